"""How every figure looks: panels above each other, lines with bands, a legend beside and a caption below.

In: datasets by name. Out: plotly figures of a fixed width, for `views/residual.py` and its neighbours.
"""

import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from plotly import graph_objects as go
from plotly.subplots import make_subplots

# Okabe and Ito's palette, which colour-blind readers can tell apart; without its yellow, too pale for a line.
BLUE = "#0072B2"
VERMILION = "#D55E00"
GREEN = "#009E73"
PURPLE = "#CC79A7"
ORANGE = "#E69F00"
SKY = "#56B4E9"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, "#222222")
GREY = "#767676"
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
# Colours of a map of scores, near white where they are 0, as most are where few heads do what is asked, to dark.
SHADES = ["#f7f9fc", "#d0e0f0", "#97bfde", "#5094c8", "#1c67ab", "#0b3f7c", "#061e42"]
# And of effects, which go both ways from 0: blue below, red above.
BOTH_WAYS = ["#053061", "#2a72b2", "#8ec1dd", "#f7f7f7", "#f2a886", "#c43b3c", "#67001f"]
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")
# The x axis of what runs along layers and of what runs along blocks.
DEPTH = "layer (a block stands at the layer that it starts from)"
# Pixels of the figure's width, and of a panel of height 1.
WIDTH = 900
_PANEL = 270
# Pixels between panels, and above one that stands apart.
_GAP = 26
_APART = 84
# Pixels of the margins left and above.
_LEFT = 76
_TOP = 84
# Pixels of a line of the caption, and from the panels to the first.
_LINE = 17
_CAPTION_AT = 58
# Characters in a line of the caption and of a legend, and of the longest name.
_CAPTION_WRAP = 146
_NAME_WRAP = 22
_NAME_SHOWN = 60
# Layers up to which points are marked.
MARKED = 16


class Line(NamedTuple):
    """One variable to draw, with the colour it has where there is one scan (several are told apart by colour)."""

    variable: str
    label: str
    colour: str
    dash: str = "solid"


def there(data: xr.Dataset, name: str) -> bool:
    return name in data and bool(data[name].notnull().any())


def symbol(i: int) -> str:
    """Colours come round again after the seventh scan; then the markers differ."""
    return _SYMBOLS[i // len(COLOURS) % len(_SYMBOLS)]


def panels(titles: Sequence[str], heights: Sequence[float], apart: bool = False) -> go.Figure:
    """Panels above each other along one x axis; a height of 1 is `_PANEL` pixels.

    The last stands `apart` where it has an x axis of its own.
    """
    figure, shared = make_subplots(len(titles), 1), len(titles) - apart
    gaps = [_APART if apart and row == len(titles) else _GAP for row in range(2, len(titles) + 1)]
    inside = _PANEL * sum(heights) + (_APART - _GAP) * apart
    unit, top = (inside - sum(gaps)) / sum(heights), inside
    for row, (title, height, gap) in enumerate(zip(titles, heights, [*gaps, 0], strict=True), 1):
        domain = [max(top - height * unit, 0) / inside, top / inside]
        figure.update_yaxes(title_text=title, domain=domain, row=row, col=1)
        lower = {"matches": f"x{shared}", "showticklabels": False}
        if row < shared:
            figure.update_xaxes(lower, row=row, col=1)
        top -= height * unit + gap
    figure.update_layout(height=inside)
    return figure


def legend_of(row: int) -> str:
    """The legend beside a panel."""
    return "legend" if row == 1 else f"legend{row}"


def draw(
    figure: go.Figure, row: int, named: Mapping[str, xr.Dataset], lines: Sequence[Line], explain: bool = True
) -> None:
    """The lines of every scan with their bands, in one panel, and if it is to `explain` them in a legend of its own.

    One scan: a colour for each line. Several: a colour for each scan, named once in the first panel's legend, and
    dashes for the lines, explained in grey.
    """
    several = len(named) > 1
    own = legend_of(row) if explain else "legend"
    traces: Any = figure.data
    explained = {trace.legendgroup for trace in traces if trace.showlegend}
    for i, (name, data) in enumerate(named.items()):
        for line in lines:
            if not there(data, line.variable):
                continue
            common: dict[str, Any] = {"legendgroup": f"scan {i}" if several else line.label}
            common["legend"] = "legend" if several else own
            colour = COLOURS[i % len(COLOURS)] if several else line.colour
            if there(data, f"{line.variable}_low"):
                figure.add_trace(_band(data, line.variable, colour).update(common), row=row, col=1)
            named_after = name if several else line.label
            pointed_at = f"{name}, {line.label}" if several else line.label
            curve = _curve(data, line, pointed_at, colour).update(common)
            curve.update(name=wrapped(named_after), marker_symbol=symbol(i))
            curve.showlegend = explain and not (several and common["legendgroup"] in explained)
            explained |= {common["legendgroup"]} if curve.showlegend else set()
            figure.add_trace(curve, row=row, col=1)
    if several and explain and len(lines) > 1:
        for line in lines:
            style = {"color": GREY, "dash": line.dash}
            key = go.Scatter(x=[None], y=[None], mode="lines", line=style, name=wrapped(line.label), legend=own)
            figure.add_trace(key, row=row, col=1)


def shares_scale(title: str, length: float) -> dict[str, Any]:
    """The colour axis of maps of what lies between 0 and 1, explained beside them over so many pixels."""
    return {"cmin": 0, "cmax": 1, "colorscale": SHADES, "colorbar": colour_bar(title, length)}


def colour_bar(title: str, length: float) -> dict[str, Any]:
    """What explains the colours of maps, beside the uppermost."""
    place = {"x": 1.02, "y": 1, "yanchor": "top"}
    return {"title": title, "thickness": 14, "len": length, "lenmode": "pixels", **place}


def whole_ticks(count: int, most: int) -> int:
    """The distance of ticks along so many layers or heads, such that there are `most` at most."""
    return next((step for step in (1, 2, 5, 10, 20, 50) if count <= most * step), 100)


def stripe(figure: go.Figure, row: int, null: float, last: int) -> None:
    """Where cosines of unrelated directions lie; a trace and no shape, so that the axis makes room for it."""
    ends = [0, last]
    stripe = go.Scatter(x=[*ends, *ends[::-1]], y=[null, null, -null, -null], mode="lines", fill="toself")
    stripe.update(fillcolor="rgba(118, 118, 118, 0.13)", line_width=0, hoverinfo="skip", legend=f"legend{row}")
    figure.add_trace(stripe.update(name=wrapped("unrelated directions"), showlegend=True), row=row, col=1)


def log_axis(figure: go.Figure, row: int) -> None:
    axis = "y" if row == 1 else f"y{row}"
    traces: Any = figure.data
    drawn = np.concatenate([t.y for t in traces if t.yaxis == axis and t.y[0] is not None])
    figure.update_yaxes(log_scale(drawn), row=row, col=1)


def log_scale(drawn: np.ndarray) -> dict[str, Any]:
    """A log axis with ticks at powers of ten, over two decades and less at 1, 2 and 5; where the values lie close
    together plotly's own ticks do better."""
    spread = np.nanmax(drawn) / np.nanmin(drawn)
    if not spread > 5:
        return {"type": "log"}
    return {"type": "log", "dtick": "D2" if spread <= 100 else 1, "tickformat": "~g"}


def rule(figure: go.Figure, row: int, at: float) -> None:
    figure.add_hline(at, row=row, col=1, line={"color": GREY, "width": 1}, layer="below")  # type: ignore[arg-type]


def _curve(data: xr.Dataset, line: Line, name: str, colour: str) -> go.Scatter:
    values = data[line.variable]
    x, y = _along(values), values.values
    hover = f"{escape(name)}: %{{y:.4g}}"
    interval = None
    if there(data, f"{line.variable}_low"):
        interval = np.stack([data[line.variable + end].values for end in ("_low", "_high")], -1)
        hover += " (%{customdata[0]:.4g} to %{customdata[1]:.4g})"
    known = np.pad(np.isfinite(y), 1)
    alone = known[1:-1] & ~known[:-2] & ~known[2:]  # a line would not show these
    mode = "lines+markers" if len(x) <= MARKED or alone.any() else "lines"
    return go.Scatter(
        x=x,
        y=y,
        customdata=interval,
        hovertemplate=hover + "<extra></extra>",
        mode=mode,
        line={"color": colour, "dash": line.dash, "width": 2},
        marker={"color": colour, "size": 6},
    )


def _band(data: xr.Dataset, variable: str, colour: str) -> go.Scatter:
    """What lies between `_low` and `_high`, with gaps where either is unknown; a single point is drawn a little wide,
    or it would have no area."""
    low, high = data[f"{variable}_low"], data[f"{variable}_high"]
    along, known = _along(low), np.flatnonzero((low.notnull() & high.notnull()).values)
    corners: list[np.ndarray] = []
    for run in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1):
        x, below, above = along[run], low.values[run], high.values[run]
        if len(run) == 1:
            x, below, above = np.array([x[0] - 0.1, x[0] + 0.1]), below.repeat(2), above.repeat(2)
        gap = np.full((2, min(len(corners), 1)), np.nan)
        corners += [gap, np.stack([x, above]), np.stack([x, below])[:, ::-1]]
    x, y = np.concatenate(corners, 1)
    return go.Scatter(
        x=x,
        y=y,
        mode="lines",
        fill="toself",
        fillcolor=f"rgba({', '.join(str(int(colour[k : k + 2], 16)) for k in (1, 3, 5))}, 0.13)",
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
    )


def _along(values: xr.DataArray) -> np.ndarray:
    """The layers or blocks that a variable runs along."""
    return values[values.dims[0]].values


def finish(figure: go.Figure, title: str, named: Mapping[str, xr.Dataset], caption: str, x_title: str) -> None:
    """The common look: title, x axis, legends right of their panels, and the caption below all."""
    layout: Any = figure.layout
    rows = sorted((axis for axis in layout if axis.startswith("yaxis")), key=lambda axis: int(axis[5:] or 1))
    for row, axis in enumerate(rows, 1):
        top = layout[axis].domain[1]
        layout[legend_of(row)] = {"x": 1.02, "y": top, "yanchor": "top"}
    lines = textwrap.wrap(caption, _CAPTION_WRAP)
    below = _CAPTION_AT + _LINE * len(lines) + 14
    figure.update_layout(
        template="plotly_white",
        width=WIDTH,
        height=layout.height + _TOP + below,
        margin={"l": _LEFT, "r": 30, "t": _TOP, "b": below},
        title={"text": title, "x": 0, "xref": "paper", "y": 1, "yanchor": "top", "pad": {"t": 18}},
        title_subtitle={"text": _facts(named), "font": {"color": GREY}},
        font_family="Arial, Helvetica, sans-serif",  # the caption is wrapped for its width
        modebar_remove=["sendChartToCloud", "select", "lasso"],  # a click on the first would upload the figure
        hovermode=layout.hovermode or "x unified",
    )
    figure.update_yaxes(automargin=False, title_standoff=8, zeroline=False)
    figure.update_xaxes(zeroline=False)
    figure.update_xaxes(title_text=x_title, row=len(rows), col=1)
    if x_title in ("layer", DEPTH):
        longest = max(data.sizes["layer"] for data in named.values())
        figure.update_xaxes(tick0=0, dtick=whole_ticks(longest, 14))
    figure.add_annotation(
        text="<br>".join(lines),
        name="caption",
        x=0,
        y=0,
        xref="paper",
        yref="paper",
        xanchor="left",
        yanchor="top",
        xshift=12 - _LEFT,
        yshift=-_CAPTION_AT,
        align="left",
        showarrow=False,
        font={"size": 12, "color": "#444444"},
    )


def _facts(named: Mapping[str, xr.Dataset]) -> str:
    """What was read, in a line under the title, as far as it is known."""
    counts = sorted(int(data.attrs.get("tokens_seen", 0)) for data in named.values())
    if len(named) == 1:
        name, data = next(iter(named.items()))
        facts, sequences = escape(short_name(name), quote=False), int(data.attrs.get("sequences", 0))
        return facts + f": {counts[0]} tokens in {sequences} sequence{'s' * (sequences != 1)}" * bool(counts[0])
    read = f" of {counts[0]}{'' if counts[0] == counts[-1] else f' to {counts[-1]}'} tokens"
    return f"{len(named)} scans{read * bool(counts[-1])}"


def wrapped(name: str) -> str:
    return "<br>".join(escape(line, quote=False) for line in textwrap.wrap(short_name(name), _NAME_WRAP))


def short_name(name: str) -> str:
    """The end of a name too long to print: folders differ there."""
    return name if len(name) <= _NAME_SHOWN else f"…{name[-_NAME_SHOWN:]}"
