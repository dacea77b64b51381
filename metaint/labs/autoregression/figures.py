"""Figures of models that learn s_{t+1} = W s_t in context: losses beside baselines and optima, steps, heads, P.

In: recordings of the autoregression lab by name, frames with one row a run, and matrices. Out: plotly figures, each
with a caption that says how to read it and when it misleads. After Sander et al. 2024 (2402.05787) and von Oswald et
al. 2023 (2212.07677).
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
from metaint.measures.closed_forms import augmented_optimum, diagonal_minimum
from metaint.views.drawing.panels import (
    BLUE,
    COLOURS,
    GREY,
    ORANGE,
    SKY,
    VERMILION,
    Line,
    draw,
    finish,
    panels,
    symbol,
    wrapped,
)

Recordings = Mapping[str, xr.DataTree]

# Below it a loss counts as none, and a log axis leaves it out.
_NOTHING = 1e-4
_TRAINING = "optimiser step (square-root scale)"
_PREDICTED = "dash"


def plot_losses(recordings: Recordings, predicted: Mapping[str, float]) -> go.Figure:
    """Held-out loss of each run over training, and where the optimum of each is predicted, dotted."""
    named = {name: _on_root(tree, "training", ["held_out_loss"]) for name, tree in _checked(recordings).items()}
    figure = panels(["held-out loss"], [1.4])
    draw(figure, 1, named, [Line("held_out_loss", "held-out loss", BLUE)])
    last = max(float(data["step"].max()) for data in named.values())
    for i, (name, data) in enumerate(named.items()):
        if np.isfinite(predicted.get(name, np.nan)):
            colour = COLOURS[i % len(COLOURS)] if len(named) > 1 else BLUE
            ends = [0, float(data["step"].max()) if len(named) == 1 else last]
            style = {"color": colour, "width": 1.5, "dash": "dot"}
            rule = go.Scatter(x=ends, y=[predicted[name]] * 2, mode="lines", line=style, legendgroup=f"scan {i}")
            rule.update(showlegend=False, hovertemplate=f"predicted for {escape(name)}: %{{y:.4g}}<extra></extra>")
            figure.add_trace(rule)
    _fit_losses(figure, np.concatenate([data["held_out_loss"].values for data in named.values()]))
    dotted = " Dotted, in the run's colour, is what is predicted for it at the optimum." if predicted else ""
    caption = (
        f"How to read: loss on fresh sequences, the same at each record.{dotted} It misleads where a plateau is taken "
        "for the end: products of matrices that begin small may rest for long before they fall."
    )
    return _over_training(figure, "Loss over training", named, caption)


def _fit_losses(figure: go.Figure, losses: np.ndarray) -> None:
    """A log axis for losses of several sizes; what an untrained model of several layers starts from may leave it."""
    losses = losses[np.isfinite(losses)]
    low = losses.min()
    top = min(losses.max(), max(1000 * low, 30 * np.median(losses)))
    if low > _NOTHING and top > 8 * low:
        figure.update_yaxes(type="log", range=np.log10([low / 1.25, top * 1.25]).tolist(), dtick="D2", tickformat="~g")
    elif top < losses.max():
        figure.update_yaxes(range=[low - 0.05 * top, 1.05 * top])


def plot_agreement(recordings: Recordings) -> go.Figure:
    """Over training, at the longest context, the cosine of the matrix that a model applies with those of one gradient
    step and of least squares; of regression the three comparisons with one gradient step."""
    checked = _checked(recordings)
    if any("effective_matrix_cosine" not in tree["recurrence"] for tree in checked.values()):
        return _regression_agreement(checked)
    words = {"gradient_step": "one gradient step", "least_squares": "least squares"}
    figure = panels([f"cosine with {word}" for word in words.values()], [1.0] * len(words))
    named: dict[str, xr.Dataset] = {}
    for row, reference in enumerate(words, 1):
        named = {name: _cosines(tree, reference) for name, tree in checked.items()}
        draw(figure, row, named, [Line("cosine", "cosine", BLUE)], explain=row == 1)
        figure.update_yaxes(matches="y" if row > 1 else None, row=row, col=1)
    caption = (
        "How to read: mean cosine, at the longest context, of the matrix that takes the last vector to the prediction "
        "with the matrices that one gradient step and least squares (which is W, from T = d + 1 on) find from the same "
        "context; bands are 95 % over sequences. It misleads where read as identity: matrices of different length have "
        "a cosine of 1, and a step and least squares are near each other in long contexts."
    )
    return _over_training(figure, "What matrix the model goes by", named, caption)


def _regression_agreement(recordings: Recordings) -> go.Figure:
    parts = {
        "sensitivity_cosine": "cosine of sensitivities",
        "prediction_difference": "difference of predictions",
        "model_difference": "difference of sensitivities",
    }
    figure = panels(list(parts.values()), [0.9] * len(parts))
    named = {name: _on_root(tree, "recurrence", list(parts)) for name, tree in recordings.items()}
    for row, variable in enumerate(parts, 1):
        draw(figure, row, named, [Line(variable, parts[variable], BLUE)], explain=row == 1)
    caption = (
        "How to read: the model beside one gradient step of the best size, its predictions and their gradients in the "
        "query (sensitivities); a model that takes this very step has a cosine of 1 and no differences. With more "
        "layers it should not, as it can do better."
    )
    return _over_training(figure, "The model beside one gradient step", named, caption)


def plot_positions(recordings: Recordings) -> go.Figure:
    """Loss by the length of the context after training, beside baselines, gradient descent and least squares."""
    last = {name: tree["recurrence"].to_dataset().isel(step=-1) for name, tree in _checked(recordings).items()}
    longest = max(last.values(), key=lambda data: data.sizes["position"])
    figure = panels(["squared error per coordinate"], [1.9])
    for i, (name, data) in enumerate(last.items()):
        dash = ("solid", "dashdot", "dot")[i // len(COLOURS) % 3]
        figure.add_trace(_positional_line(data, "loss", name, COLOURS[i % len(COLOURS)], dash, symbol(i)))
    references = {
        "loss_zero": ("prediction 0", "longdash"), "loss_persistence": ("s_T", "longdashdot"),
        "loss_gradient_step": ("1 step, one eta", "dash"), "loss_gradient_steps_1": ("1 step", "dash"),
        "loss_gradient_steps_2": ("2 steps", "dashdot"), "loss_gradient_steps_3": ("3 steps", "dashdot"),
        "loss_gradient_steps_5": ("5 steps", "dot"), "loss_least_squares": ("least squares", "solid"),
    }  # fmt: skip
    greys = np.linspace(190, 90, len(references)).round().astype(int)
    for (variable, (word, dash)), grey in zip(references.items(), greys, strict=True):
        figure.add_trace(_positional_line(longest, variable, word, f"rgb({grey}, {grey}, {grey})", dash, None))
    figure.update_yaxes(type="log", dtick=1, row=1, col=1)
    caption = (
        "How to read: mean squared error per coordinate of what follows a context of T vectors, with models in colour "
        "and references, on the same sequences, in grey (gradient descent with eta = c / (T - 1), each with its best "
        "c). Least squares is exact once T > d, and leaves the axis. Losses below the steps that a model has layers "
        "for mean that it does something else; a loss above least squares at T > d, that it doesn't invert."
    )
    finish(figure, "Loss by length of the context", last, caption, "length T of the context")
    figure.update_layout(hovermode="closest")
    return _subtitled(figure, f"{int(longest.attrs.get('sequences', 0))} fresh sequences")


def _positional_line(
    data: xr.Dataset, variable: str, name: str, colour: str, dash: str, marker: str | None
) -> go.Scatter:
    y = data[variable].where(data[variable] > _NOTHING)
    mode = "lines+markers" if marker and len(y) <= 12 else "lines"
    line = {"color": colour, "dash": dash, "width": 2.5 if marker else 1.3}
    trace = go.Scatter(x=data["position"].values, y=y.values, mode=mode, line=line, name=wrapped(name))
    trace.update(hovertemplate=f"{escape(name)}, T = %{{x}}: %{{y:.4g}}<extra></extra>")
    return trace.update(marker_symbol=marker) if marker else trace


def plot_depth(details: pd.DataFrame, descents: Mapping[int, float]) -> go.Figure:
    """Loss by number of layers, a line for each kind of model, beside gradient descent with as many steps."""
    figure = panels(["loss"], [1.5])
    steps = {"x": list(descents), "y": list(descents.values())}
    style = {"color": GREY, "dash": _PREDICTED, "width": 2}
    figure.add_trace(go.Scatter(**steps, mode="lines+markers", line=style, name="gradient descent"))
    groups = details.groupby(["model", "heads"], sort=False)
    for i, (key, rows) in enumerate(groups):
        model, heads = key  # type: ignore[misc]
        told = f"{model}, {heads} head{'s' * (heads > 1)}" if model == "transformer" else str(model)
        means: Any = rows.groupby("layers")["same_loss"].mean()
        colour = COLOURS[i % len(COLOURS)]
        trace = go.Scatter(x=means.index, y=means.values, mode="lines+markers", line_color=colour, marker_size=9)
        figure.add_trace(trace.update(name=wrapped(told)))
    caption = (
        "How to read: trained models by layers, and on the same sequences gradient descent by steps, all of one size, "
        "the best for these. Below the dashed line a model does better than as many steps, which no theorem forbids; "
        "well above it, training hasn't found what its layers could do."
    )
    finish(figure, "Loss by depth", {"": xr.Dataset()}, caption, "layers, or steps of gradient descent")
    figure.update_xaxes(dtick=1)
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(hovermode="closest")
    return _subtitled(figure, f"{len(details)} run{'s' * (len(details) > 1)}")


def plot_steps(details: pd.DataFrame) -> go.Figure:
    """Learnt step and loss of models on augmented tokens, by the context they were trained at, beside the optimum."""
    d, longest = int(details["d"].to_numpy()[0]), int(details["length"].to_numpy().max())
    figure = panels(["step eta", "loss per coordinate"], [1.1, 1.1])
    contexts = np.arange(2, longest + 1)
    optima = [augmented_optimum(int(T), d) for T in contexts]
    curves = (np.array([best.eta for best in optima]), np.array([best.loss for best in optima]))
    names = (f"1 / (T + {d - 2})" if d != 2 else "1 / T", f"{d - 1} / (T + {d - 2})")
    for row, (curve, name) in enumerate(zip(curves, names, strict=True), 1):
        line = {"color": GREY, "dash": _PREDICTED, "width": 2}
        own = go.Scatter(x=contexts, y=curve, mode="lines", line=line, name=f"predicted, {name}", hoverinfo="skip")
        figure.add_trace(own.update(legend="legend" if row == 1 else "legend2"), row=row, col=1)
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
    return _subtitled(figure, f"augmented tokens, d = {d}, W unitary and diagonal")


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
    return _subtitled(figure, f"{setting} W, d = {d}")


def plot_maps(maps: Mapping[str, np.ndarray], title: str, caption: str, told: str = "", limit: float = 1) -> go.Figure:
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
    return _subtitled(figure, told)


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
    return _subtitled(figure, "last row of P, one coordinate")


# ---- shared -----------------------------------------------------------------------------------------------------


def _checked(recordings: Recordings) -> Recordings:
    if not recordings:
        raise InputError("recordings is empty: give at least one.")
    for name, tree in recordings.items():
        if not {"training", "recurrence"} <= set(tree.children):
            raise InputError(f"the recording {name} has no /training and /recurrence: give those of the lab.")
    return recordings


def _on_root(tree: xr.DataTree, group: str, variables: list[str]) -> xr.Dataset:
    data = tree[group].to_dataset()[variables]
    return data.assign_coords(step=np.sqrt(data["step"].values))


def _cosines(tree: xr.DataTree, reference: str) -> xr.Dataset:
    """The cosine with a reference at the longest context that was read, with its interval."""
    data = tree["recurrence"].to_dataset()
    values = data["effective_matrix_cosine"].sel(reference=reference)
    longest = values["position"].values[values.notnull().any("step").values].max()
    ends = {"cosine": "", "cosine_low": "_low", "cosine_high": "_high"}
    at = {"reference": reference, "position": longest}
    found = {name: data[f"effective_matrix_cosine{end}"].sel(at, drop=True) for name, end in ends.items()}
    return xr.Dataset(found).assign_coords(step=np.sqrt(data["step"].values))


def _over_training(figure: go.Figure, title: str, named: Mapping[str, xr.Dataset], caption: str) -> go.Figure:
    finish(figure, title, named, caption, _TRAINING)
    last = max(float(data["step"].max()) for data in named.values()) ** 2
    ticks = sorted({0.0, *(float(f"{last * (i / 5) ** 2:.1g}") for i in range(1, 5)), last})
    figure.update_xaxes(tickvals=np.sqrt(ticks), ticktext=[f"{tick:g}" for tick in ticks])
    figure.update_layout(hovermode="closest")
    return _subtitled(figure, f"{len(named)} run{'s' * (len(named) > 1)}")


def _subtitled(figure: go.Figure, told: str) -> go.Figure:
    return figure.update_layout(title_subtitle_text=escape(told, quote=False))
