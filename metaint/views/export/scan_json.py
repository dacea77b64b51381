"""A scan as JSON, every variable of every group in it."""

import json
from typing import Any

import xarray as xr

from metaint.views.groups.catalogue import VIEWS
from metaint.views.groups.group_view import group_json


def scan_json(scan: xr.DataTree) -> str:
    """All groups of a scan as JSON; what is not a number is null.

    `attributes` are the scan's. `/heads` is a list with one record for each head; `/residual` and `/inner` have their
    attributes, their scalars, a record for each layer under `layers`, and what runs along other dimensions under
    `variables`; other groups, and those of a recording, have attributes, coordinates and variables.
    """
    groups = {str(name): node.to_dataset() for name, node in scan.children.items() if node.data_vars}
    parts: dict[str, Any] = {"attributes": scan.attrs}
    for name in [*(name for name in VIEWS if name in groups), *(name for name in groups if name not in VIEWS)]:
        data = groups[name]
        plain = name not in VIEWS or "step" in data.dims
        parts[name] = group_json(data) if plain else VIEWS[name].json(data)
    return json.dumps(parts, indent=1, default=str)
