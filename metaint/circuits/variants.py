"""What replaces heads and MLPs, and how it reaches a pass: as hooks, or as a change of what attention gives.

In: `Variant`s, which say what stands at hook_z of heads or is written by MLPs, and a clean pass. Out: hooks for several
variants stacked along the batch; and what each variant adds to attention's output, through W_O.
"""

from collections.abc import Container, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from metaint.circuits.clean import Clean, Hook, keep
from metaint.models.heads import by_head, repeat_heads
from metaint.models.invariants import bias_of, value_hook, values_of


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


class Edit(NamedTuple):
    """What one of several stacked copies writes into an activation: a head's share of it, or (None) all of it."""

    copy: int
    head: int | None
    value: Tensor
    at: Bool[Tensor, " position"] | None

    def write(self, activation: Tensor, batch: int) -> None:
        """Into an activation [copy * batch, position, ...], at the positions `at` or everywhere."""
        rows = activation[self.copy * batch : (self.copy + 1) * batch]
        target = rows if self.head is None else rows[:, :, self.head]
        value = self.value.to(target.dtype)
        target[:] = value if self.at is None else torch.where(self.at[:, None], value, target)


def edit_hooks(
    clean: Clean, variants: Sequence[Variant], layers: range, preserve: bool = False, attended: Container[int] = ()
) -> list[Hook]:
    """Hooks for the edits of stacked variants that begin together; what attention gives in layers of `attended` is
    replaced already. With `preserve`, layers after the first that is changed attend as in the clean pass."""
    hooks: list[Hook] = []
    for layer in layers:
        attends = layer in clean.subject.shape.attending
        preserved = preserve and attends and all(variant.start[0] < layer for variant in variants)
        edits = _head_edits(variants, layer)
        held: dict[int, Tensor] = {}
        if preserved:
            hooks.append(
                (f"blocks.{layer}.attn.{value_hook(clean.subject.model)}", partial(keep, slot=held, key=layer))
            )
        if layer not in attended and (preserved or edits):
            edit = partial(edit_z, clean=clean, layer=layer, held=held, edits=edits, preserve=preserved)
            hooks.append((f"blocks.{layer}.attn.hook_z", edit))
        writes = [Edit(i, None, v.mlp[layer], v.at) for i, v in enumerate(variants) if layer in v.mlp]
        if writes:
            edit = partial(_edit_mlp, batch=len(clean.tokens), edits=writes)
            hooks.append((f"blocks.{layer}.hook_mlp_out", edit))
    return hooks


def _head_edits(variants: Sequence[Variant], layer: int) -> list[Edit]:
    edits = []
    for copy, variant in enumerate(variants):
        edits += [Edit(copy, head, value, variant.at) for head, value in variant.z.get(layer, {}).items()]
    return edits


def edit_z(
    z: Tensor, hook: Any, clean: Clean, layer: int, held: dict[int, Tensor], edits: list[Edit], preserve: bool
) -> Tensor:
    """hook_z with these edits; with `preserve` it is first made of the clean pattern and the values `held`."""
    batch = len(clean.tokens)
    new = by_head(z.clone(), clean.subject.shape.n_heads)
    if preserve:
        pattern = clean.patterns[layer].to(z.dtype)
        value = repeat_heads(values_of(clean.subject.model, held.pop(layer)), pattern.shape[1], 2)
        value = rearrange(value, "(copy batch) key head d_head -> copy batch key head d_head", batch=batch)
        mix = "batch head query key, copy batch key head d_head -> copy batch query head d_head"
        new = einsum(pattern, value, mix).reshape(new.shape).clone()
    for edit in edits:
        edit.write(new, batch)
    return new.reshape(z.shape)


def _edit_mlp(written: Tensor, hook: Any, batch: int, edits: list[Edit]) -> Tensor:
    new = written.clone()
    for edit in edits:
        edit.write(new, batch)
    return new


def attention_changes(
    clean: Clean, variants: Sequence[Variant], layer: int, places: Tensor | None = None
) -> Float[Tensor, "variant *rest d_model"]:
    """What is added to what attention gives in each variant: the change of z through W_O."""
    changes = [_attention_change(clean, variant, layer, places) for variant in variants]
    return torch.stack(changes) if len(changes) > 1 else changes[0][None]


def _attention_change(
    clean: Clean, variant: Variant, layer: int, places: Tensor | None
) -> Float[Tensor, "*rest d_model"]:
    weight, z = clean.subject.output_weights(layer), clean.z[layer]
    given = at_places(clean.attention[layer], places)
    heads = variant.z.get(layer, {})
    left = [head for head in range(len(weight)) if head not in heads]
    change = torch.zeros_like(given)
    if heads and len(left) < len(heads):  # from what stays, which is less than what goes
        change = bias_of(clean.subject.model, "b_O", layer, given[None]).to(given) - given
        if left:
            change = change + _written(z, weight, left, places)
    elif heads:
        change = -_written(z, weight, list(heads), places)
    for head, value in heads.items():
        value = value.to(weight.dtype)
        if value.ndim > 1:
            change = change + at_places(value.expand_as(z[:, :, head]), places) @ weight[head]
        elif value.ndim or bool(value):  # a zero or a mean is one row, not one for each position
            change = change + value.expand(weight.shape[1]) @ weight[head]
    if variant.at is not None:
        change = change * at_places(variant.at.expand(z.shape[:2]), places)[..., None]
    return change


def _written(z: Tensor, weight: Tensor, heads: list[int], places: Tensor | None) -> Tensor:
    """What these heads write together."""
    chosen = at_places(z if len(heads) == len(weight) else z[:, :, heads], places)
    outwards = rearrange(weight[heads], "head d_head d_model -> (head d_head) d_model")
    return rearrange(chosen, "... head d_head -> ... (head d_head)") @ outwards


def at_places(values: Tensor, places: Tensor | None) -> Tensor:
    return values if places is None else values[places]
