"""What is shown of a group: one `GroupView` beside its figures, and one line in `catalogue.py`.

Reports, tables, JSON and the shell ask for nothing else.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import xarray as xr
from plotly import graph_objects as go
from rich.console import Console


def group_json(data: xr.Dataset) -> dict[str, Any]:
    """A group for JSON: attributes, coordinates and variables with their dimensions; what is not finite is a text."""
    whole = data.to_dict(data="list")
    coordinates, variables = (
        {name: {"dims": list(values["dims"]), "data": _plain(values["data"])} for name, values in whole[part].items()}
        for part in ("coords", "data_vars")
    )
    return {"attributes": data.attrs, "coordinates": coordinates, "variables": variables}


def _plain(values: Any) -> Any:
    if isinstance(values, list):
        return [_plain(value) for value in values]
    if isinstance(values, float) and not math.isfinite(values):
        return None if math.isnan(values) else str(values)
    return values


@dataclass(frozen=True)
class GroupView:
    """What is shown of one group of a scan."""

    group: str
    figures: Callable[[xr.DataTree], Mapping[str, go.Figure]]
    """Every figure that a scan with this group allows, by name."""
    frames: Mapping[str, Callable[[xr.DataTree], pd.DataFrame]]
    """Its wide tables by name; the first is the one that the shell gives as CSV."""
    shown: tuple[tuple[str, ...], ...]
    """The dimensions of those variables that the wide tables show: others get tables of their own."""
    print: Callable[[Console, xr.DataTree], None]
    """What the terminal shows."""
    source: str
    """Where what the group holds comes from, in one line."""
    json: Callable[[xr.Dataset], Any] = group_json
    """The group for JSON, every variable in it."""
