"""`/residual` as a figure: how long the stream is, how each block lengthens it, and what is added along it.

In: one scan, or several by name to compare them. Out: a plotly figure of a fixed width with a caption. What it shows is
an operational definition inspired by Wu & Varshney (2310.05884), see `measures/inner.py`.
"""

import math
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
import xarray as xr
from plotly import graph_objects as go
from rich.console import Console

from metaint.errors import door
from metaint.measures.norms import histogram_quantile
from metaint.scans.finding import Scans, group_of, named_groups
from metaint.views.drawing.panels import (
    BLUE,
    DEPTH,
    GREEN,
    GREY,
    PURPLE,
    VERMILION,
    Line,
    draw,
    finish,
    log_axis,
    panels,
    rule,
    stripe,
    there,
)
from metaint.views.drawing.terminal import number
from metaint.views.groups.group_view import GroupView
from metaint.views.groups.layers import Column, cells, column, interval, layer_frame, layers_json, print_layers, ranges

# With fewer growths than this after block 0 (four a block) there is nothing that it could flatten.
_FEW_GROWTHS = 8


@door
def plot_residual(scans: Scans) -> go.Figure:
    """Length of the stream by layer, growth in each block beside its orthogonal counterpart, and cosines of writes.

    - `scans`: a scan, its `/residual`, or a dict from names to these.
    - Lengths are geometric means with bands that hold 5 to 95 % of the tokens, on a log axis: one scan has a line for
      each position bucket, several have one each for all positions but 0.
    - Growth is a factor; cosines with the stream are in [-1, 1]; both are means over tokens after position 0, with 95 %
      intervals over sequences.

    Raises InputError where `/residual` is missing.

    >>> import metaint, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> scan = metaint.scan(model, torch.arange(10).repeat(2, 2), [metaint.ResidualProbe()])
    >>> metaint.plot_residual(scan).layout.title.text
    'Residual stream'
    """
    named = named_groups(scans, "residual")
    split = any(there(data, f"cos_stream_{part}") for data in named.values() for part in ("attn", "mlp"))
    titles = ["length", "length after / before", "cosine with the stream"][: 2 + split]
    figure = panels(titles, [1, 0.9, 0.9][: len(titles)])
    _draw_lengths(figure, named)
    growth = [Line("growth", "growth", BLUE), Line("growth_orthogonal", "if orthogonal", GREY, "dash")]
    draw(figure, 2, named, growth)
    rule(figure, 2, 1)
    _leave_out_first(figure, named)
    cosines = _draw_cosines(figure, named) if split else ""
    caption = (
        "How to read: geometric mean length of the stream at each layer (0 is the embedding, the last comes before the "
        f"final norm){'' if len(named) == 1 else ', position 0 left out'}, bands hold 5 to 95 % of the tokens; growth "
        "of the length in each block, beside what the same step would give if it were orthogonal to the stream "
        f"(growth below that: the step opposes it){cosines}. Below the first panel means are over tokens after "
        "position 0, bands 95 % intervals over sequences. It misleads where growth is taken for inner optimisation: "
        "any exact descent through a final norm lengthens the stream, and so does adding vectors that don't oppose "
        "it. Folded or centred weights change lengths: compare scans whose weights were processed alike."
    )
    finish(figure, "Residual stream", named, caption, DEPTH)
    return figure


def _draw_lengths(figure: go.Figure, named: Mapping[str, xr.Dataset]) -> None:
    tables = {name: _norm_bands(data) for name, data in named.items()}
    buckets = [str(name) for name in next(iter(tables.values())) if not str(name).endswith(("_low", "_high"))]
    colours = dict(zip(buckets, (GREY, BLUE, VERMILION, GREEN, PURPLE), strict=False))
    lines = [Line(buckets[-1], buckets[-1], BLUE)]
    if len(named) == 1:
        dashes = {"position 0": "dash"}
        lines = [Line(name, name, colours[name], dashes.get(name, "solid")) for name in buckets[:-1]]
    draw(figure, 1, tables, lines)
    log_axis(figure, 1)


def _norm_bands(data: xr.Dataset) -> xr.Dataset:
    """Geometric mean and 5 and 95 % quantiles of the length in each bucket, and in all but position 0."""
    lengths = {}
    for bucket in data["position"].values:
        quantiles = data["norm_quantile"].sel(position=bucket, drop=True)
        key = "position 0" if bucket == "0" else f"positions {bucket.replace('-', '–')}"
        lengths[key] = (data["norm_geometric"].sel(position=bucket, drop=True), quantiles)
    lengths["positions 1 and later"] = later_norms(data)
    bands = {}
    for key, (mean, quantiles) in lengths.items():
        bands[key] = mean
        bands[f"{key}_low"], bands[f"{key}_high"] = (quantiles.isel(quantile=i, drop=True) for i in (0, -1))
    return xr.Dataset(bands)


def _draw_cosines(figure: go.Figure, named: Mapping[str, xr.Dataset]) -> str:
    """What attention and MLP add beside the stream, in the third panel; returns how to read it."""
    writes = [Line("cos_stream_attn", "attention", VERMILION), Line("cos_stream_mlp", "MLP", GREEN, "dash")]
    null = 2 * max(data["cos_null_std"].item() for data in named.values())
    stripe(figure, 3, null, max(data.sizes["block"] for data in named.values()))
    draw(figure, 3, named, writes)
    rule(figure, 3, 0)
    return (
        f"; cosine of what attention and MLP add with the stream, in grey ±{number(null)}, two standard deviations of "
        f"unrelated directions{' in the narrowest model' if len(named) > 1 else ''}"
    )


def _leave_out_first(figure: go.Figure, named: Mapping[str, xr.Dataset]) -> None:
    """Begin with an axis without block 0 where its growth would flatten all others, as it does in most models."""
    names = ("growth", "growth_low", "growth_high", "growth_orthogonal")
    rest = np.concatenate([data[name][1:].values for data in named.values() for name in names])
    rest = rest[np.isfinite(rest)]
    first = max(float(data["growth"][0]) for data in named.values())
    if len(rest) < _FEW_GROWTHS or first <= 2 * rest.max() - min(rest.min(), 1):
        return
    low, high = min(rest.min(), 1), max(rest.max(), 1)
    room = 0.08 * (high - low)
    figure.update_yaxes(range=[low - room, high + 2 * room], row=2, col=1)
    words = f"block 0 is off the scale ({number(first)}): double-click to see all"
    figure.add_annotation(
        text=words, x=1, y=1, xref="x2 domain", yref="y2 domain", xanchor="right", yanchor="top", showarrow=False
    )


def later_norms(residual: xr.Dataset) -> tuple[xr.DataArray, xr.DataArray]:
    """Geometric mean (layer) and quantiles (quantile, layer) of the length over every position but 0."""
    later = residual.sel(position=[bucket for bucket in residual["position"].values if bucket != "0"])
    count = later["norm_count"]
    total = count.sum("position")
    logs = xr.DataArray(count * np.log(later["norm_geometric"])).sum("position")
    histogram = later["norm_histogram"].sum("position").transpose("layer", "bin").values
    quantiles = histogram_quantile(torch.tensor(histogram), torch.tensor(residual["quantile"].values))
    coords = {"quantile": residual["quantile"], "layer": residual["layer"]}
    return xr.DataArray(np.exp(logs / total.where(total > 0))), xr.DataArray(
        quantiles.numpy(), coords, ("quantile", "layer")
    )


def print_residual(console: Console, scan: xr.DataTree) -> None:
    """Length of the stream at every layer and what each block does to it; a wider terminal gets more columns."""
    data = group_of(scan, "residual")
    rate = data["growth_rate"].item()
    first, last = data.attrs.get("growth_layers", ("first", "last"))
    fit = f"; {number(rate)} a layer from layer {first} to {last}" if not math.isnan(rate) else ""
    print_layers(console, f"Residual stream{fit}", data, _COLUMNS)
    null = 2 * data["cos_null_std"].item()
    console.print(
        "[dim]length: geometric mean before any norm, at position 0 and at later ones (all else is of later ones); "
        "growth to cos MLP: of the block that starts at this layer; if ortho.: what growth would be if the step were "
        "orthogonal to the stream (growth below it: the step opposes the stream); "
        f"cosines within ±{number(null)} are those of unrelated directions; *: massive "
        "(above 100 and 1000 times the median). Growth alone is no evidence of inner optimisation: any exact descent "
        "through a final norm lengthens the stream, and so does adding what doesn't oppose it.[/]\n"
    )


def _later(data: xr.Dataset) -> list[str]:
    return cells(later_norms(data)[0], data["layer"])


def _spread(data: xr.Dataset) -> list[str]:
    quantiles = later_norms(data)[1]
    ends = (quantiles.isel(quantile=i, drop=True) for i in (0, -1))
    return ranges(*(cells(end, data["layer"]) for end in ends))


def _largest(data: xr.Dataset) -> list[str]:
    marks = data["massive"].sel(rank=1).values
    values = cells(data["massive_value"].sel(rank=1, drop=True), data["layer"])
    return [f"{value}{'*' if mark else ' '}" for value, mark in zip(values, marks, strict=True)]


_COLUMNS = [
    column("length\nat 0", "norm_geometric", position="0"),
    Column("length\nlater", _later),
    column("growth", "growth"),
    column("if\northo.", "growth_orthogonal"),
    column("cos\nattn", "cos_stream_attn"),
    column("cos\nMLP", "cos_stream_mlp"),
    column("cos to\nfinal", "cos_to_final"),
    Column("largest\n|x| ", _largest),
    column("effective\nrank", "effective_rank"),
    interval("growth\n95 %", "growth"),
    Column("length later\n5–95 % of tokens", _spread),
    column("length\nattn adds", "attn_write_norm"),
    column("length\nMLP adds", "mlp_write_norm"),
    column("median\n|x|", "median_magnitude"),
]


VIEW = GroupView(
    group="residual",
    figures=lambda scan: {"residual": plot_residual(scan)},
    frames={"residual": partial(layer_frame, group="residual")},
    shown=(("layer",), ("block",), ("layer", "position"), ("layer", "rank"), ("block", "position")),
    print=print_residual,
    source="An operational definition of our own, after Wu & Varshney 2023, A Meta-Learning Perspective on "
    "Transformers for Causal Language Modeling (arXiv 2310.05884).",
    json=partial(layers_json, group="residual"),
)
