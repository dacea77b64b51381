"""Figures of what training led to beside what is predicted: losses by depth and by heads, steps, weights.

In: frames of the autoregression lab with one row a run, and matrices. Out: plotly figures, each with a caption that
says how to read it and when it misleads. After Sander et al. 2024 (2402.05787) and von Oswald et al. 2023 (2212.07677).
"""

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from metaint.errors import InputError
from metaint.labs.autoregression.figures import subtitled
from metaint.measures.closed_forms import augmented_optimum, diagonal_minimum
from metaint.views.drawing.panels import BLUE, COLOURS, GREY, ORANGE, SKY, VERMILION, finish, panels, wrapped

_PREDICTED = "dash"


def plot_depth(details: pd.DataFrame, descents: Mapping[int, float]) -> go.Figure:
    """Loss by number of layers, a line for each kind of model, beside gradient descent with as many steps."""
    figure = panels(["loss"], [1.5])
    steps = {"x": list(descents), "y": list(descents.values())}
    style = {"color": GREY, "dash": _PREDICTED, "width": 2}
    figure.add_trace(go.Scatter(**steps, mode="lines+markers", line=style, name="gradient descent"))
    groups = details.groupby(["model", "heads"], sort=False)
    for i, (key, rows) in enumerate(groups):
        model, heads = key  # type: ignore[misc]
        label = f"{model}, {heads} head{'s' * (heads > 1)}" if model == "transformer" else str(model)
        means: Any = rows.groupby("layers")["same_loss"].mean()
        colour = COLOURS[i % len(COLOURS)]
        trace = go.Scatter(x=means.index, y=means.values, mode="lines+markers", line_color=colour, marker_size=9)
        figure.add_trace(trace.update(name=wrapped(label)))
    caption = (
        "How to read: trained models by layers, and on the same sequences gradient descent by steps, all of one size, "
        "the best for these. Below the dashed line a model does better than as many steps, which no theorem forbids; "
        "well above it, training hasn't found what its layers could do."
    )
    finish(figure, "Loss by depth", {"": xr.Dataset()}, caption, "layers, or steps of gradient descent")
    figure.update_xaxes(dtick=1)
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(hovermode="closest")
    return subtitled(figure, f"{len(details)} run{'s' * (len(details) > 1)}")


def plot_steps(details: pd.DataFrame) -> go.Figure:
    """Learnt step and loss of models on augmented tokens, by the context they were trained at, beside the optimum."""
    d, longest = int(details["d"].to_numpy()[0]), int(details["length"].to_numpy().max())
    figure = panels(["step eta", "loss per coordinate"], [1.1, 1.1])
    contexts = np.arange(2, longest + 1)
    optima = [augmented_optimum(int(T), d) for T in contexts]
    curves = (np.array([best.eta for best in optima]), np.array([best.loss for best in optima]))
    names = (f"1 / (T + {d - 2})" if d != 2 else "1 / T", f"{d - 1} / (T + {d - 2})")
    legends = ("legend", "legend2")
    for row, (curve, name, legend) in enumerate(zip(curves, names, legends, strict=True), 1):
        line = {"color": GREY, "dash": _PREDICTED, "width": 2}
        own = go.Scatter(x=contexts, y=curve, mode="lines", line=line, name=f"predicted, {name}", hoverinfo="skip")
        figure.add_trace(own.update(legend=legend), row=row, col=1)
    kinds = (
        ("diagonal", BLUE, "circle", 10), ("signed", SKY, "x", 10), ("blocks", ORANGE, "square-open", 12),
        ("free", VERMILION, "diamond", 8),
    )  # fmt: skip
    for model, colour, shape, size in kinds:
        rows: Any = details[details["model"] == model]
        for row, column in enumerate(("step", "loss"), 1):
            marks = {"color": colour, "size": size, "symbol": shape, "line_width": 2 * (shape == "square-open")}
            dots = go.Scatter(x=rows["length"], y=rows[column], mode="markers", marker=marks, name=model)
            dots.update(showlegend=row == 1, legendgroup=model)
            dots.update(hovertemplate=f"{model}, T = %{{x}}: %{{y:.4f}}<extra></extra>")
            figure.add_trace(dots, row=row, col=1)
    caption = (
        "How to read: a mark is a trained model, at the context length it was trained for; dashed, the step with the "
        "least expected loss, and that loss. The step is the product of a coordinate's weights, averaged over "
        "coordinates. Models whose blocks are more than diagonal (blocks, free) do more than a gradient step, so that "
        "their loss lies below and this step isn't all they do."
    )
    finish(figure, "Learnt step against the best step", {"": xr.Dataset()}, caption, "context length T in training")
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(hovermode="closest")
    return subtitled(figure, f"augmented tokens, d = {d}, W unitary and diagonal")


def plot_staircase(details: pd.DataFrame) -> go.Figure:
    """Loss by number of diagonal heads, measured beside predicted, and the share of starts that got there."""
    setting, d = str(details["setting"].to_numpy()[0]), int(details["d"].to_numpy()[0])
    kind: Any = setting
    figure = panels(["loss, summed over coordinates", "share of starts"], [1.4, 0.7])
    most = int(details["heads"].to_numpy().max())
    heads = list(range(1, most + 1))
    minima = [diagonal_minimum(kind, d, count) for count in heads]
    word = "d - H" if setting == "unitary" else "d - 2H"
    line = {"color": GREY, "dash": _PREDICTED, "width": 2, "shape": "hvh"}
    figure.add_trace(go.Scatter(x=heads, y=minima, mode="lines", line=line, name=f"predicted, {word}"), row=1, col=1)
    for column, row, name in (("loss", 1, "trained"), ("reached", 2, "reached")):
        marks = {"color": BLUE, "size": 10}
        dots = go.Scatter(x=details["heads"], y=details[column], mode="markers", marker=marks, name=name)
        dots.update(showlegend=row == 1, hovertemplate=f"%{{x}} heads: {column} %{{y:.4f}}<extra></extra>")
        figure.add_trace(dots, row=row, col=1)
    caption = (
        "How to read: loss of the best start on fresh sequences, and the least expected loss with so many heads; "
        "below, the share of starts within 0.02 d of it. "
    )
    few = float(details["reached"].to_numpy().min()) < 0.5
    caption += (
        "Where few get there, a single training tells little of the optimum."
        if few
        else "It misleads where no start gets there: then the lower dots are at 0, and the upper ones above the line."
    )
    finish(figure, f"Heads and loss: {word}", {"": xr.Dataset()}, caption, "heads")
    figure.update_xaxes(dtick=1)
    figure.update_yaxes(range=[-0.06, 1.06], row=2, col=1)
    figure.update_layout(hovermode="closest")
    return subtitled(figure, f"{setting} W, d = {d}")


def plot_maps(
    maps: Mapping[str, np.ndarray], title: str, caption: str, subtitle: str = "", limit: float = 1
) -> go.Figure:
    """Matrices side by side, in colours from -limit to limit."""
    if not maps:
        raise InputError("maps is empty: give at least one matrix.")
    figure = make_subplots(1, len(maps), subplot_titles=[escape(name) for name in maps], horizontal_spacing=0.05)
    for column, values in enumerate(maps.values(), 1):
        grid = go.Heatmap(z=values, coloraxis="coloraxis")
        grid.update(hovertemplate="row %{y}, column %{x}: %{z:.3f}<extra></extra>")
        figure.add_trace(grid, row=1, col=column)
    figure.update_layout(height=820 / len(maps) * 0.92)
    finish(figure, title, {"": xr.Dataset()}, caption, "")
    figure.update_yaxes(autorange="reversed", showgrid=False, dtick=5)
    figure.update_xaxes(showgrid=False, dtick=5, title_text="")
    bar = {"thickness": 12, "x": 1.01, "len": 1}
    colours = {"cmin": -limit, "cmax": limit, "colorscale": "RdBu", "reversescale": True, "colorbar": bar}
    figure.update_layout(coloraxis=colours, hovermode="closest")
    figure.update_annotations(selector=lambda a: a.name != "caption", font_size=13)
    return subtitled(figure, subtitle)


def plot_rows(rows: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> go.Figure:
    """The last row of positional weights for each run, measured and (dashed) predicted, from p_1 to p_T."""
    figure = panels(["weight"], [1.5])
    for i, (name, (measured, predicted)) in enumerate(rows.items()):
        colour, x = COLOURS[i % len(COLOURS)], np.arange(1, len(measured) + 1)
        marks = {"color": colour, "size": 6}
        hover = f"{escape(name)}: p_%{{x}} = %{{y:.3f}}<extra></extra>"
        figure.add_trace(
            go.Scatter(x=x, y=measured, mode="markers", marker=marks, name=wrapped(name), hovertemplate=hover)
        )
        line = {"color": colour, "dash": _PREDICTED, "width": 1.5}
        figure.add_trace(go.Scatter(x=x, y=predicted, mode="lines", line=line, showlegend=False, hoverinfo="skip"))
    caption = (
        "How to read: dots, the weights that the last query gives to all keys, of which the last, p_T, is the key "
        "after the query; dashed, gradient descent on the expected loss after as many steps. The phases of W are "
        "divided by mu: the narrower their arc, the slower the weights fall off. The authors' plot leaves out p_T. "
        "None of these rows is the optimum (p_T = 1, others 0), which descent would reach much later."
    )
    finish(figure, "Learnt positional weights", {"": xr.Dataset()}, caption, "position of the key")
    figure.update_layout(hovermode="closest")
    return subtitled(figure, "last row of P, one coordinate")
