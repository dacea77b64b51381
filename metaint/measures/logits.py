"""The largest attention logit of each row: the score before the softmax, scale and soft cap as the model has them.

In: a pattern and the queries and keys that made it. Out: a number a row, and how numbers are counted for quantiles.
Scores that grow without bound are how training with large learning rates fails (Kimi K2's MuonClip, 2507.20534).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Bins of equal width in asinh(x): about 0.02 near 0 and 2 % of larger values, up to 1e6 on both sides.
_WIDTH = 0.02
_HALF = math.ceil(math.asinh(1e6) / _WIDTH)
BINS = 2 * _HALF


def row_maxima(
    pattern: Float[Tensor, "batch head query key"],
    query: Float[Tensor, "batch query head d_head"],
    key: Float[Tensor, "batch key head d_head"],
    scale: float,
    cap: float = 0.0,
) -> Float[Tensor, "batch head query"]:
    """cap(q_i k_j / scale) at the key of each row's largest weight, with cap(x) = c tanh(x / c) where c is above 0.

    A softmax keeps the order of scores, so it is the largest of those that the mask allows, without the product of
    all queries with all keys.
    """
    best = pattern.argmax(-1)
    rows = key.transpose(1, 2).gather(2, best[..., None].expand(-1, -1, -1, key.shape[-1]))
    logits = (query.transpose(1, 2) * rows).sum(-1) / scale
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


def logit_bin(logits: Float[Tensor, "*rest"]) -> Int[Tensor, "*rest"]:
    """The index of each logit's bin, 0 to `BINS` - 1."""
    return (logits.asinh() / _WIDTH).floor().add(_HALF).clamp(0, BINS - 1).long()


def logit_quantile(histogram: Float[Tensor, "*rest bin"], quantile: float) -> Float[Tensor, "*rest"]:
    """The middle of the bin that a quantile falls into; NaN where nothing was counted."""
    reached = histogram.double().cumsum(-1)
    place = (reached < quantile * reached[..., -1:]).sum(-1)
    value = ((place - _HALF + 0.5) * _WIDTH).sinh()
    return value.masked_fill(reached[..., -1] == 0, math.nan)
