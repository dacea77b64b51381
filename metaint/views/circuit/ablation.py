"""What ablation does, in figures: `plot_ablation` of the effects of parts, `plot_check` of a circuit beside others.

In: what `metaint.ablate` and `metaint.check_circuit` give. Out: plotly figures with a caption each.
"""

import math
import textwrap
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import xarray as xr
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from metaint.errors import InputError, door
from metaint.views.circuit.words import figure as digits, unit_of
from metaint.views.drawing.panels import (
    BLUE,
    BOTH_WAYS,
    GREEN,
    GREY,
    VERMILION,
    colour_bar,
    finish,
    short_name,
    there,
    whole_ticks,
    wrapped,
)

# Pixels of a layer, and the least and the most of all layers together.
_LAYER_HEIGHT = 15
_LEAST_HEIGHT = 180
_MOST_HEIGHT = 620
# Pixels of a set in the forest, of what lies between rows, and of a row's own margin.
_SET_HEIGHT = 30
_ROW_GAP = 74
_FOREST_MARGIN = 20
# Pixels that the colours take, with the legend below them.
_COLOURS_HEIGHT = 180
_BELOW_COLOURS = 230
# Heads named on the map: those with the largest effects.
_NAMED = 5
# Parts of a set's row that its random sets lie below it.
_BELOW_SET = 0.3
# Characters of a set's name in a line, and pixels of one.
_SET_WRAP = 24
_LETTER = 6.8
# Pixels that the names have left of the panels, and that the panels are wide beside a legend.
_LEFT_OF_FOREST = 62
_FOREST_WIDTH = 620
# Shares of the width that the map takes beside the layers: at most, and for each head.
_MOST_OF_WIDTH = 0.58
_OF_WIDTH_BY_HEAD = 0.035


@dataclass(frozen=True)
class _Kind:
    """A kind of part that has one effect a layer."""

    variable: str
    name: str
    colour: str
    symbol: str


_BY_LAYER = (
    _Kind("mlp_effect", "MLP", GREEN, "diamond"),
    _Kind("attn_effect", "all heads of the layer", VERMILION, "circle"),
)


@door
def plot_ablation(ablation: xr.Dataset) -> go.Figure:
    """The effects of ablating parts: heads as a map, MLPs and whole layers of heads beside it, sets in a forest below.

    - `ablation`: what `metaint.ablate` gives. Effects are the metric with parts ablated minus without, in its units;
      bars are 95 % bootstrap intervals over sequences (those of heads are told by the pointer). What was not asked for
      is left out.

    Raises InputError where it is anything else.

    >>> import metaint, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> sink = metaint.scan_metric("first_token", layers=[1])
    >>> effects = metaint.ablate(model, torch.arange(20).view(2, 10), ["heads", "mlps"], metric=sink)
    >>> [trace.type for trace in metaint.plot_ablation(effects).data]
    ['heatmap', 'scatter']
    """
    if not isinstance(ablation, xr.Dataset) or not {"effect", "clean"} <= set(ablation.data_vars):
        what = "a dataset without effects" if isinstance(ablation, xr.Dataset) else f"a {type(ablation).__name__}"
        raise InputError(f"ablation is {what}: pass what metaint.ablate gives.")
    kinds = [kind for kind in _BY_LAYER if there(ablation, kind.variable)]
    has_heads = there(ablation, "effect")
    has_sets = there(ablation, "set_effect")
    figure = _frame(ablation, has_heads, bool(kinds), has_sets)
    finish(figure, "Effects of ablation", {"": ablation}, _caption(ablation, has_heads), "")
    figure.update_layout(title_subtitle_text=_facts(ablation), hovermode="closest")
    if has_heads:
        _draw_heads(figure, ablation)
    if kinds:
        _draw_layers(figure, ablation, kinds, 1 + has_heads)
    if has_sets:
        _draw_sets(figure, ablation, int(has_heads or bool(kinds)) + 1)
    _place_legend(figure, has_heads)
    return figure


def _frame(data: xr.Dataset, has_heads: bool, has_layers: bool, has_sets: bool) -> go.Figure:
    """Empty panels: the map and beside it the layers, below both the sets."""
    layers = min(max(_LAYER_HEIGHT * data.sizes["layer"], _LEAST_HEIGHT), _MOST_HEIGHT)
    heights = [layers] * (has_heads or has_layers)
    if has_sets:
        heights.append(_SET_HEIGHT * data.sizes["set"] + _FOREST_MARGIN)
    columns = max(1, has_heads + has_layers)
    specs: list[list[Any]] = [[{}] * columns] * (has_heads or has_layers)
    specs += [[{"colspan": columns}, *[None] * (columns - 1)]] * has_sets
    inside = sum(heights) + _ROW_GAP * (len(heights) - 1)
    map_share = min(_MOST_OF_WIDTH, _OF_WIDTH_BY_HEAD * data.sizes["head"])
    widths = [map_share, 1 - map_share] if columns == 2 else [1]
    figure = make_subplots(
        len(heights), columns, specs=specs, row_heights=heights, column_widths=widths, shared_yaxes=columns == 2,
        horizontal_spacing=0.02, vertical_spacing=(len(heights) > 1) * _ROW_GAP / inside,
    )  # fmt: skip
    figure.update_layout(height=inside)
    return figure


def _draw_heads(figure: go.Figure, data: xr.Dataset) -> None:
    """Layers down and heads across; the strongest are named, since a map's cells are small."""
    effects, low, high = (data[f"effect{end}"].transpose("layer", "head").values for end in ("", "_low", "_high"))
    limit = float(np.nanmax(np.abs(effects))) or 1.0
    grid = go.Heatmap(
        z=effects, x=data["head"].values, y=data["layer"].values, coloraxis="coloraxis",
        customdata=_hover(data, effects, low, high), hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip
    figure.add_trace(grid, row=1, col=1)
    for i, j in _strongest(effects):
        dark = abs(effects[i, j]) > 0.6 * limit
        figure.add_annotation(
            text=f"{data['layer'].values[i]}.{data['head'].values[j]}", x=data["head"].values[j],
            y=data["layer"].values[i], showarrow=False, font={"size": 9, "color": "white" if dark else "black"},
            row=1, col=1,
        )  # fmt: skip
    n_layers, n_heads = data.sizes["layer"], data.sizes["head"]
    ticks = {"tick0": 0, "showgrid": False}
    figure.update_xaxes(title_text="head", dtick=whole_ticks(n_heads, 14), **ticks, row=1, col=1)
    figure.update_yaxes(title_text="layer", dtick=whole_ticks(n_layers, 16), **ticks, row=1, col=1)
    figure.update_yaxes(range=[n_layers - 0.5, -0.5], row=1, col=1)
    bar = colour_bar("effect of<br>a head", _COLOURS_HEIGHT)
    figure.update_layout(coloraxis={"cmin": -limit, "cmax": limit, "colorscale": BOTH_WAYS, "colorbar": bar})


def _hover(data: xr.Dataset, effects: np.ndarray, low: np.ndarray, high: np.ndarray) -> list[list[str]]:
    """What the pointer shows of each head."""
    unit = escape(unit_of(data.attrs))
    rows = []
    for i, layer in enumerate(data["layer"].values):
        row = []
        for j, head in enumerate(data["head"].values):
            effect = "not asked for"
            if not math.isnan(effects[i, j]):
                effect = (
                    f"{digits(effects[i, j], True)} ({digits(low[i, j], True)} to {digits(high[i, j], True)}){unit}"
                )
            row.append(f"head {layer}.{head}: {effect}{_beside(data, layer, head)}")
        rows.append(row)
    return rows


def _beside(data: xr.Dataset, layer: int, head: int) -> str:
    """Other heads of the layer, in a line of their own; nothing where none is known."""
    name = "effect_same_layer"
    if not there(data, f"{name}_mean"):
        return ""
    mean, std = (float(data[f"{name}_{end}"].sel(layer=layer, head=head)) for end in ("mean", "std"))
    if math.isnan(mean):
        return ""
    return f"<br>other heads of the layer: mean {digits(mean, True)}, standard deviation {digits(std)}"


def _strongest(effects: np.ndarray) -> list[tuple[int, int]]:
    """Places of the heads with the largest effects."""
    order = np.argsort(-np.abs(np.nan_to_num(effects)), axis=None)[:_NAMED]
    rows, columns = np.unravel_index(order, effects.shape)
    places = zip(rows.tolist(), columns.tolist(), strict=True)
    return [place for place in places if abs(np.nan_to_num(effects[place])) > 0]


def _draw_layers(figure: go.Figure, data: xr.Dataset, kinds: list[_Kind], column: int) -> None:
    """A dot for each layer's MLP and for all its heads, with an interval, along the layers of the map."""
    where: Any = {"row": 1, "col": column}
    layers = data["layer"].values
    for i, kind in enumerate(kinds):
        shift = (i - (len(kinds) - 1) / 2) * 0.3
        hover = f"{kind.name}, layer %{{customdata}}: %{{x:.3g}}<extra></extra>"
        figure.add_trace(
            go.Scatter(
                x=data[kind.variable].values, y=layers + shift, customdata=layers, mode="markers", name=kind.name,
                marker={"color": kind.colour, "symbol": kind.symbol, "size": 7}, hovertemplate=hover, showlegend=True,
                error_x=_bars(data, kind.variable, kind.colour),
            ),
            **where,
        )  # fmt: skip
    n_layers = data.sizes["layer"]
    figure.add_vline(0, line={"color": GREY, "width": 1}, **where)
    figure.update_xaxes(title_text=_axis_title(data), **where)
    figure.update_yaxes(tick0=0, dtick=whole_ticks(n_layers, 16), range=[n_layers - 0.5, -0.5], **where)
    if column == 1:
        figure.update_yaxes(title_text="layer", **where)


def _draw_sets(figure: go.Figure, data: xr.Dataset, row: int) -> None:
    """A row for each set, in the order in which they were given."""
    names = [str(name) for name in data["set"].values]
    rows = list(range(len(names)))
    if there(data, "set_effect_same_layer"):
        _draw_random_sets(figure, data, row)
    dots = go.Scatter(
        x=data["set_effect"].values, y=rows, mode="markers", customdata=names, showlegend=False, name="sets",
        marker={"color": BLUE, "size": 9, "symbol": "square"}, error_x=_bars(data, "set_effect", BLUE),
        hovertemplate="%{customdata}: %{x:.3g}<extra></extra>",
    )  # fmt: skip
    figure.add_trace(dots, row=row, col=1)
    figure.add_vline(0, line={"color": GREY, "width": 1}, row=row, col=1)  # type: ignore[arg-type]
    figure.update_xaxes(title_text=f"{_axis_title(data)}, sets together", row=row, col=1)
    labels = [textwrap.wrap(short_name(name), _SET_WRAP) for name in names]
    longest = max(len(line) for label in labels for line in label)
    figure.update_xaxes(domain=[max(0, longest * _LETTER - _LEFT_OF_FOREST) / _FOREST_WIDTH, 1], row=row, col=1)
    texts = ["<br>".join(escape(line, quote=False) for line in label) for label in labels]
    figure.update_yaxes(tickvals=rows, ticktext=texts, range=[len(rows) - 0.4, -0.6], row=row, col=1)


def _draw_random_sets(figure: go.Figure, data: xr.Dataset, row: int) -> None:
    """A small dot for each draw, a little below the set that it stands beside."""
    values = data["set_effect_same_layer"].transpose("set", "draw").values
    places = np.broadcast_to(np.arange(len(values))[:, None] + _BELOW_SET, values.shape)
    dots = go.Scatter(
        x=values.ravel(), y=places.ravel(), mode="markers", name=wrapped("random heads of the same layers"),
        marker={"color": GREY, "size": 5, "opacity": 0.6}, showlegend=True,
        hovertemplate="as many random heads of the same layers: %{x:.3g}<extra></extra>",
    )  # fmt: skip
    figure.add_trace(dots, row=row, col=1)


def _bars(data: xr.Dataset, name: str, colour: str) -> dict[str, Any]:
    """The interval of an effect."""
    values, low, high = (data[name + end].values for end in ("", "_low", "_high"))
    ends = {"array": high - values, "arrayminus": values - low}
    return {"type": "data", "symmetric": False, **ends, "color": colour, "thickness": 1.4, "width": 3}


def _axis_title(data: xr.Dataset) -> str:
    metric = escape(str(data.attrs.get("metric", "metric")).replace("_", " "), quote=False)
    unit = " (nats)" if unit_of(data.attrs) == " nats" else ""
    return f"{metric}{unit}: ablated minus whole"


def _place_legend(figure: go.Figure, has_heads: bool) -> None:
    """Below the colours where there is a map."""
    if has_heads:
        layout: Any = figure.layout
        inside = layout.height - layout.margin.t - layout.margin.b
        figure.update_layout(legend_y=1 - _BELOW_COLOURS / inside)


def _facts(data: xr.Dataset) -> str:
    """What was ablated, how, and on how much."""
    attrs = data.attrs
    parts = [f"{escape(short_name(str(attrs.get('model', 'model'))), quote=False)}: {attrs.get('how', '')} ablation"]
    if "sequences" in attrs:
        parts.append(f"{attrs['sequences']} sequences")
    clean = float(data["clean"])
    metric = escape(str(attrs.get("metric", "metric")).replace("_", " "), quote=False)
    return ", ".join([*parts, f"{metric} {digits(clean)} with nothing ablated"])


def _caption(data: xr.Dataset, has_heads: bool) -> str:
    heads = "a cell is a head, red where ablating it raises the metric, blue where it lowers it; " if has_heads else ""
    at = data.attrs.get("ablated_positions", "all")
    where = "" if isinstance(at, str) else f" at positions {', '.join(map(str, np.atleast_1d(at)[:8]))}"
    return (
        f"How to read: what becomes of the metric when a part is ablated{where}, minus what it is; {heads}bars, and "
        "what the pointer tells of heads, are 95 % bootstrap intervals over sequences. Compare a head with others of "
        "its layer, and a set with the grey dots, as many random heads of the same layers. It misleads where parts "
        "stand in for each other: each alone may do little, and all together much, so look at sets; where what stands "
        "in for a part is unlike anything that later ones ever see, as zero often is; and among many parts some "
        "intervals leave out 0 by luck."
    )
