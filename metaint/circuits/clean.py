"""One pass of a model as it is, and what a pass that begins in the middle takes from it.

In: a model and a batch. Out: `Clean`, with the stream before every block, hook_z and what attention gives; and logits
at chosen positions, made nowhere else.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaint.circuits.scan_metrics import Reader
from metaint.models.reading import widen
from metaint.models.readout import readout_of

Hook = tuple[str, Callable[..., Any]]


@dataclass
class Clean:
    """One batch as the model runs it, and what a pass that begins in the middle takes from it.

    `streams` are what each block reads and what the last one gives; `logits` are those of `places`, [row, vocab], or of
    all positions. `patterns` are there where later layers are to attend as in this pass. Where a metric is read from
    patterns, by `reader`, `scores` are what it read in each layer.
    """

    tokens: Int[Tensor, "batch position"]
    places: Bool[Tensor, "batch position"] | None
    streams: dict[int, Float[Tensor, "batch position d_model"]] = field(default_factory=dict)
    z: dict[int, Float[Tensor, "batch position head d_head"]] = field(default_factory=dict)
    attention: dict[int, Float[Tensor, "batch position d_model"]] = field(default_factory=dict)
    mlp: dict[int, Float[Tensor, "batch position d_model"]] = field(default_factory=dict)
    patterns: dict[int, Float[Tensor, "batch head query key"]] = field(default_factory=dict)
    read: dict[str, Tensor] = field(default_factory=dict)
    # How many values a block and its attention give, 0 for a tensor that is no tuple.
    shapes: dict[int, tuple[int, int]] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    reader: Reader | None = None
    scores: dict[int, Float[Tensor, "batch head"]] = field(default_factory=dict)

    @property
    def outcome(self) -> Tensor:
        """What a metric is made of: the logits, or what a reader makes of scores."""
        return self.logits if self.reader is None else self.reader.outcome(self.scores)


def clean_pass(
    model: Any,
    tokens: Int[Tensor, "batch position"],
    places: Bool[Tensor, "batch position"] | None,
    *,
    mlps: bool = False,
    patterns: bool = False,
    also: Sequence[str] = (),
    reader: Reader | None = None,
) -> Clean:
    """The model's own pass; with `mlps` what MLPs write, with `patterns` the patterns, and hooks named in `also`."""
    found = Clean(tokens, places, reader=reader)
    kept = {"attn.hook_z": found.z}
    kept |= {"hook_mlp_out": found.mlp} if mlps else {}
    kept |= {"attn.hook_pattern": found.patterns} if patterns else {}
    hooks = [
        (f"blocks.{layer}.{name}", partial(keep_copy if slot is found.mlp else keep, slot=slot, key=layer))
        for layer in range(int(model.cfg.n_layers))
        for name, slot in kept.items()
    ]
    hooks += [(name, partial(keep, slot=found.read, key=name)) for name in also]
    if reader is not None:
        hooks += reader.hooks(range(len(model.blocks)), [found.scores])
    with ExitStack() as stack:
        for layer, block in enumerate(model.blocks):
            stack.callback(block.register_forward_pre_hook(partial(_keep_input, found, layer), with_kwargs=True).remove)
            last = layer == len(model.blocks) - 1
            stack.callback(block.register_forward_hook(partial(_keep_output, found, layer, last)).remove)
            if hasattr(block, "attn"):
                stack.callback(block.attn.register_forward_hook(partial(_keep_attention, found, layer)).remove)
        found.logits = logits_of(model, tokens, places, hooks)
    return found


def logits_of(model: Any, tokens: Tensor, places: Tensor | None, hooks: list[Hook]) -> Tensor:
    """The logits [row, vocab] of these places, no others being made where the model has an unembedding to hook; without
    places all of them, [batch, position, vocab]."""
    gathered = False

    def gather(module: Any, args: tuple) -> tuple | None:
        nonlocal gathered
        if places is None or not args or args[0].shape[:2] != places.shape:
            return None
        gathered = True
        return (args[0][places][None], *args[1:])

    unembed = getattr(model, "unembed", None)
    with ExitStack() as stack:
        if unembed is not None:
            stack.callback(unembed.register_forward_pre_hook(gather).remove)
        stack.enter_context(model.hooks(fwd_hooks=hooks))
        output = model(tokens)
    output = getattr(output, "logits", output)
    logits = output[0] if isinstance(output, tuple) else output
    if places is None:
        return logits
    return logits[0] if gathered else logits[places]


def read_out(model: Any, streams: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest vocab"]:
    """The logits of last streams, in at least float32, as the audit's `unembedding` has it."""
    return readout_of(model).logits(widen(streams).flatten(0, -2)).unflatten(0, streams.shape[:-1])


def output_weights(model: Any, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """W_O of a layer: the module's own where it has one, since a bridge makes the stack of all layers anew."""
    own = getattr(model.blocks[layer].attn, "W_O", None)
    return (own if isinstance(own, Tensor) and own.ndim == 3 else model.W_O[layer]).detach()


def first_input(args: tuple, kwargs: dict) -> tuple[str | None, Any]:
    """What a block is given to read, and its name where it is given by one."""
    if args:
        return None, args[0]
    return next(iter(kwargs.items()))


def keep(activation: Tensor, hook: Any, slot: dict, key: Any) -> None:
    slot[key] = activation.detach()


def keep_copy(activation: Tensor, hook: Any, slot: dict, key: Any) -> None:
    slot[key] = activation.detach().clone()  # some models add to the stream, or to what is added, in place


def _keep_input(clean: Clean, layer: int, block: Any, args: tuple, kwargs: dict) -> None:
    clean.streams[layer] = first_input(args, kwargs)[1].detach().clone()


def _keep_output(clean: Clean, layer: int, last: bool, block: Any, args: tuple, output: Any) -> None:
    first, items = _unpacked(output)
    clean.shapes[layer] = (items, clean.shapes.get(layer, (0, 0))[1])
    if last:  # what any other gives, the next one reads
        clean.streams[layer + 1] = first.detach().clone()


def _keep_attention(clean: Clean, layer: int, attention: Any, args: tuple, output: Any) -> None:
    first, items = _unpacked(output)
    clean.shapes[layer] = (0, items)
    clean.attention[layer] = first.detach().clone()


def _unpacked(output: Any) -> tuple[Tensor, int]:
    return (output[0], len(output)) if isinstance(output, tuple) else (output, 0)
