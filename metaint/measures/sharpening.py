"""Attention at many kappas, in blocks of rows that stay in the cache: its output, and what each row's gaps are like.

In: one sequence's pattern and values. Out: blocks of weights beside their row's largest, as `saturation.powers` takes
them, outputs and statistics of rows.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from metaint.measures import saturation
from metaint.measures.tile import BLOCK_CPU, BLOCK_DEVICE, TAUS


class Block(NamedTuple):
    """Some rows of a pattern, the key they end at, and their weights beside their largest."""

    rows: slice
    stop: int
    relative: Float[Tensor, "head row key"]


def blocks(pattern: Float[Tensor, "head query key"], causal: bool, tau: float = saturation.TIE) -> Iterator[Block]:
    """The rows in blocks, cut at the diagonal if the pattern is causal, which halves the work.

    A pattern may have a column more than queries, the first, for a sink that every query sees.
    """
    heads, queries, keys = pattern.shape
    step = max(32, (BLOCK_CPU if pattern.device.type == "cpu" else BLOCK_DEVICE) // (heads * keys))
    dtype = torch.promote_types(pattern.dtype, torch.float32)
    for start in range(0, queries, step):
        rows = slice(start, min(start + step, queries))
        stop = rows.stop + keys - queries if causal else keys
        yield Block(rows, stop, saturation.relative_weights(pattern[:, rows, :stop].to(dtype), tau))


def mix(
    weights: Float[Tensor, "head row key"], value: Float[Tensor, "head key d_head"]
) -> tuple[Float[Tensor, "head row d_head"], Float[Tensor, "head row"]]:
    """What attention with these weights, once normalised, makes of the values; and what the weights sum to."""
    total = weights.sum(-1)
    output = torch.bmm(weights, value) / total.clamp(min=torch.finfo(weights.dtype).tiny)[..., None]
    return output, total


def row_statistics(relative: Float[Tensor, "head row key"]) -> Float[Tensor, "slot head row"]:
    """How many keys are tied with the largest, the sum of the weights beside it, the gap below it, and how many keys
    lie within each of `TAUS` of it."""
    space = torch.empty_like(relative)
    # Comparing into a float buffer and summing it is several times faster than counting booleans.
    ties = [torch.ge(relative, math.exp(-tau), out=space).sum(-1) for tau in TAUS]
    largest = torch.ge(relative, 1, out=space).sum(-1)
    return torch.stack([largest, relative.sum(-1), saturation.gap(relative), *ties])
