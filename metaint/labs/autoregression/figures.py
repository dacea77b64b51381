"""Figures of models that learn s_{t+1} = W s_t in context, over training and over positions.

In: recordings of the autoregression lab by name. Out: plotly figures of their losses and of the matrices they apply
beside baselines and optima, each with a caption that says how to read it and when it misleads. After Sander et al.
2024 (2402.05787) and von Oswald et al. 2023 (2212.07677).
"""

from collections.abc import Mapping
from html import escape

import numpy as np
import xarray as xr
from plotly import graph_objects as go

from metaint.errors import InputError
from metaint.views.drawing.panels import BLUE, COLOURS, Line, draw, finish, panels, symbol, wrapped

Recordings = Mapping[str, xr.DataTree]

# Below it a loss counts as none, and a log axis leaves it out.
_NOTHING = 1e-4
_TRAINING = "optimiser step (square-root scale)"


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
        if row > 1:
            figure.update_yaxes(matches="y", row=row, col=1)
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
    return subtitled(figure, f"{int(longest.attrs.get('sequences', 0))} fresh sequences")


def _positional_line(
    data: xr.Dataset, variable: str, name: str, colour: str, dash: str, marker: str | None
) -> go.Scatter:
    y = data[variable].where(data[variable] > _NOTHING)
    mode = "lines+markers" if marker and len(y) <= 12 else "lines"
    line = {"color": colour, "dash": dash, "width": 2.5 if marker else 1.3}
    trace = go.Scatter(x=data["position"].values, y=y.values, mode=mode, line=line, name=wrapped(name))
    trace.update(hovertemplate=f"{escape(name)}, T = %{{x}}: %{{y:.4g}}<extra></extra>")
    return trace.update(marker_symbol=marker) if marker else trace


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
    cosines = {name: data[f"effective_matrix_cosine{end}"].sel(at, drop=True) for name, end in ends.items()}
    return xr.Dataset(cosines).assign_coords(step=np.sqrt(data["step"].values))


def _over_training(figure: go.Figure, title: str, named: Mapping[str, xr.Dataset], caption: str) -> go.Figure:
    finish(figure, title, named, caption, _TRAINING)
    last = max(float(data["step"].max()) for data in named.values()) ** 2
    ticks = sorted({0.0, *(float(f"{last * (i / 5) ** 2:.1g}") for i in range(1, 5)), last})
    figure.update_xaxes(tickvals=np.sqrt(ticks), ticktext=[f"{tick:g}" for tick in ticks])
    figure.update_layout(hovermode="closest")
    return subtitled(figure, f"{len(named)} run{'s' * (len(named) > 1)}")


def subtitled(figure: go.Figure, subtitle: str) -> go.Figure:
    """The figure with this line under its title, whatever signs are in it."""
    return figure.update_layout(title_subtitle_text=escape(subtitle, quote=False))
