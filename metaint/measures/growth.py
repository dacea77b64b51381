"""How long the parameters are, how each step changes that, and what the weights of one head can do.

In: weights, two checkpoints of them, or a series of norms. Out: numbers for each tensor, series or head. Sources:
Merrill et al. 2021 (2010.09697 v4) for norms in training, whose App. E.2 prints the cross term of the squared norm
without its factor 2, and whose script divides the alignment of a layer by ||theta - a scalar||: neither is copied.
Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", for the copying score.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Real
from torch import Tensor

from metaint.errors import InputError

# Numbers that are in float64 at once, when a parameter is read or the vocabulary summed over.
_CHUNK = 2**20
# A line through two points fits whatever they are.
_FEWEST = 3

TRENDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "t": lambda t: t,
    "sqrt_t": np.sqrt,
    "fourth_root_t": lambda t: t**0.25,
}


# ---- one step ---------------------------------------------------------------------------------------------------


def squared_norm(parameter: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """||theta||², summed in float64 piece by piece."""
    total = torch.zeros((), dtype=torch.float64, device=_place(parameter))
    for piece in _pieces(parameter):
        total += piece.square().sum()
    return total


def change(before: Float[Tensor, "..."], after: Float[Tensor, "..."]) -> Float[Tensor, "3"]:
    """||theta||², <theta, delta> and ||delta||² for delta = after - before: add them up over tensors.

    With them ||theta + delta||² = ||theta||² + 2 <theta, delta> + ||delta||², exactly. They come from the difference
    itself: ||theta'||² - 2 <theta, theta'> + ||theta||² would lose a short step in rounding. Summed in float64 piece
    by piece, where `after` is. Raises InputError for tensors of two shapes.
    """
    if before.shape != after.shape:
        raise InputError(f"before is {list(before.shape)} and after {list(after.shape)}: they must be of one shape.")
    total = torch.zeros(3, dtype=torch.float64, device=_place(after))
    for theta, new in zip(_pieces(before), _pieces(after), strict=True):
        theta = theta.to(new.device)
        delta = new - theta
        total += torch.stack([theta.square().sum(), (theta * delta).sum(), delta.square().sum()])
    return total


def squared_norm_after(change: Float[Tensor, "*rest 3"]) -> Float[Tensor, "*rest"]:
    """||theta + delta||² from `change`."""
    return (change[..., 0] + 2 * change[..., 1] + change[..., 2]).clamp(min=0)


def step_norm(change: Float[Tensor, "*rest 3"]) -> Float[Tensor, "*rest"]:
    """||delta|| from `change`."""
    return change[..., 2].sqrt()


def alignment(change: Float[Tensor, "*rest 3"]) -> Float[Tensor, "*rest"]:
    """<theta, delta> / (||theta|| ||delta||) in [-1, 1] from `change`; NaN where either is zero.

    1 is a step that lengthens the parameters, 0 one across them, under which the squared norm grows by ||delta||².
    """
    return _ratio(change[..., 1], change[..., 0], change[..., 2])


def direction_cosine(change: Float[Tensor, "*rest 3"]) -> Float[Tensor, "*rest"]:
    """cos(theta, theta + delta) in [-1, 1] from `change`; NaN where either is zero.

    The closer two checkpoints lie, the nearer to 1 it is: it says nothing without their spacing.
    """
    return _ratio(change[..., 0] + change[..., 1], change[..., 0], squared_norm_after(change))


def _ratio(dot: Tensor, square: Tensor, other: Tensor) -> Tensor:
    return (dot / (square.sqrt() * other.sqrt())).clamp(-1, 1)  # 0 / 0 is NaN


def _place(tensor: Tensor) -> torch.device:
    """Where sums over this tensor are kept: there, or on the CPU if it has no float64 there."""
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(_place(tensor)).double()


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor in float64, some rows at a time: a transposed or strided one isn't copied whole either."""
    rows = tensor[None] if tensor.ndim == 0 else tensor
    for piece in rows.split(max(1, _CHUNK // max(1, rows[:1].numel()))):
        yield _wide(piece)


# ---- a series of norms ------------------------------------------------------------------------------------------


class Trend(NamedTuple):
    """A least-squares line: intercept, slope, and R² (at most 1)."""

    intercept: float
    slope: float
    r2: float


class Exponent(NamedTuple):
    """The power of t with which the squared norm grows, that of the norm (half of it), and R² in logarithms."""

    squared: float
    norm: float
    r2: float


class Dynamics(NamedTuple):
    """The norm at each checkpoint: as it was, and as it would be had all steps been parallel, or orthogonal."""

    observed: Float[np.ndarray, " step"]
    aligned: Float[np.ndarray, " step"]
    misaligned: Float[np.ndarray, " step"]


def fit_trends(steps: Real[np.ndarray, " step"], norms: Real[np.ndarray, " norm"]) -> dict[str, Trend]:
    """Least squares of the norm on 1 and f(t), for each f of `TRENDS`: t, sqrt(t), t^(1/4).

    `steps` counts optimiser steps. Merrill et al. report R² = 1.00 for sqrt(t) on T5. R² tells little between sqrt(t)
    and t^(1/4): any smooth rising series has a high one for both, so compare them, and see `growth_exponent`. NaN
    with fewer than three norms or one that isn't finite; R² is NaN where the norm doesn't vary. Raises InputError for
    steps that don't rise from 0 or more, and unless there is one norm a step.
    """
    t, rho = _series(steps, norms)
    return {name: _line(f(t), rho) for name, f in TRENDS.items()}


def growth_exponent(steps: Real[np.ndarray, " step"], norms: Real[np.ndarray, " norm"]) -> Exponent:
    """The slope of log(rho² - rho_0²) on log(t - t_0), with rho_0 the first norm, at step t_0.

    1 for the squared norm (so 1/2 for the norm) is growth by steps across the parameters, sqrt(t); 1/2 (1/4) is
    t^(1/4). Start at initialisation: from a later t_0 only the exponent 1 is told right. NaN where the norm does not
    grow, which is if a later one isn't above the first (leaving those out would make growth of anything), and with
    fewer than three later norms. Raises InputError as `fit_trends` does.
    """
    t, rho = _series(steps, norms)
    gain = (rho[1:] - rho[:1]) * (rho[1:] + rho[:1])
    if not (gain > 0).all():
        return Exponent(math.nan, math.nan, math.nan)
    line = _line(np.log(t[1:] - t[:1]), np.log(gain))
    return Exponent(line.slope, line.slope / 2, line.r2)


def dynamics(norms: Real[np.ndarray, " step"], step_norms: Real[np.ndarray, " interval"]) -> Dynamics:
    """The norm beside rho_0 + sum ||delta|| (aligned) and sqrt(rho_0² + sum ||delta||²) (misaligned).

    The first is the most it can be; the second is what orthogonal steps give, which Merrill et al. find T5 to follow.
    A delta is between checkpoints, not one optimiser step: with other spacing the steps taken add up to another sum,
    and both curves change. Raises InputError unless there is one step norm between each two norms.
    """
    if len(norms) != len(step_norms) + 1:
        raise InputError(f"step_norms has {len(step_norms)} values: for {len(norms)} norms there must be one less.")
    rho, delta = norms.astype(float), np.concatenate([[0.0], step_norms])
    return Dynamics(rho, rho[0] + delta.cumsum(), np.sqrt(rho[0] ** 2 + (delta**2).cumsum()))


def _series(steps: np.ndarray, norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(steps) != len(norms):
        raise InputError(f"norms has {len(norms)} values for {len(steps)} steps: give one for each.")
    t = steps.astype(float)  # before the difference, which unsigned integers have no sign for
    if len(t) and not (t[0] >= 0 and (np.diff(t) > 0).all()):
        raise InputError("steps must rise from 0 or more: sort the checkpoints, and give each once.")
    return t, norms.astype(float)


def _line(x: np.ndarray, y: np.ndarray) -> Trend:
    if len(x) < _FEWEST or not np.isfinite(y).all():
        return Trend(math.nan, math.nan, math.nan)
    across, up = x - x.mean(), y - y.mean()
    slope = float(across @ up / (across @ across))
    left = up - slope * across
    r2 = float(1 - left @ left / (up @ up)) if np.ptp(y) > 0 else math.nan
    return Trend(float(y.mean() - slope * x.mean()), slope, r2)


# ---- the weights of a head --------------------------------------------------------------------------------------


def product_norm(
    left: Float[Tensor, "*rest d_model d_head"], right: Float[Tensor, "*rest d_head d_model"]
) -> Float[Tensor, "*rest"]:
    """Frobenius norm of left @ right, such as W_Q W_K^T or W_V W_O, in float64.

    By tr(left^T left right right^T): nothing of d_model x d_model is made. A product that is zero may read as 1e-8 of
    what its factors' norms allow.
    """
    left, right = _wide(left), _wide(right)
    return ((left.mT @ left) * (right @ right.mT)).sum((-2, -1)).clamp(min=0).sqrt()


def vocabulary_loop(
    W_U: Float[Tensor, "d_model vocab"], W_E: Float[Tensor, "vocab d_model"]
) -> Float[Tensor, "d_model d_model"]:
    """W_U W_E in float64, a piece of the vocabulary at a time: what the full OV circuit has between W_O and W_V."""
    d_model, vocab = W_U.shape
    total = torch.zeros(d_model, d_model, dtype=torch.float64, device=_place(W_U))
    size = max(1, _CHUNK // d_model)
    for start in range(0, vocab, size):
        words = slice(start, start + size)
        total.addmm_(_wide(W_U[:, words]), _wide(W_E[words]).to(total.device))
    return total


def copying_score(
    W_V: Float[Tensor, "*rest d_model d_head"],
    W_O: Float[Tensor, "*rest d_head d_model"],
    loop: Float[Tensor, "d_model d_model"] | None = None,
) -> Float[Tensor, "*rest"]:
    """sum(Re lambda) / sum |lambda| in [-1, 1] over the eigenvalues of an OV circuit; 1 where all are positive.

    Of W_V W_O, what a head writes for what it reads; with `loop` = `vocabulary_loop(W_U, W_E)` of the full circuit
    W_E W_V W_O W_U, by how much a token raises its own logit (Elhage et al. 2021). Its eigenvalues other than zero
    are those of W_O W_V, or of W_O W_U W_E W_V, which are d_head x d_head. No scale of a matrix changes it; norms,
    and their gains, are left out. NaN where all eigenvalues are zero or a weight isn't finite. Of a circuit that has
    none but zero in exact arithmetic and not in floating point (a nilpotent one), it is noise.
    """
    W_V, W_O = _wide(W_V), _wide(W_O)
    circuit = W_O @ W_V if loop is None else W_O @ loop.to(W_O) @ W_V
    finite = circuit.isfinite().all(-1).all(-1)
    circuit = circuit.masked_fill(~finite[..., None, None], 0)
    # LAPACK does many small ones faster than an accelerator does.
    total = torch.linalg.eigvals(circuit.cpu()).abs().sum(-1).to(circuit.device)
    return (circuit.diagonal(dim1=-2, dim2=-1).sum(-1) / total).clamp(-1, 1)


def copying_null(
    d_model: int,
    d_head: int,
    loop: Float[Tensor, "d_model d_model"] | None = None,
    draws: int = 32,
    seed: int = 0,
) -> tuple[float, float]:
    """Mean and standard deviation of `copying_score` for Gaussian W_V and W_O of these sizes, with the same `loop`.

    Since no scale changes the score, it is one null for all heads of a model; about 0 and 1.5 / d_head without a
    loop. The global random state is left as it was.
    """
    generator = torch.Generator().manual_seed(seed)
    place = torch.device("cpu") if loop is None else loop.device
    drawn = []
    for _ in range(draws):
        W_V = torch.randn(d_model, d_head, generator=generator, dtype=torch.float64)
        W_O = torch.randn(d_head, d_model, generator=generator, dtype=torch.float64)
        drawn.append(copying_score(W_V.to(place), W_O.to(place), loop).cpu())
    scores = torch.stack(drawn)
    return float(scores.mean()), float(scores.std())
