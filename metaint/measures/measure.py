"""What a head measure is: a named function, and the two decorators that make one."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Int
from torch import Tensor

from metaint.errors import door
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

    def __reduce__(self) -> Any:
        """For pickle, which carries probes to other processes: by name, since the function's own name is now ours."""
        home = self.function.__module__
        if home != "__main__" and getattr(sys.modules.get(home), self.name, None) is self:
            return self.name
        return Measure, (self.name, self.form, self.function, self.per_tau, self.per_sequence)


@door
def kind(function: Callable[[Context], Tensor | Pairs]) -> Measure:
    """Make a kind of head from a function of the context that returns a mask `[batch, query, key]`.

    Or its indices, as of `mask.nonzero(as_tuple=True)`, where there is a shorter way to them. The score of a query
    is its weight on those keys, and the kind is defined for the queries with at least one. Keys that a query can't
    see, and queries at position 0 or in padding, are dropped for you.

    >>> import metaint
    >>> @metaint.kind
    ... def second_token(context):
    ...     "The token at position 1."
    ...     return (context.rank == 1)[:, None].expand_as(context.visible)
    >>> metaint.HeadProbe([second_token, "induction"]).measures[0].form
    'kind'
    """
    return _measure("kind", function)


@door
def statistic(function: Callable[[Tile], Tensor]) -> Measure:
    """Make a statistic from a function of a tile that returns values `[batch, head, query]`.

    Not a number means that the statistic is not defined for that query.

    >>> import metaint
    >>> @metaint.statistic
    ... def runner_up(tile):
    ...     "The second largest weight of the row."
    ...     return tile.pattern.topk(2, dim=-1).values[..., 1]
    >>> runner_up.name, runner_up.form
    ('runner_up', 'statistic')
    """
    return _measure("statistic", function)


def _measure(form: Literal["kind", "statistic"], function: Callable[..., Any]) -> Measure:
    measure = Measure(function.__name__, form, function)
    measure.__doc__, measure.__module__ = function.__doc__, function.__module__
    return measure
