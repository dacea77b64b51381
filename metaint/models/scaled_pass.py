"""One forward pass with all parameters multiplied: what its stream, writes, scores and logits are at some positions.

In: a model, a factor, tokens. Out: `ScaledPass`; or, for the published script's mask, a `PublishedPass`. Overflow is an
ActivationError that names hook and factor.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaint.errors import ActivationError
from metaint.measures import norms, saturation
from metaint.models.describe import is_causal
from metaint.models.heads import repeat_heads
from metaint.models.invariants import pattern_hook, scores_of
from metaint.models.parameters import scaled
from metaint.models.protocol import Model

_WRITES = {"hook_attn_out": "attn_write", "hook_mlp_out": "mlp_write"}


class Batch(NamedTuple):
    """Sequences, which of their tokens are real, and the positions looked at (where `sampled`)."""

    tokens: Int[Tensor, "batch position"]
    mask: Bool[Tensor, "batch position"] | None
    index: Int[Tensor, "batch sample"]
    sampled: Bool[Tensor, "batch sample"]

    @property
    def real(self) -> Bool[Tensor, "batch position"]:
        return torch.ones_like(self.tokens, dtype=torch.bool) if self.mask is None else self.mask.bool()

    @property
    def padding(self) -> dict[str, Tensor]:
        return {} if self.mask is None else {"attention_mask": self.mask}

    def pick(self, values: Tensor) -> Tensor:
        """The rows of [batch, position, *rest] at the sampled positions."""
        return values[torch.arange(len(values), device=values.device)[:, None], self.index.to(values.device)]


class ScaledPass(NamedTuple):
    """The stream after each block, logarithms of lengths by activation, and logits, all at the sampled positions."""

    stream: Float[Tensor, "layer batch sample d_model"]
    log_norms: dict[str, Float[Tensor, "layer batch sample"]]
    logits: Float[Tensor, "batch sample vocab"]


class PublishedPass(NamedTuple):
    """The stream after each block at every position, and each head's sums of n, n², n > 1 and 1 over queries, n the
    positions it attends to."""

    stream: Float[Tensor, "layer batch position d_model"]
    counts: Float[Tensor, "statistic layer head"]


def scaled_pass(
    model: Model, c: float, batch: Batch, *, writes: bool, score_names: Sequence[str], allow_folded: bool = False
) -> ScaledPass:
    """The model's own pass with all parameters times c. `writes`: read what sublayers add; `score_names`: the hooks on
    queries and keys as they enter the scores, if they are known."""
    layers, hook_points = range(int(model.cfg.n_layers)), model.hook_dict
    streams: dict[int, Tensor] = {}
    logs: dict[str, dict[int, Tensor]] = {}
    held: dict[str, Tensor] = {}

    def stream(x: Tensor, hook: Any, layer: int) -> None:
        streams[layer] = batch.pick(x.detach()).double()

    def length(x: Tensor, hook: Any, name: str, layer: int) -> None:
        logs.setdefault(name, {})[layer] = _log(norms.norm(batch.pick(x.detach()).double()))

    def scores(x: Tensor, hook: Any, name: str, layer: int) -> None:
        held[name] = x.detach()
        if len(held) == 2:
            query, key = (held.pop(name) for name in score_names)
            logs.setdefault("score", {})[layer] = _score_length(model, layer, query, key, batch)

    hooks: list[tuple[str, Callable[..., Any]]] = [
        ("blocks.0.hook_resid_pre", partial(length, name="embedding", layer=0))
    ]
    for layer in layers:
        block = f"blocks.{layer}"
        hooks.append((f"{block}.hook_resid_post", partial(stream, layer=layer)))
        if writes:
            for name, written in _WRITES.items():
                if f"{block}.{name}" in hook_points:
                    hooks.append((f"{block}.{name}", partial(length, name=written, layer=layer)))
        hooks += [(f"{block}.attn.{name}", partial(scores, name=name, layer=layer)) for name in score_names]
    output = _run(model, c, batch, hooks, allow_folded)
    together = torch.stack([streams[layer] for layer in layers])
    logs["stream"] = dict(enumerate(_log(norms.norm(together))))
    log_norms = {name: torch.stack([by_layer[layer] for layer in sorted(by_layer)]) for name, by_layer in logs.items()}
    return ScaledPass(together, log_norms, batch.pick(output))


def published_pass(
    model: Model, c: float, batch: Batch, score_names: Sequence[str], *, multiply: bool, allow_folded: bool = False
) -> PublishedPass:
    """A pass with all parameters times c whose attention has the published script's mask (or, without `multiply`, the
    model's own), counting at each query the keys with a weight above 1e-5."""
    streams: dict[int, Tensor] = {}
    counts: dict[int, Tensor] = {}
    held: dict[str, Tensor] = {}

    def hold(x: Tensor, hook: Any, name: str) -> None:
        held[name] = x.detach()

    def count(pattern: Tensor, hook: Any, layer: int) -> None:
        n = saturation.attended(pattern.detach().double())
        rows = n.new_tensor(n.shape[0] * n.shape[2]).expand(n.shape[1])
        counts[layer] = torch.stack([n.sum((0, 2)), n.square().sum((0, 2)), (n > 1).double().sum((0, 2)), rows])

    def attend(z: Tensor, hook: Any, layer: int) -> Tensor:
        query, key = (held.pop(name) for name in score_names)
        pattern = saturation.published_pattern(scores_of(model, layer, query, key))
        count(pattern, None, layer)
        value = repeat_heads(held.pop("hook_v"), pattern.shape[1], 2)
        mixed = einsum(pattern, value, "batch head query key, batch key head d_head -> batch query head d_head")
        return mixed.reshape(z.shape).to(z.dtype)

    def stream(x: Tensor, hook: Any, layer: int) -> None:
        streams[layer] = x.detach().double()

    hooks: list[tuple[str, Callable[..., Any]]] = []
    for layer in range(int(model.cfg.n_layers)):
        attention = f"blocks.{layer}.attn"
        if multiply:
            hooks += [(f"{attention}.{name}", partial(hold, name=name)) for name in (*score_names, "hook_v")]
            hooks.append((f"{attention}.hook_z", partial(attend, layer=layer)))
        else:
            hooks.append((pattern_hook(layer), partial(count, layer=layer)))
        hooks.append((f"blocks.{layer}.hook_resid_post", partial(stream, layer=layer)))
    _run(model, c, batch, hooks, allow_folded, patterns=not multiply)
    return PublishedPass(
        torch.stack([streams[layer] for layer in sorted(streams)]),
        torch.stack([counts[layer] for layer in sorted(counts)], 1),
    )


def _run(
    model: Model, c: float, batch: Batch, hooks: list[tuple[str, Any]], allow_folded: bool, patterns: bool = True
) -> Tensor:
    """The logits of a pass at c, with these hooks, and with everything that is read checked for overflow."""
    layers = range(int(model.cfg.n_layers))
    watched = [name for name in model.hook_dict if name.endswith("hook_scale")]
    watched += [f"blocks.{layer}.hook_resid_post" for layer in layers]
    watched += [pattern_hook(layer) for layer in layers] if patterns else []
    checks = [(name, partial(_check, name=name, c=c, real=batch.real)) for name in watched]
    with scaled(model, c, allow_folded=allow_folded), model.hooks(fwd_hooks=[*checks, *hooks]):
        output = model(batch.tokens, return_type="logits", **batch.padding)
    return output.detach()


def _check(x: Tensor, hook: Any, name: str, c: float, real: Bool[Tensor, "batch position"]) -> None:
    """Raises ActivationError for NaN or infinity at real tokens, and for rows of a pattern that came to nothing."""
    if name.endswith("hook_pattern"):  # HookedTransformer makes zeros of a row of NaN
        fine = (x.detach().sum(-1) > 0.5).transpose(1, 2)[real.to(x.device)].all()
    elif x.shape[:2] == real.shape:
        fine = x.detach()[real.to(x.device)].isfinite().all()
    else:
        fine = x.detach().isfinite().all()
    if not bool(fine):
        kind = str(x.dtype).removeprefix("torch.")
        wider = "" if x.dtype == torch.float64 else ", or open the model in float64"
        raise ActivationError(
            f"{name} holds NaN or infinity with all parameters times {c:g}: {kind} overflows there or before, so use "
            f"smaller scales{wider}."
        )


def _score_length(model: Model, layer: int, query: Tensor, key: Tensor, batch: Batch) -> Float[Tensor, "batch sample"]:
    """Logarithm of the length of a query's scores, over heads and the keys it may see."""
    scores = scores_of(model, layer, batch.pick(query).double(), key.double())
    seen = rearrange(batch.real, "batch key -> batch 1 key").to(scores.device)
    if is_causal(model):
        keys = torch.arange(scores.shape[-1], device=scores.device)
        seen = seen & (keys <= batch.index.to(scores.device)[..., None])
    return _log((scores.square() * seen[:, None]).sum((1, 3)).sqrt())


def _log(lengths: Tensor) -> Tensor:
    return lengths.clamp(min=torch.finfo(torch.float64).tiny).log()
