"""What a head measure is: a named function, and the two decorators that make one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Int
from torch import Tensor

from metaint.measures.tile import Context, Tile

# Indices (batch, query, key) of a mask, in rising order.
Pairs = tuple[Int[Tensor, " _"], Int[Tensor, " _"], Int[Tensor, " _"]]


@dataclass(eq=False)
class Measure:
    """A named function of a tile or its context; `form` says which of the two forms of this file it has."""

    name: str
    form: Literal["kind", "statistic"]
    function: Callable[..., Any] = field(repr=False)
    # A statistic over several tolerances returns `[tau, batch, head, query]`.
    per_tau: bool = False
    # Where the score is not the mean over queries: from a sequence's sum and count to its value (or NaN).
    per_sequence: Callable[[Tensor, Tensor], Tensor] | None = field(default=None, repr=False)

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def kind(function: Callable[[Context], Tensor | Pairs]) -> Measure:
    """Make a kind of head from a function of the context that returns a mask `[batch, query, key]`.

    Or its indices, as of `mask.nonzero(as_tuple=True)`, where there is a shorter way to them. The score of a query
    is its weight on those keys, and the kind is defined for the queries with at least one. Keys that a query can't
    see, and queries at position 0 or in padding, are dropped for you.
    """
    return _measure("kind", function)


def statistic(function: Callable[[Tile], Tensor]) -> Measure:
    """Make a statistic from a function of a tile that returns values `[batch, head, query]`.

    Not a number means that the statistic is not defined for that query.
    """
    return _measure("statistic", function)


def _measure(form: Literal["kind", "statistic"], function: Callable[..., Any]) -> Measure:
    found = Measure(function.__name__, form, function)
    found.__doc__ = function.__doc__
    return found
