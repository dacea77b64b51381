"""How an induction head is born, in figures: accuracy, memories and attention over training.

In: recordings of the birth lab by name. Out: plotly figures, each with a caption that says how to read it and when it
misleads. After Bietti et al. 2023 (2306.00802). Pictures of its models are in `birth_pictures.py`.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from metaint.errors import InputError
from metaint.scans.curves import first_passing, memory_curves
from metaint.views.drawing.panels import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    Line,
    draw,
    finish,
    panels,
    short_name,
    symbol,
    there,
    wrapped,
)
from metaint.views.groups.training import Recordings, checked

# The memories that an induction head needs besides that of its output, in the order in which they form.
_KEYS = (
    Line("W_K2", "W_K2", VERMILION),
    Line("W_K1_early", "W_K1, first 64", ORANGE),
    Line("W_K1", "W_K1", GREEN),
)
_HEADS = (Line("previous_mass", "previous token", GREEN), Line("induction_mass", "induction", VERMILION))
_LOSSES = (
    Line("loss_later", "known from context", BLUE),
    Line("loss_bigram", "no triggers", PURPLE, "dash"),
    Line("loss_first", "triggers' first times", ORANGE, "dashdot"),
    Line("W_F_kl", "W_F: KL of bigrams", SKY, "longdash"),
)
_SHAPES = {"outputs as in training": "circle", "drawn otherwise": "circle-open", "repeating the token": "line-ns-open"}
_OTHER = ("accuracy_uniform", "accuracy_bigram", "accuracy_test")


# ---- over training ----------------------------------------------------------------------------------------------


class _Panel(NamedTuple):
    """Curves, and dotted beside them what would be scored without knowing anything, named `null` in the legend."""

    title: str
    lines: Sequence[Line]
    nulls: Sequence[Line]
    null: str
    height: float
    share: bool = True


def plot_birth(recordings: Recordings) -> go.Figure:
    """In-context accuracy, what the memories recall, where the heads look, and losses, over training.

    One run has a colour for each curve, several have one each and a panel for each memory and head. InputError where a
    recording has no /training or /memory.
    """
    named = _curves(recordings)
    one = len(named) == 1
    heads = [(f"attention, {line.label}", [line]) for line in _HEADS]
    shown = [_accuracy(one), *_recalls(named, one)]
    for title, lines in [("attention", _HEADS)] if one else heads:
        nulls = [_null(line, line.variable.replace("_mass", "_uniform")) for line in lines]
        shown.append(_Panel(title, lines, nulls, "uniform attention", 0.8 if one else 0.6))
    losses = [x for x in _LOSSES[: 4 if one else 2] if any(there(data, x.variable) for data in named.values())]
    floor = [Line("floor", "log(vocabulary)", GREY, "dot")] * one
    shown.append(_Panel("nats", losses, floor, "log(vocabulary)", 1, False))
    figure = _drawn(named, shown)
    caption = (
        "How to read: W_O, W_K2 and W_K1 are memories: token → its own logit, what layer 1 wrote of a token → that "
        "token (of triggers alone where these are fixed), position → the one before. A recall is the share that the "
        "weights alone get right. Accuracy is of positions whose trigger came before in the sequence, known from "
        "context as their loss is; attention is weight of the first layer on the token before, and of the last on "
        "what followed earlier occurrences of the current token. Dotted: what repeating the current token, candidates "
        "that score alike, and uniform attention score; rings: at one half or more from there on. It misleads where "
        "recalls are read as the circuit: that can work with much of W_K1 missing and fail with all recalls at 1; and "
        "of few triggers W_K2 recalls half by luck."
    )
    return _finished(figure, "Birth of an induction head", named, caption)


def plot_staged(recordings: Recordings, released: Mapping[str, Mapping[str, int]]) -> go.Figure:
    """Accuracy and recalls of runs with frozen matrices and without; vertical lines where matrices are released.

    `released` has, for each run with frozen matrices, the step from which each is trained. InputError where it names
    another run, or a recording has no /training or /memory.
    """
    named = _curves(recordings)
    if unknown := [name for name in released if name not in named]:
        raise InputError(f"released names {unknown[0]!r}: name some of {', '.join(named)}.")
    figure = _drawn(named, [_accuracy(False), *_recalls(named, False)])
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
    return _finished(figure, "Memories that are learnt one after the other", named, caption)


def _released_at(steps: Mapping[str, int], at: int) -> str:
    return ", ".join(escape(matrix) for matrix, step in steps.items() if step == at)


def _drawn(named: Mapping[str, xr.Dataset], shown: Sequence[_Panel]) -> go.Figure:
    figure = panels([panel.title for panel in shown], [panel.height for panel in shown])
    for row, panel in enumerate(shown, 1):
        draw(figure, row, named, panel.lines)
        draw(figure, row, named, panel.nulls, explain=False)
        figure.update_traces(mode="lines", selector={"line.dash": "dot"})
        known = any(there(data, line.variable) for data in named.values() for line in panel.nulls)
        if known and (row == 1 or len(named) == 1):  # several runs fill the legend beside the first panels
            key = go.Scatter(x=[None], y=[None], mode="lines", line={"color": GREY, "dash": "dot"}, showlegend=True)
            key.update(name=wrapped(panel.null if len(named) == 1 else "chance, see below"))
            figure.add_trace(key.update(legend="legend" if row == 1 else f"legend{row}"), row=row, col=1)
        if panel.share:
            figure.update_yaxes(range=[-0.05, 1.08], dtick=0.5, row=row, col=1)
            _ring_halves(figure, row, named, panel.lines)
    return figure


def _ring_halves(figure: go.Figure, row: int, named: Mapping[str, xr.Dataset], lines: Sequence[Line]) -> None:
    """A ring where each curve passes one half, to stay above."""
    for i, data in enumerate(named.values()):
        for line in lines:
            step = first_passing(data, line.variable) if line.variable in data else None
            if step is not None:
                y, colour = data[line.variable].sel(step=step).item(), COLOURS[i % len(COLOURS)]
                marker = {"symbol": "circle-open", "size": 13, "line": {"width": 2}}
                ring = go.Scatter(x=[step], y=[y], mode="markers", marker=marker, hoverinfo="skip", showlegend=False)
                figure.add_trace(ring.update(marker_color=colour if len(named) > 1 else line.colour), row=row, col=1)


def _accuracy(one: bool) -> _Panel:
    lines = [Line("accuracy", "accuracy", BLUE), Line("accuracy_without_copies", "without copies", SKY, "dash")]
    nulls = [Line("copy_accuracy", "repeating the current token", GREY, "dot")]
    return _Panel("in-context accuracy", lines[: 1 + one], nulls, "repeating the current token", 0.9)


def _recalls(named: Mapping[str, xr.Dataset], one: bool) -> list[_Panel]:
    """All memories in `one` panel, with the step from which each is above one half, or a panel for each memory."""
    lines = _memories(named)
    if not one:
        return [_Panel(f"recall, {x.label}", [x], [_null(x, f"{x.variable}_chance")], "chance", 0.6) for x in lines]
    nulls = [_null(line, f"{line.variable}_chance") for line in lines]
    steps = [first_passing(next(iter(named.values())), line.variable) for line in lines]
    told = [
        x if at is None else x._replace(label=f"{x.label}: ½ from {at}") for x, at in zip(lines, steps, strict=True)
    ]
    return [_Panel("recall", told, nulls, "chance", 1)]


def _null(line: Line, variable: str) -> Line:
    return line._replace(variable=variable, label=f"chance of {line.label}", dash="dot")


def _memories(named: Mapping[str, xr.Dataset]) -> list[Line]:
    """What the runs have, the output's first; W_K1 once where no position comes after the first 64."""
    outputs = sorted({str(name) for data in named.values() for name in data if re.fullmatch(r"W_O\d+", str(name))})
    lines = [Line("W_O", " / ".join(outputs), BLUE), *_KEYS]
    if all(data["W_K1_early"].equals(data["W_K1"]) for data in named.values() if "W_K1" in data):
        lines = [line for line in lines if line.variable != "W_K1_early"]
    return [line for line in lines if any(there(data, line.variable) for data in named.values())]


def _curves(recordings: Recordings) -> dict[str, xr.Dataset]:
    """What each run did and what its memories recalled, by `step`; `floor` is the loss of uniformly drawn outputs."""
    checked(recordings, "training")
    named = {}
    for name, tree in checked(recordings, "memory").items():
        curves = _with_output(memory_curves(tree))
        if tree.attrs.get("outputs", "uniform") == "uniform":
            curves["floor"] = -np.log(curves["W_O_chance"])  # chance is one of the vocabulary
        named[name] = xr.merge([tree["training"].to_dataset(), curves], join="inner")
    return named


def _with_output(curves: xr.Dataset) -> xr.Dataset:
    """The memory of the last layer's output as `W_O` too, whichever layer that is."""
    last = next(str(name) for name in curves if re.fullmatch(r"W_O\d+", str(name)))
    return curves.assign({f"W_O{end}": curves[f"{last}{end}"] for end in ("", "_chance")})


def _finished(figure: go.Figure, title: str, named: Mapping[str, xr.Dataset], caption: str) -> go.Figure:
    finish(figure, title, named, caption, "optimiser step")
    last = max(int(data["step"].max()) for data in named.values())
    runs = escape(short_name(next(iter(named))), quote=False) if len(named) == 1 else f"{len(named)} runs"
    figure.update_layout(title_subtitle_text=f"{runs}, {last} steps", hovermode="closest")
    return figure


# ---- many runs --------------------------------------------------------------------------------------------------


def plot_sweep(recordings: Recordings) -> go.Figure:
    """In-context accuracy over training by distribution of the data, and with outputs drawn otherwise than in
    training; and for each run the step from which it is one half, and the last accuracies.

    Runs whose names differ in `seed` and a number alone share a colour. InputError where a recording has no /training.
    """
    named = {name: _with_other(tree) for name, tree in checked(recordings, "training").items()}
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
    return _finished(figure, "In-context accuracy by distribution of the data", named, caption)


def _with_other(tree: xr.DataTree) -> xr.Dataset:
    """/training with the accuracy on other outputs as `other`, whichever they are."""
    data = tree["training"].to_dataset()
    found = next((name for name in _OTHER if there(data, name)), None)
    return data if found is None else data.assign(other=data[found])


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
        told = go.Scatter(dot).update(x=[0], mode="text", text=["not reached"], textposition="middle right")
        figure.add_trace(told.update(textfont_color=GREY), row=3, col=1)
    else:
        figure.add_trace(go.Scatter(dot).update(x=[passed], marker=_marker(colour, "circle")), row=3, col=1)
    for variable, shape in zip(("copy_accuracy", "other", "accuracy"), reversed(_SHAPES.values()), strict=True):
        if there(data, variable):
            marker = _marker(GREY if variable == "copy_accuracy" else colour, shape)
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
    named = {name: _with_output(memory_curves(tree)) for name, tree in stepped.items()}
    last = {name: _with_output(memory_curves(tree)) for name, tree in (recordings or {}).items() if name in named}
    kinds = _memories(named)
    figure = panels(["recall"], [1.3])
    width = 0.7 / len(named)
    for i, (name, data) in enumerate(named.items()):
        have = [(k, line.variable) for k, line in enumerate(kinds) if there(data, line.variable)]
        x = [k + (i - (len(named) - 1) / 2) * width for k, _ in have]
        for found, shape in ((data, symbol(i)), (last.get(name), "circle-open")):
            if found is not None:
                hover = f"{escape(name)}: %{{y:.3f}}<extra></extra>"
                dots = go.Scatter(x=x, y=[found[v].values[-1] for _, v in have], mode="markers", hovertemplate=hover)
                dots.update(marker=_marker(COLOURS[i % len(COLOURS)], shape), name=wrapped(name), legendgroup=str(i))
                figure.add_trace(dots.update(showlegend=found is data))
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
