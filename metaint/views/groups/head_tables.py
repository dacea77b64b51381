"""`/heads` as tables: a wide one for machines (`head_frame`), and for the terminal the labels and every score."""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from rich.console import Console
from rich.table import Table

from metaint.errors import InputError
from metaint.measures.attention import HEAD_MEASURES
from metaint.scans.evidence import evidence
from metaint.scans.finding import Scan
from metaint.scans.labels import SPECIFIC, THRESHOLDS, heads_of, label_heads, telling_heads
from metaint.views.drawing.terminal import cell_width, number, plain_table
from metaint.views.groups.group_view import group_json

KINDS = [measure.name for measure in HEAD_MEASURES if measure.form == "kind"]
TAU_SHOWN = 0.5
# A table of more heads than this is cut short, unless asked for.
MOST_ROWS = 400
# Heads in one that is.
FEW_ROWS = 50
# With more labels than this, those that many heads hold are cut short.
FEW_LABELS = 60
# Heads of such a label that are shown.
FEW_OF_A_LABEL = 8


def _with_tau(name: str) -> str:
    return f"{name}_tau_{TAU_SHOWN:g}"


SCORES = [_with_tau(measure.name) if measure.per_tau else measure.name for measure in HEAD_MEASURES]


def head_frame(scan: Scan) -> pd.DataFrame:
    """One row for each head: its name, labels (joined by a comma), and every variable of `/heads` that heads have."""
    heads = heads_of(scan)
    flat = heads[[name for name, values in heads.items() if set(values.dims) <= {"layer", "head"}]]
    for name in [name for name, values in heads.items() if set(values.dims) == {"tau", "layer", "head"}]:
        tied = heads[name]
        flat = flat.assign({f"{name}_tau_{tau:g}": tied.sel(tau=tau, drop=True) for tau in tied["tau"].values})
    table = flat.drop_vars(["tau", "window"], errors="ignore").to_dataframe().reset_index()
    table.insert(0, "head", [f"{i}.{j}" for i, j in zip(table["layer"], table["head"], strict=True)], True)
    table = table.loc[:, ~table.columns.duplicated()]
    labels = label_heads(scan).groupby("head")["label"].agg(lambda names: ",".join(n for n in names if n != "none"))
    table.insert(1, "labels", table["head"].map(labels))
    return table


def heads_json(heads: xr.Dataset) -> Any:
    """For JSON: one record for each head; beside them, where there is any, what runs along other dimensions."""
    records = json.loads(head_frame(heads).to_json(orient="records", double_precision=12) or "[]")
    for record in records:
        record["labels"] = [name for name in record["labels"].split(",") if name]
    others = [name for name, values in heads.items() if not set(values.dims) <= {"tau", "layer", "head"}]
    return {"heads": records, **group_json(heads[others])} if others else records


def print_scan(console: Console, scan: xr.DataTree, sort: str | None = None, top: int | None = None) -> None:
    """Labels with their evidence, then every score of every head, sorted by `sort` (largest first)."""
    frame = head_frame(scan)
    scores, tied = _measured(heads_of(scan))
    order = sort or next((name for name in ("induction", "prefix_match", *scores) if _is_known(frame, name)), None)
    if order is None or order not in frame or order in ("head", "labels"):
        raise InputError(f"sort is {sort!r}: choose one of {', '.join([*scores, *tied])}.")
    total = len(frame)
    if top is None:
        top = total if total <= MOST_ROWS else FEW_ROWS
    frame = frame.sort_values(order, ascending=False, kind="stable").head(top or total)
    print_labels(console, scan)
    groups = {
        "Where heads look (weight on the keys of each kind)": [name for name in scores if name in KINDS],
        "How heads look (the shape of their rows)": [name for name in scores if name not in KINDS] + tied,
    }
    for title, columns in groups.items():
        for table in _scores(title, frame, columns, order, console.width):
            console.print(table)
    if len(frame) < total:
        console.print(f"{len(frame)} of {total} heads shown: --top 0 prints all, --json and --csv give all.")


def _measured(heads: xr.Dataset) -> tuple[list[str], list[str]]:
    """The scores that were measured, our own first, and at the shown tau those that have one for each tau."""
    known = [measure.name for measure in HEAD_MEASURES]
    counted = [str(name)[: -len("_count")] for name in heads if str(name).endswith("_count")]
    counted = [name for name in counted if "lag" not in heads[name].dims]
    names = sorted(counted, key=lambda name: known.index(name) if name in known else len(known))
    scores = [name for name in names if "tau" not in heads[name].dims]
    return scores, [_with_tau(name) for name in names if "tau" in heads[name].dims]


def print_labels(console: Console, scan: xr.DataTree, title: str = "Labelled heads") -> None:
    """The labelled heads with what their labels rest on: of a label that many hold, those with the widest margins."""
    labels = label_heads(scan)
    named = labels.query("label != 'none'")
    order = list(THRESHOLDS)
    named = named.assign(order=[order.index(label) for label in named["label"]])
    named = named.sort_values(by=["order", "margin"], ascending=[True, False])
    total = len(set(labels["head"]))
    if named.empty:
        console.print(f"None of the {total} heads earns a label.")
        _print_not_judged(console, labels)
        return
    columns = _evidence_columns(console.width, bool(named["output_share"].notna().any()))
    count = len(set(named["head"]))
    tight = console.width < 90
    table = plain_table(f"{title}: {count} of {total}", ("head", "label"), columns, tight=tight, no_wrap=True)
    few = len(named) <= FEW_LABELS
    for label, rows in named.groupby("label", sort=False):
        shown = rows if few else rows.head(FEW_OF_A_LABEL)
        for row in shown.to_dict("records"):
            near = "?" if row["borderline"] else ""
            table.add_row(row["head"], row["label"] + near, *(_CELLS[name](row) for name in columns))
        if len(shown) < len(rows):
            table.add_row("…", f"{len(rows) - len(shown)} more of {label}", style="dim")
    console.print(table)
    words = [f"{name}: {_WORDS[name]}" for name in columns if name in _WORDS]
    console.print(f"[dim]{'; '.join([*words, '?: other tokens may undo it'])}.[/]")
    _print_not_judged(console, labels)
    console.print()


def _evidence_columns(width: int, written: bool) -> list[str]:
    """What is shown of each label's evidence, in the order in which it matters, as far as there is room."""
    columns = ["score", "interval", "off sink", "on first"]
    if written:
        columns += ["written", "share"]
    if width >= (110 if written else 90):
        columns += ["uniform", "null"]
    return columns


def _interval(row: dict[str, Any]) -> str:
    return "" if math.isnan(row["low"]) else f"{number(row['low'])}–{number(row['high'])}"


def _null(row: dict[str, Any]) -> str:
    if math.isnan(row["null_mean"]):
        return ""
    spread = "" if math.isnan(row["null_std"]) else f" ± {number(row['null_std'])}"
    return number(row["null_mean"]) + spread


# What stands in each column of the labels' table, and what the words under it say.
_CELLS: dict[str, Callable[[dict[str, Any]], str]] = {
    "score": lambda row: f"[bold]{number(row['score'])}[/]",
    "interval": _interval,
    "off sink": lambda row: number(row["off_sink"]),
    "on first": lambda row: number(row["on_first"]),
    "written": lambda row: number(row["written"]),
    "share": lambda row: number(row["output_share"]),
    "uniform": lambda row: number(row["uniform"]),
    "null": _null,
}
_WORDS = {
    "interval": "95 %, by resampling sequences",
    "off sink": "of the weight beside position 0, of which kinds of tokens ask",
    "on first": "weight on position 0, the attention sink",
    "written": "the score weighted by values",
    "share": "length written, over the layer's mean",
    "uniform": "what even attention scores on these tokens",
    "null": "the same rows read at random other keys (averaging: the other heads of the layer)",
}


def _print_not_judged(console: Console, labels: pd.DataFrame) -> None:
    """The labels that these tokens can't tell, with the reason."""
    for label, reason in labels.attrs["not_judged"].items():
        console.print(f"[dim]No head is judged as {label}: {reason}[/]")


def print_telling(console: Console, scan: xr.DataTree, on_text: xr.DataTree, most: int = 15) -> None:
    """The labelled heads that tell most, with what each label's score is on text beside it."""
    chosen = telling_heads(scan, most)
    if chosen.empty:
        console.print("No head earns a label.")
        return
    others = evidence(heads_of(on_text))
    labels = label_heads(on_text)
    also = labels[labels["label"].isin(SPECIFIC)].groupby("head")["label"].agg(", ".join)
    title, tight = f"The {len(chosen)} most telling heads", console.width < 90
    columns = (("head", "label"), ("score", "interval", "null", "off sink", "on text"))
    table = plain_table(title, *columns, tight=tight, no_wrap=True)
    table.add_column("label on text")
    for row in chosen.to_dict("records"):
        interval = f"{number(row['low'])}–{number(row['high'])}"
        on_text_score = "–"
        if row["label"] in others:
            on_text_score = number(float(others[row["label"]].asked.value[row["layer"], row["index"]]))
        off_sink = number(row["off_sink"])
        numbers = (interval, number(row["null_mean"]), off_sink, on_text_score)
        score = f"[bold]{number(row['score'])}[/]"
        table.add_row(row["head"], row["label"], score, *numbers, also.get(row["head"], "–"))
    console.print(table)
    console.print(
        "[dim]score: share of attention on the tokens of this kind, of repeated random tokens, where the kind is "
        "defined; interval: 95 %, by resampling sequences; null: the same rows read at random other keys; off sink: "
        "the share of the weight beside position 0; on text: the same on prose (induction at matches whose "
        "continuation repeats).[/]\n"
    )


def _is_known(frame: pd.DataFrame, name: str) -> bool:
    return name in frame and bool(frame[name].notna().any())


def _scores(title: str, frame: pd.DataFrame, columns: list[str], order: str, width: int) -> Iterator[Table]:
    """The columns in as many tables as the width needs; the labels stand in the first."""
    labels = [label.replace(",", ", ") for label in frame["labels"]]
    cells = {name: [number(value) for value in frame[name]] for name in columns}
    headings = {name: _heading(name, name == order) for name in columns}
    room = width - 2 - cell_width("head", frame["head"])
    first = True
    while columns:
        table = plain_table(title)
        table.add_column("head", no_wrap=True)
        beside = [frame["head"].tolist()]
        even = ["even"]
        left = room
        if first:
            table.add_column("label", no_wrap=True)
            beside.append(labels)
            even = ["", "uniform"]
            left -= cell_width("uniform", labels)
        count = _fitting([cell_width(headings[name], cells[name]) for name in columns], left)
        shown, columns = columns[:count], columns[count:]
        for name in shown:
            heading = f"[bold]{headings[name]}[/]" if name == order else headings[name]
            table.add_column(heading, justify="right", no_wrap=True)
        for row in zip(*beside, *(cells[name] for name in shown), strict=True):
            table.add_row(*row)
        table.add_section()
        table.add_row(*even, *(number(_uniform(frame, name)) for name in shown), style="dim")
        yield table
        first, title = False, "(continued)"


def _fitting(widths: list[int], room: int) -> int:
    """How many columns fit beside each other, at least one."""
    return max(1, int((np.cumsum(widths) <= room).sum()))


def _heading(name: str, chosen: bool) -> str:
    words = name.replace(f"_tau_{TAU_SHOWN:g}", f"_τ={TAU_SHOWN:g}").replace("_", "\n")
    return f"{words} ↓" if chosen else words


def _uniform(frame: pd.DataFrame, name: str) -> float:
    """What uniform attention scores, over the heads of the table."""
    even = name.replace("_tau_", "_uniform_tau_") if "_tau_" in name else f"{name}_uniform"
    return float(np.mean(frame[even].to_numpy())) if even in frame else math.nan
