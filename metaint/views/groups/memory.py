"""`/memory` as tables and a figure: which heads recall what, and which pairs of heads read each other.

In: a scan. Out: for the terminal the strongest heads and pairs, each beside its chance, and what behaviour shows;
frames for machines; a plotly figure with a caption.
"""

import math
import textwrap
from html import escape
from typing import Any

import pandas as pd
import xarray as xr
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from rich.console import Console

from metaint.errors import door
from metaint.scans.finding import Scan, group_of, one_group
from metaint.views.drawing.panels import BLUE, GREY, finish, shares_scale, short_name, whole_ticks
from metaint.views.drawing.terminal import number, print_columns
from metaint.views.groups.group_view import GroupView

# Heads and pairs in a table.
_TOP = 8
# Pairs in the figure.
_DRAWN = 20
_PAIR = ("layer", "head", "layer_to", "head_to")
# Variables and headings, the one that sorts a table first; a recall stands beside its chance.
_OUTPUTS = [("ov_recall", "OV recall"), ("ov_recall_top5", "in\ntop 5")]
_POSITIONS = [
    ("previous_position_recall", "previous position\nrecall"),
    ("previous_position_recall_early", "of the\nfirst 64"),
    ("previous_position_recall_causal", "of earlier\nalone"),
    ("previous_position_mass", "weight\nthere"),
]
_KEYS = [
    ("key_composition_recall", "key composition\nrecall"),
    ("key_composition_recall_top5", "in\ntop 5"),
    ("key_composition_recall_triggers", "of\ntriggers"),
]
_BEHAVIOUR = {
    "in_context_accuracy": "in context",
    "in_context_accuracy_without_copies": "without copies",
    "first_occurrence_accuracy": "at first occurrences",
}
_UNKNOWN = {
    "ov_recall": "OV recall is not known: the audit doesn't find the weights to be what a head does.",
    "previous_position_recall": "Recall of the previous position is not known: it is asked of heads with learned "
    "positions or rotated queries and keys, where the audit finds the weights to be what a head does.",
    "key_composition_recall": "Key composition is not known: it is asked of pairs of heads in different layers, where "
    "the audit finds the weights to be what a head does.",
}
_TOO_MANY = "Key composition is not known: pairs are left out in a model of so many heads."


def memory_frame(scan: Scan) -> pd.DataFrame:
    """One row a head: its recalls, each beside its chance. InputError where a scan has no `/memory`."""
    data = group_of(scan, "memory")
    return _with_chances(data, ("layer", "head"))


def pairs_frame(scan: Scan) -> pd.DataFrame:
    """One row for each pair of heads, the second in a later layer, with its recalls and their chances; no rows where
    pairs weren't read. InputError where a scan has no `/memory`."""
    data = group_of(scan, "memory")
    if "key_composition_recall" not in data:
        return pd.DataFrame(columns=[*_PAIR, "key_composition_recall"])
    return _with_chances(data, _PAIR).query("layer < layer_to").reset_index(drop=True)


def _with_chances(data: xr.Dataset, dims: tuple[str, ...]) -> pd.DataFrame:
    names = [str(name) for name in data.data_vars if set(data[name].dims) == set(dims)]
    beside = [part for name in names for part in (name, f"{name}_chance")]
    columns = [name for name in beside if name in data]
    return pd.DataFrame(data[columns].to_dataframe(dim_order=list(dims)).reset_index()[[*dims, *columns]])


def print_memory(console: Console, scan: xr.DataTree) -> None:
    """The heads and the pairs of heads that recall most, and how often the model predicts from the context."""
    data = group_of(scan, "memory")
    heads, pairs = memory_frame(scan), pairs_frame(scan)
    heads.insert(0, "name", _names(heads, "layer", "head"))
    pairs.insert(0, "name", _pair_names(pairs))
    _print_top(console, "OV", heads, _OUTPUTS)
    _print_top(console, "Positions", heads, _POSITIONS)
    _print_top(console, "Pairs", pairs, _KEYS)
    behaviour = ", ".join(
        f"{words} {number(data[name].item())} of {int(data[f'{name}_count'])}"
        for name, words in _BEHAVIOUR.items()
        if name in data and data[f"{name}_count"] > 0
    )
    console.print(f"Behaviour, share of next tokens right: {behaviour or 'not known, no predictions were read'}.")
    console.print(
        f"[dim]Recalls: of {data.attrs.get('tokens_read', '?')} tokens, or of positions, the share for which the "
        "weights alone score the right one highest; chance: if all scored alike. In context: where the next token is "
        "what followed the current one last time, to be read against first occurrences. It misleads where read as "
        "use: a recall of 1 does not mean that the circuit works, since the rest of the stream is left out, and a "
        "head may recall what it never attends to; several weak heads may do together what none does alone.[/]\n"
    )


def _print_top(console: Console, title: str, frame: pd.DataFrame, wanted: list[tuple[str, str]]) -> None:
    """The rows that recall most, or a sentence where nothing is known."""
    by = wanted[0][0]
    known = frame.dropna(subset=[by])
    if known.empty:
        console.print(f"[dim]{_why(frame, by)}[/]\n")
        return
    top = known.sort_values(by, ascending=False, kind="stable").head(_TOP)
    paired = "layer_to" in top
    columns = [("pair" if paired else "head", [*top["name"], "chance"])]
    for name, heading in wanted:
        if name in top and len(top[name].dropna()):
            even = chance(top[f"{name}_chance"].iloc[0])
            columns.append((heading, [*(number(value) for value in top[name]), even]))
    print_columns(console, f"{title}: top {len(top)} of {len(known)}", columns)


def _why(frame: pd.DataFrame, name: str) -> str:
    return _TOO_MANY if frame.empty and "key_composition_recall_chance" not in frame else _UNKNOWN[name]


def chance(value: float) -> str:
    """`number`, and a power of ten for a chance that it would round to nothing."""
    return f"{value:.0e}" if 0 < value < 0.001 else number(value)


@door
def plot_memory(scan: Scan) -> go.Figure:
    """Recall of each head, layers down and heads across, and below them the pairs that recall most, beside chance.

    In: a scan, or its `/memory`; InputError without it.

    >>> import metaint, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> scan = metaint.scan(model, torch.arange(10).repeat(2, 2), [metaint.MemoryProbe()])
    >>> metaint.plot_memory(scan).layout.title.text
    'What the weights recall'
    """
    model, data = one_group(scan, "memory")
    pairs = pairs_frame(data)
    pairs = pairs.dropna(subset=["key_composition_recall"])
    pairs = pairs.sort_values("key_composition_recall", ascending=False, kind="stable").head(_DRAWN)
    heights = [max(200.0, min(13 * data.sizes["layer"], 760)), 19.0 * max(len(pairs), 3) + 10]
    gap = 96
    figure = make_subplots(
        2, 2, specs=[[{}, {}], [{"colspan": 2}, None]], row_heights=heights, horizontal_spacing=0.09,
        vertical_spacing=gap / (sum(heights) + gap),
    )  # fmt: skip
    figure.update_layout(height=sum(heights) + gap)
    maps = {"previous_position_recall": "recall of the previous position", "ov_recall": "OV recall"}
    for column, (name, title) in enumerate(maps.items(), 1):
        _draw_map(figure, column, data, name, title)
    missing = _UNKNOWN["key_composition_recall"] if "key_composition_recall" in data else _TOO_MANY
    _draw_pairs(figure, pairs, missing)
    caption = (
        "How to read: the share of positions, and of tokens, for which a head's weights alone score the position "
        "before, or the token's own logit, highest; below, for pairs of heads, the share of tokens that the second "
        f"finds by its keys among those that the first wrote (the {_DRAWN} strongest pairs). A colour means something "
        "where it is far above chance. It misleads where read as use: a recall of 1 does not mean that the circuit "
        "works, since the rest of the stream is left out, and a head may recall what it never attends to."
    )
    finish(figure, "What the weights recall", {"": data}, caption, "")
    subtitle = escape(short_name(model), quote=False)
    subtitle += f": {data.attrs['tokens_read']} tokens read" if "tokens_read" in data.attrs else ""
    figure.update_layout(title_subtitle_text=subtitle, hovermode="closest")
    return figure


def _draw_map(figure: go.Figure, column: int, data: xr.Dataset, name: str, title: str) -> None:
    values = data[name]
    where: Any = {"row": 1, "col": column}
    if bool(values.isnull().all()):
        figure.add_trace(go.Scatter(x=[None], y=[None], showlegend=False), **where)
        _say(figure, _UNKNOWN[name], 46, **where)
        return
    names = [[f"{i}.{j}" for j in data["head"].values] for i in data["layer"].values]
    grid = go.Heatmap(
        z=values.values, x=data["head"].values, y=data["layer"].values, coloraxis="coloraxis", customdata=names,
        hovertemplate="head %{customdata}: %{z:.3f}<extra></extra>",
    )  # fmt: skip
    figure.add_trace(grid, **where)
    even = data[f"{name}_chance"].item()
    steps = {dim: whole_ticks(data.sizes[dim], 16) for dim in ("layer", "head")}
    beside = "" if math.isnan(even) else f" (chance {chance(even)})"
    figure.update_xaxes(title_text=f"head: {title}{beside}", tick0=0, dtick=steps["head"], **where)
    figure.update_yaxes(title_text="layer", autorange="reversed", tick0=0, dtick=steps["layer"], **where)
    figure.update_layout(coloraxis=shares_scale("recall", 180))


def _draw_pairs(figure: go.Figure, pairs: pd.DataFrame, missing: str) -> None:
    """A dot for each pair, the strongest above, and a line where chance is."""
    if pairs.empty:
        figure.add_trace(go.Scatter(x=[None], y=[None], showlegend=False), row=2, col=1)
        _say(figure, missing, 92, row=2, col=1)
        return
    names = _pair_names(pairs)
    recalls, even = pairs["key_composition_recall"], float(pairs["key_composition_recall_chance"].iloc[0])
    rows = list(range(len(pairs)))
    width = 0.04 * min(len(pairs), 3)  # fewer than three pairs share the height of three
    stems = go.Bar(x=recalls, y=rows, orientation="h", width=width, marker_color=BLUE, hoverinfo="skip")
    dots = go.Scatter(x=recalls, y=rows, mode="markers", marker={"color": BLUE, "size": 9}, customdata=names)
    dots.update(hovertemplate="%{customdata}: %{x:.3f}<extra></extra>")
    for trace in (stems, dots):
        figure.add_trace(trace.update(showlegend=False), row=2, col=1)
    line = {"color": GREY, "dash": "dash", "width": 1.5}
    figure.add_vline(even, row=2, col=1, line=line)  # type: ignore[arg-type]
    figure.update_xaxes(
        title_text=f"key composition recall (dashed: chance, {chance(even)})",
        range=[-0.01, 1.03],
        domain=[0.03, 1],
        row=2,
    )
    figure.update_yaxes(
        tickvals=rows, ticktext=names, range=[len(rows) - 0.4, -0.6], showgrid=False, row=2, col=1
    )  # fmt: skip


def _say(figure: go.Figure, sentence: str, width: int, row: int, col: int) -> None:
    """A sentence in place of what isn't known."""
    lines = textwrap.wrap(sentence, width)
    place = {"x": 0.5, "y": 0.5, "xref": "x domain", "yref": "y domain", "row": row, "col": col}
    figure.add_annotation(text="<br>".join(lines), showarrow=False, font_color=GREY, **place)
    figure.update_xaxes(visible=False, row=row, col=col)
    figure.update_yaxes(visible=False, row=row, col=col)


def _names(frame: pd.DataFrame, layer: str, head: str) -> list[str]:
    return [f"{i}.{j}" for i, j in zip(frame[layer], frame[head], strict=True)]


def _pair_names(frame: pd.DataFrame) -> list[str]:
    ends = _names(frame, "layer", "head"), _names(frame, "layer_to", "head_to")
    return [f"{writes} → {reads}" for writes, reads in zip(*ends, strict=True)]


VIEW = GroupView(
    group="memory",
    figures=lambda scan: {"memory": plot_memory(scan)},
    frames={"memory": memory_frame, "memory_pairs": pairs_frame},
    shown=(("layer", "head"), _PAIR),
    print=print_memory,
    source="Bietti et al. 2023, Birth of a Transformer: A Memory Viewpoint (arXiv 2306.00802).",
)
