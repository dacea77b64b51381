"""Two scans beside each other in a figure: maps of what differs, and the largest differences with their intervals.

In: what `metaint.compare` gives. Out: a plotly figure with a caption.
"""

from html import escape
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from metaint.errors import door
from metaint.views.comparison.table import (
    SURE,
    changed_labels,
    check_comparison,
    described,
    difference_frame,
    shown_scores,
)
from metaint.views.drawing.panels import BLUE, BOTH_WAYS, GREY, finish, whole_ticks
from metaint.views.drawing.terminal import number

# Maps that are drawn, and differences below them, at most.
_MAPS = 6
_ROWS = 12
# Pixels of a layer's height, of all layers at least and at most, of a difference's row, and between rows of panels.
_LAYER = 11
_LEAST, _MOST = 120, 340
_ROW = 22
_GAP = 78
# With more heads than this two maps stand side by side in place of three.
_FEW = 24
# Pixels that names of differences have beside them, of the width of all panels.
_NAMES, _WIDTH = 150, 794
_CAPTION = (
    "How to read: each cell of a map is a head, red where b scores higher and blue where it scores lower, each map up "
    "to the number in its title; a full triangle marks a label that was gained, an empty one a label that was lost "
    "(on the map of the score that it rests on). Below, the largest differences in standard deviations over the heads, "
    "with 95 % intervals, full where sure at a false discovery rate of 5 %. It misleads where a scale is small: a map "
    "is as vivid for a change of 0.001; where the two read different tokens, which differ too; and where a score that "
    "moves is read as a function that changed, which ablation tells."
)


@door
def plot_comparison(comparison: xr.Dataset) -> go.Figure:
    """Maps of what differs between two scans, labels gained and lost on them, and the largest differences below.

    - `comparison`: what `metaint.compare` gives. The six main scores that move most are drawn.

    Raises InputError where it is anything else.

    >>> import metaint, torch
    >>> from metaint.toys.small import small_transformer
    >>> sizes = {"n_layers": 2, "n_heads": 2, "d_model": 16, "d_mlp": 32, "d_vocab": 50, "n_ctx": 32}
    >>> one, other = (small_transformer(norm="pre", **sizes, seed=seed) for seed in (0, 1))
    >>> tokens = torch.arange(40).view(4, 10)
    >>> comparison = metaint.compare(metaint.scan(one, tokens), metaint.scan(other, tokens))
    >>> metaint.plot_comparison(comparison).layout.title.text
    'What differs between two scans'
    """
    check_comparison(comparison)
    scores, frame = _moving_most(comparison), difference_frame(comparison)
    largest = frame.head(_ROWS)
    figure, inside = _frame(comparison, scores, len(largest))
    changes = changed_labels(comparison)
    beside = _beside(comparison, scores)
    for k, score in enumerate(scores):
        where: Any = {"row": k // beside + 1, "col": k % beside + 1}
        figure.add_trace(_map(comparison, score, changes), **where)
        _mark(figure, comparison, score, changes, where)
    _forest(figure, largest, -(-len(scores) // beside) + 1)
    figure.update_layout(height=inside)
    finish(figure, "What differs between two scans", {"": comparison}, _CAPTION, "")
    figure.update_layout(title_subtitle_text=escape(described(comparison), quote=False), hovermode="closest")
    _tidy(figure, comparison, len(scores), beside)
    return figure


def _moving_most(comparison: xr.Dataset) -> list[str]:
    """The shown scores whose heads move most beside their spread, in the order in which they are always shown."""
    names = shown_scores(comparison)
    shown = comparison.sel(score=names)
    moved = abs(shown["difference"]).mean(("layer", "head")) / shown["spread"].where(shown["spread"] > 0)
    order = np.argsort(-np.nan_to_num(moved.values), kind="stable")[:_MAPS]
    return [names[k] for k in sorted(order)]


def _beside(comparison: xr.Dataset, scores: list[str]) -> int:
    return min(len(scores), 3 if comparison.sizes["head"] <= _FEW else 2)


def _frame(comparison: xr.Dataset, scores: list[str], rows: int) -> tuple[go.Figure, float]:
    """Empty panels, and the pixels of all of them: maps above, one wide panel below."""
    beside = _beside(comparison, scores)
    rows_of_maps = -(-len(scores) // beside)
    height = min(max(_LAYER * comparison.sizes["layer"], _LEAST), _MOST)
    heights = [height] * rows_of_maps + [_ROW * rows + 16]
    inside = sum(heights) + _GAP * (len(heights) - 1)
    specs: list[list[Any]] = [[{}] * beside for _ in range(rows_of_maps)]
    specs.append([{"colspan": beside}, *[None] * (beside - 1)])
    titles = [_title(comparison, score) for score in scores] + [""] * (rows_of_maps * beside - len(scores))
    figure = make_subplots(
        len(heights), beside, specs=specs, row_heights=heights, subplot_titles=titles, horizontal_spacing=0.04,
        vertical_spacing=_GAP / inside,
    )  # fmt: skip
    return figure, inside


def _title(comparison: xr.Dataset, score: str) -> str:
    """The score, its scale and its rank agreement."""
    limit = _limit(comparison, score)
    agreement = number(float(comparison["spearman"].sel(score=score)))
    return f"<b>{score.replace('_', ' ')}</b><br>rank agreement {agreement} · ± {limit:.2g}"


def _limit(comparison: xr.Dataset, score: str) -> float:
    return float(abs(comparison["difference"].sel(score=score)).max()) or 1.0


def _map(comparison: xr.Dataset, score: str, changes: pd.DataFrame) -> go.Heatmap:
    limit = _limit(comparison, score)
    data = comparison.sel(score=score).transpose(..., "layer", "head")
    changed: dict[str, str] = {}
    for head, label, change in zip(changes["head"], changes["label"], changes["change"], strict=True):
        changed[head] = changed.get(head, "") + f"<br><b>{change} {label.replace('_', ' ')}</b>"
    told = [[_told(data, i, j, changed) for j in range(data.sizes["head"])] for i in range(data.sizes["layer"])]
    return go.Heatmap(
        z=data["difference"].values, x=data["head"].values, y=data["layer"].values, zmin=-limit, zmax=limit,
        colorscale=BOTH_WAYS, showscale=False, name=score, customdata=told,
        hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip


def _told(data: xr.Dataset, i: int, j: int, changed: dict[str, str]) -> str:
    """What the pointer shows of a head, with its labels that came or went."""
    at = {name: float(data[name].values[i, j]) for name in ("a", "b", "difference", "low", "high", "q_value")}
    between = "" if np.isnan(at["low"]) else f" ({number(at['low'])} to {number(at['high'])})"
    head = f"{data['layer'].values[i]}.{data['head'].values[j]}"
    text = f"head {head}: {number(at['a'])} → {number(at['b'])}<br>difference {number(at['difference'])}{between}"
    return f"{text}<br>q {number(at['q_value'])}{changed.get(head, '')}"


def _mark(figure: go.Figure, comparison: xr.Dataset, score: str, changes: pd.DataFrame, where: Any) -> None:
    """Triangles where labels that rest on this score came or went."""
    if "rests_on" not in comparison:
        return
    labels = comparison["label"].values[comparison["rests_on"].values == score]
    for change, symbol in (("gained", "triangle-up"), ("lost", "triangle-down-open")):
        chosen = changes[changes["label"].isin(labels.tolist()) & (changes["change"] == change)]
        if chosen.empty:
            continue
        marker = {"size": 8, "color": "black", "symbol": symbol, "line": {"color": "black", "width": 1.2}}
        dots = go.Scatter(x=chosen["index"], y=chosen["layer"], mode="markers", marker=marker)
        figure.add_trace(dots.update(hoverinfo="skip", showlegend=False, name=change), **where)


def _forest(figure: go.Figure, largest: pd.DataFrame, row: int) -> None:
    """A row for each of the largest differences, in spreads, with its interval."""
    ends = [(abs(largest[end] - largest["difference"]) / largest["spread"]).to_numpy() for end in ("high", "low")]
    sure = (largest["q_value"] <= SURE).tolist()
    rows = list(range(len(largest)))
    told = [
        f"head {each['head']}, {each['score'].replace('_', ' ')}: {number(each['a'])} → {number(each['b'])}"
        for each in largest.to_dict("records")
    ]
    symbols = ["square" if is_sure else "square-open" for is_sure in sure]
    bars = {"type": "data", "symmetric": False, "array": ends[0], "arrayminus": ends[1], "thickness": 1.4, "width": 3}
    dots = go.Scatter(
        x=largest["in_spreads"], y=rows, mode="markers", customdata=told, showlegend=False, name="largest",
        marker={"color": BLUE, "size": 8, "symbol": symbols}, error_x=bars,
        hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip
    figure.add_trace(dots, row=row, col=1)
    figure.add_vline(0, line={"color": GREY, "width": 1}, row=row, col=1)  # type: ignore[arg-type]
    names = [f"{each['head']} {each['score'].replace('_', ' ')}" for each in largest.to_dict("records")]
    figure.update_yaxes(tickvals=rows, ticktext=names, range=[len(rows) - 0.4, -0.6], row=row, col=1)
    figure.update_xaxes(title_text="difference, in standard deviations over the heads", row=row, col=1)
    figure.update_xaxes(domain=[_NAMES / _WIDTH, 1], row=row, col=1)


def _tidy(figure: go.Figure, comparison: xr.Dataset, maps: int, beside: int) -> None:
    """Small titles, whole numbers on the axes of maps, layer 0 above."""
    figure.for_each_annotation(lambda note: note.update(font_size=12) if note.name != "caption" else None)
    ticks = {dim: whole_ticks(comparison.sizes[dim], 14) for dim in ("layer", "head")}
    ends = {dim: [comparison[dim].values[0] - 0.5, comparison[dim].values[-1] + 0.5] for dim in ("layer", "head")}
    for k in range(maps):
        where: Any = {"row": k // beside + 1, "col": k % beside + 1}
        figure.update_xaxes(tick0=0, dtick=ticks["head"], range=ends["head"], showgrid=False, **where)
        figure.update_xaxes(title_text="head", title_standoff=4, **where)
        figure.update_yaxes(tick0=0, dtick=ticks["layer"], range=ends["layer"][::-1], showgrid=False, **where)
        if k % beside == 0:
            figure.update_yaxes(title_text="layer", **where)
    layout: Any = figure.layout
    figure.update_layout(height=layout.height + 26, margin_t=layout.margin.t + 26)
