"""`/weights` as tables and a figure.

In: a scan. Out: terminal tables, of norms and copying by layer and of the pairs of heads that compose most; a frame for
machines; a plotly figure with a caption.
"""

from html import escape
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from rich.console import Console

from metaint.errors import door
from metaint.scans.finding import Scan, group_of, one_group
from metaint.views.drawing.panels import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    MARKED,
    VERMILION,
    finish,
    short_name,
    there,
    whole_ticks,
)
from metaint.views.drawing.terminal import head_at, number, numbers, print_columns
from metaint.views.groups.group_view import GroupView

# Pairs of heads in the table.
_TOP = 8
# Pairs of heads in the figure.
_DRAWN = 20
_PRODUCTS = {"qk_norm": "W_Q W_K^T", "ov_norm": "W_V W_O"}
_KINDS = {"Q": "q_composition", "K": "k_composition", "V": "v_composition"}
_COPYING = {"full_ov_copying": "full OV copying", "ov_copying": "OV copying"}
# Colours and markers of the parts of a layer, and of the kinds of composition, in their orders.
_LOOKS = ((BLUE, "circle"), (VERMILION, "square"), (GREEN, "diamond"))


def weights_frame(scan: xr.DataTree) -> pd.DataFrame:
    """One row a head; the norms of a layer's parts stand in the rows of all its heads."""
    data = group_of(scan, "weights")
    frame = data[[name for name in data.data_vars if data[name].dims == ("layer", "head")]].to_dataframe()
    norms = data["parameter_norm"].to_pandas().add_prefix("parameter_norm_")
    return frame.join(norms, on="layer").reset_index()


def print_weights(console: Console, scan: xr.DataTree) -> None:
    """Norms of the parameters by layer and part, and what the heads' weights can do."""
    data = group_of(scan, "weights")
    parts = {part: data["parameter_norm"].sel(part=part) for part in data["part"].values}
    columns = [("layer", [str(layer) for layer in data["layer"].values])]
    columns += [(str(part), numbers(norms)) for part, norms in parts.items()]
    columns += [(f"{label}\nmean head", numbers(data[name].mean("head"))) for name, label in _PRODUCTS.items()]
    for name, label in (("full_ov_copying", "full OV copying"), ("ov_copying", "OV copying")):
        for end, which in (("highest", "argmax"), ("lowest", "argmin")):
            columns.append((f"{label}\n{end}", head_at(data[name], which)))
    print_columns(console, "Norms of the parameters, and copying", columns)
    totals = ", ".join(
        f"{name.removesuffix('_norm').replace('_', ' ')} {number(data[name].item())}"
        for name in ("embedding_norm", "unembedding_norm", "total_norm", "total_norm_without_embeddings")
        if not data[name].isnull()
    )
    spread = [number(float(data[f"{name}_null_std"].max()) * 2) for name in ("ov_copying", "full_ov_copying")]
    console.print(
        f"[dim]norms: {totals}; raw weights, biases and gains included, tied weights once. Copying: sum of the real "
        "parts over sum of the magnitudes of the eigenvalues of W_V W_O (full: of W_E W_V W_O W_U), 1 copies, -1 "
        f"suppresses; within ±{spread[0]} (full: ±{spread[1]}) of their mean lie random heads of these sizes. Norms, "
        "their gains and MLPs are left out, so a copying score tells what a head's weights can do, not what it does."
        "[/]\n"
    )
    _print_pairs(console, data)


def _print_pairs(console: Console, data: xr.Dataset) -> None:
    """The pairs of heads with the largest z over the three kinds of composition; nothing where none is known."""
    if "composition" in data.attrs:
        console.print(f"[dim]Composition of pairs of heads is {data.attrs['composition']}.[/]\n")
    known = _known(data)
    if not known:
        return
    top = _strongest(data, _TOP)
    chance, total = number(data["composition_chance"].item()), sum(int(data[z].notnull().sum()) for z in known.values())
    columns = [("kind", [pair.kind for pair in top]), ("from", [pair.writes for pair in top])]
    columns += [("to", [pair.reads for pair in top]), ("score", [number(pair.score) for pair in top])]
    columns += [("chance", [chance] * len(top)), ("z", [f"{pair.z:.1f}" for pair in top])]
    print_columns(console, f"Composition: top {len(top)} of {total} pairs", columns)
    medians = ", ".join(f"{kind} {float(data[z].median()):.1f}" for kind, z in known.items())
    console.print(
        "[dim]score: ||M1 M2|| / (||M1|| ||M2||), M1 = W_V W_O what a head writes, M2 what a later one reads for its "
        "queries (W_Q W_K^T), keys (W_K W_Q^T) or values (W_V W_O), with the gains of norms; chance: had one of them "
        "been turned at random in the stream; z: how far the squared score lies above that, in standard deviations "
        f"(median of all pairs: {medians}). It misleads where read as use: these are weights alone, at relative "
        "position 0, without rotary rotations, biases and MLPs, and all heads of a trained model share directions, so "
        "that a large z says more than the chance of a rotation, and not that the pair is used.[/]\n"
    )


class _Pair(NamedTuple):
    kind: str
    writes: str
    reads: str
    score: float
    z: float


def _known(data: xr.Dataset) -> dict[str, str]:
    """The kinds of composition that are known of some pair, and the variables of their z."""
    return {kind: f"{name}_z" for kind, name in _KINDS.items() if there(data, f"{name}_z")}


def _strongest(data: xr.Dataset, count: int) -> list[_Pair]:
    """The pairs with the largest z over all kinds of composition, those without one left out."""
    pairs = [pair for kind in _known(data) for pair in _of_kind(data, kind, count)]
    return sorted(pairs, key=lambda pair: -pair.z)[:count]


def _of_kind(data: xr.Dataset, kind: str, count: int) -> list[_Pair]:
    score, z = (data[name].values for name in (_KINDS[kind], f"{_KINDS[kind]}_z"))
    order = np.argsort(np.where(np.isfinite(z), -z, np.inf), axis=None, kind="stable")[:count]
    places = [place for place in zip(*np.unravel_index(order, z.shape), strict=True) if np.isfinite(z[place])]
    return [
        _Pair(kind, f"{layer}.{head}", f"{layer_to}.{head_to}", float(score[place]), float(z[place]))
        for place in places
        for layer, head, layer_to, head_to in [place]
    ]


@door
def plot_weights(scan: Scan) -> go.Figure:
    """Norms of the parameters by layer and part, copying of each head beside random ones, and the pairs of heads that
    compose most.

    In: a scan, or its `/weights`. Copying is of the full circuit through the vocabulary where that is known, else of
    W_V W_O; it and the pairs are left out where they are not known. InputError where a scan has no `/weights`.

    >>> import metaint, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> scan = metaint.scan(model, torch.arange(10).repeat(2, 2), [metaint.WeightProbe()])
    >>> metaint.plot_weights(scan).layout.title.text
    'Weights of layers and heads'
    """
    model, data = one_group(scan, "weights")
    copying = next((name for name in _COPYING if there(data, name)), None)
    pairs = _strongest(data, _DRAWN)
    heights = [270.0, *([19.0 * max(len(pairs), 3) + 10] if pairs else [])]
    gap = 84
    top = [{}, {}] if copying else [{"colspan": 2}, None]
    figure = make_subplots(
        len(heights), 2, specs=[top, *([[{"colspan": 2}, None]] if pairs else [])], row_heights=heights,
        horizontal_spacing=0.11, vertical_spacing=gap / (sum(heights) + gap),
    )  # fmt: skip
    figure.update_layout(height=sum(heights) + gap * (len(heights) - 1))
    _draw_norms(figure, data, 1 + bool(copying))
    if copying:
        _draw_copying(figure, data, copying)
    if pairs:
        _draw_pairs(figure, data, pairs, f"legend{2 + bool(copying)}")
    finish(figure, "Weights of layers and heads", {"": data}, _caption(data, copying, pairs), "")
    parameters = data.attrs.get("parameters")
    subtitle = escape(short_name(model), quote=False)
    subtitle += f": {parameters:,} parameters" if parameters else ""
    figure.update_layout(title_subtitle_text=subtitle, hovermode="closest")
    return figure


def _draw_norms(figure: go.Figure, data: xr.Dataset, column: int) -> None:
    """A line for each part of a layer that the model has."""
    where: Any = {"row": 1, "col": column}
    mode = "lines+markers" if data.sizes["layer"] <= MARKED else "lines"
    for part, (colour, symbol) in zip(data["part"].values, _LOOKS, strict=False):
        norms = data["parameter_norm"].sel(part=part)
        if norms.notnull().any():
            line = go.Scatter(x=data["layer"].values, y=norms.values, name=str(part), mode=mode)
            line.update(line_color=colour, marker={"symbol": symbol, "size": 7})
            line.update(hovertemplate=f"layer %{{x}}, {part}: %{{y:.4g}}<extra></extra>")
            figure.add_trace(line, **where)
    figure.update_yaxes(title_text="norm of the parameters", rangemode="tozero", **where)
    _along_layers(figure, data, **where)


def _draw_copying(figure: go.Figure, data: xr.Dataset, name: str) -> None:
    """A dot for each head, spread out over its layer, and where random heads lie."""
    where: Any = {"row": 1, "col": 1}
    n_layers, n_heads = data.sizes["layer"], data.sizes["head"]
    mean, spread = (float(data[f"{name}_null_{end}"].mean()) for end in ("mean", "std"))
    ends = [-0.5, n_layers - 0.5]
    band = go.Scatter(x=[*ends, *ends[::-1]], y=[mean + 2 * spread] * 2 + [mean - 2 * spread] * 2, fill="toself")
    band.update(mode="lines", line_width=0, fillcolor="rgba(118, 118, 118, 0.25)", hoverinfo="skip", showlegend=False)
    figure.add_trace(band, **where)
    beside = (np.arange(n_heads) - (n_heads - 1) / 2) * 0.7 / max(n_heads, 2)
    x, names = (np.arange(n_layers)[:, None] + beside).ravel(), list(np.ndindex(n_layers, n_heads))
    dots = go.Scatter(x=x, y=data[name].values.ravel(), customdata=[f"{i}.{j}" for i, j in names], mode="markers")
    dots.update(
        marker={"color": COLOURS[-1], "size": 7 if len(names) <= 300 else 3.5, "opacity": 0.6}, showlegend=False
    )
    dots.update(hovertemplate="head %{customdata}: %{y:.3f}<extra></extra>")
    figure.add_trace(dots, **where)
    figure.update_yaxes(title_text=_COPYING[name], range=[-1.06, 1.06], dtick=0.5, **where)
    _along_layers(figure, data, **where)


def _along_layers(figure: go.Figure, data: xr.Dataset, row: int, col: int) -> None:
    n_layers = data.sizes["layer"]
    step = whole_ticks(n_layers, 14)
    figure.update_xaxes(title_text="layer", tick0=0, dtick=step, range=[-0.6, n_layers - 0.4], row=row, col=col)


def _draw_pairs(figure: go.Figure, data: xr.Dataset, pairs: list[_Pair], legend: str) -> None:
    """A dot for each pair, the strongest above, and a line at the median of all pairs; a legend beside them."""
    where: Any = {"row": 2, "col": 1}
    width = 0.04 * min(len(pairs), 3)  # fewer than three pairs share the height of three
    for kind, (colour, symbol) in zip(_KINDS, _LOOKS, strict=True):
        rows = [i for i, pair in enumerate(pairs) if pair.kind == kind]
        if not rows:
            continue
        chosen = [pairs[i] for i in rows]
        common: dict[str, Any] = {"x": [pair.z for pair in chosen], "y": rows, "legendgroup": kind}
        stems = go.Bar(orientation="h", width=width, marker_color=colour, hoverinfo="skip", showlegend=False, **common)
        texts = [
            f"{kind} {pair.writes} → {pair.reads}: z {pair.z:.1f}<br>score {number(pair.score)}" for pair in chosen
        ]
        dots = go.Scatter(mode="markers", name=f"{kind} composition", legend=legend, customdata=texts, **common)
        dots.update(marker={"color": colour, "symbol": symbol, "size": 9})
        dots.update(hovertemplate="%{customdata}<extra></extra>")
        for trace in (stems, dots):
            figure.add_trace(trace, **where)
    median = _median(data)
    figure.add_vline(median, line={"color": GREY, "dash": "dash", "width": 1.5}, **where)
    figure.update_xaxes(
        title_text=f"z of the composition (dashed: median of all pairs, {median:.1f})", rangemode="tozero", **where
    )
    names = [f"{pair.writes} → {pair.reads}" for pair in pairs]
    figure.update_yaxes(
        tickvals=list(range(len(pairs))), ticktext=names, range=[len(pairs) - 0.4, -0.6], showgrid=False, **where
    )


def _median(data: xr.Dataset) -> float:
    return float(np.nanmedian(np.concatenate([data[z].values.ravel() for z in _known(data).values()])))


def _caption(data: xr.Dataset, copying: str | None, pairs: list[_Pair]) -> str:
    norms = "length of all parameters of a part of a layer, raw, gains and biases included. "
    caption = f"How to read: {norms}"
    if copying:
        circuit = "W_E W_V W_O W_U" if copying == "full_ov_copying" else "W_V W_O"
        caption = (
            f"How to read: left, a dot for each head: of the eigenvalues of {circuit}, the sum of the real parts over "
            "that of the magnitudes; 1 copies, -1 suppresses, and random heads of these sizes lie in the grey band "
            f"(two deviations). Right, {norms}"
        )
    if pairs:
        caption += (
            f"Below, the {len(pairs)} pairs of heads with the largest z: how far what the second reads for its queries "
            "(Q), keys (K) or values (V) is what the first writes, in deviations above heads turned at random. "
        )
    elif "composition" in data.attrs:
        caption += f"Composition of pairs of heads is {data.attrs['composition']}. "
    return caption + (
        "It misleads where read as use: weights tell what heads can do, without norms, MLPs and rotations, and heads "
        "of a trained model share directions, so that a large z need not mean that a pair is used; norms grow with "
        "the number of parameters."
    )


VIEW = GroupView(
    group="weights",
    figures=lambda scan: {"weights": plot_weights(scan)},
    frames={"weights": weights_frame},
    shown=(("layer", "head"), ("layer", "part")),
    print=print_weights,
    source="Norms: Merrill et al. 2021 (arXiv 2010.09697); copying and composition: Elhage et al. 2021, A Mathematical "
    "Framework for Transformer Circuits (transformer-circuits.pub, not on arXiv).",
)
