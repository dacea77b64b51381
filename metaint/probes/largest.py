"""The largest magnitudes of the residual stream (massive activations, Sun et al. 2024), as `ResidualProbe` keeps them.

A candidate is (value, dimension, position, token); a sequence has so many at each layer, in float64.
"""

from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from metaint.probes.stream import Rows, precise

# Fields of a candidate.
FIELDS = ("value", "dimension", "position", "token")


def candidates_of(x: Float[Tensor, "batch row d_model"], rows: Rows, count: int) -> Float[Tensor, "batch rank field"]:
    """Up to `count` of each sequence, the largest first; those of padding have the value -1."""
    magnitude = x.abs()
    per_row = magnitude.amax(-1).masked_fill(~rows.real, -1.0)
    chosen = per_row.topk(min(count, per_row.shape[1])).indices  # the largest values lie in these rows
    batch = rearrange(torch.arange(len(x), device=x.device), "batch -> batch 1")
    is_padding = rearrange(~rows.real[batch, chosen], "batch row -> batch row 1")
    values = magnitude[batch, chosen].masked_fill(is_padding, -1.0)
    best = values.flatten(1).topk(min(count, values[0].numel()))
    row = chosen.gather(1, best.indices // x.shape[-1])
    token = torch.full_like(row, -1) if rows.tokens is None else rows.tokens.gather(1, row)
    fields = [best.values, best.indices % x.shape[-1], rows.position.gather(1, row), token]
    return torch.stack([field.to(precise(x.device)) for field in fields], -1)


def larger_of(
    left: Float[Tensor, "batch rank field"], right: Float[Tensor, "batch other field"]
) -> Float[Tensor, "batch rank field"]:
    """The largest of both, as many as are on the left."""
    both = torch.cat([left, right.to(left.dtype)], 1)
    order = both[..., 0].topk(left.shape[1]).indices
    return both[torch.arange(len(both), device=both.device)[:, None], order]


class Largest(NamedTuple):
    """The largest of all sequences, one for each (dimension, position), and the mean over sequences."""

    ranked: dict[str, Float[Tensor, "layer rank"]]
    """For each of `FIELDS`; NaN where there are fewer."""
    mean: Float[Tensor, "layer rank"]


def largest_of(candidates: Float[Tensor, "sequence layer rank field"]) -> Largest:
    """What the candidates of all sequences come to."""
    values = candidates[..., 0]
    mean = values.masked_fill(values < 0, torch.nan).nanmean(0)
    ranked = torch.full(candidates.shape[1:], torch.nan, dtype=torch.float64)
    for layer, rows in enumerate(rearrange(candidates, "sequence layer rank field -> layer (sequence rank) field")):
        rows = rows.double()
        rows = rows[rows[:, 0].argsort(descending=True, stable=True)]
        _, first = np.unique(rows[:, 1:3].numpy(), axis=0, return_index=True)
        best = rows[torch.from_numpy(np.sort(first)[: ranked.shape[1]])]
        ranked[layer, : len(best)] = best.masked_fill(best[:, :1] < 0, torch.nan)
    return Largest(dict(zip(FIELDS, ranked.unbind(-1), strict=True)), mean)
