"""`/saturation` as tables and figures.

In: a scan. Out: terminal tables, one row a scale or a layer; frames for machines; plotly figures with a caption each.
"""

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from plotly import graph_objects as go
from plotly.colors import sample_colorscale
from rich.console import Console

from metaint.errors import door
from metaint.scans.finding import Scan, group_of, one_group
from metaint.views.drawing.panels import GREY, MARKED, SHADES, finish, panels, whole_ticks
from metaint.views.drawing.terminal import head_at, number, numbers, print_columns
from metaint.views.groups.group_view import GroupView

# Columns of the table of scales, and of that of layers: variable, heading. What a scan lacks is left out.
_BY_SCALE = [
    ("similarity", "similarity"),
    ("similarity_null", "of other\ntokens"),
    ("similarity_centred", "centred"),
    ("similarity_to_limit", "to largest\nscale"),
    ("embedding_share", "embedding's\nshare"),
    ("stream_slope", "stream\nslope"),
    ("attn_write_slope", "attention\nslope"),
    ("mlp_write_slope", "MLP\nslope"),
    ("score_slope", "score\nslope"),
    ("kl", "KL"),
    ("top1_agreement", "same\ntop 1"),
    ("loss_change", "loss\nchange"),
]


def saturation_frame(scan: xr.DataTree) -> pd.DataFrame:
    """One row for each scale and layer; what has no layer (KL, agreement, loss) stands in every row of its scale."""
    data = group_of(scan, "saturation")
    names = [
        name for name in data.data_vars if set(data[name].dims) <= {"scale", "layer"} and "scale" in data[name].dims
    ]
    return data[names].to_dataframe().reset_index()


def print_saturation(console: Console, scan: xr.DataTree) -> None:
    """What each scale does to the last layer and to the predictions, and how near each layer's heads are to it."""
    data = group_of(scan, "saturation")
    scaled = data.attrs.get("scaled", "scores")
    last = data.isel(layer=-1)
    columns = [("scale", [f"{scale:g}" for scale in data["scale"].values])]
    for name, heading in _BY_SCALE:
        if name in last and not bool(last[name].isnull().all()):
            columns.append((heading, [_cell(value, name) for value in last[name].values]))
    print_columns(console, f"Saturation: {scaled} times a scale", columns)
    if "total_variation" in data:
        title = f"By layer, at scale {data['scale'].values[0]:g} and, the last four, {data['scale'].values[-1]:g}"
        print_columns(console, title, _of_layers(data))
    if "attended_mean" in data:
        print_columns(console, "Published estimator: positions attended", _published(data))
    console.print(f"[dim]{_READ[scaled]}[/]\n")


def _cell(value: float, name: str) -> str:
    return f"{value:.2e}" if abs(value) >= 1e4 or (name == "embedding_share" and 0 < value < 1e-3) else number(value)


def _of_layers(data: xr.Dataset) -> list[tuple[str, list[str]]]:
    """By layer: how far its heads are from saturated, and what saturating all layers makes of its stream."""
    heads, top = data["total_variation"].isel(scale=0), data.isel(scale=-1)
    return [
        ("layer", [str(layer) for layer in data["layer"].values]),
        ("distance\nto saturated", numbers(heads.mean("head"))),
        ("nearest\nhead", head_at(heads, "argmin")),
        ("furthest\nhead", head_at(heads, "argmax")),
        ("gap", numbers(data["gap_mean"].mean("head"))),
        ("output\nchange", numbers(top["output_change"].mean("head"))),
        ("similarity", numbers(top["similarity"])),
        ("of other\ntokens", numbers(top["similarity_null"])),
        ("centred", numbers(top["similarity_centred"])),
    ]


def _published(data: xr.Dataset) -> list[tuple[str, list[str]]]:
    """By head: the published counts of attended positions beside those under a true mask."""
    layers, heads = data["layer"].values, range(data["attended_mean"].sizes["head"])
    published = data["similarity_published"].values.tolist()
    return [
        ("head", [f"{i}.{j}" for i in layers for j in heads]),
        ("mean", numbers(data["attended_mean"])),
        ("deviation", numbers(data["attended_std"])),
        ("share\nabove 1", numbers(data["attended_split"])),
        ("mean\ncausal", numbers(data["attended_mean_causal"])),
        ("share above 1\ncausal", numbers(data["attended_split_causal"])),
        ("similarity\nof layer", ["" if j else number(published[i]) for i in layers for j in heads]),
    ]


@door
def plot_saturation(scan: Scan) -> go.Figure:
    """Similarity of the stream with that at each scale, by layer, its null at the largest, and distance to saturated.

    In: a scan, or its `/saturation`; InputError without it.

    >>> import metaint, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> scan = metaint.scan(model, torch.arange(10).repeat(2, 2), [metaint.SaturationProbe()])
    >>> metaint.plot_saturation(scan).layout.title.text
    'Saturation by layer'
    """
    name, data = one_group(scan, "saturation")
    heads = "total_variation" in data
    figure = panels(["similarity", "distance to saturated"][: 1 + heads], [1.3, 1][: 1 + heads])
    layers, scales = data["layer"].values, data["scale"].values
    colours = sample_colorscale("Viridis", np.linspace(0.05, 0.85, len(scales)).tolist())
    mode = "lines+markers" if len(layers) <= MARKED else "lines"
    for scale, colour in zip(scales, colours, strict=True):
        at = data.sel(scale=scale)
        look: dict[str, Any] = {"legendgroup": f"{scale:g}", "line": {"color": colour}, "name": f"scale {scale:g}"}
        figure.add_trace(go.Scatter(x=layers, y=at["similarity"], mode=mode, **look), row=1, col=1)
        if heads:
            mean = at["total_variation"].mean("head")
            figure.add_trace(go.Scatter(x=layers, y=mean, mode=mode, showlegend=False, **look), row=2, col=1)
    null = {"color": GREY, "dash": "dash"}
    values = data["similarity_null"].isel(scale=-1)
    figure.add_trace(
        go.Scatter(x=layers, y=values, mode="lines", line=null, name="other tokens<br>at the largest"), 1, 1
    )
    caption = (
        f"How to read: mean cosine of the stream after each block with that of the same model with its "
        f"{data.attrs.get('scaled', 'scores')} times a scale; 1 means that scaling changes nothing, as where attention "
        "is saturated already. It misleads where the grey line, the cosine with other tokens, is as high: such a "
        "stream looks like anything. "
    )
    if heads:
        caption += "Below, mean distance (total variation) of attention to attention to the largest scores alone. "
    finish(figure, "Saturation by layer", {name: data}, caption, "layer")
    return figure


def plot_head_saturation(scan: Scan) -> go.Figure:
    """Distance of each head's attention to saturated attention, layers down and heads across; InputError without it."""
    name, data = one_group(scan, "saturation")
    values = data["total_variation"].isel(scale=0)
    figure = panels(["layer"], [max(0.7, 0.045 * data.sizes["layer"])])
    names = [[f"{i}.{j}" for j in data["head"].values] for i in data["layer"].values]
    grid = go.Heatmap(
        z=values, x=data["head"], y=data["layer"], zmin=0, zmax=1, colorscale=SHADES,
        customdata=names, hovertemplate="head %{customdata}: %{z:.3f}<extra></extra>",
        colorbar={"title": "distance", "len": 1, "thickness": 14},
    )  # fmt: skip
    figure.add_trace(grid)
    steps = {dim: whole_ticks(data.sizes[dim], 20) for dim in ("layer", "head")}
    figure.update_yaxes(autorange="reversed", tick0=0, dtick=steps["layer"])
    figure.update_xaxes(tick0=0, dtick=steps["head"])
    caption = (
        "How to read: total variation between a head's attention and its saturated form, all weight on the largest "
        "score; 0 is an argmax head, or one whose largest scores tie. It misleads for heads that attend evenly on "
        "purpose: high here, and no less settled; see averaging in /heads."
    )
    finish(figure, "How far each head is from saturated", {name: data}, caption, "head")
    figure.update_layout(hovermode="closest")
    return figure


def saturation_figures(scan: Scan) -> dict[str, go.Figure]:
    """Every figure that the scan's `/saturation` allows; InputError without it."""
    heads = "total_variation" in group_of(scan, "saturation")
    return {"saturation": plot_saturation(scan), **({"head_saturation": plot_head_saturation(scan)} if heads else {})}


_READ = {
    "scores": "similarity: mean cosine of the stream with that of the model whose attention scores are all multiplied "
    "by the scale (inf: attention to the largest alone); of other tokens: what a collapsed stream scores anyway; "
    "centred: mean directions taken out; distance: total variation between attention and its saturated form, without "
    "propagation; gap: largest score less the next; KL and loss in nats.",
    "all parameters": "similarity: mean cosine of the stream with that of the model with all parameters multiplied by "
    "the scale, the estimator of Merrill et al. 2021; slope: k of the growth c^k to the next scale; embedding's share: "
    "||x_0|| / ||x||, near 0 once the token embedding has dropped out, and then similarity tells of that as much as of "
    "saturated attention: compare with scaled scores. KL and loss in nats.",
}


VIEW = GroupView(
    group="saturation",
    figures=saturation_figures,
    frames={"saturation": saturation_frame},
    shown=(("scale", "layer"), ("scale",)),
    print=print_saturation,
    source="Merrill et al. 2021, Effects of Parameter Norm Growth During Transformer Training (arXiv 2010.09697).",
)
