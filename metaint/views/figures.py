"""Plotly figures of `/residual` and `/inner`.

In: one scan, or several by name to compare them. Out: figures of a fixed width, each with a caption that says how to
read it and when it misleads. What they show is an operational definition inspired by Wu & Varshney (2310.05884), see
`measures/inner.py`.
"""

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
import xarray as xr
from plotly import graph_objects as go

from metaint.errors import InputError
from metaint.probes.inner import MOST_TOKENS
from metaint.views.panels import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILION,
    Line,
    draw,
    finish,
    log_axis,
    log_scale,
    panels,
    rule,
    stripe,
    symbol,
    there,
    wrapped,
)
from metaint.views.streams import group_of, later_norms
from metaint.views.tables import number

Scans = xr.DataTree | Mapping[str, xr.DataTree]

# With fewer growths than this after block 0 (four a block) there is nothing that it could flatten.
_FEW_GROWTHS = 8
_NO_PROOF = (
    "Growth alone is no evidence of inner optimisation: any exact descent through a final norm lengthens the stream, "
    "and so does adding vectors that don't oppose it."
)


def plot_norms(scans: Scans) -> go.Figure:
    """Length of the residual stream by layer: geometric means, and bands that hold 5 to 95 % of the tokens.

    One scan has a line for each position bucket, several have one line each for all positions but 0.
    InputError where /residual is missing.
    """
    named = _named(scans, "residual")
    alone = len(named) == 1
    tables = {name: _norm_bands(data) for name, data in named.items()}
    buckets = [str(name) for name in next(iter(tables.values())) if not str(name).endswith(("_low", "_high"))]
    colours = dict(zip(buckets, (GREY, BLUE, VERMILION, GREEN, PURPLE), strict=False))
    lines = [Line(name, name, colours[name], "dash" if name == "position 0" else "solid") for name in buckets[:-1]]
    figure = panels(["length of the stream"], [1.3])
    draw(figure, 1, tables, lines if alone else [Line(buckets[-1], buckets[-1], BLUE)])
    log_axis(figure, 1)
    read = (
        "How to read: geometric mean length of the stream before each layer's block (layer 0 is the embedding, the "
        f"last comes before the final norm){'' if alone else ', position 0 left out'}; bands hold 5 to 95 % of the "
        "tokens. "
    )
    trap = " Folded or centred weights change lengths, so compare only scans whose weights were processed alike."
    finish(figure, "Length of the residual stream", named, read + _NO_PROOF + trap, "layer")
    return figure


def plot_growth(scans: Scans) -> go.Figure:
    """By what factor each block lengthens the stream, and the cosines of what attention and MLP add with it.

    InputError where /residual is missing.
    """
    named = _named(scans, "residual")
    split = any(there(data, f"cos_stream_{part}") for data in named.values() for part in ("attn", "mlp"))
    figure = panels(["length after / before", "cosine with the stream"][: 1 + split], [1, 1][: 1 + split])
    growth = [Line("growth", "growth", BLUE), Line("growth_orthogonal", "if orthogonal", GREY, "dash")]
    draw(figure, 1, named, growth)
    rule(figure, 1, 1)
    _leave_out_first(figure, named)
    caption = (
        "How to read: growth of the length in each block, beside what the same step would give if it were orthogonal "
        "to the stream (growth below that: the step opposes the stream). "
    )
    caption += _draw_cosines(figure, named) if split else ""
    caption += "Means over tokens after position 0, bands are 95 % intervals over sequences. " + _NO_PROOF
    finish(figure, "Growth of the stream in each block", named, caption, "block")
    return figure


def _draw_cosines(figure: go.Figure, named: Mapping[str, xr.Dataset]) -> str:
    """What attention and MLP add beside the stream, in the second panel; returns how to read it."""
    writes = [Line("cos_stream_attn", "attention", VERMILION), Line("cos_stream_mlp", "MLP", GREEN, "dash")]
    null = 2 * max(data["cos_null_std"].item() for data in named.values())
    stripe(figure, 2, null, max(data["block"].size for data in named.values()))
    draw(figure, 2, named, writes)
    rule(figure, 2, 0)
    return (
        "Below, cosine of what attention and MLP add with the stream; grey, up to "
        f"±{number(null)}, are ±2 standard deviations for unrelated directions"
        f"{' in the narrowest model' if len(named) > 1 else ''}. "
    )


def plot_inner_loss(scans: Scans) -> go.Figure:
    """Loss of the next token if each layer were the last, its baseline, the prediction's entropy, and the rank.

    InputError where /inner is missing.
    """
    named = _named(scans, "inner")
    figure = panels(["nats", "rank of the next token"], [1.2, 1])
    losses = [
        Line("loss", "loss", BLUE),
        Line("loss_null", "loss of another token's target", GREY, "dash"),
        Line("prediction_entropy", "entropy of the prediction", ORANGE, "dot"),
    ]
    draw(figure, 1, named, losses)
    draw(figure, 2, named, [Line("target_rank", "rank", GREEN)])
    log_axis(figure, 2)
    caption = (
        "How to read: mean loss of the next token if the stream at this layer were the last; a loss as high as that "
        "of another token's target knows nothing of this position. Below, geometric mean rank, 1 is the most likely. "
        f"Bands are 95 % intervals over sequences. {_lens(named)}"
    )
    finish(figure, "Loss at every layer", named, caption, "layer")
    return figure


def plot_agreement(scans: Scans) -> go.Figure:
    """Cosine of each block's step with the descent direction of the loss, beside its null; attention and MLP too.

    InputError where /inner is missing.
    """
    named = _named(scans, "inner")
    parts = {"": "block", "_attn": "attention", "_mlp": "MLP"}
    kept = [p for p in parts if p == "" or any(there(data, f"step_gradient_cosine{p}") for data in named.values())]
    figure = panels([f"cosine, {parts[part]}" for part in kept], [0.8] * len(kept))
    for row, part in enumerate(kept, 1):
        lines = [
            Line(f"step_gradient_cosine{part}", "next token", BLUE),
            Line(f"step_gradient_cosine_null{part}", "another token's target", GREY, "dash"),
        ]
        draw(figure, row, named, lines, explain=row == 1)
        rule(figure, row, 0)
        figure.update_yaxes(matches="y" if row > 1 else None, row=row, col=1)
    caption = (
        "How to read: mean cosine of what is added with the descent direction of the next token's loss there, 1 is a "
        "gradient step; only what stands above the same with another token's target tells of this token. Bands are "
        "95 % intervals over sequences. Operational definition inspired by Wu & Varshney (2023), no theorem of "
        f"theirs. {_lens(named)}"
    )
    finish(figure, "Do steps follow the gradient?", named, caption, "block")
    return figure


def plot_norm_loss(scans: Scans, layer: int | None = None) -> go.Figure:
    """Length of the stream against the loss, a dot for each token, at one layer (default: the last).

    InputError where /inner is missing or has no such layer.
    """
    named = _named(scans, "inner")
    figure = panels(["loss (nats)"], [1.3])
    told = []
    for i, (name, data) in enumerate(named.items()):
        layers = data["layer"].values.tolist()
        at = layers[-1] if layer is None else layer
        if at not in layers:
            raise InputError(f"layer is {layer}: the scan of {name} has layers 0 to {layers[-1]}.")
        here = data.sel(layer=at)
        figure.add_trace(_dots(name, here, i, len(named)))
        both = (_coefficient(here, f"norm_loss_spearman{end}") for end in ("", "_partial"))
        who = "" if len(named) == 1 else f"{escape(name, quote=False)}, "
        told.append(f"{who}layer {at}: Spearman {' and partial '.join(both)}.")
    traces: Any = figure.data
    figure.update_xaxes(log_scale(np.concatenate([trace.x for trace in traces])))
    figure.update_layout(hovermode="closest")
    caption = (
        f"{' '.join(told)} How to read: a dot is a token, at most {MOST_TOKENS} a scan (the coefficients use all that "
        "were sampled, with 95 % intervals over sequences); partial: with token frequencies and position partialled "
        "out. A correlation over tokens is no cause: frequent tokens and early positions have lengths and losses of "
        "their own."
    )
    finish(figure, "Length of the stream and loss", named, caption, "length of the stream")
    return figure


def stream_figures(scans: Scans) -> dict[str, go.Figure]:
    """Every figure that the groups of the scan (of every scan, of several) allow; InputError if they allow none."""
    plots = {
        "residual": {"norms": plot_norms, "growth": plot_growth},
        "inner": {"inner_loss": plot_inner_loss, "agreement": plot_agreement, "norm_loss": plot_norm_loss},
    }
    trees = _trees(scans).values()
    groups = [group for group in plots if all(group in tree.children for tree in trees)]
    if not groups:
        raise InputError("scans have no /residual or /inner group in common: scan with ResidualProbe or InnerProbe.")
    return {name: plot(scans) for group in groups for name, plot in plots[group].items()}


def _trees(scans: Scans) -> Mapping[str, xr.DataTree]:
    if isinstance(scans, xr.DataTree):
        return {str(scans.attrs.get("model", "scan")): scans}
    if not isinstance(scans, Mapping) or not scans or not all(isinstance(s, xr.DataTree) for s in scans.values()):
        raise InputError(f"scans is {type(scans).__name__}: pass a scan, or a dict from names to scans.")
    return scans


def _named(scans: Scans, group: str) -> dict[str, xr.Dataset]:
    """The group of each scan by the scan's name."""
    return {name: group_of(tree, group) for name, tree in _trees(scans).items()}


def _norm_bands(data: xr.Dataset) -> xr.Dataset:
    """Geometric mean and 5 and 95 % quantiles of the length in each bucket, and in all but position 0."""
    found = {}
    for bucket in data["position"].values:
        quantiles = data["norm_quantile"].sel(position=bucket, drop=True)
        key = "position 0" if bucket == "0" else f"positions {bucket.replace('-', '–')}"
        found[key] = (data["norm_geometric"].sel(position=bucket, drop=True), quantiles)
    found["positions 1 and later"] = later_norms(data)
    bands = {}
    for key, (mean, quantiles) in found.items():
        bands[key] = mean
        bands[f"{key}_low"], bands[f"{key}_high"] = (quantiles.isel(quantile=i, drop=True) for i in (0, -1))
    return xr.Dataset(bands)


def _lens(named: Mapping[str, xr.Dataset]) -> str:
    if all(data.attrs.get("lens") == "tuned lens" for data in named.values()):
        return "A tuned lens was trained to predict the last layer: what it reads early is partly its own work."
    return (
        "It misleads early on: the logit lens is biased in early layers, and layer 0 of tied embeddings predicts the "
        "current token."
    )


def _coefficient(here: xr.Dataset, name: str) -> str:
    value, low, high = (float(here[name + end]) for end in ("", "_low", "_high"))
    return number(value) + ("" if np.isnan(low) else f" ({number(low)} to {number(high)})")


def _dots(name: str, here: xr.Dataset, i: int, count: int) -> go.Scatter:
    return go.Scatter(
        x=here["token_norm"].values,
        y=here["token_loss"].values,
        customdata=np.stack([here[key].values for key in ("token", "target", "token_position")], -1),
        hovertemplate="token %{customdata[0]}, next %{customdata[1]}, position %{customdata[2]}"
        "<br>length %{x:.4g}, loss %{y:.4g}",
        mode="markers",
        name=wrapped(name),
        marker={"color": COLOURS[i % len(COLOURS)], "size": 5, "opacity": 0.5, "symbol": symbol(i)},
        showlegend=count > 1,
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
    figure.update_yaxes(range=[low - room, high + 2 * room], row=1, col=1)
    words = f"block 0 is off the scale ({number(first)}): double-click to see all"
    figure.add_annotation(
        text=words, x=1, y=1, xref="x domain", yref="y domain", xanchor="right", yanchor="top", showarrow=False
    )
