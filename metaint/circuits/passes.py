"""Passes of a model in which heads or MLPs give something else, without running again what lies below them.

In: a model, a batch, and `Variant`s, which say what stands at hook_z of heads or is written by MLPs. Out: the outcome
of each variant: its logits, or what a reader makes of its patterns. A clean pass keeps the stream before every block;
variants that begin at the same layer are stacked along the batch and start from there, the blocks below being passed
over. `trial.begins_anywhere` tells whether that gives what one plain pass with hooks gives; where it doesn't, each
variant is such a pass.

Blocks are passed over by giving their module another `forward` for the time of a pass. TransformerLens's own
`start_at_layer` does not exist before 4.0 on bridges, and in 4.3 computes the blocks below all the same.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from metaint.circuits.clean import (
    Clean,
    Hook,
    first_input,
    keep,
    keep_copy,
    logits_of,
    output_weights,
    read_out,
)
from metaint.models.audit import holds
from metaint.models.describe import sublayers_of
from metaint.models.heads import repeat_heads
from metaint.models.invariants import bias_of


class Variant(NamedTuple):
    """What replaces hook_z of some heads, by layer and head, and what some MLPs write, by layer.

    Each tensor is [batch, position, width], or broadcasts to it; with `at` it counts where that is True alone.
    """

    z: Mapping[int, Mapping[int, Tensor]] = {}
    mlp: Mapping[int, Tensor] = {}
    at: Bool[Tensor, " position"] | None = None

    @property
    def start(self) -> tuple[int, bool]:
        """The first layer where something is replaced, and whether that is in attention."""
        layer = min([*self.z, *self.mlp])
        return layer, layer in self.z


def outcomes(
    model: Any, clean: Clean, variants: Sequence[Variant], rows: int, anywhere: bool, preserve: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """The number of each variant and its outcome, as `Clean.outcome`, in any order.

    Where a reader looks at no layer above what is changed, that is the clean pass's own. At most `rows` sequences are
    run at once, copies counted. `anywhere`: begin where variants begin. With `preserve`, layers after the first that is
    changed attend as in the clean pass (Olsson et al. 2022).
    """
    groups: dict[tuple[int, bool], list[int]] = {}
    for i, variant in enumerate(variants):
        if clean.reader is not None and variant.start[0] >= clean.reader.last:
            yield i, clean.outcome
        elif anywhere:
            groups.setdefault(variant.start, []).append(i)
        else:
            yield i, whole_pass(model, clean, [variant], preserve)[0]
    size = max(1, rows // len(clean.tokens))
    for start, members in groups.items():
        for begin in range(0, len(members), size):
            some = members[begin : begin + size]
            yield from zip(some, _resumed(model, clean, [variants[i] for i in some], start, preserve), strict=True)


def read_by_mlp(
    model: Any, clean: Clean, layer: int, streams: Sequence[Float[Tensor, "batch position d_model"]]
) -> list[Float[Tensor, "batch position d_model"]]:
    """What the MLP of a layer writes where the block reads each of `streams`, its attention being the clean pass's."""
    written: dict[int, Tensor] = {}
    held = {head: clean.z[layer][:, :, head] for head in range(clean.z[layer].shape[2])}
    hooks = _hooks(clean, [Variant({layer: held})] * len(streams), range(layer, layer + 1))
    hooks.append((f"blocks.{layer}.hook_mlp_out", partial(keep_copy, slot=written, key=layer)))
    tokens = clean.tokens.repeat(len(streams), 1)
    others = [i for i in range(len(model.blocks)) if i != layer]
    with _passed_over(model, clean, others), _reading(model.blocks[layer], torch.cat(list(streams))):
        logits_of(model, tokens, torch.zeros_like(tokens, dtype=torch.bool), hooks)
    return list(written[layer].split(len(clean.tokens)))


# ---- one pass ----------------------------------------------------------------------------------------------------


def whole_pass(model: Any, clean: Clean, variants: Sequence[Variant], preserve: bool = False) -> Sequence[Tensor]:
    """The outcomes of variants in a whole pass."""
    layers = range(int(model.cfg.n_layers))
    return _run(model, clean, len(variants), _hooks(clean, variants, layers, preserve), layers)


def _run(model: Any, clean: Clean, copies: int, hooks: list[Hook], changed: range) -> Sequence[Tensor]:
    """The outcome of each copy in a pass of stacked copies, of which these layers attend otherwise than in the clean
    pass."""
    tokens, reader = clean.tokens.repeat(copies, 1), clean.reader
    places = None if clean.places is None else clean.places.repeat(copies, 1)
    scores = [dict(clean.scores) for _ in range(copies)]
    logits = logits_of(model, tokens, places, hooks if reader is None else [*hooks, *reader.hooks(changed, scores)])
    return logits.split(len(logits) // copies) if reader is None else [reader.outcome(some) for some in scores]


def _resumed(
    model: Any, clean: Clean, variants: Sequence[Variant], start: tuple[int, bool], preserve: bool
) -> Iterable[Tensor]:
    """The outcomes of variants that all begin at `start`."""
    layer, in_attention = start
    copies, layers = len(variants), int(model.cfg.n_layers)
    stop = layers if clean.reader is None else clean.reader.last + 1
    # The block's MLP reads what attention writes, or writes something else itself. What it wrote is never taken off the
    # block's output instead: a norm may have followed, and where it wrote most of the stream, rounding is what is left.
    inside = in_attention and sublayers_of(model) == "sequential"
    inside = inside or any(layer in variant.mlp for variant in variants)
    first = layer if inside else layer + 1
    if first == layers and holds(model, "unembedding"):
        return _read_out_of(model, clean, variants, layer)
    stream = clean.streams[first].repeat(copies, 1, 1)
    with ExitStack() as stack:
        if inside:
            written = clean.attention[layer] + _attention_change(model, clean, variants, layer)
            stack.enter_context(_giving(model.blocks[layer].attn, written.flatten(0, 1), clean.shapes[layer][1]))
        else:
            stream += _attention_change(model, clean, variants, layer).flatten(0, 1)
        stack.enter_context(_passed_over(model, clean, [*range(first), *range(stop, layers)]))
        stack.enter_context(_reading(model.blocks[min(first, layers - 1)], stream))
        hooks = _hooks(clean, variants, range(first, layers), preserve, attended=layer)
        return _run(model, clean, copies, hooks, range(layer + 1, layers))


def _read_out_of(model: Any, clean: Clean, variants: Sequence[Variant], layer: int) -> Iterable[Tensor]:
    """The logits of variants in which nothing is left to run but the unembedding."""
    change = _attention_change(model, clean, variants, layer, clean.places)
    stream = clean.streams[layer + 1]
    return read_out(model, (stream if clean.places is None else stream[clean.places]) + change)


def _attention_change(
    model: Any, clean: Clean, variants: Sequence[Variant], layer: int, places: Tensor | None = None
) -> Float[Tensor, "variant *rest d_model"]:
    """What is added to what attention gives in each variant: the change of z through W_O."""
    weight, z, same = output_weights(model, layer), clean.z[layer], _at(clean.attention[layer], places)

    def written(heads: list[int]) -> Tensor:
        return _at(z if len(heads) == len(weight) else z[:, :, heads], places).flatten(-2) @ weight[heads].flatten(0, 1)

    changes = []
    for variant in variants:
        heads = variant.z.get(layer, {})
        left = [head for head in range(len(weight)) if head not in heads]
        change = torch.zeros_like(same)
        if heads and len(left) < len(heads):  # from what stays, which is less than what goes
            change = bias_of(model, "b_O", layer, same[None]).to(same) - same
            change = change + written(left) if left else change
        elif heads:
            change = -written(list(heads))
        for head, new in heads.items():
            new = new.to(weight.dtype)
            # A zero or a mean is one row, not one for each position.
            rows = new.expand(weight.shape[1]) if new.ndim < 2 else _at(new.expand_as(z[:, :, head]), places)
            change = change + rows @ weight[head] if new.ndim or bool(new) else change
        if variant.at is not None:
            change = change * _at(variant.at.expand(z.shape[:2]), places)[..., None]
        changes.append(change)
    return torch.stack(changes) if len(changes) > 1 else changes[0][None]


def _at(values: Tensor, places: Tensor | None) -> Tensor:
    return values if places is None else values[places]


def _hooks(
    clean: Clean, variants: Sequence[Variant], layers: range, preserve: bool = False, attended: int = -1
) -> list[Hook]:
    """Hooks for the edits of stacked variants that begin together; what attention gives in `attended` is replaced
    already."""
    found: list[Hook] = []
    for layer in layers:
        kept = preserve and all(variant.start[0] < layer for variant in variants)
        edits = [(i, head, new, v.at) for i, v in enumerate(variants) for head, new in v.z.get(layer, {}).items()]
        held: dict[int, Tensor] = {}
        if kept:
            found.append((f"blocks.{layer}.attn.hook_v", partial(keep, slot=held, key=layer)))
        if layer != attended and (kept or edits):
            name = f"blocks.{layer}.attn.hook_z"
            found.append((name, partial(_edit_z, clean=clean, layer=layer, held=held, edits=edits, preserve=kept)))
        writes = [(i, v.mlp[layer], v.at) for i, v in enumerate(variants) if layer in v.mlp]
        if writes:
            found.append((f"blocks.{layer}.hook_mlp_out", partial(_edit_mlp, batch=len(clean.tokens), edits=writes)))
    return found


def _edit_z(
    z: Tensor, hook: Any, clean: Clean, layer: int, held: dict[int, Tensor], edits: list[Any], preserve: bool
) -> Tensor:
    batch = len(clean.tokens)
    new = z.clone()
    if preserve:
        pattern = clean.patterns[layer].to(z.dtype)
        value = repeat_heads(held.pop(layer), pattern.shape[1], 2)
        mixed = torch.einsum("bhqk,cbkhd->cbqhd", pattern, value.unflatten(0, (-1, batch)))
        new = mixed.flatten(0, 1).reshape(z.shape).clone()
    for i, head, value, at in edits:
        _put(new[i * batch : (i + 1) * batch, :, head], value, at)
    return new


def _edit_mlp(written: Tensor, hook: Any, batch: int, edits: list[Any]) -> Tensor:
    new = written.clone()
    for i, value, at in edits:
        _put(new[i * batch : (i + 1) * batch], value, at)
    return new


def _put(part: Float[Tensor, "batch position width"], value: Tensor, at: Bool[Tensor, " position"] | None) -> None:
    """Write a value into a part of an activation, at these positions or everywhere."""
    value = value.to(part.dtype)
    part[:] = value if at is None else torch.where(at[:, None], value, part)


@contextmanager
def _passed_over(model: Any, clean: Clean, layers: Iterable[int]) -> Iterator[None]:
    """Blocks that give what they are given."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_giving(model.blocks[layer], None, clean.shapes[layer][0]))
        yield


@contextmanager
def _giving(module: nn.Module, value: Tensor | None, items: int) -> Iterator[None]:
    """A module that computes nothing and gives `value`, or None for its first input, in the form it gives."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = first_input(args, kwargs)[1] if value is None else value
        return (found, *[None] * (items - 1)) if items else found

    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


@contextmanager
def _reading(block: nn.Module, stream: Tensor) -> Iterator[None]:
    """A block that reads this stream, whatever it is given."""

    def replace(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        name, _ = first_input(args, kwargs)
        return ((stream, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: stream})

    handle = block.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
