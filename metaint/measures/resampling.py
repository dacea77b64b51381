"""Intervals by resampling sequences: tokens of one sequence are not independent, sequences are."""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def bootstrap_interval(
    sums: Float[Tensor, "sequence *rest"],
    counts: Float[Tensor, "sequence *rest"],
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[Float[Tensor, "*rest"], Float[Tensor, "*rest"]]:
    """Percentile bootstrap interval over sequences of the ratio sum(sums) / sum(counts).

    Not a number with fewer than two sequences, and where no resample has a count.
    """
    rest = sums.shape[1:]
    weights = resampled_weights(len(sums), resamples, seed)
    if weights is None:
        nothing = torch.full(rest, math.nan, dtype=sums.dtype)
        return nothing, nothing.clone()
    weights = weights.to(sums.dtype)
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=sums.dtype)
    low, high = [], []
    # A few thousand columns at a time: 80 x 64 heads with every measure would not fit at once.
    for s, c in zip(*(part.reshape(len(part), -1).split(4096, 1) for part in (sums, counts)), strict=True):
        bounds = torch.nanquantile((weights @ s) / (weights @ c), tail, dim=0)
        low.append(bounds[0])
        high.append(bounds[1])
    return torch.cat(low).view(rest), torch.cat(high).view(rest)


def resampled_weights(n: int, resamples: int = 1000, seed: int = 0) -> Float[Tensor, "resample sequence"] | None:
    """How often each of n sequences is drawn in each resample; None for fewer than two, which tell no interval."""
    if n < 2:
        return None
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    return torch.from_numpy(draws).double()
