"""How well a target, such as the W of a sequence s_{t+1} = W s_t, can be read linearly from features of a model.

In: features and targets, a row a sequence. Out: R² on sequences that weren't fitted. A probe of our own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from metaint.errors import InputError

# Shares of the sequences that a penalty is chosen on, and that R² is of.
VALIDATION, _TEST = 0.2, 0.2
PENALTIES = tuple(10.0**power for power in range(-8, 3))
FEWEST = 10


class Decoding(NamedTuple):
    """How well targets can be read linearly from features of sequences that weren't fitted."""

    r2: float
    """Mean of `per_target`; at most 1, and below 0 where the mean of the targets would have been nearer."""
    per_target: Float[Tensor, " target"]
    """R² on the test sequences; NaN for a target that doesn't vary there."""
    penalty: float


def decodability(
    features: Float[Tensor, "sequence feature"],
    targets: Float[Tensor, "sequence target"],
    penalty: float | int | None = None,
    seed: int = 0,
) -> Decoding:
    """R² of targets, such as vec(W), read by ridge regression from features, such as a model's stream at position T.

    A random fifth of the sequences is the test, another fifth chooses the penalty (out of 1e-8, 1e-7, ..., 100) unless
    one is given, and the rest, or then all but the test, is what is fitted. The penalty is in units of the features'
    mean variance times their number of sequences, so that no scale changes the result. The intercept is free.
    Computed in float64.

    The number means something only beside that of the raw context, `features = vectors[:, :T].flatten(1)` for the same
    targets and seed: W is no linear function of it, but not independent of it either. Raises InputError for fewer than
    10 sequences, a penalty that isn't positive, and numbers that aren't finite.
    """
    count = len(features)
    if count < FEWEST or len(targets) != count:
        raise InputError(f"features has {count} sequences and targets {len(targets)}: give {FEWEST} or more of each.")
    if penalty is not None and not penalty > 0:
        raise InputError(f"penalty is {penalty}: give a positive number, or None to choose one.")
    if not (features.isfinite().all() and targets.isfinite().all()):
        raise InputError("features or targets hold NaN or infinity, to which nothing can be fitted: give finite ones.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(features.device)
    x, y = features.double()[order], targets.double()[order]
    rest = count - round(_TEST * count)
    if penalty is None:
        fitted = rest - round(VALIDATION * count)
        guesses = _ridge(x[:fitted], y[:fitted], x[fitted:rest], PENALTIES)
        errors = [(guess - y[fitted:rest]).square().sum() for guess in guesses]
        penalty = PENALTIES[int(torch.stack(errors).argmin())]
    else:
        fitted = rest
    guess = _ridge(x[:fitted], y[:fitted], x[rest:], (float(penalty),))[0]
    per_target = _r2(guess, y[rest:])
    return Decoding(float(per_target.nanmean()), per_target, float(penalty))


def _ridge(x: Tensor, y: Tensor, at: Tensor, penalties: Sequence[float]) -> list[Tensor]:
    """What ridge regression of y on x says at other features, for each penalty; one decomposition for all."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    u, s, v = torch.linalg.svd(x - x_mean, full_matrices=False)
    unit = s.square().sum() / x.shape[1]
    projected, scores = u.mT @ (y - y_mean), (at - x_mean) @ v.mT
    shrunk = [torch.where(s > 0, s / (s.square() + penalty * unit), 0.0) for penalty in penalties]
    return [scores @ (factor[:, None] * projected) + y_mean for factor in shrunk]


def _r2(guess: Tensor, y: Tensor) -> Tensor:
    total = (y - y.mean(0)).square().sum(0)
    # A constant's rounding is no variance.
    varies = total > (len(y) * torch.finfo(y.dtype).eps * y.abs().amax(0)).square() * len(y)
    return torch.where(varies, 1 - (guess - y).square().sum(0) / total, torch.nan)
