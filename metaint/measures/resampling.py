"""Intervals by resampling sequences: tokens of one sequence are not independent, sequences are."""

import math
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

# The last draws are remembered up to so many numbers, of eight bytes.
_REMEMBERED = 10**7


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
    # Where all heads share their counts, these are summed once.
    share = rest[-1] if counts.ndim > 1 and counts.stride(-1) == 0 else 1
    counts = counts[..., :1] if share > 1 else counts
    totals = weights @ counts.reshape(len(counts), -1)
    low, high = [], []
    # A few thousand columns at a time: 80 x 64 heads with every measure would not fit at once.
    for columns in torch.arange(math.prod(rest)).split(4096):
        drawn = weights @ sums.reshape(len(sums), -1)[:, columns[0] : columns[-1] + 1]
        bounds = torch.nanquantile(drawn / totals[:, columns // share], tail, dim=0)
        low.append(bounds[0])
        high.append(bounds[1])
    return torch.cat(low).view(rest), torch.cat(high).view(rest)


def pseudo_values(
    sums: Float[Tensor, "sequence *rest"], counts: Float[Tensor, "sequence *#rest"], bundles: int
) -> Float[Tensor, "bundle *rest"]:
    """The jackknife's pseudo-values of the ratio sum(sums) / sum(counts), over bundles of neighbouring sequences.

    Each is B times the ratio less B - 1 times the ratio without that bundle, where B is `bundles` or the number of
    sequences, if that is smaller: of one mean, what the bundle alone would give. Their mean is the ratio, exactly
    where all bundles count alike; their standard deviation over the root of B is its standard error (Tukey 1958), and
    so with sums and differences of them. Not a number with fewer than two sequences, or where all counts lie in one
    bundle.
    """
    size = min(bundles, len(sums))
    place = torch.arange(len(sums)) * size // max(1, len(sums))
    parts, weights = (
        torch.zeros(size, *values.shape[1:], dtype=torch.float64).index_add_(0, place, values.double())
        for values in (sums, counts)
    )
    total, rest = weights.sum(0), weights.sum(0) - weights
    without = (parts.sum(0) - parts) / rest.where(rest > 1e-9 * total, math.nan)  # a difference of floats is never 0
    return size * parts.sum(0) / total - (size - 1) * without


def resampled_weights(n: int, resamples: int = 1000, seed: int = 0) -> Float[Tensor, "resample sequence"] | None:
    """How often each of n sequences is drawn in each resample; None for fewer than two, which tell no interval."""
    if n < 2:
        return None
    draw = _draws if n * resamples <= _REMEMBERED else _draws.__wrapped__
    return draw(n, resamples, seed)


# Every measure of a scan asks for the same draws, which cost more than all that is made of them.
@lru_cache(maxsize=1)
def _draws(n: int, resamples: int, seed: int) -> Float[Tensor, "resample sequence"]:
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    return torch.from_numpy(draws).double()
