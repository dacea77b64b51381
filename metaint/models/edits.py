"""Whether edits at hooks take effect: in every layer, and at hook_z for one head and nothing else.

In: a model and a hook. Out: for each layer how far an edit there changes the logits, the noise beside it, whether what
attention writes changed by what the edited head writes, and the layers where an edit rightly changes nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaint.models.describe import attending_layers, by_layer
from metaint.models.heads import by_head
from metaint.models.protocol import Model
from metaint.models.reading import Edit, logits_after, random_tokens, tolerance, widen

# What attention writes, before anything that a block does with it; the first of these that fires.
_WRITTEN = ("attn.o.hook_out", "attn.hook_out")

Other = Callable[[Tensor], Tensor]


class Effects(NamedTuple):
    """What edits did: `logits[layer]` and their `noise`, and the layer whose attention wrote something else than the
    edited head does, with how much else, or None; `silent` layers write exactly 0 whatever stands at the hook."""

    logits: list[float]
    noise: float
    astray: tuple[int, float] | None
    silent: frozenset[int]


def effects_of(model: Model, hook: str, length: int) -> Effects:
    """Edit each layer in a row of its own, all rows being the same tokens; the last row tells the noise.

    So one forward pass tells for each layer whether an edit there reaches the logits. Raises Unavailable, naming the
    hook, if it is not there or never fires.
    """
    n_layers, short = int(model.cfg.n_layers), hook.removeprefix("attn.")
    tokens = random_tokens(model, 1, length).repeat(n_layers + 2, 1)
    change = _other_pattern if short == "hook_pattern" else _other_values
    seen: dict[str, Tensor] = {}
    edits: dict[str, Edit] = {}
    inside = hook.startswith("attn.")
    writers = _writers(model) if inside else {}
    for layer in attending_layers(model) if inside else range(n_layers):
        whole = partial(_edit_row, change, layer + 1)
        head = partial(_edit_head, layer + 1, _edited_head(model, writers, layer), int(model.cfg.n_heads), layer, seen)
        edits[f"blocks.{layer}.{hook}"] = head if short == "hook_z" else whole
    watched = _writings(model, n_layers, seen) if short == "hook_z" else {}
    if short == "hook_pattern":
        watched = {f"blocks.{layer}.attn.hook_v": partial(_keep_values, layer, seen) for layer in writers}
        watched = {name: reader for name, reader in watched.items() if name in model.hook_dict}
    logits = widen(logits_after(model, tokens, edits, watched))
    effects = (logits[1:] - logits[:1]).abs().flatten(1).amax(1).tolist()
    noise = max(10 * effects.pop(), torch.finfo(logits.dtype).eps * float(logits[0].abs().max()))
    silent = {layer for layer, heads in writers.items() if not heads}
    silent |= {layer for layer in writers if f"v{layer}" in seen and not bool(seen[f"v{layer}"].any())}
    astray = _astray(model, writers, seen) if short == "hook_z" else None
    return Effects(effects, noise, astray, frozenset(silent))


def _writers(model: Model) -> dict[int, list[int]]:
    """The heads of each layer whose W_O is not 0 throughout; nothing of a model without W_O for each head."""
    try:
        weights = by_layer(model, "W_O")
    except Exception:  # AttributeError or NotImplementedError, by architecture and version
        return {}
    heads = int(model.cfg.n_heads)
    some = {layer: weight.detach().flatten(1).any(1) for layer, weight in weights.items() if len(weight) == heads}
    return {layer: writes.nonzero().flatten().tolist() for layer, writes in some.items()}


def _edited_head(model: Model, writers: Mapping[int, Sequence[int]], layer: int) -> int:
    """Another head in each layer, and one that writes something where it is known which do."""
    heads = writers.get(layer) or range(int(model.cfg.n_heads))
    return heads[layer % len(heads)]


def _writings(model: Model, n_layers: int, seen: dict[str, Tensor]) -> dict[str, Callable[[Tensor], None]]:
    """Readers of what attention writes in the row that is edited and in the first, for the layers that tell of it."""
    points, readers = model.hook_dict, {}
    for layer in range(n_layers):
        name = next((f"blocks.{layer}.{hook}" for hook in _WRITTEN if f"blocks.{layer}.{hook}" in points), None)
        if name is not None:
            readers[name] = partial(_keep_rows, layer, seen)
    return readers


def _keep_rows(layer: int, seen: dict[str, Tensor], activation: Any) -> None:
    if isinstance(activation, Tensor):
        seen[f"out{layer}"] = widen(activation[[0, layer + 1]].detach())


def _keep_values(layer: int, seen: dict[str, Tensor], value: Tensor) -> None:
    seen[f"v{layer}"] = value.detach()


def _astray(model: Model, writers: Mapping[int, Sequence[int]], seen: dict[str, Tensor]) -> tuple[int, float] | None:
    """The layer where attention's output did not change by what the edited head writes; None where none did, or where
    the model does not tell: without W_O for each head, or without a hook on that output."""
    weights = by_layer(model, "W_O") if writers else {}  # which a bridge makes anew at each call
    for layer in weights:
        change, written = seen.get(f"z{layer}"), seen.get(f"out{layer}")
        output = widen(weights[layer][_edited_head(model, writers, layer)].detach())
        if change is None or written is None or change.shape[-1] != len(output):
            continue
        expected = change @ output
        difference = float((written[1] - written[0] - expected).abs().max())
        magnitude = float(written.abs().max() + expected.abs().max())  # rounding scales with what all heads write
        if not difference <= tolerance(weights[layer].dtype) * magnitude:
            return layer, difference
    return None


def _edit_row(change: Other, row: int, activation: Tensor) -> Tensor:
    edited = activation.clone()
    edited[row] = change(activation[row])
    return edited


def _edit_head(row: int, head: int, n_heads: int, layer: int, seen: dict[str, Tensor], z: Tensor) -> Tensor:
    """Another z for one head of one row, however the hook divides what heads give."""
    edited = by_head(z.clone(), n_heads)
    edited[row, :, head] = _other_values(edited[row, :, head])
    seen[f"z{layer}"] = widen(edited[row, :, head]) - widen(by_head(z, n_heads)[0, :, head])
    return edited.reshape(z.shape)


def _other_pattern(pattern: Tensor) -> Tensor:
    """A pattern [head, query, key] of random weights, on earlier keys alone so that any mask allows it."""
    weights = torch.rand(pattern.shape, generator=torch.Generator().manual_seed(1)).add(0.01).tril()
    return (weights / weights.sum(-1, keepdim=True)).to(pattern)


def _other_values(values: Tensor) -> Tensor:
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).to(values)
    return values + noise * (values.std() if float(values.std()) > 0 else 1.0)
