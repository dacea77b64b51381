"""How an induction head is born, in figures: what waits for what, many runs, and the first gradients.

In: recordings of the birth lab by name. Out: plotly figures, each with a caption that says how to read it and when it
misleads. After Bietti et al. 2023 (2306.00802). Pictures of its models are in `pictures.py`.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import xarray as xr
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from metaint.errors import InputError
from metaint.scans.curves import first_passing, memory_curves
from metaint.scans.finding import Recordings, recordings_with
from metaint.views.drawing.panels import (
    COLOURS,
    GREY,
    finish,
    panels,
    short_name,
    symbol,
    there,
    wrapped,
)
from metaint.views.drawing.steps import along_steps
from metaint.views.groups.birth import (
    accuracy_panel,
    birth_curves,
    draw_birth,
    memory_lines,
    recall_panels,
    with_output,
)

_SHAPES = {"outputs as in training": "circle", "drawn otherwise": "circle-open", "repeating the token": "line-ns-open"}
_OTHER = ("accuracy_uniform", "accuracy_bigram", "accuracy_test")


def plot_staged(recordings: Recordings, released: Mapping[str, Mapping[str, int]]) -> go.Figure:
    """Accuracy and recalls of runs with frozen matrices and without; vertical lines where matrices are released.

    `released` has, for each run with frozen matrices, the step from which each is trained. InputError where it names
    another run, or a recording has no /training or /memory.
    """
    named = birth_curves(recordings)
    if unknown := [name for name in released if name not in named]:
        raise InputError(f"released names {unknown[0]!r}: name some of {', '.join(named)}.")
    figure = draw_birth(named, [accuracy_panel(False), *recall_panels(named, False)])
    for at in sorted({step for steps in released.values() for step in steps.values()}):
        waited = {i: _released_at(released.get(name, {}), at) for i, name in enumerate(named)}
        waited = {i: matrices for i, matrices in waited.items() if matrices}
        colour = COLOURS[min(waited) % len(COLOURS)] if len(waited) == 1 < len(named) else GREY
        line: Any = {"color": colour, "dash": "dash", "width": 1}
        figure.add_vline(at, row="all", col=1, line=line)  # type: ignore[arg-type]
        figure.add_annotation(
            text=f"{'; '.join(dict.fromkeys(waited.values()))} released", x=at, y=1, yref="y domain", xanchor="left",
            yanchor="bottom", showarrow=False, font={"size": 11, "color": colour},
        )  # fmt: skip
    caption = (
        "How to read: at a vertical line, matrices that were frozen begin to be trained, in the run of its colour. "
        "What rises before the line can be learnt without them, what waits for it cannot; repeating the current token "
        "already scores the dotted line of the first panel, candidates that score alike the others. Rings: at one "
        "half or more from there on. It misleads as proof of an order: frozen matrices tell what can be learnt alone, "
        "not what is learnt first where all are trained, and one seed is one seed."
    )
    return along_steps(figure, "Memories that are learnt one after the other", named, caption)


def _released_at(steps: Mapping[str, int], at: int) -> str:
    return ", ".join(escape(matrix) for matrix, step in steps.items() if step == at)


# ---- many runs --------------------------------------------------------------------------------------------------


def plot_sweep(recordings: Recordings) -> go.Figure:
    """In-context accuracy over training by distribution of the data, and with outputs drawn otherwise than in
    training; and for each run the step from which it is one half, and the last accuracies.

    Runs whose names differ in `seed` and a number alone share a colour. InputError where a recording has no /training.
    """
    named = {name: _with_other(tree) for name, tree in recordings_with(recordings, "training").items()}
    alike = {name: re.sub(r"[-_ ]?seed\d+", "", name) or name for name in named}
    kinds = list(dict.fromkeys(alike.values()))
    figure = _sweep_panels(list(named), max(float(data["step"].max()) for data in named.values()))
    for row, (name, data) in enumerate(named.items()):
        i, first = kinds.index(alike[name]), list(alike.values()).index(alike[name]) == row
        colour, dash = COLOURS[i % len(COLOURS)], ("solid", "dash", "dot")[i // len(COLOURS) % 3]
        for panel, variable in ((1, "accuracy"), (2, "other")):
            if there(data, variable):
                hover = f"{escape(name)}: %{{y:.3f}} at %{{x}}<extra></extra>"
                curve = go.Scatter(x=data["step"], y=data[variable], mode="lines", hovertemplate=hover)
                curve.update(line={"color": colour, "dash": dash, "width": 2}, name=wrapped(alike[name]))
                figure.add_trace(curve.update(legendgroup=str(i), showlegend=first and panel == 1), row=panel, col=1)
        _draw_dots(figure, row, name, data, colour)
    for key, shape in _SHAPES.items():
        mark = go.Scatter(x=[None], y=[None], mode="markers", marker=_marker(GREY, shape), name=wrapped(key))
        figure.add_trace(mark.update(legend="legend4"), row=3, col=2)
    caption = (
        "How to read: share of positions whose trigger came before in the sequence that are predicted right; colours "
        "are distributions of the training data, runs of one colour differ in their seeds. The second panel, and open "
        "circles, are sequences whose outputs are drawn otherwise than in training: uniform where they followed the "
        "bigrams, bigrams where they were uniform, unseen tokens where some were left out. Below, a row a run: "
        "the record from which accuracy is one half or more, and the last accuracies. It misleads where chance is "
        "taken for none: a bar is what repeating the current token scores with outputs as in training; and a step is "
        "as fine as the records are."
    )
    return along_steps(figure, "In-context accuracy by distribution of the data", named, caption)


def _with_other(tree: xr.DataTree) -> xr.Dataset:
    """/training with the accuracy on other outputs as `other`, whichever they are."""
    data = tree["training"].to_dataset()
    other = next((name for name in _OTHER if there(data, name)), None)
    return data if other is None else data.assign(other=data[other])


def _sweep_panels(names: Sequence[str], last: float) -> go.Figure:
    """Two panels over steps, and two with a row a run."""
    labels = [textwrap.wrap(short_name(name), 36) for name in names]
    heights, gap = [250, 210, 14 + sum(6 + 15 * len(label) for label in labels)], 58
    figure = make_subplots(
        3, 2, specs=[[{"colspan": 2}, None], [{"colspan": 2}, None], [{}, {}]], row_heights=heights,
        vertical_spacing=gap / (sum(heights) + 2 * gap),
    )  # fmt: skip
    figure.update_layout(height=sum(heights) + 2 * gap, xaxis2_matches="x")
    for row, title in enumerate(("in-context accuracy", "with other outputs"), 1):
        figure.update_yaxes(title_text=title, range=[-0.03, 1.05], row=row, col=1)
        figure.update_xaxes(title_text="optimiser step", row=row, col=1)
    axis = {"tickvals": list(range(len(names))), "range": [len(names) - 0.4, -0.6]}
    texts = ["<br>".join(escape(part, quote=False) for part in label) for label in labels]
    figure.update_yaxes(axis | {"ticktext": texts, "tickfont": {"size": 11}}, row=3, col=1)
    figure.update_yaxes(axis | {"showticklabels": False}, row=3, col=2)
    end = [-0.05 * last, 1.05 * last]
    figure.update_xaxes(title_text="accuracy ≥ ½ from step", domain=[0.25, 0.6], range=end, row=3, col=1)
    figure.update_xaxes(title_text="accuracy at the last step", domain=[0.65, 1], range=[-0.03, 1.05], row=3, col=2)
    return figure


def _draw_dots(figure: go.Figure, row: int, name: str, data: xr.Dataset, colour: str) -> None:
    """The row of a run: when it passed one half, and its last accuracies beside that of repeating."""
    hover = f"{escape(name)}: %{{x:.4g}}<extra></extra>"
    dot = go.Scatter(y=[row], mode="markers", hovertemplate=hover, showlegend=False)
    passed = first_passing(data, "accuracy")
    if passed is None:
        words = go.Scatter(dot).update(x=[0], mode="text", text=["not reached"], textposition="middle right")
        figure.add_trace(words.update(textfont_color=GREY), row=3, col=1)
    else:
        figure.add_trace(go.Scatter(dot).update(x=[passed], marker=_marker(colour, "circle")), row=3, col=1)
    for variable, shape in zip(("copy_accuracy", "other", "accuracy"), reversed(_SHAPES.values()), strict=True):
        if there(data, variable):
            own = GREY if variable == "copy_accuracy" else colour
            marker = _marker(own, shape)
            figure.add_trace(go.Scatter(dot).update(x=[data[variable].values[-1]], marker=marker), row=3, col=2)


def _marker(colour: str, shape: str) -> dict[str, Any]:
    return {"color": colour, "symbol": shape, "size": 9, "line": {"width": 2 if shape.endswith("open") else 0}}


# ---- the first gradients ----------------------------------------------------------------------------------------


def plot_first_gradients(gradients: Mapping[str, xr.Dataset], recordings: Recordings | None = None) -> go.Figure:
    """What minus the first gradient of each matrix recalls, beside chance, and beside what training makes of it.

    `gradients` has for each run the /memory of its first gradients; `recordings` of runs of the same names give the
    last recalls (open). InputError where there are none.
    """
    if not isinstance(gradients, Mapping) or not gradients:
        raise InputError("gradients is empty: pass a dict from names to /memory of the first gradients.")
    stepped = {n: xr.DataTree.from_dict({"/memory": g.expand_dims(step=[0])}) for n, g in gradients.items()}
    named = {name: with_output(memory_curves(tree)) for name, tree in stepped.items()}
    last = {name: with_output(memory_curves(tree)) for name, tree in (recordings or {}).items() if name in named}
    kinds = memory_lines(named)
    figure = panels(["recall"], [1.3])
    width = 0.7 / len(named)
    for i, (name, data) in enumerate(named.items()):
        have = [(k, line.variable) for k, line in enumerate(kinds) if there(data, line.variable)]
        x = [k + (i - (len(named) - 1) / 2) * width for k, _ in have]
        for curves, shape in ((data, symbol(i)), (last.get(name), "circle-open")):
            if curves is not None:
                hover = f"{escape(name)}: %{{y:.3f}}<extra></extra>"
                dots = go.Scatter(x=x, y=[curves[v].values[-1] for _, v in have], mode="markers", hovertemplate=hover)
                dots.update(marker=_marker(COLOURS[i % len(COLOURS)], shape), name=wrapped(name), legendgroup=str(i))
                figure.add_trace(dots.update(showlegend=curves is data))
        dash = _marker(GREY, "line-ew-open") | {"size": min(30, max(6, 400 * width / len(kinds)))}
        even = go.Scatter(x=x, y=[data[f"{v}_chance"].values[0] for _, v in have], mode="markers", marker=dash)
        even.update(name="chance", hovertemplate="chance %{y:.3f}<extra></extra>", legendgroup="chance")
        figure.add_trace(even.update(showlegend=i == len(named) - 1))
    if last:
        key = go.Scatter(x=[None], y=[None], mode="markers", marker=_marker(GREY, "circle-open"))
        figure.add_trace(key.update(name="after training"))
    caption = (
        "How to read: each matrix is replaced by minus its gradient on the first batch, and asked what it recalls; "
        "well above chance (grey) means that the first step begins to write this memory. Open circles are the recalls "
        "at the end of training. It misleads where a gradient's scale matters: recall ignores it, so a tiny gradient "
        "may recall much and move nothing; what is at chance can still be learnt once other memories are there; and a "
        "share of few triggers is coarse."
    )
    finish(figure, "What the first gradients write", {"": xr.Dataset()}, caption, "matrix")
    figure.update_xaxes(tickvals=list(range(len(kinds))), ticktext=[line.label for line in kinds])
    figure.update_xaxes(range=[-0.5, len(kinds) - 0.5], showgrid=False)
    for k in range(1, len(kinds)):
        figure.add_vline(k - 0.5, line={"color": "#e0e0e0", "width": 1})  # type: ignore[arg-type]
    figure.update_yaxes(range=[-0.05, 1.08])
    figure.update_layout(title_subtitle_text=f"{len(named)} run{'s' * (len(named) > 1)}", hovermode="closest")
    return figure
