"""What a model's rotary embedding does to queries, measured at its hooks.

In: a model. Out: for each layer, queries and keys as they are before they are rotated, and the rotation of each lag.
Nothing is taken from a config on trust, whose names for bases, scalings and partial rotations differ from model to
model: where no hook carries rotated queries, what the config says must give the model's own pattern.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from metaint.models.describe import attending_layers
from metaint.models.heads import repeat_heads
from metaint.models.invariants import pattern_of
from metaint.models.protocol import Model
from metaint.models.reading import Reading, Unavailable, random_tokens, read, untouched
from metaint.models.readout import setting

# Numbers that are kept at once, of queries before and after their rotation: 128 MB in float32.
_KEPT = 2**25
# How far a rotation may be off, relative to what it rotates: half precision and the fit.
_TOLERANCE = 0.02


class Rotation(NamedTuple):
    """One layer's queries and mean keys on random tokens, and R_D R_0^T of each lag D, so that a query meets a key
    that lies D back at query @ rotations[D] @ key."""

    queries: Float[Tensor, "sample head d_head"]
    key: Float[Tensor, "head d_head"]
    rotations: Float[Tensor, "lag d_head d_head"]


def rotations(model: Model, lags: int) -> Iterator[Rotation | None]:
    """Each layer's rotation in float64, None for a layer that rotates nothing, at most `lags` lags (fewer if the
    context is shorter).

    A few passes over random tokens, so many that the queries at each position span what heads can ask for; the matrix
    of each position is what maps hook_q to hook_rot_q there. Raises Unavailable where no matrix does.
    """
    cfg = model.cfg
    lags = min(lags, int(cfg.n_ctx))
    rows = max(2, math.ceil(2 * cfg.d_head / cfg.n_heads))
    layers = max(1, _KEPT // (4 * rows * lags * cfg.n_heads * cfg.d_head))
    known: Tensor | None = None
    for start in range(0, cfg.n_layers, layers):
        group = range(start, min(start + layers, cfg.n_layers))
        hooks = ("hook_q", "hook_k", "hook_rot_q")
        with untouched(model):
            names = [f"blocks.{layer}.attn.{hook}" for layer in group for hook in hooks]
            reading = read(model, random_tokens(model, rows, lags), names)
        for layer in group:
            if layer not in attending_layers(model):
                yield None
                continue
            attention = f"blocks.{layer}.attn"
            if f"{attention}.hook_rot_q" in reading:
                known = _rotation(reading, attention, known)
            elif getattr(cfg, "positional_embedding_type", None) == "rotary":
                known = _configured(model, layer, lags)
            else:
                yield None
                continue
            query, key = (reading[f"{attention}.{name}"].double() for name in hooks[:2])
            key = repeat_heads(key.mean((0, 1)), query.shape[2], 0)
            yield Rotation(
                rearrange(query, "batch position head d_head -> (batch position) head d_head"), key, known @ known[0].mT
            )


def _rotation(reading: Reading, attention: str, known: Tensor | None) -> Float[Tensor, "position d_head d_head"]:
    """The matrix of each position; the one `known` of the layer before, if it holds here too."""
    by_position = "batch position head d_head -> position (batch head) d_head"
    before, after = (
        rearrange(reading[f"{attention}.{name}"].double(), by_position) for name in ("hook_q", "hook_rot_q")
    )
    if known is not None and _fits(before, known, after):
        return known
    solution = torch.linalg.lstsq(before.cpu(), after.cpu()).solution.to(before.device)
    if not _fits(before, solution, after):
        reason = "queries are not only rotated between hook_q and hook_rot_q (normalised, say)"
        raise Unavailable(reason, f"{attention}.hook_rot_q")
    return solution


@torch.no_grad()
def _configured(model: Model, layer: int, lags: int) -> Float[Tensor, "position d_head d_head"]:
    """The rotation that the config describes, if with it queries and keys give the model's own pattern."""
    cfg, attention = model.cfg, f"blocks.{layer}.attn"
    rope = setting(model, "rope_parameters") or {}
    base = float(rope.get("rope_theta") or setting(model, "rotary_base") or 10000)
    share = float(rope.get("partial_rotary_factor") or 1)
    width = int(getattr(cfg, "rotary_dim", None) or share * cfg.d_head)
    with untouched(model):
        names = [f"{attention}.{name}" for name in ("hook_q", "hook_k", "hook_pattern")]
        reading = read(model, random_tokens(model, 2, lags), names)
    query, key, pattern = (reading[name].double() for name in names)
    for adjacent in (False, True):
        turns = plane_rotations(cfg.d_head, width, query.shape[1], base, adjacent).to(query.device)
        turned = "batch position head d_head, position d_head d_to -> batch position head d_to"
        made = pattern_of(model, layer, einsum(query, turns, turned), einsum(key, turns, turned))
        if (made - pattern).abs().max() <= _TOLERANCE:
            return turns
    reason = "no hook carries rotated queries, and the config's rotation doesn't give the model's pattern"
    raise Unavailable(reason, f"{attention}.hook_rot_q")


def plane_rotations(
    d_head: int, width: int, positions: int, base: float, adjacent: bool
) -> Float[Tensor, "position d_head d_head"]:
    """The rotary embedding as matrices: row vectors x turn into x @ matrices[t] at position t, in float64.

    The first `width` coordinates turn in planes, plane i by t / base^(2 i / width); a plane holds two `adjacent`
    coordinates (GPT-J), or one from each half (Llama, GPT-NeoX).
    """
    planes = torch.arange(width // 2)
    angles = torch.arange(positions)[:, None] * base ** (-2 * planes.double() / width)
    first, second = (2 * planes, 2 * planes + 1) if adjacent else (planes, planes + width // 2)
    turns = torch.eye(d_head, dtype=torch.float64).repeat(positions, 1, 1)
    turns[:, first, first] = turns[:, second, second] = angles.cos()
    turns[:, first, second] = angles.sin()
    turns[:, second, first] = -angles.sin()
    return turns


def _fits(before: Tensor, matrices: Tensor, after: Tensor) -> bool:
    if before.shape[-1] != after.shape[-1]:
        return False
    return bool((before @ matrices - after).norm() <= _TOLERANCE * after.norm())
