"""What `/residual` and `/inner` share: one row a layer, for machines (`layer_frame`, `layers_json`) and terminals.

A block stands in the row of the layer that it starts from, so that the last row has none.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import xarray as xr
from rich.console import Console

from metaint.scans.finding import Scan, group_of
from metaint.views.drawing.terminal import number, print_columns
from metaint.views.groups.group_view import group_json

_DEPTHS = ("layer", "block")
# Further dimensions of which each value becomes a column of its own.
_SPREAD = {"position", "rank"}


def layer_frame(scan: Scan, group: str) -> pd.DataFrame:
    """One row a layer, a column for each variable of `/residual` or `/inner` along layers or blocks.

    Variables that also run over position buckets or ranks become a column for each (`norm_geometric_position_1-3`,
    `massive_value_rank_1`); quantiles, histograms and single tokens stay in the scan.
    """
    data = group_of(scan, group)
    columns: dict[str, Any] = {}
    for key in map(str, [*data.data_vars, *data.coords]):
        values = data[key]
        if key in _DEPTHS or not _has_rows(values):
            continue
        further = [str(dim) for dim in values.dims if dim not in _DEPTHS]
        if not further:
            columns[key] = pd.Series(values.to_series())
            continue
        depth = next(str(dim) for dim in values.dims if dim in _DEPTHS)
        spread = values.transpose(depth, further[0]).to_pandas()
        columns |= {f"{key}_{further[0]}_{value}": spread[value] for value in spread}
    table = pd.DataFrame({name: column.reindex(data["layer"].values) for name, column in columns.items()})
    return table.rename_axis("layer").reset_index()


def _has_rows(values: xr.DataArray) -> bool:
    """Whether a variable stands in the rows of `layer_frame`."""
    further = [dim for dim in values.dims if dim not in _DEPTHS]
    return values.ndim - len(further) == 1 and len(further) <= 1 and set(further) <= _SPREAD


def layers_json(data: xr.Dataset, group: str) -> dict[str, Any]:
    """For JSON: attributes, scalars, one record for each layer, and what runs along other dimensions as it is."""
    scalars = {str(name): None if value.isnull() else value.item() for name, value in data.items() if not value.dims}
    layers = layer_frame(data, group).to_json(orient="records", double_precision=12)
    others = [name for name, values in data.items() if values.dims and not _has_rows(values)]
    rest = group_json(data[others])
    return {
        "attributes": data.attrs,
        **scalars,
        "layers": json.loads(layers or "[]"),
        "coordinates": rest["coordinates"],
        "variables": rest["variables"],
    }


# ---- the terminal -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of a terminal table: its heading, and one cell a layer."""

    heading: str
    cells: Callable[[xr.Dataset], list[str]]


def print_layers(console: Console, title: str, data: xr.Dataset, columns: Sequence[Column]) -> None:
    """A row for each layer; a wider terminal gets more columns."""
    layers = [str(layer) for layer in data["layer"].values]
    print_columns(console, title, [("layer", layers), *((column.heading, column.cells(data)) for column in columns)])


def cells(values: xr.DataArray, layers: xr.DataArray) -> list[str]:
    """One cell a layer; the block that starts there, for what runs along blocks."""
    return [_short(value) for value in values.to_series().reindex(layers.values)]


def _short(value: float) -> str:
    """`number`, and a power of ten for what would be a long row of digits."""
    return f"{value:.1e}" if 1e6 <= abs(value) < math.inf else number(value)


def ranges(low: Sequence[str], high: Sequence[str]) -> list[str]:
    return ["–" if least == "–" else f"{least} to {most}" for least, most in zip(low, high, strict=True)]


def column(heading: str, name: str, **where: Any) -> Column:
    """A variable, at one place of its further dimensions."""
    return Column(heading, lambda data: cells(data[name].sel(where, drop=True), data["layer"]))


def interval(heading: str, name: str) -> Column:
    """The ends of a variable's interval."""

    def both(data: xr.Dataset) -> list[str]:
        low, high = (cells(data[name + end], data["layer"]) for end in ("_low", "_high"))
        return ranges(low, high)

    return Column(heading, both)
