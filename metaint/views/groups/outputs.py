"""`/outputs` as a table and a figure: how much each head writes, from where, and what that says.

In: a scan. Out: for the terminal the heads that stand out, a frame for machines, a plotly figure with a caption.
"""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from rich.console import Console

from metaint.errors import door
from metaint.scans.finding import Scan, group_of, one_group, without_bundles
from metaint.views.drawing.panels import BOTH_WAYS, SHADES, finish, there, whole_ticks
from metaint.views.drawing.terminal import number, print_columns
from metaint.views.groups.group_view import GroupView

# Heads at each end of a table.
_TOP = 6
# Pixels of a map's width and of its height, at most, of a cell's at least, and between rows of maps.
_HEIGHT = 470
_CELL = 15
_LEAST = 110
_GAP = 74
# With more heads than this two maps stand side by side in place of three.
_FEW = 24


class _Map(NamedTuple):
    """A map of the figure: a variable, or its difference to its null; values are cut off at `ends`."""

    variable: str
    title: str
    ends: tuple[float, float]
    null: str = ""


_SHARE = (0.0, 1.0)
_SAYS = (-2.0, 2.0)
_MAPS = (
    _Map("output_share", "length of the output<br>1 is the layer's mean head", (0.0, 2.0)),
    _Map("first_token_output", "part from position 0<br>0 none, 1 all", _SHARE),
    _Map("sink_drain", "drain at position 0<br>0 none, 1 its value is 0", _SHARE),
    _Map("induction_written", "induction, by what is written<br>0 none, 1 all", _SHARE),
    _Map(
        "copying_deviations", "says what it looks at<br>−2 (blue) to 2 (red) deviations", _SAYS,
        "copying_deviations_null",
    ),
    _Map(
        "following_deviations", "says what follows that<br>−2 (blue) to 2 (red) deviations", _SAYS,
        "following_deviations_null",
    ),
)  # fmt: skip
# Instead of the induction stripe, on tokens that don't repeat.
_ON_TEXT = _Map("prefix_match_written", "prefix match, by what is written<br>0 none, 1 all", _SHARE)
# Columns of the terminal's tables: variable, heading.
_COLUMNS = (
    ("output_share", "output\nshare"),
    ("z_share", "z\nshare"),
    ("first_token_output", "from\nposition 0"),
    ("sink_drain", "drain\nthere"),
    ("induction_written", "induction\nwritten"),
    ("prefix_match_written", "prefix match\nwritten"),
    ("copying_deviations", "copying"),
    ("copying_deviations_null", "null"),
    ("following_deviations", "following"),
    ("following_deviations_null", "null"),
)


def outputs_frame(scan: Scan) -> pd.DataFrame:
    """One row a head: its name, and every variable of `/outputs`. InputError where a scan has none."""
    table = without_bundles(group_of(scan, "outputs")).to_dataframe(dim_order=["layer", "head"]).reset_index()
    table["head"] = [f"{layer}.{head}" for layer, head in zip(table["layer"], table["head"], strict=True)]
    return table


def print_outputs(console: Console, scan: xr.DataTree) -> None:
    """The heads that write least, and those that say most for and against the token that they look at."""
    frame = outputs_frame(scan)
    least = frame.dropna(subset=["z_share"]).sort_values("z_share", kind="stable")
    _print_heads(console, "Heads that write least", least.head(_TOP))
    if _known(frame, "copying_deviations"):
        frame["above"] = frame["copying_deviations"] - frame["copying_deviations_null"]
        said: Any = frame.dropna(subset=["above"]).sort_values("above", ascending=False, kind="stable")
        _print_heads(console, "Heads that copy most", said.head(_TOP))
        _print_heads(console, "Heads that suppress most", said.tail(_TOP).sort_values("above", kind="stable"))
    else:
        console.print("[dim]What heads say is not known: no positions were read, or writes don't reach the logits.[/]")
    console.print(f"[dim]{_READ}[/]\n")


def _known(frame: pd.DataFrame, name: str) -> bool:
    return name in frame and bool(frame[name].notna().any())


def _print_heads(console: Console, title: str, frame: pd.DataFrame) -> None:
    columns = [("head", list(frame["head"]))]
    for name, heading in _COLUMNS:
        if _known(frame, name):
            columns.append((heading, [number(value) for value in frame[name]]))
    print_columns(console, title, columns)


@door
def plot_outputs(scan: Scan) -> go.Figure:
    """Maps of the heads: how much each writes, what of it comes from position 0, and what that says.

    In: a scan, or its `/outputs`; InputError without it. What was not measured is left out.

    >>> import metaint, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> scan = metaint.scan(model, torch.arange(10).repeat(2, 2), [metaint.OutputProbe()])
    >>> metaint.plot_outputs(scan).layout.title.text
    'What the heads write'
    """
    model, data = one_group(scan, "outputs")
    maps = list(_MAPS)
    if not there(data, "induction_written"):
        maps = [_ON_TEXT if each.variable == "induction_written" else each for each in _MAPS]
    maps = [each for each in maps if there(data, each.variable)]
    most = 3 if data.sizes["head"] <= _FEW else 2
    beside = min(len(maps), most)
    rows = -(-len(maps) // beside)
    height = min(max(_CELL * data.sizes["layer"], _LEAST), _HEIGHT)
    inside = rows * height + (rows - 1) * _GAP
    figure = make_subplots(
        rows, beside, subplot_titles=[_title(each) for each in maps], shared_yaxes=True, horizontal_spacing=0.04,
        vertical_spacing=(rows > 1) * _GAP / inside,
    )  # fmt: skip
    for i, each in enumerate(maps):
        row, column = divmod(i, beside)
        where: Any = {"row": row + 1, "col": column + 1}
        figure.add_trace(_heatmap(data, each), **where)
        figure.update_xaxes(title_text="head", title_standoff=4, **where)
        if column == 0:
            figure.update_yaxes(title_text="layer", **where)
    figure.update_layout(height=inside)
    finish(figure, "What the heads write", {model: data}, _CAPTION, "")
    _tidy(figure, data)
    return figure


def _heatmap(data: xr.Dataset, drawn: _Map) -> go.Heatmap:
    values = _values(data, drawn)
    colours = BOTH_WAYS if drawn.ends[0] < 0 else SHADES
    tips = [[_tip(data, layer, head) for head in data["head"].values] for layer in data["layer"].values]
    return go.Heatmap(
        z=values, x=data["head"].values, y=data["layer"].values, zmin=drawn.ends[0], zmax=drawn.ends[1],
        colorscale=colours, showscale=False, name=drawn.variable, customdata=tips,
        hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip


def _values(data: xr.Dataset, drawn: _Map) -> np.ndarray:
    values = data[drawn.variable].transpose("layer", "head").values
    return values - data[drawn.null].transpose("layer", "head").values if drawn.null else values


def _tip(data: xr.Dataset, layer: int, head: int) -> str:
    """What the pointer shows of a head: everything that the maps draw of it, with its interval."""
    at = data.sel(layer=layer, head=head)
    lines = [f"head {layer}.{head}"]
    for name, _ in _COLUMNS:
        if name in at and not bool(at[name].isnull()):
            low, high = at[f"{name}_low"].item(), at[f"{name}_high"].item()
            between = "" if np.isnan(low) else f" ({number(low)} to {number(high)})"
            lines.append(f"{name.replace('_', ' ')} {number(at[name].item())}{between}")
    return "<br>".join(lines)


def _title(drawn: _Map) -> str:
    first, rest = drawn.title.split("<br>")
    return f"<b>{first}</b><br>{rest}"


def _tidy(figure: go.Figure, data: xr.Dataset) -> None:
    """Small titles, whole numbers on the axes, layer 0 above."""
    figure.for_each_annotation(lambda note: note.update(font_size=12) if note.name != "caption" else None)
    ticks = {dim: whole_ticks(data.sizes[dim], 14) for dim in ("layer", "head")}
    ends = {dim: [data[dim].values[0] - 0.5, data[dim].values[-1] + 0.5] for dim in ("layer", "head")}
    figure.update_xaxes(tick0=0, dtick=ticks["head"], range=ends["head"], showgrid=False)
    figure.update_yaxes(tick0=0, dtick=ticks["layer"], range=ends["layer"][::-1], showgrid=False)
    layout: Any = figure.layout
    figure.update_layout(height=layout.height + 30, margin_t=layout.margin.t + 30, hovermode="closest")


_CAPTION = (
    "How to read: each cell is a head. Above, the length of what it writes beside its layer's mean head (dark from "
    "twice that), what part of it comes from position 0, and how much shorter the value there is than others, so that "
    "a head with nothing to say can look there. Below, the weight on an induction target with each weight times the "
    "length of its value, and the logit that the write itself gives the token that the head looks at, and the token "
    "after that: in standard deviations over the vocabulary, less the same with each row's weights shuffled; red "
    "copies, blue suppresses. It misleads where read as effect: later layers may undo what a head writes, and most "
    "heads write for later heads and not for the logits; of a head that is pale in the first map the others tell "
    "little."
)
_READ = (
    "output share, z share: mean length of what a head writes, after and before W_O, beside its layer's mean head; "
    "from position 0: the part of what is written that comes from there; drain: how much shorter the value there is "
    "than the others; written: weight on the kind's targets with each weight times its value's length; copying, "
    "following: the logit that the write itself gives the token that the head looks at, and the token after it, in "
    "standard deviations over the vocabulary; null: with each row's weights shuffled. It misleads where read as "
    "effect: later layers may undo what a head writes."
)


VIEW = GroupView(
    group="outputs",
    figures=lambda scan: {"outputs": plot_outputs(scan)},
    frames={"outputs": outputs_frame},
    shown=(("layer", "head"),),
    print=print_outputs,
    source="Kobayashi et al. 2020, Attention is Not Only a Weight (arXiv 2004.10102); z share: Sandoval-Segura et al. "
    "2025, Identifying and Evaluating Inactive Heads in Pretrained LLMs (arXiv 2504.03889).",
)
