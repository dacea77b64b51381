"""Plotly figures over training: the norm of the parameters, saturation, kinds of heads, and homogeneity slopes.

In: recordings by name, as `read_recording` gives them. Out: figures in the style of `views/figures.py`, each with a
caption that says how to read it and when it misleads. After Merrill et al. 2021 (2010.09697).
"""

import math
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from plotly import graph_objects as go

from metaint.errors import InputError
from metaint.labels import label_heads
from metaint.measures.growth import TRENDS, fit_trends
from metaint.views.panels import (
    COLOURS,
    GREY,
    Line,
    draw,
    finish,
    panels,
    short_name,
    symbol,
)

Recordings = Mapping[str, xr.DataTree]

# How the trends of `measures.growth` are written.
SIGNS = {"t": "t", "sqrt_t": "√t", "fourth_root_t": "t^¼"}
_ACTIVATIONS = {
    "embedding": "embedding", "scores": "scores", "attn_write": "attention adds", "mlp_write": "MLP adds",
    "stream": "stream",
}  # fmt: skip
_NORM = "total_norm_without_embeddings"
# Layers that have a panel: more are hard to compare.
_LAYERS = 4
_AXIS = "optimiser step (square-root scale)"


def plot_norm_growth(recordings: Recordings) -> go.Figure:
    """Length of all parameters but the embeddings over training, with each run's best trend; R² in the legend.

    InputError where a recording has no /weights.
    """
    named = _over_root_steps(recordings, "weights", [_NORM])
    figure = panels(["norm of the parameters"], [1.5])
    draw(figure, 1, named, [Line(_NORM, "norm", COLOURS[0])])
    for i, (name, tree) in enumerate(recordings.items()):
        steps, norms = steady_norms(tree)
        trends = fit_trends(steps, norms)
        traces: Any = figure.data
        curve = next(trace for trace in traces if trace.legendgroup in (f"scan {i}", "norm"))
        told = "  ".join(_r2(trends[key].r2) for key in TRENDS)
        curve.update(name=f"{escape(short_name(name), quote=False)}<br>R² {told}", showlegend=True)
        figure.add_trace(_fitted(steps, trends).update(line_color=curve.line.color, legendgroup=f"scan {i}"))
    caption = (
        "How to read: length of all parameters but the embeddings; a dotted line is the run's best trend, fitted "
        "after the warmup, and the legend has R² of all of them. Growth by steps across the parameters is a straight "
        "line here. It misleads: any smooth rise has a high R² for √t and t^¼ alike, and gains of norms, which begin "
        "at 1 and hardly grow, make up much of the length of a small model."
    )
    _over_training(figure, "Norm of the parameters over training", named, caption)
    figure.update_layout(legend_title_text=f"R² of {', '.join(SIGNS[key] for key in TRENDS)}")
    return figure


def plot_training_saturation(recordings: Recordings) -> go.Figure:
    """Similarity with the model of saturated attention over training, with its null dashed; a panel a layer.

    Of more than four layers four are drawn, the first and the last among them. InputError where a recording has no
    /saturation with kappa = infinity.
    """
    parts = ("similarity", "similarity_low", "similarity_high", "similarity_null")
    layers: list[int] = []
    for name, tree in checked(recordings, "saturation").items():
        if math.inf not in tree["saturation"].to_dataset().get("scale", []):
            raise InputError(f"the recording {name} has no kappa of infinity: record with SaturationProbe((1, inf)).")
        layers = max(layers, tree["saturation"].to_dataset()["layer"].values.tolist(), key=len)
    shown = sorted({layers[round(i * (len(layers) - 1) / (_LAYERS - 1))] for i in range(_LAYERS)})
    figure = panels([f"similarity, layer {layer}" for layer in shown], [0.75] * len(shown))
    named: dict[str, xr.Dataset] = {}
    for row, layer in enumerate(shown, 1):
        at = {"scale": math.inf, "layer": layer}
        having = {name: tree for name, tree in recordings.items() if layer in tree["saturation"]["layer"]}
        named = _over_root_steps(having, "saturation", parts, at)
        lines = [Line("similarity", "similarity", COLOURS[0]), Line("similarity_null", "null", GREY, "dash")]
        draw(figure, row, named, lines, explain=row == 1)
        figure.update_yaxes(matches="y" if row > 1 else None, row=row, col=1)
    caption = (
        "How to read: mean cosine of the stream after a layer with that of the same model whose attention goes to the "
        "largest scores alone (kappa = infinity), band: 95 % over sequences; dashed: the same with a token of another "
        "sequence, which a collapsed stream scores anyway. It misleads where attention adds little: then the stream is "
        "similar however soft attention is, as before training."
    )
    _over_training(figure, "Saturation over training", named, caption)
    return figure


def plot_training_heads(recordings: Recordings) -> go.Figure:
    """How many heads hold the labels argmax and averaging over training. InputError where there is no /heads."""
    counts = {name: head_counts(tree) for name, tree in checked(recordings, "heads").items()}
    named = {name: _on_root(data) for name, data in counts.items()}
    figure = panels(["argmax heads", "averaging heads"], [1, 1])
    for row, label in enumerate(("argmax", "averaging"), 1):
        draw(figure, row, named, [Line(label, label, COLOURS[row - 1])])
        figure.update_yaxes(rangemode="tozero", tickformat="d", row=row, col=1)
        _whole_numbers(figure, row, max(float(data[label].max()) for data in named.values()))
    most = sorted({data.attrs["heads"] for data in counts.values()})
    caption = (
        f"How to read: of {' or '.join(map(str, most))} heads of a run, how many put at least 0.8 of their weight on "
        "one key with few near it (argmax), and how many attend evenly, a quarter as far from uniform as the model's "
        "typical head at most (averaging). It misleads before training, where all heads average alike and none gets "
        "the label; and a head at a threshold comes and goes."
    )
    _over_training(figure, "Kinds of heads over training", named, caption)
    return figure


def plot_slopes(table: pd.DataFrame) -> go.Figure:
    """Measured homogeneity slopes against those expected for each placement of the norm.

    In: columns run, activation, slope, low, high and expected. InputError where one is missing or no row is there.
    """
    missing = {"run", "activation", "slope", "low", "high", "expected"} - set(table.columns)
    if missing or table.empty:
        raise InputError(f"table lacks {', '.join(sorted(missing)) or 'rows'}: give the slopes of a study.")
    figure = panels(["slope k"], [1.3])
    runs = list(dict.fromkeys(table["run"].astype(str)))
    kinds = [kind for kind in _ACTIVATIONS if kind in set(table["activation"])]
    width = 0.7 / len(runs)
    for i, run in enumerate(runs):
        rows: Any = table[table["run"] == run].set_index("activation").reindex(kinds)
        x = np.arange(len(kinds)) + (i - (len(runs) - 1) / 2) * width
        colour, name = COLOURS[i % len(COLOURS)], escape(short_name(run), quote=False)
        hover = f"{name}: %{{y:.3f}} (expected %{{customdata:g}})<extra></extra>"
        figure.add_trace(
            go.Scatter(
                x=x, y=rows["slope"], customdata=rows["expected"], hovertemplate=hover, mode="markers", name=name,
                marker={"color": colour, "size": 9, "symbol": symbol(i)},
                error_y={
                    "type": "data", "symmetric": False, "array": rows["high"] - rows["slope"],
                    "arrayminus": rows["slope"] - rows["low"], "width": 0, "thickness": 1.5,
                },
            )
        )  # fmt: skip
        known = rows["expected"].where(rows["slope"].notna())
        expected = {"symbol": "line-ew-open", "size": max(8, 240 * width), "color": GREY, "line": {"width": 2}}
        figure.add_trace(
            go.Scatter(
                x=x, y=known, mode="markers", marker=expected, hoverinfo="skip", name="expected",
                legendgroup="expected", showlegend=i == len(runs) - 1,
            )
        )  # fmt: skip
    caption = (
        "How to read: with all parameters times c an activation grows as c^k; k between c = 512 and 1024 in float64, "
        "mean over layers, bars from the least to the most of them, dashes where the placement of the norm puts it. "
        "It misleads as a sign of training: the slope tells of the architecture, and departs from it only where biases "
        "or attention not yet saturated at c = 512 still count."
    )
    finish(figure, "Homogeneity of the trained models", {"": xr.Dataset()}, caption, "activation")
    figure.update_xaxes(tickvals=list(range(len(kinds))), ticktext=[_ACTIVATIONS[kind] for kind in kinds])
    figure.update_yaxes(dtick=1)
    figure.update_layout(title_subtitle_text=f"{len(runs)} run{'s' * (len(runs) > 1)}", hovermode="closest")
    return figure


def training_figures(recordings: Recordings, slopes: pd.DataFrame | None = None) -> dict[str, go.Figure]:
    """Every figure of a study, by name."""
    plots = {"norms": plot_norm_growth, "saturation": plot_training_saturation, "heads": plot_training_heads}
    found = {name: plot(recordings) for name, plot in plots.items()}
    return found if slopes is None else {**found, "slopes": plot_slopes(slopes)}


def steady_norms(recording: xr.DataTree) -> tuple[np.ndarray, np.ndarray]:
    """Steps and norms without embeddings from the end of the warmup on (`warmup_steps` in the attributes, or 0)."""
    weights = recording["weights"].to_dataset()
    after = weights["step"].values >= recording.attrs.get("warmup_steps", 0)
    return weights["step"].values[after], weights[_NORM].values[after]


def head_counts(recording: xr.DataTree) -> xr.Dataset:
    """How many heads hold the labels `argmax` and `averaging` at each step (`label_heads`); `heads` in the attrs."""
    heads = recording["heads"].to_dataset()
    steps = heads["step"].values
    labels = [label_heads(heads.isel(step=i, drop=True))["label"].tolist() for i in range(len(steps))]
    counts = {name: ("step", [found.count(name) for found in labels]) for name in ("argmax", "averaging")}
    total = heads.sizes["layer"] * heads.sizes["head"]
    return xr.Dataset(counts, {"step": steps}, {"heads": total, **heads.attrs})


def checked(recordings: Recordings, group: str) -> dict[str, xr.DataTree]:
    """The recordings, of which each has this group over steps; InputError for one that hasn't, and for none."""
    if not isinstance(recordings, Mapping) or not recordings:
        what = "empty" if isinstance(recordings, Mapping) else f"a {type(recordings).__name__}"
        raise InputError(f"recordings is {what}: pass a dict from names to recordings.")
    for name in recordings:
        _group(recordings, name, group)
    return dict(recordings)


def _group(recordings: Recordings, name: str, group: str) -> xr.Dataset:
    tree = recordings[name]
    if group not in tree.children or "step" not in tree[group].dims:
        raise InputError(f"the recording {name} has no /{group} over steps: record it with that probe.")
    return tree[group].to_dataset()


def _over_root_steps(
    recordings: Recordings, group: str, variables: Any, at: Mapping[str, Any] | None = None
) -> dict[str, xr.Dataset]:
    """These variables of each recording at one place, along the root of the step."""
    having = checked(recordings, group)
    found = {name: _group(having, name, group)[list(variables)].sel(at or {}, drop=True) for name in having}
    return {name: _on_root(data) for name, data in found.items()}


def _on_root(data: xr.Dataset) -> xr.Dataset:
    return data.assign_coords(step=np.sqrt(data["step"].values))


def _fitted(steps: np.ndarray, trends: Mapping[str, Any]) -> go.Scatter:
    """The best trend as a thin line; an empty one where nothing was fitted."""
    best = max(TRENDS, key=lambda key: np.nan_to_num(trends[key].r2, nan=-np.inf))
    t = np.linspace(np.sqrt(steps[0]), np.sqrt(steps[-1]), 60) ** 2
    y = trends[best].intercept + trends[best].slope * TRENDS[best](t)
    line = {"width": 1, "dash": "dot"}
    name = f"fit of {SIGNS[best]}"
    return go.Scatter(x=np.sqrt(t), y=y, mode="lines", line=line, name=name, hoverinfo="skip", showlegend=False)


def _r2(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"


def _whole_numbers(figure: go.Figure, row: int, most: float) -> None:
    """Counts have ticks at whole numbers, and room above where all are 0."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if most <= 8 * step)
    top = max(most, 1)
    figure.update_yaxes(dtick=step, range=[-0.06 * top, 1.08 * top], row=row, col=1)


def _over_training(figure: go.Figure, title: str, named: Mapping[str, xr.Dataset], caption: str) -> None:
    """The common look, with steps as ticks of an axis of their roots."""
    finish(figure, title, named, caption, _AXIS)
    last = max(float(data["step"].max()) for data in named.values()) ** 2
    ticks = sorted({0.0, *(float(f"{max(1, last * (i / 6) ** 2):.1g}") for i in range(1, 6)), last})
    if len(ticks) > 2 and np.sqrt(last) - np.sqrt(ticks[-2]) < 0.06 * np.sqrt(last):
        ticks.pop(-2)  # its label would touch the last one's
    figure.update_xaxes(tickvals=np.sqrt(ticks), ticktext=[f"{tick:g}" for tick in ticks])
    runs = len(named)
    figure.update_layout(title_subtitle_text=f"{runs} run{'s' * (runs > 1)} of {last:g} steps", hovermode="closest")
