"""`/heads` as a figure: a map of all heads for each score, layers down and heads across, labelled ones marked.

In: a scan. Out: a plotly figure with a caption.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from metaint.errors import InputError, door
from metaint.scans.evidence import induction_source
from metaint.scans.finding import Scan, one_group
from metaint.scans.labels import label_heads
from metaint.views.drawing.panels import SHADES, finish, shares_scale, there, whole_ticks
from metaint.views.drawing.terminal import number
from metaint.views.groups.group_view import GroupView
from metaint.views.groups.head_tables import head_frame, heads_json, print_scan
from metaint.views.groups.lags import plot_lags

# What is drawn unless asked otherwise; on tokens that don't repeat, matches take the place of `induction`.
_MAIN = (
    "induction", "previous_token", "duplicate_token", "first_token", "local_mass", "averaging", "max_weight", "entropy",
)  # fmt: skip
# The score on whose map each label is marked; that of "induction" depends on the tokens.
_MARKED_ON = {
    "previous_token": "previous_token",
    "duplicate_token": "duplicate_token",
    "current_token": "current_token",
    "sink": "first_token",
    "local": "local_mass",
    "averaging": "averaging",
    "argmax": "max_weight",
}
_TITLES = {"first_token": "first token (sink)"}
# Pixels of a map's height, at least and at most.
_LEAST = 130
_MOST = 560
# Pixels of a cell's width, at most.
_CELL = 26
# Pixels between rows of maps, of all maps of a row together, and of room for the first row's titles.
_GAP = 66
_ACROSS = 740
_ABOVE = 30
# With more heads than this two maps stand side by side in place of three, so that a cell can still be pointed at.
_FEW = 24


@door
def plot_heads(scan: Scan, scores: Sequence[str] | None = None) -> go.Figure:
    """A map of each score, heads across and layers down, beside what uniform attention scores; labelled heads marked.

    - `scan`: a scan, or its `/heads`.
    - `scores`: names of (layer, head) variables that were measured; by default induction (`prefix_match_correct` where
      the tokens don't repeat), previous, duplicate and first token, local mass, averaging, the largest weight, and
      entropy, as far as the scan has them. Scores between 0 and 1 share a scale.

    A label's dot is on the map of the score that earned it; the labels are those of `metaint.label_heads`. Raises
    InputError where a scan has no `/heads`, is a recording over several steps, or lacks a score.

    >>> import metaint, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> scan = metaint.scan(model, torch.arange(10).repeat(2, 2), [metaint.HeadProbe()])
    >>> [trace.name for trace in metaint.plot_heads(scan, ["entropy", "induction"]).data if trace.type == "heatmap"]
    ['entropy', 'induction']
    """
    model, data = one_group(scan, "heads")
    names = _chosen(data, scores)
    beside = 3 if data.sizes["head"] <= _FEW else 2
    columns = min(len(names), beside)
    rows = -(-len(names) // columns)
    cell = min(_ACROSS / columns / data.sizes["head"], _CELL)
    height = min(max(cell * data.sizes["layer"], _LEAST), _MOST)
    inside = rows * height + (rows - 1) * _GAP
    figure = make_subplots(
        rows, columns, subplot_titles=[_title(data, name) for name in names], shared_yaxes=True,
        horizontal_spacing=0.035, vertical_spacing=(rows > 1) * _GAP / inside,
    )  # fmt: skip
    labels = _labels(data)
    for i, name in enumerate(names):
        row, column = divmod(i, columns)
        where: Any = {"row": row + 1, "col": column + 1}
        figure.add_trace(_map(data, name, labels), **where)
        _mark(figure, data, name, labels, cell, height, **where)
        figure.update_xaxes(title_text="head", title_standoff=4, **where)
        if column == 0:
            figure.update_yaxes(title_text="layer", **where)
    figure.update_layout(height=inside)
    finish(figure, "Scores of the heads", {model: data}, _CAPTION, "")
    _tidy(figure, data, inside)
    return figure


def _chosen(data: xr.Dataset, scores: Sequence[str] | None) -> list[str]:
    """The scores to draw, in order; InputError for one that isn't there."""
    measured = [
        str(name)
        for name in data
        if set(data[name].dims) == {"layer", "head"} and f"{name}_count" in data and there(data, str(name))
    ]
    if scores is None:
        induction = induction_source(data)
        main = [induction if name == "induction" else name for name in _MAIN]
        scores = [name for name in main if name in measured] or measured
        if not scores:
            raise InputError("scan has no score of single heads in /heads: scan with metaint.HeadProbe().")
    unknown = [name for name in scores if name not in measured]
    if isinstance(scores, str) or unknown or not scores:
        what = f"names {unknown[0]!r}" if unknown and not isinstance(scores, str) else f"is {scores!r}"
        raise InputError(f"scores {what}: give a list of some of {', '.join(measured)}.")
    return list(scores)


def _labels(data: xr.Dataset) -> dict[tuple[int, int], list[str]]:
    """The labels of each head that earned any, by its place."""
    labels: dict[tuple[int, int], list[str]] = {}
    for row in label_heads(data).query("label != 'none'").to_dict("records"):
        labels.setdefault((row["layer"], row["index"]), []).append(row["label"])
    return labels


def _map(data: xr.Dataset, name: str, labels: dict[tuple[int, int], list[str]]) -> go.Heatmap:
    values = _values(data, name)
    scale: dict[str, Any] = {"coloraxis": "coloraxis"}
    if not _is_share(values):
        scale = {"zmin": np.nanmin(values), "zmax": np.nanmax(values), "colorscale": SHADES, "showscale": False}
    return go.Heatmap(
        z=values,
        x=data["head"].values,
        y=data["layer"].values,
        customdata=_told(data, name, labels),
        hovertemplate="%{customdata}<extra></extra>",
        name=name,
        **scale,
    )


def _told(data: xr.Dataset, name: str, labels: dict[tuple[int, int], list[str]]) -> list[list[str]]:
    """What the pointer shows of each head: its score with interval, uniform and null, and its labels."""
    ends = ("", "_low", "_high", "_uniform", "_null_mean", "_null_std")
    score, low, high, uniform, mean, std = (_values(data, name + end) for end in ends)
    known = [~np.isnan(values) for values in (low, uniform, mean)]
    rows = []
    for i, layer in enumerate(data["layer"].values):
        row = []
        for j, head in enumerate(data["head"].values):
            at = (i, j)
            text = f"head {layer}.{head}: {number(score[at])}"
            text += f" ({number(low[at])} to {number(high[at])})" if known[0][at] else ""
            text += f"<br>uniform {number(uniform[at])}" if known[1][at] else ""
            text += f"<br>null {number(mean[at])} ± {number(std[at])}" if known[2][at] else ""
            row.append(text + (f"<br><b>{', '.join(labels[at])}</b>" if at in labels else ""))
        rows.append(row)
    return rows


def _mark(
    figure: go.Figure, data: xr.Dataset, name: str, labels: dict[tuple[int, int], list[str]], cell: float,
    height: float, row: int, col: int,
) -> None:  # fmt: skip
    """A dot in the cell of each head whose label rests on this score; nothing where there is none."""
    sources = {**_MARKED_ON, "induction": induction_source(data)}
    wanted = [label for label, source in sources.items() if source == name]
    places = [at for at, earned in labels.items() if set(wanted) & set(earned)]
    if not places:
        return
    size = max(5.0, min(11.0, 0.5 * min(cell, height / data.sizes["layer"])))
    marker = {"size": size, "color": "white", "line": {"color": "black", "width": 1.2}}
    x, y = ([data[dim].values[at[k]] for at in places] for k, dim in ((1, "head"), (0, "layer")))
    dots = go.Scatter(x=x, y=y, mode="markers", marker=marker, hoverinfo="skip", showlegend=False, name=wanted[0])
    figure.add_trace(dots, row=row, col=col)


def _title(data: xr.Dataset, name: str) -> str:
    """The score's name and what uniform attention scores, which differs between layers with their windows."""
    title = _TITLES.get(name, name.replace("_", " "))
    values = _values(data, name)
    uniform = _values(data, f"{name}_uniform")
    if not np.isnan(uniform).all():
        least, most = number(np.nanmin(uniform)), number(np.nanmax(uniform))
        title += f" · uniform {least}" + (f" to {most}" if most != least else "")
    if not _is_share(values):
        title += f"<br>light {number(np.nanmin(values))}, dark {number(np.nanmax(values))}"
    return f"<b>{title.replace(' · ', '</b> · ', 1)}" if " · " in title else f"<b>{title}</b>"


def _tidy(figure: go.Figure, data: xr.Dataset, inside: float) -> None:
    """Small titles, whole numbers on the axes, layer 0 above, and the shared scale at the side."""
    figure.for_each_annotation(lambda note: note.update(font_size=12) if note.name != "caption" else None)
    ticks = {dim: whole_ticks(data.sizes[dim], 14) for dim in ("layer", "head")}
    ends = {dim: [data[dim].values[0] - 0.5, data[dim].values[-1] + 0.5] for dim in ("layer", "head")}
    figure.update_xaxes(tick0=0, dtick=ticks["head"], range=ends["head"], showgrid=False)
    figure.update_yaxes(tick0=0, dtick=ticks["layer"], range=ends["layer"][::-1], showgrid=False)
    layout: Any = figure.layout
    figure.update_layout(coloraxis=shares_scale("score", min(220, inside)), hovermode="closest")
    figure.update_layout(height=layout.height + _ABOVE, margin_t=layout.margin.t + _ABOVE)


def _is_share(values: np.ndarray) -> bool:
    return bool(np.nanmin(values) >= -1e-6 and np.nanmax(values) <= 1 + 1e-6)


def _values(data: xr.Dataset, name: str) -> np.ndarray:
    if name not in data:
        return np.full((data.sizes["layer"], data.sizes["head"]), np.nan)
    return data[name].transpose("layer", "head").values


_CAPTION = (
    "How to read: each cell is a head, the darker the higher its score; a kind of head stands out where its cell is "
    "far above what uniform attention scores on the same tokens (in the title). A white dot marks a head that earned "
    "the score's label: above its threshold, above uniform attention and above its null. It misleads where a map is "
    "dark all over: short contexts, sinks and windows raise a score for all heads, and averaging and entropy are "
    "highest in heads that look at nothing in particular, as before training; and attention tells where a head looks, "
    "not what it moves or whether that matters."
)


def _figures(scan: xr.DataTree) -> dict[str, go.Figure]:
    curves = {"lags": plot_lags(scan)} if "by_lag" in scan["heads"].dataset else {}
    return {"heads": plot_heads(scan), **curves}


VIEW = GroupView(
    group="heads",
    figures=_figures,
    frames={"heads": head_frame, "labels": label_heads},
    shown=(("layer", "head"), ("tau", "layer", "head")),
    print=print_scan,
    source="Olsson et al. 2022, In-context Learning and Induction Heads (arXiv 2209.11895); argmax and averaging "
    "heads: Merrill et al. 2021 (arXiv 2010.09697); sinks: Gu et al. 2025 (arXiv 2410.10781).",
    json=heads_json,
)
