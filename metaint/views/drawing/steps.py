"""Axes over the steps of training: along the step, or along its square root."""

from collections.abc import Collection, Mapping
from html import escape
from typing import Any

import numpy as np
import xarray as xr
from plotly import graph_objects as go

from metaint.views.drawing.panels import finish, short_name

_ROOT_AXIS = "optimiser step (square-root scale)"
# Parts of the axis between two ticks, about.
_TICKS = 6
# Two ticks nearer than this share of the axis would touch with their labels.
_NEAR = 0.06
# Ticks of counts, the first with at most `_COUNTS` of them on the axis.
_COUNT_STEPS = (1, 2, 5, 10, 20, 50, 100)
_COUNTS = 8


def on_root(data: xr.Dataset) -> xr.Dataset:
    """The same along the square root of the step."""
    return data.assign_coords(step=np.sqrt(data["step"].values))


def over_training(figure: go.Figure, title: str, runs: Collection[str], caption: str) -> None:
    """The common look of what is drawn along roots of steps: steps as ticks, and in what the pointer shows."""
    finish(figure, title, {"": xr.Dataset()}, caption, _ROOT_AXIS)
    traces: Any = figure.data
    drawn = [trace for trace in traces if trace.x is not None and trace.x[0] is not None]
    last = max(float(trace.x[-1]) for trace in drawn if trace.fill is None) ** 2
    ticks = _root_ticks(last)
    figure.update_xaxes(tickvals=np.sqrt(ticks), ticktext=[f"{tick:g}" for tick in ticks])
    for trace in drawn:
        if trace.hovertemplate:
            steps = [f"step {round(root**2)}, " for root in trace.x]
            trace.update(text=steps, hovertemplate="%{text}" + trace.hovertemplate)
    figure.update_layout(title_subtitle_text=f"{_runs(runs)}, {last:.0f} steps", hovermode="closest")


def _root_ticks(last: float) -> list[float]:
    """Round steps, evenly spread over the root of the axis, its ends among them."""
    round_steps = [float(f"{max(1, last * (i / _TICKS) ** 2):.1g}") for i in range(1, _TICKS)]
    ticks = sorted({0.0, *round_steps, round(last)})
    if len(ticks) > 2 and np.sqrt(last) - np.sqrt(ticks[-2]) < _NEAR * np.sqrt(last):
        ticks.pop(-2)
    return ticks


def along_steps(figure: go.Figure, title: str, named: Mapping[str, xr.Dataset], caption: str) -> go.Figure:
    """The common look of what is drawn along the steps themselves."""
    finish(figure, title, named, caption, "optimiser step")
    last = max(int(data["step"].max()) for data in named.values())
    figure.update_layout(title_subtitle_text=f"{_runs(named)}, {last} steps", hovermode="closest")
    return figure


def _runs(runs: Collection[str]) -> str:
    return escape(short_name(next(iter(runs))), quote=False) if len(runs) == 1 else f"{len(runs)} runs"


def whole_numbers(figure: go.Figure, row: int, most: float) -> None:
    """Counts have ticks at whole numbers, and room above where all are 0."""
    step = next((step for step in _COUNT_STEPS if most <= _COUNTS * step), 1000)
    top = max(most, 1)
    figure.update_yaxes(dtick=step, tickformat="d", range=[-0.06 * top, 1.08 * top], row=row, col=1)
