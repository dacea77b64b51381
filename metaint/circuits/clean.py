"""One pass of a model as it is, and what a pass that begins in the middle takes from it.

In: a subject and a batch. Out: `Clean`, with the stream before every block, hook_z and what attention gives; and logits
at chosen positions, made nowhere else.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaint.circuits.scan_metrics import Reader
from metaint.circuits.subject import Subject
from metaint.models.heads import by_head
from metaint.models.protocol import Model
from metaint.models.reading import widen

Hook = tuple[str, Callable[..., Any]]


@dataclass
class Clean:
    """One batch as the model runs it, and what a pass that begins in the middle takes from it.

    `streams` are what each block reads and what the last one gives; `logits` are those of `places`, [row, vocab], or of
    all positions. `patterns` are there where later layers are to attend as in this pass. Where a metric is read from
    patterns, by `reader`, `scores` are what it read in each layer.
    """

    subject: Subject
    tokens: Int[Tensor, "batch position"]
    places: Bool[Tensor, "batch position"] | None
    streams: dict[int, Float[Tensor, "batch position d_model"]] = field(default_factory=dict)
    z: dict[int, Float[Tensor, "batch position head d_head"]] = field(default_factory=dict)
    attention: dict[int, Float[Tensor, "batch position d_model"]] = field(default_factory=dict)
    mlp: dict[int, Float[Tensor, "batch position d_model"]] = field(default_factory=dict)
    patterns: dict[int, Float[Tensor, "batch head query key"]] = field(default_factory=dict)
    read: dict[str, Tensor] = field(default_factory=dict)
    # How many values a block and its attention give, 0 for a tensor that is no tuple.
    block_items: dict[int, int] = field(default_factory=dict)
    attention_items: dict[int, int] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    reader: Reader | None = None
    scores: dict[int, Float[Tensor, "batch head"]] = field(default_factory=dict)

    @property
    def outcome(self) -> Tensor:
        """What a metric is made of: the logits, or what a reader makes of scores."""
        return self.logits if self.reader is None else self.reader.outcome(self.scores)


def clean_pass(
    subject: Subject,
    tokens: Int[Tensor, "batch position"],
    places: Bool[Tensor, "batch position"] | None,
    *,
    mlps: bool = False,
    patterns: bool = False,
    also: Sequence[str] = (),
    reader: Reader | None = None,
) -> Clean:
    """The model's own pass; with `mlps` what MLPs write, with `patterns` the patterns, and hooks named in `also`."""
    clean = Clean(subject, tokens, places, reader=reader)
    hooks: list[Hook] = []
    for layer in subject.layers:
        attends = layer in subject.shape.attending
        if attends:
            hooks.append((f"blocks.{layer}.attn.hook_z", partial(_keep_heads, clean=clean, layer=layer)))
        if mlps:
            hooks.append((f"blocks.{layer}.hook_mlp_out", partial(keep_copy, slot=clean.mlp, key=layer)))
        if patterns and attends:
            hooks.append((f"blocks.{layer}.attn.hook_pattern", partial(keep, slot=clean.patterns, key=layer)))
    hooks += [(name, partial(keep, slot=clean.read, key=name)) for name in also]
    if reader is not None:
        hooks += reader.hooks(subject.layers, [clean.scores])
    with ExitStack() as stack:
        for layer, block in enumerate(subject.model.blocks):
            keep_input, keep_output = partial(_keep_input, clean, layer), partial(_keep_output, clean, layer)
            stack.callback(block.register_forward_pre_hook(keep_input, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(keep_output).remove)
            if hasattr(block, "attn"):
                stack.callback(block.attn.register_forward_hook(partial(_keep_attention, clean, layer)).remove)
        clean.logits = logits_of(subject.model, tokens, places, hooks)
    return clean


def logits_of(model: Model, tokens: Tensor, places: Tensor | None, hooks: list[Hook]) -> Tensor:
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


def read_out(subject: Subject, streams: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest vocab"]:
    """The logits of last streams, in at least float32, as the audit's `unembedding` has it."""
    rows = rearrange(widen(streams), "... d_model -> (...) d_model")
    return subject.readout.logits(rows).unflatten(0, streams.shape[:-1])


def first_input(args: tuple, kwargs: dict) -> tuple[str | None, Any]:
    """What a block is given to read, and its name where it is given by one."""
    if args:
        return None, args[0]
    return next(iter(kwargs.items()))


def keep(activation: Tensor, hook: Any, slot: dict, key: Any) -> None:
    slot[key] = activation.detach()


def _keep_heads(z: Tensor, hook: Any, clean: Clean, layer: int) -> None:
    clean.z[layer] = by_head(z.detach(), clean.subject.shape.n_heads)


def keep_copy(activation: Tensor, hook: Any, slot: dict, key: Any) -> None:
    slot[key] = activation.detach().clone()  # some models add to the stream, or to what is added, in place


def _keep_input(clean: Clean, layer: int, block: Any, args: tuple, kwargs: dict) -> None:
    clean.streams[layer] = first_input(args, kwargs)[1].detach().clone()


def _keep_output(clean: Clean, layer: int, block: Any, args: tuple, output: Any) -> None:
    first, clean.block_items[layer] = _unpacked(output)
    if layer == clean.subject.layers[-1]:  # what any other gives, the next one reads
        clean.streams[layer + 1] = first.detach().clone()


def _keep_attention(clean: Clean, layer: int, attention: Any, args: tuple, output: Any) -> None:
    first, clean.attention_items[layer] = _unpacked(output)
    clean.attention[layer] = first.detach().clone()


def _unpacked(output: Any) -> tuple[Tensor, int]:
    return (output[0], len(output)) if isinstance(output, tuple | list) else (output, 0)
