"""Passes of a model in which heads or MLPs give something else, without running again what lies below them.

In: a clean pass of a batch, and `Variant`s. Out: the outcome of each variant: its logits, or what a reader makes of its
patterns. The clean pass holds the stream before every block; variants that begin at the same layer are stacked along
the batch and start from there, the blocks below being passed over. `trial.begins_anywhere` tells whether that gives
what one plain pass with hooks gives; where it does not, each variant is such a pass.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from metaint.circuits.clean import Clean, Hook, keep_copy, logits_of, read_out
from metaint.circuits.overrides import giving, passed_over, reading
from metaint.circuits.variants import Variant, at_places, attention_changes, edit_hooks

_COPIES_FIRST = "copy batch position d_model -> (copy batch) position d_model"


def outcomes(
    clean: Clean, variants: Sequence[Variant], rows: int, anywhere: bool, preserve: bool = False
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
            yield i, whole_pass(clean, [variant], preserve)[0]
    size = max(1, rows // len(clean.tokens))
    for start, members in groups.items():
        for begin in range(0, len(members), size):
            together = members[begin : begin + size]
            yield from zip(together, _resumed(clean, [variants[i] for i in together], start, preserve), strict=True)


def read_by_mlp(
    clean: Clean, layer: int, streams: Sequence[Float[Tensor, "batch position d_model"]]
) -> list[Float[Tensor, "batch position d_model"]]:
    """What the MLP of a layer writes where the block reads each of `streams`, its attention being the clean pass's."""
    subject = clean.subject
    written: dict[int, Tensor] = {}
    attended = {head: clean.z[layer][:, :, head] for head in range(clean.z[layer].shape[2])}
    hooks = edit_hooks(clean, [Variant({layer: attended})] * len(streams), range(layer, layer + 1))
    hooks.append((f"blocks.{layer}.hook_mlp_out", partial(keep_copy, slot=written, key=layer)))
    tokens = clean.tokens.repeat(len(streams), 1)
    others = [i for i in subject.layers if i != layer]
    with passed_over(clean, others), reading(subject.model.blocks[layer], torch.cat(list(streams))):
        logits_of(subject.model, tokens, torch.zeros_like(tokens, dtype=torch.bool), hooks)
    return list(written[layer].split(len(clean.tokens)))


# ---- one pass ----------------------------------------------------------------------------------------------------


def whole_pass(clean: Clean, variants: Sequence[Variant], preserve: bool = False) -> Sequence[Tensor]:
    """The outcomes of variants in a whole pass."""
    layers = clean.subject.layers
    return _run(clean, len(variants), edit_hooks(clean, variants, layers, preserve), layers)


def _run(clean: Clean, copies: int, hooks: list[Hook], changed: range) -> Sequence[Tensor]:
    """The outcome of each copy in a pass of stacked copies, of which these layers attend otherwise than in the clean
    pass."""
    model, reader = clean.subject.model, clean.reader
    tokens = clean.tokens.repeat(copies, 1)
    places = None if clean.places is None else clean.places.repeat(copies, 1)
    if reader is None:
        logits = logits_of(model, tokens, places, hooks)
        return logits.split(len(logits) // copies)
    scores = [dict(clean.scores) for _ in range(copies)]
    logits_of(model, tokens, places, [*hooks, *reader.hooks(changed, scores)])
    return [reader.outcome(of_copy) for of_copy in scores]


def _resumed(clean: Clean, variants: Sequence[Variant], start: tuple[int, bool], preserve: bool) -> Iterable[Tensor]:
    """The outcomes of variants that all begin at `start`."""
    layer, in_attention = start
    subject, copies = clean.subject, len(variants)
    layers = subject.shape.n_layers
    stop = layers if clean.reader is None else clean.reader.last + 1
    # The block's MLP reads what attention writes, or writes something else itself. What it wrote is never taken off the
    # block's output instead: a norm may have followed, and where it wrote most of the stream, rounding is what is left.
    inside = in_attention and subject.shape.sublayers == "sequential"
    inside = inside or any(layer in variant.mlp for variant in variants)
    first = layer if inside else layer + 1
    if first == layers and subject.can_read_out:
        return _read_out_of(clean, variants, layer)
    stream = clean.streams[first].repeat(copies, 1, 1)  # always a copy: some models add to the stream in place
    change = attention_changes(clean, variants, layer)
    with ExitStack() as stack:
        if inside:
            written = rearrange(clean.attention[layer] + change, _COPIES_FIRST)
            items = clean.attention_items.get(layer, 0)
            stack.enter_context(giving(subject.model.blocks[layer].attn, written, items))
        else:
            stream += rearrange(change, _COPIES_FIRST)
        stack.enter_context(passed_over(clean, [*range(first), *range(stop, layers)]))
        stack.enter_context(reading(subject.model.blocks[min(first, layers - 1)], stream))
        silent = [] if preserve or clean.reader is not None else _silent(clean, variants, range(layer + 1, layers))
        for other in silent:
            given = partial(_attended, clean, variants, other)
            stack.enter_context(giving(subject.model.blocks[other].attn, given, clean.attention_items.get(other, 0)))
        hooks = edit_hooks(clean, variants, range(first, layers), preserve, attended=(layer, *silent))
        return _run(clean, copies, hooks, range(layer + 1, layers))


def _silent(clean: Clean, variants: Sequence[Variant], layers: range) -> list[int]:
    """The layers in which every variant replaces every head everywhere: what attention computes there is not asked."""
    heads = clean.subject.shape.n_heads
    if any(variant.at is not None for variant in variants):
        return []
    return [layer for layer in layers if all(len(variant.z.get(layer, ())) == heads for variant in variants)]


def _attended(clean: Clean, variants: Sequence[Variant], layer: int) -> Float[Tensor, "rows position d_model"]:
    """What attention gives in stacked variants, from the change of z alone."""
    return rearrange(clean.attention[layer] + attention_changes(clean, variants, layer), _COPIES_FIRST)


def _read_out_of(clean: Clean, variants: Sequence[Variant], layer: int) -> Iterable[Tensor]:
    """The logits of variants in which nothing is left to run but the unembedding."""
    change = attention_changes(clean, variants, layer, clean.places)
    return read_out(clean.subject, at_places(clean.streams[layer + 1], clean.places) + change)
