"""Sums and counts of named variables for each sequence, and the means and intervals that they make.

In: variables, each declared once with its dimensions and its words, and what a pass adds to them. Out: the slots of a
`torchmetrics` state [sequence, slot, *rest], and from it datasets. Sequences are kept apart, since an interval
resamples them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from metaint.measures.resampling import bootstrap_interval
from metaint.scans.assemble import shaped

BOUNDS = ("_low", "_high")


@dataclass(frozen=True)
class Variable:
    """One variable of a group. With `of` it is a mean: what was added to that slot over what was added to `count`.

    A mean without a `count` is one of a single value for each sequence, NaN where the sequence has none. `along` are
    the labels of its first dimension, each of which has a slot of its own, "of label". `then` is applied to the mean
    and the bounds of its interval.
    """

    name: str
    dims: tuple[str, ...]
    words: str = ""
    of: str = ""
    count: str = ""
    along: tuple[Any, ...] = ()
    then: Callable[[Tensor], Tensor] | None = None
    interval: bool = True

    @property
    def slots(self) -> list[str]:
        """The slots that are summed."""
        return [f"{self.of} {label}" for label in self.along] if self.along else [self.of]


def mean(name: str, dims: tuple[str, ...], count: str, words: str = "", **more: Any) -> Variable:
    """A variable that is a mean of what is added under its own name, unless `of` is given."""
    return Variable(name, dims, words, count=count, **{"of": name, **more})


class Means:
    """The slots of a state [sequence, slot, *rest] that hold the sums and counts of some means."""

    def __init__(self, variables: Sequence[Variable]) -> None:
        self.variables = [variable for variable in variables if variable.of]
        summed = [slot for variable in self.variables for slot in variable.slots]
        counts = [variable.count for variable in self.variables if variable.count]
        self.slots = {name: i for i, name in enumerate(dict.fromkeys([*summed, *counts]))}
        # Of what is summed along a dimension, the slots of all its labels.
        self.places = {name: [place] for name, place in self.slots.items()}
        self.places |= {variable.of: self.index(variable.slots) for variable in self.variables if variable.along}

    def room(
        self, batch: int, *rest: int, dtype: torch.dtype, device: torch.device
    ) -> Float[Tensor, "batch slot *rest"]:
        """A state of new sequences, to which nothing was added yet."""
        return torch.zeros(batch, len(self.slots), *rest, dtype=dtype, device=device)

    def index(self, names: Sequence[str]) -> list[int]:
        """Where these slots lie."""
        return [self.slots[name] for name in names]

    def of(self, state: Float[Tensor, "sequence slot *rest"], slot: str) -> Float[Tensor, "sequence *rest"]:
        """What was added to a slot in each sequence."""
        return state[:, self.slots[slot]]

    def compute(self, state: Float[Tensor, "sequence slot *rest"], *dims: str) -> dict[str, Tensor]:
        """The means whose dimensions are `dims`, each with its interval over sequences: "", _low and _high."""
        chosen = [variable for variable in self.variables if variable.dims == dims]
        parts = [self._sums_and_counts(state, variable) for variable in chosen]
        with_interval = [part for variable, part in zip(chosen, parts, strict=True) if variable.interval]
        bounds = _bounds(with_interval)
        values: dict[str, Tensor] = {}
        for variable, (sums, counts) in zip(chosen, parts, strict=True):
            results = {"": sums.sum(0) / counts.sum(0)}
            if variable.interval:
                results |= next(bounds)
            for end, value in results.items():
                value = value if variable.along else value[0]
                values[variable.name + end] = variable.then(value) if variable.then else value
        return values

    def ratios(
        self, state: Float[Tensor, "sequence slot *rest"], *dims: str
    ) -> Iterator[tuple[str, Float[Tensor, "sequence *rest"], Float[Tensor, "sequence *rest"]]]:
        """The means whose dimensions are `dims` and that have an interval, each with what it rests on."""
        for variable in self.variables:
            if variable.dims == dims and variable.interval:
                sums, counts = self._sums_and_counts(state, variable)
                yield variable.name, sums[:, 0], counts[:, 0]

    def _sums_and_counts(self, state: Tensor, variable: Variable) -> tuple[Tensor, Tensor]:
        """What one mean rests on, each [sequence, label, *rest]; one label where it is along none."""
        sums = state[:, self.index(variable.slots)]
        if variable.count:
            return sums, state[:, self.index([variable.count])].expand_as(sums)
        known = sums.isfinite()
        return sums.where(known, 0.0), known.to(sums.dtype)


def _bounds(parts: Sequence[tuple[Tensor, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The interval of each ratio of sums to counts; one bootstrap for all, since its draws cost more than its sums."""
    if not parts:
        return
    sums, counts = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
    sizes = [part.shape[1] for part, _ in parts]
    bounds = [bound.split(sizes) for bound in bootstrap_interval(sums, counts)]
    for pair in zip(*bounds, strict=True):
        yield dict(zip(BOUNDS, pair, strict=True))


def as_dataset(values: Mapping[str, Tensor], variables: Sequence[Variable], coords: Mapping[str, Any]) -> xr.Dataset:
    """Values as labelled variables, in the order and with the dimensions and words that they were declared with."""
    data = xr.Dataset(coords=coords)
    for variable in variables:
        for name in (variable.name, *(variable.name + end for end in BOUNDS)):
            if name not in values:
                continue
            value = values[name]
            if value.ndim == len(variable.dims):
                data[name] = (variable.dims, value.numpy())
            else:
                data[name] = shaped(variable.dims, value, coords)
        if variable.name in data and variable.words:
            data[variable.name].attrs["description"] = variable.words
    return data
