"""A scan from what probes read.

In: probes, or datasets by group. Out: an `xarray.DataTree`, one group each, with facts of the model at its root.
"""

import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike


class Reader(Protocol):
    """What is asked of a probe here."""

    group: str
    facts: dict[str, str | int]

    def to_dataset(self) -> xr.Dataset: ...


def shaped(dims: Sequence[str], value: ArrayLike, coords: Mapping[str, Any]) -> tuple[tuple[str, ...], np.ndarray]:
    """A variable as xarray takes it: `compute` of torchmetrics takes the dimensions off what holds a single number."""
    return tuple(dims), np.asarray(value).reshape([len(coords[dim]) for dim in dims])


def assemble(probes: Sequence[Reader], attributes: Mapping[str, Any] | None = None) -> xr.DataTree:
    """A scan from probes: one group each, with the model's facts and further attributes at the root."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchmetrics warns of a probe that has read nothing yet
        groups = {probe.group: probe.to_dataset() for probe in probes}
    facts = probes[0].facts if probes else {}
    return as_scan(groups, facts, attributes)


def as_scan(
    groups: Mapping[str, xr.Dataset], facts: Mapping[str, Any], attributes: Mapping[str, Any] | None = None
) -> xr.DataTree:
    """A scan of these groups, with facts of the model, further attributes and versions at its root."""
    versions = {f"{name.replace('-', '_')}_version": version(name) for name in ("metaint", "transformer-lens", "torch")}
    root = xr.Dataset(attrs={**facts, **versions, **(attributes or {})})
    return xr.DataTree.from_dict({"/": root, **{f"/{name}": data for name, data in groups.items()}})
