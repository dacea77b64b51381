"""`plot_check`: a circuit beside random ones, by what it does alone and by what is lost without it."""

from html import escape
from typing import Any

import numpy as np
import xarray as xr
from plotly import graph_objects as go

from metaint.circuits.checks import VERDICTS
from metaint.errors import InputError, door
from metaint.views.circuit.words import figure as digits, percent
from metaint.views.drawing.panels import GREY, VERMILION, finish, panels, short_name

_QUESTIONS = {"faithfulness": "there with the circuit alone", "completeness": "lost without the circuit"}
# Heads of the circuit named in the subtitle.
_NAMED = 12
# Where the circuit and the random ones lie in a panel, and how far those are spread.
_CIRCUIT_AT = 0.75
_RANDOM_AT = 0.25
_SPREAD = 0.16


@door
def plot_check(check: xr.Dataset) -> go.Figure:
    """Faithfulness and completeness of a circuit with their intervals, each beside those of random circuits.

    - `check`: what `metaint.check_circuit` gives. Both are shares of what all heads bring to the metric: 1 is all of
      it. Bars are 95 % bootstrap intervals over sequences; a grey dot is a random circuit.

    Raises InputError where it is anything else.

    >>> import metaint, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=4, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> tokens = torch.arange(10).repeat(3, 2)
    >>> check = metaint.check_circuit(model, ["0.1", "1.0"], tokens, random=8)
    >>> len(metaint.plot_check(check).data[0].x)
    8
    """
    if not isinstance(check, xr.Dataset) or not {"faithfulness", "random_completeness"} <= set(check.data_vars):
        what = "a dataset without shares" if isinstance(check, xr.Dataset) else f"a {type(check).__name__}"
        raise InputError(f"check is {what}: pass what metaint.check_circuit gives.")
    figure = panels(list(_QUESTIONS), [0.55] * len(_QUESTIONS))
    for row, name in enumerate(_QUESTIONS, 1):
        _draw_random(figure, check, name, row)
        _draw_circuit(figure, check, name, row)
    finish(figure, _title(check), {"": check}, _caption(check), "share of what all heads bring to the metric")
    figure.update_layout(title_subtitle_text=_facts(check), hovermode="closest")
    return figure


def _draw_random(figure: go.Figure, check: xr.Dataset, name: str, row: int) -> None:
    """A dot for each random circuit, spread so that equal ones can be told apart, in the same way each time."""
    shares = check[f"random_{name}"].values
    height = _RANDOM_AT + np.random.default_rng(0).uniform(-_SPREAD, _SPREAD, len(shares))
    dots = go.Scatter(
        x=shares, y=height, mode="markers", name="random circuits", showlegend=row == 1 and len(shares) > 0,
        marker={"color": GREY, "size": 7, "opacity": 0.55}, legendgroup="random",
        hovertemplate="random circuit: %{x:.3f}<extra></extra>",
    )  # fmt: skip
    figure.add_trace(dots, row=row, col=1)


def _draw_circuit(figure: go.Figure, check: xr.Dataset, name: str, row: int) -> None:
    share, low, high = (float(check[name + end]) for end in ("", "_low", "_high"))
    hover = f"{name}: {percent(share)} ({percent(low)} to {percent(high)}) {_QUESTIONS[name]}<extra></extra>"
    bars = {"type": "data", "symmetric": False, "array": [high - share], "arrayminus": [share - low]}
    dot = go.Scatter(
        x=[share], y=[_CIRCUIT_AT], mode="markers", name="the circuit", showlegend=row == 1, hovertemplate=hover,
        marker={"color": VERMILION, "size": 12, "symbol": "diamond"}, legendgroup="circuit",
        error_x={**bars, "color": VERMILION, "thickness": 2, "width": 5},
    )  # fmt: skip
    figure.add_trace(dot, row=row, col=1)
    for at in (0, 1):
        line = {"color": GREY, "width": 1, "dash": "dot" if at else "solid"}
        figure.add_vline(at, row=row, col=1, line=line, layer="below")  # type: ignore[arg-type]
    figure.update_yaxes(range=[0, 1], showticklabels=False, showgrid=False, row=row, col=1)
    figure.update_xaxes(tickformat=".0%", row=row, col=1)


def _title(check: xr.Dataset) -> str:
    verdict = str(check.attrs.get("verdict", "found" if check.attrs.get("found") else "not found"))
    return "Part of a circuit" if verdict == VERDICTS[1] else f"Circuit {verdict}"


def _facts(check: xr.Dataset) -> str:
    """Whose heads they are, and what all heads bring."""
    heads = str(check.attrs.get("heads", "")).split(", ")
    names = ", ".join(heads[:_NAMED]) + (f" and {len(heads) - _NAMED} more" if len(heads) > _NAMED else "")
    model, metric = (escape(short_name(str(check.attrs.get(key, key))), quote=False) for key in ("model", "metric"))
    clean, ablated = (digits(float(check[name])) for name in ("clean", "ablated"))
    metric = metric.replace("_", " ")
    return f"{model}: heads {escape(names, quote=False)}<br>{metric} {clean}, with all heads ablated {ablated}"


def _caption(check: xr.Dataset) -> str:
    why: Any = check.attrs.get("why", "")
    return (
        f"{escape(str(why), quote=False)} How to read: faithfulness is the share of what all heads bring to the metric "
        "that is there with every other head ablated, completeness the share that is lost with the circuit alone "
        "ablated; bars are 95 % bootstrap intervals over sequences. A circuit lies right of the random ones. It "
        "misleads where the metric is nearly as good without any head, since shares of a small number are large; and "
        "where heads outside stand in for those inside, which low completeness tells."
    )
