"""`/recurrence` as tables and figures: a model beside gradient descent and least squares, and the matrix it applies.

In: a scan, or several by name. Out: terminal tables, one row a context length or a layer; a frame for machines; plotly
figures with a caption each.
"""

import math
from collections.abc import Mapping
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from plotly import graph_objects as go
from rich.console import Console

from metaint.errors import InputError, door
from metaint.scans.finding import Scans, group_of, named_groups
from metaint.views.drawing.panels import (
    BLUE,
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
    rule,
)
from metaint.views.drawing.terminal import number, print_columns
from metaint.views.groups.group_view import GroupView

# Rows of a table, at most.
_ROWS = 12
# Decades of a loss that are drawn, at most: below lies rounding.
_DECADES = 6


def recurrence_frame(scan: xr.DataTree) -> pd.DataFrame:
    """One row for each context length and reference; what has no reference (losses, step size) stands in each row.

    InputError where a scan has no `/recurrence`.
    """
    data = group_of(scan, "recurrence")
    names = [name for name in data.data_vars if "position" in data[name].dims]
    return data[names].to_dataframe(dim_order=["position", "reference"]).reset_index()


# ---- tables -----------------------------------------------------------------------------------------------------


def print_recurrence(console: Console, scan: xr.DataTree) -> None:
    """Losses beside baselines, how near the model's matrix is to each reference, and what layers tell of W.

    InputError where a scan has no `/recurrence`.
    """
    data = group_of(scan, "recurrence")
    known = _known(data)
    rows = known if known.sizes["position"] else data.isel(position=_spread(data.sizes["position"]))
    lengths = ("context\nlength", [str(T) for T in rows["position"].values])
    losses = {"": "model", "_zero": "zero", "_gradient_step": "one step", "_least_squares": "least squares"}
    losses |= {"_persistence": "last again"} | {f"_{key}": name for key, name in _names(data).items() if _is_mean(key)}
    columns = [(name.replace(" ", "\n", 1), _cells(rows[f"loss{key}"], small=True)) for key, name in losses.items()]
    print_columns(console, f"Loss of the next vector, d = {data.attrs['d']}", [lengths, *columns])
    if known.sizes["position"]:
        print_columns(console, "Effective matrix: cosine with", [lengths, *_of_matrices(rows)])
    layers = [
        ("layer", [str(layer) for layer in data["layer"].values]),
        ("R²", _cells(data["decodability"])),
        ("of another\nW", _cells(data["decodability_null"])),
        ("from the raw\ncontext", [number(data["decodability_raw"].item())] * data.sizes["layer"]),
    ]
    print_columns(console, f"W decoded at T = {data.attrs['decoded_at']}", layers)
    console.print(f"[dim]{_READ}[/]\n")


def _of_matrices(rows: xr.Dataset) -> list[tuple[str, list[str]]]:
    """Cosines with every reference, the null, and what the comparison with one step tells besides."""
    cosines, names = rows["effective_matrix_cosine"], _names(rows)
    first, others = ("truth", "gradient_step", "least_squares"), [name for name in names if _is_mean(name, 2)]
    columns = [(names[key].replace(" ", "\n", 1), _cells(cosines.sel(reference=key))) for key in (*first, *others)]
    null = ("another\nW", _cells(rows["effective_matrix_cosine_null"].sel(reference="truth")))
    beside = [
        ("step\nsize", _cells(rows["step_size"])),
        ("error\nbeside W", _cells(rows["effective_matrix_error"].sel(reference="truth"))),
        ("difference\nto one step", _cells(rows["prediction_difference"])),
    ]
    return [columns[0], null, *columns[1:3], *beside, *columns[3:]]


def _is_mean(reference: str, least: int = 1) -> bool:
    """Whether a reference is so many steps on the mean inner loss; one of them has the direction of "gradient_step"."""
    name, _, steps = reference.rpartition("_")
    return name == "gradient_steps" and int(steps) >= least


def _names(data: xr.Dataset) -> dict[str, str]:
    """References by what they are called in tables and figures."""
    names = {"truth": "W", "gradient_step": "one step", "least_squares": "least squares"}
    for reference in data["reference"].values.tolist():
        if _is_mean(reference):
            steps = reference.rpartition("_")[2]
            names[reference] = f"{steps} step{'s' * (steps != '1')} (mean)"
    return {str(key): names.get(str(key), str(key)) for key in data["reference"].values}


def _cells(values: xr.DataArray, small: bool = False) -> list[str]:
    """Numbers, and powers of ten where `small` ones tell."""
    return [f"{value:.0e}" if small and 0 < value < 1e-3 else number(value) for value in values.values.tolist()]


def _spread(size: int) -> list[int]:
    return np.unique(np.linspace(0, size - 1, min(_ROWS, size)).round()).astype(int).tolist()


# ---- figures ----------------------------------------------------------------------------------------------------


@door
def plot_recurrence(scans: Scans) -> go.Figure:
    """Loss by context length beside baselines, and cosines of the effective matrix with each reference, beside a null.

    In: a scan, its `/recurrence`, or a dict from names to these; of several the baselines and the null are those of
    the first. InputError where `/recurrence` is missing.

    >>> import metaint, torch
    >>> from metaint.tasks import autoregressive
    >>> from metaint.toys.linear_attention import gradient_step
    >>> vectors, matrices = autoregressive("haar", 3, 8, 12, dtype=torch.float64)
    >>> scan = metaint.recur(gradient_step(3, 0.05, dtype=torch.float64), vectors, matrices)
    >>> metaint.plot_recurrence(scan).layout.title.text
    'Prediction in context'
    """
    named = named_groups(scans, "recurrence")
    first = next(iter(named.values()))
    matrices = {name: known for name, data in named.items() if (known := _known(data)).sizes["position"]}
    figure = panels(["loss", "cosine of the matrix"][: 1 + bool(matrices)], [1.2, 1.1][: 1 + bool(matrices)])
    label = "model" if len(named) == 1 else "loss"
    draw(figure, 1, named, [Line("loss", label, BLUE)])
    draw(figure, 1, {"": first}, _baselines(first, len(named) == 1))
    _log_loss(figure, named)
    caption = (
        "How to read: mean squared error of the next vector by the number of vectors seen, beside baselines on the "
        "same sequences; one step: a gradient step on the inner loss, one step size for all contexts; steps (mean): "
        "steps on its mean over transitions. Vertical: T = d + 1, from where least squares knows W. "
    )
    if matrices:
        _draw_cosines(figure, matrices)
        caption += (
            "Below, cosine of d prediction / d s_T with each reference's matrix for the same context; grey: with "
            "the W of another sequence. It misleads where it is near 1 with several references: with enough context "
            "they agree, so look at short ones, and at the size, which a cosine leaves out (effective_matrix_error). "
        )
    else:
        caption += "It misleads as a sign of an algorithm: many have the same loss; compare effective matrices. "
    caption += "Baselines in grey are those of the first scan. " if len(named) > 1 else ""
    caption += "Bands are 95 % intervals over sequences."
    d = {data.attrs["d"] for data in named.values()}
    for row in range(1, 2 + bool(matrices)):
        if len(d) == 1:
            line = {"color": GREY, "width": 1, "dash": "dot"}
            figure.add_vline(min(d) + 1, row=row, col=1, line=line, layer="below")  # type: ignore[arg-type]
    finish(figure, "Prediction in context", named, caption, "context length T")
    figure.update_layout(title_subtitle_text=_told(named))
    return figure


def _baselines(data: xr.Dataset, alone: bool) -> list[Line]:
    """What losses are drawn beside; with several scans, which have the colours, a few in grey."""
    if not alone:
        dashes = {"zero": "dashdot", "gradient_step": "dash", "least_squares": "dot"}
        names = {"zero": "zero"} | _names(data)
        return [Line(f"loss_{name}", names[name], GREY, dash) for name, dash in dashes.items()]
    lines = [Line("loss_zero", "zero", GREY, "dot"), Line("loss_persistence", "last vector again", GREY, "dash")]
    coloured = {reference: pair for reference, pair in _coloured(data).items() if reference != "truth"}
    return lines + [Line(f"loss_{reference}", name, colour, "dash") for reference, (name, colour) in coloured.items()]


def _coloured(data: xr.Dataset) -> dict[str, tuple[str, str]]:
    """Names and colours of the references; several descents take turns."""
    colours = {"truth": BLUE, "gradient_step": VERMILION, "least_squares": GREEN}
    turns = cycle((ORANGE, PURPLE, SKY))
    return {key: (name, colours.get(key) or next(turns)) for key, name in _names(data).items()}


def _log_loss(figure: go.Figure, named: Mapping[str, xr.Dataset]) -> None:
    """As many decades as losses have, but for those of least squares, which run down to rounding."""
    lines = ["loss", *(line.variable for line in _baselines(next(iter(named.values())), len(named) == 1))]
    drawn = [name for name in lines if name != "loss_least_squares"]
    values = np.concatenate([data[name].values for data in named.values() for name in drawn])
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return
    high = math.log10(values.max())
    low = max(math.log10(values.min()), high - _DECADES)
    ticks: dict[str, Any] = (
        {"dtick": 1, "exponentformat": "power"} if high - low > 2 else {"dtick": "D2", "tickformat": "~g"}
    )
    figure.update_yaxes(type="log", range=[low - 0.15, high + 0.1], row=1, col=1, **ticks)


def _draw_cosines(figure: go.Figure, named: Mapping[str, xr.Dataset]) -> None:
    tables, lines = {}, []
    for name, data in named.items():
        table = xr.Dataset()
        for reference in data["reference"].values.tolist():
            for end in ("", "_low", "_high"):
                values = data[f"effective_matrix_cosine{end}"].sel(reference=reference, drop=True)
                table[f"{reference}{end}"] = values
        table["null"] = data["effective_matrix_cosine_null"].sel(reference="truth", drop=True)
        tables[name] = table
    alone, first = len(named) == 1, next(iter(named.values()))
    dashes = {"truth": "solid", "gradient_step": "dash", "least_squares": "dot"}
    for reference, (name, colour) in _coloured(first).items():
        if (alone and _is_mean(reference, 2)) or reference in dashes:
            dash = "solid" if alone else dashes[reference]
            lines.append(Line(reference, name, colour, dash))
    draw(figure, 2, tables, lines)
    draw(figure, 2, {"": next(iter(tables.values()))}, [Line("null", "another W", GREY, "dash")])
    rule(figure, 2, 0)
    lowest = min(float(table[line.variable].min()) for table in tables.values() for line in lines)
    figure.update_yaxes(range=[min(-0.1, lowest) - 0.05, 1.06], row=2, col=1)


def plot_decodability(scans: Scans) -> go.Figure:
    """How well W is read linearly from each layer, beside the raw context and the W of another sequence.

    InputError where `/recurrence` is missing, or of too few sequences to decode from.
    """
    named = {}
    for name, data in named_groups(scans, "recurrence").items():
        if bool(data["decodability"].isnull().all()):
            raise InputError(f"{name} has no decodability; scan 10 sequences or more.")
        raw = data["decodability_raw"].expand_dims(layer=data["layer"])
        named[name] = data.assign(raw=raw)
    figure = panels(["R² of W"], [1.2])
    lines = [
        Line("decodability", "stream", BLUE),
        Line("raw", "raw context", VERMILION, "dash"),
        Line("decodability_null", "another W", GREY, "dot"),
    ]
    draw(figure, 1, named, lines)
    rule(figure, 1, 0)
    at = {data.attrs["decoded_at"] for data in named.values()}
    caption = (
        "How to read: R² of W, entry by entry, from the stream at the last position read "
        f"(T = {', '.join(str(T) for T in sorted(at))}) by ridge regression, on sequences that weren't fitted; layer 0 "
        "is the embedding. Dashed: from s_1..s_T side by side, which any model is given. It misleads where the dashed "
        "line is as high: where the W commute and all sequences start alike, s_2 alone tells W. And W need not be kept "
        "for a model to apply it: linear attention holds W s_T alone."
    )
    finish(figure, "How well W can be read from each layer", named, caption, "layer")
    figure.update_layout(title_subtitle_text=_told(named))
    return figure


def recurrence_figures(scans: Scans) -> dict[str, go.Figure]:
    """Every figure that the `/recurrence` of these scans allows; InputError without it."""
    figures = {"recurrence": plot_recurrence(scans)}
    if all(data["decodability"].notnull().any() for data in named_groups(scans, "recurrence").values()):
        figures["decodability"] = plot_decodability(scans)
    return figures


# ---- scans ------------------------------------------------------------------------------------------------------


def _known(data: xr.Dataset) -> xr.Dataset:
    """The context lengths at which effective matrices were read."""
    known = data["effective_matrix_cosine"].notnull().any("reference") | data["step_size"].notnull()
    return data.isel(position=known.values)


def _told(named: Mapping[str, xr.Dataset]) -> str:
    counts = sorted({(data.attrs["sequences"], data.attrs["d"]) for data in named.values()})
    inputs = "; ".join(f"{sequences} sequences, d = {d}" for sequences, d in counts)
    return f"{next(iter(named))}: {inputs}" if len(named) == 1 else f"{len(named)} scans: {inputs}"


_READ = (
    "loss: mean squared error of the next vector; one step: of gradient descent on the inner loss, with one step size "
    "for all contexts; steps (mean): on its mean over transitions. Effective matrix: d prediction / d s_T; near 1 with "
    "several references it tells none apart, as with much context. R²: of W by ridge regression from the stream, to be "
    "read beside the raw context."
)


VIEW = GroupView(
    group="recurrence",
    figures=recurrence_figures,
    frames={"recurrence": recurrence_frame},
    shown=(("position",), ("position", "reference")),
    print=print_recurrence,
    source="Sander et al. 2024, How do Transformers Perform In-Context Autoregressive Learning? (arXiv 2402.05787).",
)
