"""`scan.metaint`: what is done with a scan, at the scan itself.

In: any DataTree. Out: figures, the table of labels, a report. Importing this module registers the accessor; it loads
neither plotly nor torch until something is asked for.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import xarray as xr

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from plotly.graph_objects import Figure

    from metaint.views.drawing.view import View


@xr.register_datatree_accessor("metaint")
class ScanAccessor:
    """The methods of `scan.metaint`."""

    def __init__(self, scan: xr.DataTree) -> None:
        self._scan = scan

    def plot(self, group: str | None = None) -> "Figure | dict[str, Figure]":
        """Every figure that the scan allows, by name; of one `group`, its figure, or a dict where it has several.

        Of a recording "training" is the figure over its steps, and the others are of the last step. InputError where
        there is none.
        """
        from metaint.errors import InputError
        from metaint.views.report import figures_of

        by_group = figures_of(self._scan)
        if group is None:
            return {name: figure for figures in by_group.values() for name, figure in figures.items()}
        if group not in by_group:
            raise InputError(f"group is {group!r}: this scan has figures of {', '.join(by_group)}.")
        figures = dict(by_group[group])
        return figures if len(figures) > 1 else next(iter(figures.values()))

    def labels(self) -> "pd.DataFrame":
        """The labels of the heads, as `metaint.label_heads` gives them; InputError where there is no `/heads`."""
        from metaint.scans.labels import label_heads

        return label_heads(self._scan)

    def tables(self) -> "dict[str, pd.DataFrame]":
        """Every table of the scan by name, as `metaint.tables_of` gives them."""
        from metaint.views.export.tables import tables_of

        return tables_of(self._scan)

    def report(self, path: str | Path, views: "Mapping[str, View] | None" = None) -> Path:
        """Write the scan to one HTML file that needs no network, as `metaint.report` does.

        `views` are further pictures with their titles, such as {"Circuit": metaint.show_circuit(circuit)}.
        """
        from metaint.views.report import report

        return report(self._scan, path, views)
