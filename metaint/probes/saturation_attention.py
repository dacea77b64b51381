"""The attention that `SaturationProbe` reads and changes: its parts, brought together as a model's hooks fire.

In: what hooks carry of a layer's attention, all copies of it. Out: an `Attention`, and what copies get in its place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Self

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from metaint.measures import saturation
from metaint.measures.sharpening import blocks, mix
from metaint.models.audit import holds, require
from metaint.models.describe import by_layer, sink_scores
from metaint.models.heads import OUT_OF_HEADS, by_head, repeat_heads
from metaint.models.invariants import pattern_of, score_hooks, value_hook, values_of
from metaint.models.protocol import Model


class Attention(NamedTuple):
    """What one layer's attention made."""

    pattern: Float[Tensor, "stack head query key"]
    value: Float[Tensor, "stack head key d_head"]
    z: Float[Tensor, "stack query head d_head"]

    @classmethod
    def of(cls, pattern: Tensor, value: Tensor, z: Tensor, learnt_sinks: bool) -> Self:
        """Values in float32 or better, once for each head; a learnt sink is a key before all others."""
        dtype = torch.promote_types(pattern.dtype, torch.float32)
        value = repeat_heads(value, pattern.shape[1], 2).to(dtype)
        value = rearrange(value, "sequence key head d_head -> sequence head key d_head")
        z = by_head(z, pattern.shape[1])
        if learnt_sinks:  # which holds nothing
            pattern = torch.cat([(1 - pattern.sum(-1, keepdim=True)).clamp(min=0), pattern], -1)
            value = torch.nn.functional.pad(value, (0, 0, 1, 0))
        return cls(pattern, value, z)


def sharpened(
    attention: Attention, kappas: Sequence[float], causal: bool, tau: float
) -> Float[Tensor, "copy query head d_head"]:
    """What the last rows of the stack get instead of their z, each at a kappa of its own: as many as `kappas`."""
    pattern, value, z = (part[-len(kappas) :] for part in attention)
    mixed = torch.empty_like(z, dtype=value.dtype)
    for i, kappa in enumerate(kappas):
        for block in blocks(pattern[i], causal, tau):
            (weights,) = saturation.powers(block.relative, (kappa,))
            mixed[i, block.rows] = mix(weights, value[i, :, : block.stop])[0].transpose(0, 1)
    return mixed


def with_last(stack: Float[Tensor, "stack *rest"], last: Float[Tensor, "copy *rest"]) -> Float[Tensor, "stack *rest"]:
    """A stack whose last rows are replaced."""
    return torch.cat([stack[: len(stack) - len(last)], last.to(stack.dtype)])


def _unchanged(value: Tensor) -> Tensor:
    return value


@dataclass
class AttentionParts:
    """Which hooks of a model carry its attention; holds what fires first until the rest of a layer's is there."""

    value_hook: str = "hook_v"
    # Makes [batch, key, head, d_head] of values as their hook has them.
    values: Callable[[Tensor], Tensor] = _unchanged
    # The hooks the pattern is there from: its own, or those of queries and keys, of which `patterns` makes it.
    pattern_hooks: tuple[str, ...] = ("hook_pattern",)
    patterns: Callable[..., Tensor] | None = None
    learnt_sinks: bool = False
    # Where the pattern is told after it was used: W_O by layer, for what is added to attention's output instead.
    outputs: dict[int, Tensor] = field(default_factory=dict)
    held: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Model) -> Self:
        """Those of a model; HookAuditError where its attention can't be changed."""
        parts = cls(value_hook(model), partial(values_of, model), learnt_sinks=sink_scores(model) is not None)
        if holds(model, "pattern_order"):
            return parts
        # The bridge tells of the pattern once z is made. It is made here from what makes the scores, where hooks
        # carry that; else what z would have been is added to the attention's output.
        if holds(model, "pattern_from_scores"):
            parts.pattern_hooks, parts.patterns = score_hooks(model), partial(pattern_of, model)
        else:
            require(model, ["output_sum"])
            parts.outputs = {layer: weight.detach() for layer, weight in by_layer(model, "W_O").items()}
        return parts

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hooks of a layer's attention."""
        return (self.value_hook, *self.pattern_hooks, "hook_z")

    def named(self, name: str, activation: Tensor) -> tuple[str, Tensor]:
        """The part that the hook `name` carries, and values in the order of others' values."""
        if name.endswith(self.value_hook):
            return "hook_v", self.values(activation)
        return name.split(".")[-1], activation

    def take(self, layer: int, part: str, activation: Tensor, real: Bool[Tensor, "batch key"]) -> Attention | None:
        """Hold one part; all of the attention with the part that fires last. `real` is False where a key is padding."""
        self.held[part] = activation
        if part != ("hook_pattern" if self.outputs else "hook_z"):
            return None
        held, self.held = self.held, {}
        z = held["hook_z"]
        if self.patterns is None:
            pattern = held["hook_pattern"]
        else:
            query, key = (held[hook] for hook in self.pattern_hooks)
            pattern = self.patterns(layer, query, key, real.repeat(len(z) // len(real), 1))
        return Attention.of(pattern, held["hook_v"], z, self.learnt_sinks)

    def written(self, layer: int, change: Tensor) -> Float[Tensor, "copy query d_model"]:
        """What a change of z changes in the attention's output."""
        return einsum(change, self.outputs[layer].to(change.dtype), OUT_OF_HEADS)
