"""The parameters a model computes with: each once, by a readable name, and its place in the model.

In: a model. Out: `own_parameters`, `place_of`, and `scaled`, which multiplies parameters for a while. Bridges keep the
fused projections they were split from (`qkv` beside q, k, v; `gate_up_proj` beside gate and in), in GPT-2 and Phi-3 as
the same memory, in GPT-NeoX as a stale copy.
"""

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from metaint.errors import InputError, door
from metaint.models.describe import check_open, weight_processing
from metaint.models.protocol import Model
from metaint.models.reading import roots_of
from metaint.models.swapped import Swapped, copies_of

Select = Literal["all", "attention"] | Callable[[str, Tensor], bool]

# The projections that a fused one was split into; where those exist, the fused one is not computed with.
_FUSED = {"qkv": "q", "gate_up": "gate"}
_NORM = re.compile(r"norm|^ln|_ln$|^layernorm", re.IGNORECASE)
_ATTENTION = re.compile(r"^(attn|self_attn|attention|self_attention|self)$")
# Queries and keys, by the names of TransformerLens and of Hugging Face, and the norms that some models put on them.
_QUERY_KEY = re.compile(r"^(q|k|q_proj|k_proj|query|key|q_norm|k_norm|W_Q|W_K|_W_K|b_Q|b_K|_b_K)$")


class Place(NamedTuple):
    """Where a parameter belongs: its layer (None outside the blocks), and what it serves there."""

    layer: int | None
    kind: Literal["attention", "mlp", "norm", "embedding", "unembedding"]


def own_parameters(model: Model) -> dict[str, Tensor]:
    """The parameters that the model computes with, by name: tied ones once, fused projections by their parts alone."""
    root: Any = model
    named = dict(nn.Module.named_parameters(root))
    wrapped = getattr(model, "original_model", None)  # which a bridge keeps outside its own modules
    if isinstance(wrapped, nn.Module):
        known = {id(parameter) for parameter in named.values()}
        named.update({n: p for n, p in wrapped.named_parameters() if id(p) not in known})
    readable = {name.replace("_original_component.", ""): parameter for name, parameter in named.items()}
    own: dict[str, Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, parameter in readable.items():
        memory = (parameter.data_ptr(), parameter.shape, parameter.stride())
        if memory not in seen and not _is_stale(name, readable):
            seen.add(memory)
            own[name] = parameter
    fused = _made_of_others(own)
    return {name: parameter for name, parameter in own.items() if name not in fused}


def _made_of_others(parameters: Mapping[str, Tensor]) -> set[str]:
    """Names of parameters whose memory is that of others, each of its elements once."""
    sharing: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        sharing.setdefault(parameter.untyped_storage().data_ptr(), []).append(name)
    whole: set[str] = set()
    for names in sharing.values():
        for name in names:
            first = parameters[name].storage_offset()
            end = first + parameters[name].numel()
            others = [parameters[other] for other in names if other != name]
            inside = [other.numel() for other in others if first <= other.storage_offset() < end]
            if sum(inside) == parameters[name].numel() and len(inside) > 1:
                whole.add(name)
    return whole


def _is_stale(name: str, names: dict[str, Any]) -> bool:
    path = name.split(".")
    for i, piece in enumerate(path):
        if piece in _FUSED:
            sibling = ".".join([*path[:i], _FUSED[piece], ""])
            return any(other.startswith(sibling) for other in names)
    return False


def place_of(name: str) -> Place:
    """The place that a parameter of this name tells."""
    path = name.split(".")
    layer = next((int(after) for piece, after in pairwise(path) if piece == "blocks"), None)
    if any(_NORM.search(piece) for piece in path[:-1]):
        return Place(layer, "norm")
    if layer is None:
        unembeds = any("unembed" in piece or piece in ("mlm_head", "lm_head") for piece in path)
        return Place(None, "unembedding") if unembeds else Place(None, "embedding")
    inside = path[path.index("blocks") + 2 :]
    in_attention = any(_ATTENTION.match(piece) for piece in inside)
    return Place(layer, "attention") if in_attention else Place(layer, "mlp")


def chosen(model: Model, select: Select = "all", *, allow_folded: bool = False) -> dict[str, Tensor]:
    """The parameters that `select` names: "all", "attention" (what makes queries and keys), or a function of name and
    parameter. InputError where there are none, or where they cannot be scaled to any purpose."""
    check_open(model)
    named = own_parameters(model)
    if select == "all":
        if weight_processing(model) == "folded" and not allow_folded:
            raise InputError(
                "model has its norms folded into its weights, and scaling those scales other parameters than it was "
                "trained with: open it with raw weights, or pass allow_folded=True."
            )
        selected = named
    elif select == "attention":
        selected = {n: p for n, p in named.items() if any(_QUERY_KEY.match(piece) for piece in n.split("."))}
    elif callable(select):
        selected = {name: parameter for name, parameter in named.items() if select(name, parameter)}
    else:
        raise InputError(f'select is {select!r}: choose "all", "attention", or a function of name and parameter.')
    if not selected:
        raise InputError(f"select chose none of the model's {len(named)} parameters, such as {next(iter(named), '')}.")
    if why := quantised(model, selected):
        raise InputError(f"model has quantised weights ({why}), which cannot be scaled: open it in float32 or float64.")
    return selected


def quantised(model: Model, parameters: Mapping[str, Tensor]) -> str:
    """What tells that weights are quantised: the name of one, or the configuration; empty if they are not."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    first = next((name for name, parameter in parameters.items() if not parameter.is_floating_point()), "")
    return first or ("by its configuration" if getattr(config, "quantization_config", None) is not None else "")


@door
def scaled(model: Model, c: float, select: Select = "all", *, allow_folded: bool = False) -> Swapped:
    """Multiply parameters by `c` inside the block; afterwards they are bit for bit as before, however it ends.

    Yields the model. Do not train inside the block. An interrupt (Ctrl-C) waits while parameters change hands. Their
    memory is not written to, so that a backward pass that was built before the block works after it.

    - `select`: "all" (every parameter, as Merrill et al. 2021 do); "attention" (what makes queries and keys, so that
      scores grow as c²: weights, biases, and the gains of norms on queries and keys); or a function of a parameter's
      name and the parameter.
    - `allow_folded`: scale weights that norms were folded into all the same.

    Tied weights are multiplied once. Gemma's norms, whose gain is 1 + w, get c (1 + w). Rotary tables, ALiBi slopes and
    soft caps are no parameters and stay. What is scaled exists twice until the end.

    Raises InputError for a `c` that is not a finite number above 0, for an empty selection, for quantised weights and,
    with "all", for folded ones.

    >>> import metaint, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=1, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> before = model.W_Q.norm()
    >>> with metaint.scaled(model, 2.0):
    ...     torch.equal(model.W_Q.norm(), 2 * before)
    True
    """
    if not 0 < c < float("inf"):
        raise InputError(f"c is {c}: give a finite number above 0.")
    parameters = chosen(model, select, allow_folded=allow_folded)
    offset = bool(getattr(model.cfg, "rmsnorm_uses_offset", False))
    pairs = [] if c == 1 else copies_of(parameters, _all_parameters(model))
    copies = {id(parameter): copy for parameter, copy in pairs}
    with torch.no_grad():
        for name, parameter in parameters.items() if pairs else ():
            shift = 1.0 if offset and place_of(name).kind == "norm" else 0.0
            copies[id(parameter)].add_(shift).mul_(c).sub_(shift)
    return Swapped(pairs, model)


def check_finite(model: Model) -> None:
    """InputError, which names it, for a parameter with NaN or infinity: its norm and spectrum are no numbers."""
    for name, parameter in own_parameters(model).items():
        if parameter.is_floating_point() and not bool(parameter.detach().isfinite().all()):
            raise InputError(f"model has NaN or infinity in {name}: its weights cannot be measured, so open it anew.")


def _all_parameters(model: Model) -> dict[str, Tensor]:
    """Every parameter of a model and of the model that it wraps, by a name of its own."""
    return {
        f"{prefix}{name}": parameter
        for prefix, root in roots_of(model).items()
        for name, parameter in nn.Module.named_parameters(root, remove_duplicate=False)
    }
