"""Gradient descent as a reference for `RecurrenceProbe`, with the steps that predict the sequences at hand best."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from metaint.errors import InputError
from metaint.measures import autoregression
from metaint.probes.stream import precise

# Sequences that the step of several steps is tuned on, at most: its optimum is flat.
_TUNED_ON = 256
# Steps to try, in units of 1 / the mean square of a coordinate, and then the neighbours of the best.
_COARSE = tuple(2 ** (i / 2) for i in range(-10, 5))
_FINE = tuple(2 ** (i / 8) for i in range(-3, 4))


class Descent(NamedTuple):
    """Gradient descent from 0 on the inner loss of a context, as a reference (`autoregression.gradient_descent`)."""

    steps: int
    eta: Float[Tensor, " position"]
    """For contexts of T = 1, 2, ... vectors."""


def tuned_descents(
    vectors: Inexact[Tensor, "batch position d"], steps: Sequence[int] = (1,), eta: float | None = None
) -> dict[str, Descent]:
    """The descents that a model is compared with, with the steps that predict these sequences best.

    "gradient_step" is one step with the same eta (or the one given) in every context, as one layer of linear attention
    on augmented tokens takes. "gradient_steps_k", for each k of `steps`, is k steps with eta = c / (T - 1), steps on
    the mean of the inner loss over transitions: with one eta for all contexts, several steps blow up in long ones. Its
    c is found on a grid, from the first 256 sequences. Raises InputError for a number of steps below 1 and for vectors
    of fewer than 3 positions.
    """
    length = vectors.shape[1] - 1
    if length < 2:
        raise InputError(f"vectors has {length + 1} positions: give at least 3: a transition, and what comes next.")
    shared = _best_step(vectors) if eta is None else eta
    descents = {"gradient_step": Descent(1, torch.full((length,), float(shared), dtype=torch.float64))}
    for k in steps:
        descents[f"gradient_steps_{k}"] = Descent(k, autoregression.step_sizes(_best_scale(vectors, k), length))
    return descents


def _best_step(vectors: Tensor) -> float:
    """The one eta whose single step has the least squared error: in closed form, since that is quadratic in eta."""
    along = square = 0.0
    for part in vectors.split(_TUNED_ON):
        contexts = part[:, :-1]
        step = autoregression.predictions(autoregression.gradient_descent(contexts, 1.0), contexts)
        along += float((step.conj() * part[:, 1:]).real.sum(dtype=precise(part.device)))
        square += float(step.abs().square().sum(dtype=precise(part.device)))
    return along / square if square else 0.0


def _best_scale(vectors: Tensor, steps: int) -> float:
    some = vectors[:_TUNED_ON]
    unit = 1 / max(float(some.abs().square().mean()), torch.finfo(torch.float32).tiny)
    coarse = autoregression.tuned_scale(some, steps, [unit * factor for factor in _COARSE])
    return autoregression.tuned_scale(some, steps, [coarse * factor for factor in _FINE])
