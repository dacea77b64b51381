"""Norms of the residual stream: how long it is, how each step changes it, how many directions it fills.

In: activations of the stream. Out: numbers for each position, or for a layer. Sources: Heimersheim & Turner 2023,
"Residual stream norms grow exponentially over the forward pass"; Sun et al. 2024 (2402.17762) for massive
activations. That norms grow is what any exact descent through a final norm would give (`inner.py`), and what adding
outputs that don't oppose the stream gives: alone it is evidence of neither.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# A log histogram of norms: eight bins an octave from 2^-8 to 2^24; what lies outside falls into the end bins.
BINS, LOWEST, PER_OCTAVE = 256, -8, 8
# Massive: above 100, and a thousand times the median (Sun et al. 2024, as quoted by three sources).
MASSIVE_VALUE, MASSIVE_RATIO = 100.0, 1000.0


class StepSplit(NamedTuple):
    """A step along the stream and across it; with it ||x + D||² - ||x||² = cross + square, exactly."""

    radial: Float[Tensor, "*rest"]
    tangential: Float[Tensor, "*rest"]
    cross: Float[Tensor, "*rest"]
    square: Float[Tensor, "*rest"]


def norm(stream: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest"]:
    """Euclidean length, summed in the activation's own precision."""
    return torch.linalg.vector_norm(stream, dim=-1)


def dot(x: Float[Tensor, "*rest d_model"], y: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest"]:
    """Inner product over the last dimension, true to rounding however long that is."""
    # An einsum adds term by term in float32: over a vocabulary of 49,152 that moved entropies by 0.003 nats.
    return torch.linalg.vecdot(x, y)


def cosine(x: Float[Tensor, "*rest d_model"], y: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest"]:
    """Cosine in [-1, 1]; 0 where either vector is zero."""
    lengths = norm(x) * norm(y)
    return torch.where(lengths > 0, dot(x, y) / lengths, 0.0).clamp(-1, 1)


def split_step(stream: Float[Tensor, "*rest d_model"], step: Float[Tensor, "*rest d_model"]) -> StepSplit:
    """Split a step D from x into its part along x (signed length) and across x (length >= 0).

    `cross` is 2 <x, D> and `square` ||D||² = radial² + tangential²: by how much each changes ||x||².
    """
    along, square = dot(stream, step), dot(step, step)
    length = norm(stream)
    radial = torch.where(length > 0, along / length, 0.0)
    tangential = (square - radial.square()).clamp(min=0).sqrt()
    return StepSplit(radial, tangential, 2 * along, square)


def norm_from_scale(scale: Float[Tensor, "*rest"], d_model: int, eps: float) -> Float[Tensor, "*rest"]:
    """The length that a norm divided by, from its `hook_scale`: of x for RMSNorm, of x minus its mean for LayerNorm.

    Raises nothing; a scale below sqrt(eps) gives 0.
    """
    return (d_model * (scale.square() - eps)).clamp(min=0).sqrt()


def histogram_bin(norms: Float[Tensor, "*rest"]) -> Int[Tensor, "*rest"]:
    """Index of the log bin of each norm, 0 to `BINS` - 1."""
    octave = norms.clamp(min=torch.finfo(torch.float32).tiny).log2()
    return ((octave - LOWEST) * PER_OCTAVE).floor().clamp(0, BINS - 1).long()


def bin_edges() -> Float[Tensor, " edge"]:
    """The `BINS` + 1 edges of the log histogram."""
    return torch.exp2(torch.arange(BINS + 1, dtype=torch.float64) / PER_OCTAVE + LOWEST)


def histogram_quantile(
    histogram: Float[Tensor, "*rest bin"], quantiles: Float[Tensor, " quantile"]
) -> Float[Tensor, "quantile *rest"]:
    """Quantiles of what was counted, interpolated within a bin on the log scale (so true to 9 %, a bin's width).

    NaN where nothing was counted.
    """
    shape = histogram.shape[:-1]
    counts = histogram.reshape(-1, histogram.shape[-1]).double()
    reached = counts.cumsum(-1)
    wanted = quantiles.double()[:, None] * reached[:, -1]
    place = torch.searchsorted(reached, wanted.mT.contiguous()).clamp(max=counts.shape[-1] - 1)
    below = torch.where(place > 0, reached.gather(1, (place - 1).clamp(min=0)), 0.0)
    inside = (wanted.mT - below) / counts.gather(1, place)
    value = torch.exp2((place + inside.clamp(0, 1)) / PER_OCTAVE + LOWEST)
    return value.masked_fill(reached[:, -1:] == 0, math.nan).mT.reshape(len(quantiles), *shape)


def exponential_fit(
    layers: Int[Tensor, " layer"], log_norms: Float[Tensor, " layer"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Factor per layer of the least-squares line through log norms, and its R².

    1.045 is what Heimersheim & Turner report for GPT-2 XL, layers 5 to 41. NaN with fewer than two layers; R² is NaN
    where the log norms don't vary. A line through few layers has a high R² whatever they do.
    """
    if len(layers) < 2:
        return torch.tensor(math.nan), torch.tensor(math.nan)
    x, y = layers.double() - layers.double().mean(), log_norms.double() - log_norms.double().mean()
    slope = (x * y).sum() / (x * x).sum()
    return slope.exp(), 1 - (y - slope * x).square().sum() / y.square().sum()


def sketch(d_model: int, width: int = 128) -> Float[Tensor, "d_model width"]:
    """A fixed random projection that keeps inner products on average; the identity where `d_model` <= `width`."""
    if d_model <= width:
        return torch.eye(d_model)
    drawn = np.random.default_rng(0).standard_normal((d_model, width), dtype=np.float32)
    return torch.from_numpy(drawn / math.sqrt(width))


def participation_ratio(
    covariance: Float[Tensor, "*rest width width"], d_model: int | None = None
) -> Float[Tensor, "*rest"]:
    """Effective rank tr(C)² / tr(C²), 1 to d_model: how many directions share the variance equally.

    With `d_model` wider than the covariance, C is that of data through `sketch`, and the bias of the projection is
    taken out: for a Gaussian sketch of m columns E tr(S'CS S'CS) = (1 + 1/m) tr(C²) + tr(C)²/m and
    E tr(S'CS)² = tr(C)² + 2 tr(C²)/m. Within 2 % of the full one for m = 128 and a ratio below some 100.
    """
    width = covariance.shape[-1]
    full = d_model or width
    squared = covariance.square().sum((-2, -1))
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1).square()
    if full > width:
        squared = (squared - trace / width) / (1 + 1 / width - 2 / width**2)
        trace = trace - 2 * squared / width
    return (trace / squared).clamp(1, full)


def is_massive(value: Float[Tensor, "*rest"], median: Float[Tensor, "*rest"]) -> Bool[Tensor, "*rest"]:
    """Whether |x| = `value` is a massive activation beside the layer's median |x|: above 100 and 1000 x the median."""
    return (value > MASSIVE_VALUE) & (value >= MASSIVE_RATIO * median)
