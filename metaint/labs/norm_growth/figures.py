"""Plotly figures of the norm-growth lab: norms, saturation and kinds of heads of its runs, and homogeneity slopes.

In: recordings by name, as `read_recording` gives them. Out: figures, each with a caption that says how to read it and
when it misleads. After Merrill et al. 2021 (2010.09697).
"""

import math
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from plotly import graph_objects as go

from metaint.errors import InputError
from metaint.measures.growth import TRENDS
from metaint.scans.curves import head_counts
from metaint.scans.finding import Recordings, recordings_with
from metaint.views.drawing.panels import COLOURS, GREY, Line, draw, finish, panels, short_name, symbol
from metaint.views.drawing.steps import on_root, over_training, whole_numbers
from metaint.views.groups.training import (
    SIGNS,
    draw_norms,
    draw_similarities,
    heads_told,
    shown_layers,
    similarity_titles,
)

_ACTIVATIONS = {
    "embedding": "embedding", "scores": "scores", "attn_write": "attention adds", "mlp_write": "MLP adds",
    "stream": "stream",
}  # fmt: skip


def plot_norm_growth(recordings: Recordings) -> go.Figure:
    """Length of all parameters but the embeddings over training, with each run's best trend; R² in the legend.

    InputError where a recording has no /weights.
    """
    figure = panels(["norm of the parameters"], [1.5])
    fits = draw_norms(figure, 1, recordings_with(recordings, "weights"))
    traces: Any = figure.data
    for i, name in enumerate(recordings):
        curve = next(trace for trace in traces if trace.legendgroup in (f"scan {i}", "norm"))
        qualities = "  ".join(_r2(fits[name][key].r2) if name in fits else "–" for key in TRENDS)
        curve.update(name=f"{escape(short_name(name), quote=False)}<br>R² {qualities}", showlegend=True)
    figure.update_traces(showlegend=False, selector={"line.dash": "dot"})
    caption = (
        "How to read: length of all parameters but the embeddings; a dotted line is the run's best trend, fitted "
        "after the warmup, and the legend has R² of all of them. Growth by steps across the parameters is a straight "
        "line here. It misleads: any smooth rise has a high R² for √t and t^¼ alike, and gains of norms, which begin "
        "at 1 and hardly grow, make up much of the length of a small model."
    )
    over_training(figure, "Norm of the parameters over training", recordings, caption)
    figure.update_layout(legend_title_text=f"R² of {', '.join(SIGNS[key] for key in TRENDS)}")
    return figure


def plot_training_saturation(recordings: Recordings) -> go.Figure:
    """Similarity with the model of saturated attention over training, with its null dashed; a panel a layer.

    Of more than four layers four are drawn, the first and the last among them. InputError where a recording has no
    /saturation with kappa = infinity.
    """
    for name, tree in recordings_with(recordings, "saturation").items():
        if math.inf not in tree["saturation"].to_dataset().get("scale", []):
            raise InputError(f"the recording {name} has no kappa of infinity: record with SaturationProbe((1, inf)).")
    layers = shown_layers(recordings)
    figure = panels(similarity_titles(layers), [0.75] * len(layers))
    draw_similarities(figure, 1, recordings, layers)
    caption = (
        "How to read: mean cosine of the stream after a layer with that of the same model whose attention goes to the "
        "largest scores alone (kappa = infinity), band: 95 % over sequences; dashed: the same with a token of another "
        "sequence, which a collapsed stream scores anyway. It misleads where attention adds little: then the stream is "
        "similar however soft attention is, as before training."
    )
    over_training(figure, "Saturation over training", recordings, caption)
    return figure


def plot_training_heads(recordings: Recordings) -> go.Figure:
    """How many heads hold the labels argmax and averaging over training. InputError where there is no /heads."""
    counts = {name: head_counts(tree) for name, tree in recordings_with(recordings, "heads").items()}
    named = {name: on_root(data) for name, data in counts.items()}
    figure = panels(["argmax heads", "averaging heads"], [1, 1])
    for row, label in enumerate(("argmax", "averaging"), 1):
        draw(figure, row, named, [Line(label, label, COLOURS[row - 1])])
        whole_numbers(figure, row, max(float(data[label].max()) for data in named.values()))
    caption = (
        f"How to read: of {heads_told(counts)} heads of a run, how many put at least 0.8 of their weight on "
        "one key with few near it (argmax), and how many attend evenly, a quarter as far from uniform as the model's "
        "typical head at most (averaging). It misleads before training, where all heads average alike and none gets "
        "the label; and a head at a threshold comes and goes."
    )
    over_training(figure, "Kinds of heads over training", recordings, caption)
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
    figures = {name: plot(recordings) for name, plot in plots.items()}
    return figures if slopes is None else {**figures, "slopes": plot_slopes(slopes)}


def _r2(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"
