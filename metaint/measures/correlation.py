"""Rank correlation between readings of tokens, with what they share through other variables taken out.

In: one value a token. Out: Spearman's coefficient, plain or partial, with an interval over sequences.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaint.measures.resampling import resampled_weights

# Added to the diagonal of the correlation matrix: covariates that say the same (all alike, or in step) don't break it.
_RIDGE = 1e-9


def ranks(values: Float[Tensor, "*rest token"]) -> Float[Tensor, "*rest token"]:
    """Ranks along the last dimension from 1; ties share their mean rank."""
    flat = values.reshape(-1, values.shape[-1])
    ranked = torch.empty(flat.shape, dtype=torch.float64)
    for row, out in zip(flat, ranked, strict=True):
        _, place, count = row.unique(return_inverse=True, return_counts=True)
        out.copy_((count.cumsum(0) - (count - 1) / 2)[place])
    return ranked.reshape(values.shape)


def partial_spearman(
    x: Float[Tensor, " token"],
    y: Float[Tensor, " token"],
    covariates: Float[Tensor, "covariate token"],
    sequence: Int[Tensor, " token"],
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Spearman's coefficient of x and y with the ranks of `covariates` partialled out, in [-1, 1], and its interval.

    The partial coefficient is the correlation of what linear regressions on the covariates' ranks leave of the
    ranks of x and of y. The interval resamples sequences and keeps the ranks (95 % percentile bootstrap). NaN with
    fewer than three tokens, or where x or y does not vary; the interval is NaN with fewer than two sequences.
    """
    if len(x) < 3 or x.min() == x.max() or y.min() == y.max():
        return math.nan, math.nan, math.nan
    table = ranks(torch.stack([x.double(), y.double(), *covariates.double()]))
    table = table - table.mean(-1, keepdim=True)
    table = table / table.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
    table = torch.cat([torch.ones(1, len(x), dtype=torch.float64), table])
    n_sequences, width = int(sequence.max()) + 1, len(table)
    moments = torch.zeros(n_sequences, width, width, dtype=torch.float64)
    moments.index_add_(0, sequence.cpu(), torch.einsum("it,jt->tij", table, table))
    value = float(_partial(moments.sum(0)))
    weights = resampled_weights(n_sequences)
    if weights is None:
        return value, math.nan, math.nan
    drawn = _partial(torch.einsum("rs,sij->rij", weights, moments))
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.nanquantile(drawn, tail).tolist()
    return value, low, high


def _partial(moments: Float[Tensor, "*rest width width"]) -> Float[Tensor, "*rest"]:
    """Partial correlation of variables 1 and 2 given the further ones, from second moments with a constant first."""
    count = moments[..., :1, :1]
    mean = moments[..., :1, 1:] / count
    covariance = moments[..., 1:, 1:] / count - mean.mT * mean
    spread = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=1e-12).sqrt()
    correlation = covariance / (spread[..., :, None] * spread[..., None, :])
    precision = torch.linalg.inv(correlation + _RIDGE * torch.eye(correlation.shape[-1], dtype=torch.float64))
    scale = (precision[..., 0, 0] * precision[..., 1, 1]).sqrt()
    return (-precision[..., 0, 1] / scale).clamp(-1, 1)
