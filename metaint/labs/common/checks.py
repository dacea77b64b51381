"""What the labs refuse: settings that can't be trained, and losses that aren't finite.

In: a name, and what was given for it. Out: nothing, or one sentence as InputError; while training, as `Diverged`.
"""

import math
from collections.abc import Collection
from typing import Any

from metaint.errors import InputError
from metaint.labs.common.side_by_side import Diverged


def choose(name: str, given: str, known: Collection[str]) -> None:
    """InputError unless what was given is known."""
    if given not in known:
        raise InputError(f"{name} is {given!r}: choose one of {', '.join(known)}.")


def at_least(settings: Any, **fewest: int) -> None:
    """InputError unless each of these fields of the settings is as large as said."""
    for name, least in fewest.items():
        if getattr(settings, name) < least:
            raise InputError(f"{name} is {getattr(settings, name)}: give at least {least}.")


def above_zero(name: str, given: float) -> None:
    """InputError unless this is a finite number above 0."""
    if not 0 < given < math.inf:
        raise InputError(f"{name} is {given:g}: give a finite number above 0.")


def zero_or_above(name: str, given: float) -> None:
    """InputError unless this is a finite number that isn't negative."""
    if not 0 <= given < math.inf:
        raise InputError(f"{name} is {given:g}: give 0 or a finite number above it.")


def finite(loss: float, learning_rate: float | None, trouble: str) -> float:
    """The loss; `Diverged` if it isn't finite, which says what trouble this learning rate led to."""
    if math.isfinite(loss):
        return loss
    raise Diverged(f"learning_rate is {learning_rate:g}, with which {trouble}: give a smaller one.")
