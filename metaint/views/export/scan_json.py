"""A scan as JSON, every variable of every group in it but those of single bundles of sequences."""

import json
from typing import Any

import xarray as xr

from metaint.scans.finding import without_bundles
from metaint.views.groups.catalogue import VIEWS
from metaint.views.groups.group_view import group_json


def scan_json(scan: xr.DataTree) -> str:
    """All groups of a scan as JSON; what is not a number is null, and bundles of sequences stay in the scan.

    `attributes` are the scan's. `/heads` is a list with one record for each head; `/residual` and `/inner` have their
    attributes, their scalars, a record for each layer under `layers`, and what runs along other dimensions under
    `variables`; other groups, and those of a recording, have attributes, coordinates and variables.
    """
    groups = {str(name): node.to_dataset() for name, node in scan.children.items() if node.data_vars}
    groups = {name: without_bundles(data) for name, data in groups.items()}
    parts: dict[str, Any] = {"attributes": scan.attrs}
    for name in [*(name for name in VIEWS if name in groups), *(name for name in groups if name not in VIEWS)]:
        data = groups[name]
        plain = name not in VIEWS or "step" in data.dims
        parts[name] = group_json(data) if plain else VIEWS[name].json(data)
    return json.dumps(parts, indent=1, default=str)
