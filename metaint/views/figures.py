"""Plotly figures of `/residual` and `/inner`.

In: one scan, or several by name to compare them. Out: figures of a fixed width, each with a caption that says how to
read it and when it misleads. What they show is an operational definition inspired by Wu & Varshney (2310.05884), see
`measures/inner.py`.
"""

import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from metaint.errors import InputError
from metaint.probes.inner import MOST_TOKENS
from metaint.views.streams import group_of, later_norms
from metaint.views.tables import number

Scans = xr.DataTree | Mapping[str, xr.DataTree]

# Okabe and Ito's palette, which colour-blind readers can tell apart; without its yellow, too pale for a line.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS, GREY = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, "#222222"), "#767676"
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")
# Pixels: the figure, a panel of height 1, margins, a line of the caption and where it starts below the panels.
WIDTH, _PANEL, _LEFT, _TOP, _LINE, _CAPTION_AT = 900, 270, 76, 84, 17, 58
# Characters: a line of the caption, a line of a legend, and the longest name; layers up to which points are marked.
_CAPTION_WRAP, _NAME_WRAP, _NAME_SHOWN, _MARKED = 146, 22, 60, 16
# With fewer growths than this after block 0 (four a block) there is nothing that it could flatten.
_FEW_GROWTHS = 8
_NO_PROOF = (
    "Growth alone is no evidence of inner optimisation: any exact descent through a final norm lengthens the stream, "
    "and so does adding vectors that don't oppose it."
)


class _Line(NamedTuple):
    """One variable to draw, with the colour it has where there is one scan (several are told apart by colour)."""

    variable: str
    label: str
    colour: str
    dash: str = "solid"


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
    lines = [_Line(name, name, colours[name], "dash" if name == "position 0" else "solid") for name in buckets[:-1]]
    figure = _panels(["length of the stream"], [1.3])
    _draw(figure, 1, tables, lines if alone else [_Line(buckets[-1], buckets[-1], BLUE)])
    _log_axis(figure, 1)
    read = (
        "How to read: geometric mean length of the stream before each layer's block (layer 0 is the embedding, the "
        f"last comes before the final norm){'' if alone else ', position 0 left out'}; bands hold 5 to 95 % of the "
        "tokens. "
    )
    trap = " Folded or centred weights change lengths, so compare only scans whose weights were processed alike."
    _finish(figure, "Length of the residual stream", named, read + _NO_PROOF + trap, "layer")
    return figure


def plot_growth(scans: Scans) -> go.Figure:
    """By what factor each block lengthens the stream, and the cosines of what attention and MLP add with it.

    InputError where /residual is missing.
    """
    named = _named(scans, "residual")
    split = any(_there(data, f"cos_stream_{part}") for data in named.values() for part in ("attn", "mlp"))
    figure = _panels(["length after / before", "cosine with the stream"][: 1 + split], [1, 1][: 1 + split])
    growth = [_Line("growth", "growth", BLUE), _Line("growth_orthogonal", "if orthogonal", GREY, "dash")]
    _draw(figure, 1, named, growth)
    _rule(figure, 1, 1)
    _leave_out_first(figure, named)
    caption = (
        "How to read: growth of the length in each block, beside what the same step would give if it were orthogonal "
        "to the stream (growth below that: the step opposes the stream). "
    )
    caption += _draw_cosines(figure, named) if split else ""
    caption += "Means over tokens after position 0, bands are 95 % intervals over sequences. " + _NO_PROOF
    _finish(figure, "Growth of the stream in each block", named, caption, "block")
    return figure


def _draw_cosines(figure: go.Figure, named: Mapping[str, xr.Dataset]) -> str:
    """What attention and MLP add beside the stream, in the second panel; returns how to read it."""
    writes = [_Line("cos_stream_attn", "attention", VERMILION), _Line("cos_stream_mlp", "MLP", GREEN, "dash")]
    null = 2 * max(data["cos_null_std"].item() for data in named.values())
    _stripe(figure, 2, null, max(data["block"].size for data in named.values()))
    _draw(figure, 2, named, writes)
    _rule(figure, 2, 0)
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
    figure = _panels(["nats", "rank of the next token"], [1.2, 1])
    losses = [
        _Line("loss", "loss", BLUE),
        _Line("loss_null", "loss of another token's target", GREY, "dash"),
        _Line("prediction_entropy", "entropy of the prediction", ORANGE, "dot"),
    ]
    _draw(figure, 1, named, losses)
    _draw(figure, 2, named, [_Line("target_rank", "rank", GREEN)])
    _log_axis(figure, 2)
    caption = (
        "How to read: mean loss of the next token if the stream at this layer were the last; a loss as high as that "
        "of another token's target knows nothing of this position. Below, geometric mean rank, 1 is the most likely. "
        f"Bands are 95 % intervals over sequences. {_lens(named)}"
    )
    _finish(figure, "Loss at every layer", named, caption, "layer")
    return figure


def plot_agreement(scans: Scans) -> go.Figure:
    """Cosine of each block's step with the descent direction of the loss, beside its null; attention and MLP too.

    InputError where /inner is missing.
    """
    named = _named(scans, "inner")
    parts = {"": "block", "_attn": "attention", "_mlp": "MLP"}
    kept = [p for p in parts if p == "" or any(_there(data, f"step_gradient_cosine{p}") for data in named.values())]
    figure = _panels([f"cosine, {parts[part]}" for part in kept], [0.8] * len(kept))
    for row, part in enumerate(kept, 1):
        lines = [
            _Line(f"step_gradient_cosine{part}", "next token", BLUE),
            _Line(f"step_gradient_cosine_null{part}", "another token's target", GREY, "dash"),
        ]
        _draw(figure, row, named, lines, explain=row == 1)
        _rule(figure, row, 0)
        figure.update_yaxes(matches="y" if row > 1 else None, row=row, col=1)
    caption = (
        "How to read: mean cosine of what is added with the descent direction of the next token's loss there, 1 is a "
        "gradient step; only what stands above the same with another token's target tells of this token. Bands are "
        "95 % intervals over sequences. Operational definition inspired by Wu & Varshney (2023), no theorem of "
        f"theirs. {_lens(named)}"
    )
    _finish(figure, "Do steps follow the gradient?", named, caption, "block")
    return figure


def plot_norm_loss(scans: Scans, layer: int | None = None) -> go.Figure:
    """Length of the stream against the loss, a dot for each token, at one layer (default: the last).

    InputError where /inner is missing or has no such layer.
    """
    named = _named(scans, "inner")
    figure = _panels(["loss (nats)"], [1.3])
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
    figure.update_xaxes(_log_scale(np.concatenate([trace.x for trace in traces])))
    figure.update_layout(hovermode="closest")
    caption = (
        f"{' '.join(told)} How to read: a dot is a token, at most {MOST_TOKENS} a scan (the coefficients use all that "
        "were sampled, with 95 % intervals over sequences); partial: with token frequencies and position partialled "
        "out. A correlation over tokens is no cause: frequent tokens and early positions have lengths and losses of "
        "their own."
    )
    _finish(figure, "Length of the stream and loss", named, caption, "length of the stream")
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


def _there(data: xr.Dataset, name: str) -> bool:
    return name in data and bool(data[name].notnull().any())


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
        name=_wrap(name),
        marker={"color": COLOURS[i % len(COLOURS)], "size": 5, "opacity": 0.5, "symbol": _symbol(i)},
        showlegend=count > 1,
    )


def _symbol(i: int) -> str:
    """Colours come round again after the seventh scan; then the markers differ."""
    return _SYMBOLS[i // len(COLOURS) % len(_SYMBOLS)]


def _panels(titles: Sequence[str], heights: Sequence[float]) -> go.Figure:
    """Panels above each other along one x axis; a height of 1 is `_PANEL` pixels."""
    inside = _PANEL * sum(heights)
    gap = 26 / inside
    figure = make_subplots(
        len(titles), 1, shared_xaxes=True, vertical_spacing=gap, row_heights=[h / sum(heights) for h in heights]
    )
    for row, title in enumerate(titles, 1):
        figure.update_yaxes(title_text=title, row=row, col=1)
    figure.update_layout(height=inside)
    return figure


def _draw(
    figure: go.Figure, row: int, named: Mapping[str, xr.Dataset], lines: Sequence[_Line], explain: bool = True
) -> None:
    """The lines of every scan with their bands, in one panel, and if it is to `explain` them in a legend of its own.

    One scan: a colour for each line. Several: a colour for each scan, named in the first panel's legend, and dashes
    for the lines, explained in grey.
    """
    several = len(named) > 1
    own = "legend" if row == 1 or not explain else f"legend{row}"
    for i, (name, data) in enumerate(named.items()):
        for j, line in enumerate(lines):
            if not _there(data, line.variable):
                continue
            common: dict[str, Any] = {"legendgroup": f"scan {i}" if several else line.label}
            common["legend"] = "legend" if several else own
            colour = COLOURS[i % len(COLOURS)] if several else line.colour
            if _there(data, f"{line.variable}_low"):
                figure.add_trace(_band(data, line.variable, colour).update(common), row=row, col=1)
            curve = _curve(data, line, f"{name}, {line.label}" if several else line.label, colour).update(common)
            curve.update(name=_wrap(name if several else line.label), marker_symbol=_symbol(i))
            curve.showlegend = explain and (not several or (row == 1 and j == 0))
            figure.add_trace(curve, row=row, col=1)
    if several and explain and len(lines) > 1:
        for line in lines:
            style = {"color": GREY, "dash": line.dash}
            key = go.Scatter(x=[None], y=[None], mode="lines", line=style, name=_wrap(line.label), legend=own)
            figure.add_trace(key, row=row, col=1)


def _stripe(figure: go.Figure, row: int, null: float, blocks: int) -> None:
    """Where cosines of unrelated directions lie; a trace and no shape, so that the axis makes room for it."""
    ends = [-0.5, blocks - 0.5]
    stripe = go.Scatter(x=[*ends, *ends[::-1]], y=[null, null, -null, -null], mode="lines", fill="toself")
    stripe.update(fillcolor="rgba(118, 118, 118, 0.13)", line_width=0, hoverinfo="skip", legend=f"legend{row}")
    figure.add_trace(stripe.update(name=_wrap("unrelated directions"), showlegend=True), row=row, col=1)


def _log_axis(figure: go.Figure, row: int) -> None:
    axis = "y" if row == 1 else f"y{row}"
    traces: Any = figure.data
    drawn = np.concatenate([t.y for t in traces if t.yaxis == axis and t.y[0] is not None])
    figure.update_yaxes(_log_scale(drawn), row=row, col=1)


def _log_scale(drawn: np.ndarray) -> dict[str, Any]:
    """A log axis with ticks at 1, 2 and 5; where the values lie close together plotly's own ticks do better."""
    ticks = {"dtick": "D2", "tickformat": "~g"} if np.nanmax(drawn) > 5 * np.nanmin(drawn) else {}
    return {"type": "log", **ticks}


def _rule(figure: go.Figure, row: int, at: float) -> None:
    figure.add_hline(at, row=row, col=1, line={"color": GREY, "width": 1}, layer="below")  # type: ignore[arg-type]


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


def _curve(data: xr.Dataset, line: _Line, told: str, colour: str) -> go.Scatter:
    values = data[line.variable]
    x, y = _along(values), values.values
    hover = f"{escape(told)}: %{{y:.4g}}"
    interval = None
    if _there(data, f"{line.variable}_low"):
        interval = np.stack([data[line.variable + end].values for end in ("_low", "_high")], -1)
        hover += " (%{customdata[0]:.4g} to %{customdata[1]:.4g})"
    return go.Scatter(
        x=x,
        y=y,
        customdata=interval,
        hovertemplate=hover + "<extra></extra>",
        mode="lines+markers" if len(x) <= _MARKED else "lines",
        line={"color": colour, "dash": line.dash, "width": 2},
        marker={"color": colour, "size": 6},
    )


def _band(data: xr.Dataset, variable: str, colour: str) -> go.Scatter:
    """What lies between `_low` and `_high`; a single point is drawn a little wide, or it would have no area."""
    low, high = data[f"{variable}_low"], data[f"{variable}_high"]
    kept = (low.notnull() & high.notnull()).values
    x, low, high = _along(low)[kept], low.values[kept], high.values[kept]
    if len(x) == 1:
        x, low, high = np.array([x[0] - 0.1, x[0] + 0.1]), low.repeat(2), high.repeat(2)
    return go.Scatter(
        x=np.concatenate([x, x[::-1]]),
        y=np.concatenate([high, low[::-1]]),
        mode="lines",
        fill="toself",
        fillcolor=f"rgba({', '.join(str(int(colour[k : k + 2], 16)) for k in (1, 3, 5))}, 0.13)",
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
    )


def _along(values: xr.DataArray) -> np.ndarray:
    """The layers or blocks that a variable runs along."""
    return values[values.dims[0]].values


def _finish(figure: go.Figure, title: str, named: Mapping[str, xr.Dataset], caption: str, x_title: str) -> None:
    """The common look: title, x axis, legends right of their panels, and the caption below all."""
    rows = sorted(axis for axis in figure.layout if axis.startswith("yaxis"))
    for row, axis in enumerate(rows, 1):
        top = figure.layout[axis].domain[1]
        figure.layout["legend" if row == 1 else f"legend{row}"] = {"x": 1.02, "y": top, "yanchor": "top"}
    lines = textwrap.wrap(caption, _CAPTION_WRAP)
    below = _CAPTION_AT + _LINE * len(lines) + 14
    figure.update_layout(
        template="plotly_white",
        width=WIDTH,
        height=figure.layout.height + _TOP + below,
        margin={"l": _LEFT, "r": 30, "t": _TOP, "b": below},
        title={"text": title, "x": 0, "xref": "paper", "y": 1, "yanchor": "top", "pad": {"t": 18}},
        title_subtitle={"text": _facts(named), "font": {"color": GREY}},
        font_family="Arial, Helvetica, sans-serif",  # the caption is wrapped for its width
        modebar_remove=["sendChartToCloud", "select", "lasso"],  # a click on the first would upload the figure
        hovermode=figure.layout.hovermode or "x unified",
    )
    figure.update_yaxes(automargin=False, title_standoff=8, zeroline=False)
    figure.update_xaxes(zeroline=False)
    figure.update_xaxes(title_text=x_title, row=len(rows), col=1)
    if x_title in ("layer", "block"):
        longest = max(data.sizes[x_title] for data in named.values())
        figure.update_xaxes(tick0=0, dtick=next(step for step in (1, 2, 5, 10, 20, 50, 100) if longest <= 14 * step))
    figure.add_annotation(
        text="<br>".join(lines),
        name="caption",
        x=0,
        y=0,
        xref="paper",
        yref="paper",
        xanchor="left",
        yanchor="top",
        xshift=12 - _LEFT,
        yshift=-_CAPTION_AT,
        align="left",
        showarrow=False,
        font={"size": 12, "color": "#444444"},
    )


def _facts(named: Mapping[str, xr.Dataset]) -> str:
    """What was read, in a line under the title."""
    if len(named) == 1:
        name, data = next(iter(named.items()))
        tokens, sequences = (int(data.attrs.get(key, 0)) for key in ("tokens_seen", "sequences"))
        return f"{escape(_short(name), quote=False)}: {tokens} tokens in {sequences} sequence{'s' * (sequences != 1)}"
    counts = sorted(int(data.attrs.get("tokens_seen", 0)) for data in named.values())
    return f"{len(named)} scans of {counts[0]}{'' if counts[0] == counts[-1] else f' to {counts[-1]}'} tokens"


def _wrap(name: str) -> str:
    return "<br>".join(textwrap.wrap(escape(_short(name), quote=False), _NAME_WRAP))


def _short(name: str) -> str:
    """The end of a name too long to print: folders differ there."""
    return name if len(name) <= _NAME_SHOWN else f"…{name[-_NAME_SHOWN:]}"
