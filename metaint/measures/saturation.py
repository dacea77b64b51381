"""Saturation: how near attention is to its hard limit, and how near a network is to what it becomes as norms grow.

In: rows of attention patterns, representations, activations at two scales. Out: numbers for each row, or each layer.
Source: Merrill et al. 2021, "Effects of Parameter Norm Growth During Transformer Training" (2010.09697 v4), and the
follow-up of Merrill, Sabharwal & Smith 2022 (TACL 10) for saturated attention.

Everything is read from the pattern A alone: softmax(kappa s) is A**kappa renormalised, and two scores are within tau
of each other where the logarithms of their weights are. Weights are divided by their row's largest first, so that the
largest stays 1 at every kappa and nothing overflows.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metaint.errors import InputError

KAPPAS = (1.0, 2.0, 4.0, 8.0, 16.0, 64.0, math.inf)
# Scores this close to the largest count as equal to it: what rounding makes of equal scores of up to some 80.
TIE = 1e-5
# A log histogram of score gaps: four bins an octave from 2^-9 to 2^7; what lies outside falls into the end bins.
GAP_BINS, _GAP_LOWEST, _PER_OCTAVE = 64, -9, 4
# The published count of attended positions: a weight above this (norm-growth `saturate.py`).
ATTENDED = 1e-5


def check_kappas(kappas: Iterable[float | int]) -> tuple[float, ...]:
    """The factors in rising order, each once; InputError for one below 0, for NaN and for none."""
    factors = tuple(sorted({float(kappa) for kappa in kappas}))
    if not factors:
        raise InputError("kappas is empty: give at least one factor of the scores, such as 1 or float('inf').")
    for kappa in factors:
        if not kappa >= 0:
            raise InputError(f"kappas has {kappa:g}: a factor of the scores must be 0 or more.")
    return factors


# ---- rows of a pattern ------------------------------------------------------------------------------------------


def relative_weights(pattern: Float[Tensor, "*rest key"], tau: float | int = TIE) -> Float[Tensor, "*rest key"]:
    """A / max A of each row in [0, 1], and exactly 1 where the score is within `tau` of the largest.

    A row without any weight (padding) is 0.
    """
    relative = pattern / pattern.amax(-1, keepdim=True).clamp(min=torch.finfo(pattern.dtype).tiny)
    return relative.masked_fill_(relative >= math.exp(-tau), 1)


def powers(relative: Float[Tensor, "*rest key"], kappas: Iterable[float | int]) -> Iterator[Float[Tensor, "*rest key"]]:
    """relative**kappa for rising kappas, each from the one before; overwrites `relative`, and each what came before.

    kappa 0 keeps what is visible: weights that are exactly 0 stay 0.
    """
    at = 1.0
    for kappa in kappas:
        if kappa == 0:
            yield (relative > 0).to(relative.dtype)
            continue
        if math.isinf(kappa):
            relative.floor_()  # ties are exactly 1, the rest is below
        else:
            doublings = math.log2(kappa / at)
            if doublings == int(doublings) >= 0:
                for _ in range(int(doublings)):
                    relative.square_()
            else:
                relative.pow_(kappa / at)
            at = kappa
        yield relative


def sharpened(
    pattern: Float[Tensor, "*rest key"], kappa: float | int, tau: float | int = TIE
) -> Float[Tensor, "*rest key"]:
    """softmax(kappa s) from softmax(s), with scores within `tau` of the largest taken as equal to it.

    kappa 0 is uniform over what has weight, infinity is `saturated`. Raises InputError for a kappa below 0.
    """
    (kappa,) = check_kappas([kappa])
    (weights,) = powers(relative_weights(pattern, tau), [kappa])
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(pattern.dtype).tiny)


def saturated(pattern: Float[Tensor, "*rest key"], tau: float | int = TIE) -> Float[Tensor, "*rest key"]:
    """Saturated attention: all weight on the largest score, shared equally by those within `tau` of it.

    The limit of softmax(kappa s) for kappa to infinity; sat([1, 3, 3, 2]) = [0, 1/2, 1/2, 0] (2010.09697).
    """
    return sharpened(pattern, math.inf, tau)


def total_variation(a: Float[Tensor, "*rest key"], b: Float[Tensor, "*rest key"]) -> Float[Tensor, "*rest"]:
    """Total variation distance of two rows, half the sum of |a - b|, in [0, 1]."""
    return (a - b).abs().sum(-1) / 2


def tied(relative: Float[Tensor, "*rest key"]) -> Bool[Tensor, "*rest key"]:
    """The keys that saturated attention attends to, from `relative_weights`."""
    return relative == 1


# ---- the gap below the largest score ----------------------------------------------------------------------------


def gap(relative: Float[Tensor, "*rest key"]) -> Float[Tensor, "*rest"]:
    """Largest score minus the next one that is not tied with it, in (tau, 87]; infinite where nothing else has weight.

    From `relative_weights`. 1 - max softmax(kappa s) <= (n - 1) exp(-kappa gap) without ties.
    """
    below = relative.masked_fill(tied(relative), 0).amax(-1)
    difference = below.clamp(min=torch.finfo(torch.float32).tiny).log().neg()
    return difference.masked_fill(below == 0, math.inf)


def gap_bin(gaps: Float[Tensor, "*rest"]) -> Tensor:
    """Index of the log bin of each gap, 0 to `GAP_BINS` - 1 (infinite gaps in the last)."""
    octave = gaps.clamp(2.0**_GAP_LOWEST, 2.0**7).log2()
    return ((octave - _GAP_LOWEST) * _PER_OCTAVE).floor().clamp(0, GAP_BINS - 1).long()


def gap_edges() -> Float[Tensor, " edge"]:
    """The `GAP_BINS` + 1 edges of the histogram of gaps, from 0 to infinity."""
    edges = torch.exp2(torch.arange(GAP_BINS + 1, dtype=torch.float64) / _PER_OCTAVE + _GAP_LOWEST)
    edges[0], edges[-1] = 0.0, math.inf
    return edges


def predicted_variation(
    count: Float[Tensor, "*rest bin"],
    odds: Float[Tensor, "*rest bin"],
    tied_share: Float[Tensor, "*rest bin"],
    kappa: float | int,
) -> tuple[Float[Tensor, "*rest"], Float[Tensor, "*rest"]]:
    """Between which bounds the mean distance to saturated attention lies at any kappa >= 1, from histograms alone.

    For each bin of the gap g: how many rows, the sum of their odds o = (1 - m) / m with m the weight on the tied
    largest scores at kappa = 1, and the sum of 1 / (number tied). At kappa the odds are at most o exp(-(kappa - 1) g)
    and at least exp(-kappa g) / number tied, and the distance is odds / (1 + odds), which is concave; so both bounds
    hold for the mean of a bin. In [0, 1]; NaN where nothing was counted. Raises InputError for a kappa below 1.
    """
    if not kappa >= 1:
        raise InputError(f"kappa is {kappa:g}: from what was read at 1, only factors of 1 or more can be bounded.")
    edges = gap_edges()
    narrow, wide = edges[:-1], edges[1:]
    rows = count.clamp(min=1)
    most = odds / rows * _decay(kappa - 1, narrow)
    least = tied_share / rows * _decay(kappa, wide) / (1 + _decay(kappa, narrow))
    total = count.sum(-1)
    low, high = ((count * part).sum(-1) / total for part in (least, most / (1 + most)))
    return low, high


def _decay(kappa: float | int, gaps: Float[Tensor, " bin"]) -> Float[Tensor, " bin"]:
    """exp(-kappa g), with 0 times infinity taken as 0 and a gap of 0 as no decay at any kappa."""
    return torch.where((gaps == 0) | (kappa == 0), 1.0, (-kappa * gaps).exp()).nan_to_num(1.0)


# ---- representations at two scales ------------------------------------------------------------------------------


def mismatched_cosine(
    total_a: Float[Tensor, "*rest d_model"],
    total_b: Float[Tensor, "*rest d_model"],
    within: Float[Tensor, "*rest"],
    pairs: Float[Tensor, ""],
) -> Float[Tensor, "*rest"]:
    """Mean cosine of a token in one run with a token of another sequence in the other run, over all such pairs.

    From sums of unit vectors: over all tokens of either run, and `within`, the sum over sequences of the inner product
    of their own sums; `pairs` is how many pairs lie across sequences. The baseline of `similarity`: a collapsed
    representation has a cosine near 1 with anything. In [-1, 1]; NaN without pairs.
    """
    return ((total_a * total_b).sum(-1) - within) / torch.where(pairs > 0, pairs, math.nan)


def centred_similarity(
    similarity: Float[Tensor, "*rest"],
    mean_a: Float[Tensor, "*rest d_model"],
    mean_b: Float[Tensor, "*rest d_model"],
) -> Float[Tensor, "*rest"]:
    """Mean cosine with each run's mean direction taken out: the correlation of the unit vectors of two runs.

    (E<a, b> - <E a, E b>) / sqrt((1 - |E a|²)(1 - |E b|²)) for unit vectors, in [-1, 1]; 0 for runs that share no more
    than their mean direction, NaN where all vectors of a run point the same way.
    """
    spread = (1 - mean_a.square().sum(-1)) * (1 - mean_b.square().sum(-1))
    rounding = torch.finfo(mean_a.dtype).eps * 64
    covariance = similarity - (mean_a * mean_b).sum(-1)
    return torch.where(spread > rounding, covariance / spread.clamp(min=rounding).sqrt(), math.nan).clamp(-1, 1)


def homogeneity_slope(
    small: Float[Tensor, "*rest"], large: Float[Tensor, "*rest"], c_small: float | int, c_large: float | int
) -> Float[Tensor, "*rest"]:
    """log(||u(c2)|| / ||u(c1)||) / log(c2 / c1): the k of a k-homogeneous activation (2010.09697).

    In: norms of one activation with all parameters times c1, and times c2.
    """
    return (large / small).log() / math.log(c_large / c_small)


# Slopes for all parameters scaled, gains on, by block style, as measured in float64 on small random models ("folded":
# gains of 1 that are no parameters). "stream": after the first block. Not the paper's table: its pre-norm is "output".
EXPECTED_SLOPES: dict[str, dict[str, float]] = {
    "pre": {"embedding": 1, "scores": 4, "attn_write": 3, "mlp_write": 3, "stream": 3},
    "pre, gated": {"embedding": 1, "scores": 4, "attn_write": 3, "mlp_write": 5, "stream": 5},
    "output": {"embedding": 1, "scores": 4, "attn_write": 1, "mlp_write": 1, "stream": 1},
    "post": {"embedding": 1, "scores": 4, "attn_write": 3, "mlp_write": 3, "stream": 1},
    "folded": {"embedding": 1, "scores": 2, "attn_write": 2, "mlp_write": 2, "stream": 2},
    "folded, gated": {"embedding": 1, "scores": 2, "attn_write": 2, "mlp_write": 3, "stream": 3},
    "queries and keys": {"embedding": 0, "scores": 2, "attn_write": 0, "mlp_write": 0, "stream": 0},
}


# ---- the published count ----------------------------------------------------------------------------------------


def published_pattern(
    scores: Float[Tensor, "*rest query key"], causal: bool = True
) -> Float[Tensor, "*rest query key"]:
    """The pattern of the published script, whose mask multiplies: later keys get a score of 0, not minus infinity.

    So where every visible score is negative, softmax of scaled scores goes to the *later* keys, all tied at 0
    (norm-growth @ bca0576, `src/si_transformer.py` and `saturate.py`). `causal=False` is a softmax over everything.
    """
    return (scores.tril() if causal else scores).softmax(-1)


def attended(pattern: Float[Tensor, "*rest key"], threshold: float = ATTENDED) -> Float[Tensor, "*rest"]:
    """How many keys have a weight above `threshold`: the published count of attended positions, at scaled parameters.

    Averaged over positions a uniform causal head has (T + 1) / 2 and a head that the multiplicative mask sends to later
    keys has (T (T - 1) / 2 + 1) / T: the paper's Figure 3 shows the latter as "mean heads".
    """
    return (pattern > threshold).sum(-1).to(pattern.dtype)
