"""The birth of an induction head over training: accuracy, memories and attention of the toy of Bietti et al.

In: recordings of the birth lab by name. Out: a plotly figure with a caption, and the panels that the lab's own figures
share with it. After Bietti et al. 2023 (2306.00802).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from plotly import graph_objects as go

from metaint.scans.curves import first_passing, memory_curves
from metaint.scans.finding import Recordings, recordings_with
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
    legend_of,
    panels,
    there,
    wrapped,
)
from metaint.views.drawing.steps import along_steps

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


@dataclass(frozen=True)
class Panel:
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
    named = birth_curves(recordings)
    alone = len(named) == 1
    shown = [accuracy_panel(alone), *recall_panels(named, alone), *_attention_panels(alone), _loss_panel(named)]
    figure = draw_birth(named, shown)
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
    return along_steps(figure, "Birth of an induction head", named, caption)


def is_birth(recording: xr.DataTree) -> bool:
    """Whether a recording is one of the birth lab; any other's /training holds what its owner gave."""
    groups = {str(name): node for name, node in recording.children.items() if "step" in node.dims}
    return {"memory", "training"} <= set(groups) and {"accuracy", "previous_mass"} <= set(groups["training"].data_vars)


# ---- panels -----------------------------------------------------------------------------------------------------


def draw_birth(named: Mapping[str, xr.Dataset], shown: Sequence[Panel]) -> go.Figure:
    """The panels above each other, with a ring where a share passes one half."""
    figure = panels([panel.title for panel in shown], [panel.height for panel in shown])
    for row, panel in enumerate(shown, 1):
        draw(figure, row, named, panel.lines)
        draw(figure, row, named, panel.nulls, explain=False)
        figure.update_traces(mode="lines", selector={"line.dash": "dot"})
        has_null = _any_there(named, panel.nulls)
        if has_null and (row == 1 or len(named) == 1):  # several runs fill the legend beside the first panels
            name = panel.null if len(named) == 1 else "chance, see below"
            key = go.Scatter(x=[None], y=[None], mode="lines", line={"color": GREY, "dash": "dot"}, showlegend=True)
            figure.add_trace(key.update(name=wrapped(name), legend=legend_of(row)), row=row, col=1)
        if panel.share:
            figure.update_yaxes(range=[-0.05, 1.08], dtick=0.5, row=row, col=1)
            _ring_halves(figure, row, named, panel.lines)
    return figure


def _any_there(named: Mapping[str, xr.Dataset], lines: Sequence[Line]) -> bool:
    return any(there(data, line.variable) for data in named.values() for line in lines)


def _ring_halves(figure: go.Figure, row: int, named: Mapping[str, xr.Dataset], lines: Sequence[Line]) -> None:
    """A ring where each curve passes one half, to stay above."""
    for i, data in enumerate(named.values()):
        for line in lines:
            step = first_passing(data, line.variable) if line.variable in data else None
            if step is None:
                continue
            y = data[line.variable].sel(step=step).item()
            marker = {"symbol": "circle-open", "size": 13, "line": {"width": 2}}
            ring = go.Scatter(x=[step], y=[y], mode="markers", marker=marker, hoverinfo="skip", showlegend=False)
            colour = COLOURS[i % len(COLOURS)] if len(named) > 1 else line.colour
            figure.add_trace(ring.update(marker_color=colour), row=row, col=1)


def accuracy_panel(alone: bool) -> Panel:
    """In-context accuracy beside that of repeating; of a run `alone` without copies too."""
    lines = [Line("accuracy", "accuracy", BLUE), Line("accuracy_without_copies", "without copies", SKY, "dash")]
    nulls = [Line("copy_accuracy", "repeating the current token", GREY, "dot")]
    return Panel("in-context accuracy", lines[: 1 + alone], nulls, "repeating the current token", 0.9)


def recall_panels(named: Mapping[str, xr.Dataset], alone: bool) -> list[Panel]:
    """The memories of a run `alone` in one panel, with the step from which each is above one half; else one each."""
    lines = memory_lines(named)
    nulls = [_null(line, f"{line.variable}_chance") for line in lines]
    if not alone:
        pairs = zip(lines, nulls, strict=True)
        return [Panel(f"recall, {line.label}", [line], [null], "chance", 0.6) for line, null in pairs]
    curves = next(iter(named.values()))
    return [Panel("recall", [_with_half(line, curves) for line in lines], nulls, "chance", 1)]


def _with_half(line: Line, curves: xr.Dataset) -> Line:
    """With the step from which the curve is above one half in its name."""
    step = first_passing(curves, line.variable)
    return line if step is None else line._replace(label=f"{line.label}: ½ from {step}")


def _attention_panels(alone: bool) -> list[Panel]:
    nulls = [_null(line, line.variable.replace("_mass", "_uniform")) for line in _HEADS]
    if alone:
        return [Panel("attention", _HEADS, nulls, "uniform attention", 0.8)]
    pairs = zip(_HEADS, nulls, strict=True)
    return [Panel(f"attention, {line.label}", [line], [null], "uniform attention", 0.6) for line, null in pairs]


def _loss_panel(named: Mapping[str, xr.Dataset]) -> Panel:
    alone = len(named) == 1
    lines = [line for line in _LOSSES[: 4 if alone else 2] if _any_there(named, [line])]
    floor = [Line("floor", "log(vocabulary)", GREY, "dot")] * alone
    return Panel("nats", lines, floor, "log(vocabulary)", 1, share=False)


def _null(line: Line, variable: str) -> Line:
    return line._replace(variable=variable, label=f"chance of {line.label}", dash="dot")


def memory_lines(named: Mapping[str, xr.Dataset]) -> list[Line]:
    """What the runs have, the output's first; W_K1 once where no position comes after the first 64."""
    names = {str(name) for data in named.values() for name in data}
    outputs = sorted(name for name in names if re.fullmatch(r"W_O\d+", name))
    lines = [Line("W_O", " / ".join(outputs), BLUE), *_KEYS]
    if all(data["W_K1_early"].equals(data["W_K1"]) for data in named.values() if "W_K1" in data):
        lines = [line for line in lines if line.variable != "W_K1_early"]
    return [line for line in lines if _any_there(named, [line])]


# ---- curves -----------------------------------------------------------------------------------------------------


def birth_curves(recordings: Recordings) -> dict[str, xr.Dataset]:
    """What each run did and what its memories recalled, by `step`; `floor` is the loss of uniformly drawn outputs."""
    recordings_with(recordings, "training")
    named = {}
    for name, tree in recordings_with(recordings, "memory").items():
        curves = with_output(memory_curves(tree))
        if tree.attrs.get("outputs", "uniform") == "uniform":
            curves["floor"] = -np.log(curves["W_O_chance"])  # chance is one of the vocabulary
        named[name] = xr.merge([tree["training"].to_dataset(), curves], join="inner")
    return named


def with_output(curves: xr.Dataset) -> xr.Dataset:
    """The memory of the last layer's output as `W_O` too, whichever layer that is."""
    last = next(str(name) for name in curves if re.fullmatch(r"W_O\d+", str(name)))
    return curves.assign({f"W_O{end}": curves[f"{last}{end}"] for end in ("", "_chance")})
