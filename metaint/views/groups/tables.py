"""Scans as tables: wide ones for machines (`head_frame`), and for the terminal the labels and every score."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pandas as pd
import xarray as xr
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metaint.errors import InputError
from metaint.measures.attention import HEAD_MEASURES
from metaint.scans.labels import THRESHOLDS, evidence, heads_of, label_heads, telling_heads

KINDS = [m.name for m in HEAD_MEASURES if m.form == "kind"]
TAU_SHOWN = 0.5
# A table of more heads than this is cut short, unless asked for.
MOST_ROWS, FEW_ROWS = 400, 50
SCORES = [f"{m.name}_tau_{TAU_SHOWN:g}" if m.per_tau else m.name for m in HEAD_MEASURES]


def head_frame(scan: xr.DataTree) -> pd.DataFrame:
    """One row for each head: its name, labels (joined by a comma), and every variable of `/heads`."""
    heads = heads_of(scan)
    flat = heads.drop_vars([name for name in heads if "tau" in heads[name].dims])
    for name, tied in heads.drop_vars(list(flat)).items():
        flat = flat.assign({f"{name}_tau_{tau:g}": tied.sel(tau=tau, drop=True) for tau in tied["tau"].values})
    table = flat.drop_vars(["tau", "window"], errors="ignore").to_dataframe().reset_index()
    table.insert(0, "head", [f"{i}.{j}" for i, j in zip(table["layer"], table["head"], strict=True)], True)
    table = table.loc[:, ~table.columns.duplicated()]
    labels = label_heads(scan).groupby("head")["label"].agg(lambda names: ",".join(n for n in names if n != "none"))
    table.insert(1, "labels", table["head"].map(labels))
    return table


def to_json(scan: xr.DataTree) -> str:
    """The table of heads as JSON: attributes, then one record for each head; what is not a number is null."""
    records = json.loads(head_frame(scan).to_json(orient="records", double_precision=12) or "[]")
    for record in records:
        record["labels"] = [name for name in record["labels"].split(",") if name]
    return json.dumps({"attributes": scan.attrs, "heads": records}, indent=1, default=str)


def to_csv(scan: xr.DataTree) -> str:
    """The table of heads as CSV."""
    return head_frame(scan).to_csv(index=False)


def print_scan(console: Console, scan: xr.DataTree, sort: str | None = None, top: int | None = None) -> None:
    """Labels with their evidence, then every score of every head, sorted by `sort` (largest first)."""
    heads = heads_of(scan)
    frame = head_frame(scan)
    known = [m.name for m in HEAD_MEASURES]
    own = [str(name)[: -len("_count")] for name in heads if str(name).endswith("_count")]
    measured = [name for name in known if name in own] + [name for name in own if name not in known]
    tied = [f"{name}_tau_{TAU_SHOWN:g}" for name in measured if "tau" in heads[name].dims]
    scores = [name for name in measured if "tau" not in heads[name].dims]
    order = sort or next((n for n in ("induction", "prefix_match", *scores) if _known(frame, n)), None)
    if order is None or order not in frame or order in ("head", "labels"):
        raise InputError(f"sort is {sort!r}: choose one of {', '.join([*scores, *tied])}.")
    total, shown = len(frame), top if top is not None else (len(frame) if len(frame) <= MOST_ROWS else FEW_ROWS)
    frame = frame.sort_values(order, ascending=False, kind="stable").head(shown or total)
    print_labels(console, scan)
    groups = {
        "Where heads look (weight on the keys of each kind)": [n for n in scores if n in KINDS],
        "How heads look (the shape of their rows)": [n for n in scores if n not in KINDS] + tied,
    }
    for title, columns in groups.items():
        for table in _scores(title, frame, columns, order, console.width):
            console.print(table)
    if len(frame) < total:
        console.print(f"{len(frame)} of {total} heads shown: --top 0 prints all, --json and --csv give all.")


def print_labels(console: Console, scan: xr.DataTree, title: str = "Labelled heads") -> None:
    """The labelled heads with score, baseline, null and interval."""
    found = label_heads(scan)
    named = found.query("label != 'none'")
    order = list(THRESHOLDS)
    named = named.assign(order=[order.index(label) for label in named["label"]])
    named = named.sort_values(by=["order", "margin"], ascending=[True, False])
    total = len(set(found["head"]))
    if named.empty:
        console.print(f"None of the {total} heads earns a label.")
        return
    count = len(set(named["head"]))
    table = plain_table(f"{title}: {count} of {total}", tight=console.width < 90)
    for name in ("head", "label"):
        table.add_column(name, no_wrap=True)
    for name in ("score", "interval", "uniform", "null", "margin", "on first"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in named.to_dict("records"):
        interval = "" if math.isnan(row["low"]) else f"{number(row['low'])}–{number(row['high'])}"
        null = "" if math.isnan(row["null_mean"]) else number(row["null_mean"])
        null += "" if math.isnan(row["null_std"]) else f" ± {number(row['null_std'])}"
        numbers = (interval, number(row["uniform"]), null, number(row["margin"]), number(row["on_first"]))
        table.add_row(row["head"], row["label"], f"[bold]{number(row['score'])}[/]", *numbers)
    console.print(table)
    console.print(
        "[dim]interval: 95 %, by resampling sequences; uniform: what even attention scores on these tokens; "
        "null: the same rows read at random other keys (for averaging: the model's typical head); "
        "on first: weight on position 0, the attention sink.[/]\n"
    )


def print_telling(console: Console, scan: xr.DataTree, on_text: xr.DataTree, most: int = 15) -> None:
    """The labelled heads that tell most, with what each label's score is on text beside it."""
    chosen = telling_heads(scan, most)
    if chosen.empty:
        console.print("No head earns a label.")
        return
    others = evidence(heads_of(on_text))
    also = label_heads(on_text).query("label != 'none'").groupby("head")["label"].agg(", ".join)
    table = plain_table(f"The {len(chosen)} most telling heads", tight=console.width < 90)
    for name in ("head", "label"):
        table.add_column(name, no_wrap=True)
    for name in ("score", "interval", "uniform", "null", "on text"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("labels on text")
    for row in chosen.to_dict("records"):
        interval = f"{number(row['low'])}–{number(row['high'])}"
        on_text_score = float(others[row["label"]].score[row["layer"], row["index"]])
        numbers = (interval, number(row["uniform"]), number(row["null_mean"]), number(on_text_score))
        score = f"[bold]{number(row['score'])}[/]"
        table.add_row(row["head"], row["label"], score, *numbers, also.get(row["head"], "–"))
    console.print(table)
    console.print(
        "[dim]score: share of attention on the tokens of this kind, of repeated random tokens, where the kind is "
        "defined; interval: 95 %, by resampling sequences; uniform: what even attention scores there; null: the same "
        "rows read at random other keys; on text: the same on prose (induction as prefix match).[/]\n"
    )


def print_births(console: Console, births: xr.DataTree, since: Mapping[tuple[str, str], int]) -> None:
    """How two scores of the heads that hold such a label at the end grew over the checkpoints, and since when."""
    heads, training = births["heads"].to_dataset(), births["training"].to_dataset()
    wanted = {"previous_token": "previous_token", "induction": "induction"}
    followed = sorted((head, label) for head, label in since if label in wanted)
    if not followed:
        console.print("No head holds the previous-token or the induction label at the end.\n")
        return
    table = plain_table("Over training")
    for name in ("step", "in-context accuracy", *(f"{head} {label}" for head, label in followed)):
        table.add_column(name, justify="right", no_wrap=True)
    for step in heads["step"].values:
        cells = []
        for head, label in followed:
            layer, index = (int(part) for part in head.split("."))
            value = float(heads[wanted[label]].sel(step=step, layer=layer, head=index))
            cells.append(f"[bold]{number(value)}[/]" if step >= since[head, label] else number(value))
        table.add_row(str(int(step)), number(float(training["accuracy"].sel(step=step))), *cells)
    console.print(table)
    for head, label in sorted(followed, key=lambda pair: since[pair]):
        console.print(f"Head {head} appeared as {label} head at step {since[head, label]} (bold from there on).")
    console.print()


def print_audit(console: Console, checks: pd.DataFrame, name: str) -> None:
    """The hook audit of a model, one line a check."""
    colours = {"holds": "green", "fails": "red", "unavailable": "yellow"}
    table = plain_table(f"Hook audit of {name}")
    for column in ("check", "status", "difference", "where", "note"):
        table.add_column(column, justify="right" if column == "difference" else "left", overflow="fold")
    for row in checks.to_dict("records"):
        size = "" if math.isnan(row["difference"]) else f"{row['difference']:.1e}"
        status = f"[{colours[row['status']]}]{row['status']}[/]"
        table.add_row(row["check"], status, size, escape(row["where"]), escape(row["note"]))
    console.print(table)


def number(value: float) -> str:
    """Three decimals below 10, fewer above, a dash for what is not a number."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def print_columns(console: Console, title: str, columns: Iterable[tuple[str, list[str]]]) -> None:
    """A table of columns (heading, cells), right-aligned: as many as the width holds; the first are wanted most."""
    table = plain_table(title)
    room, rows = console.width - 2, []
    for heading, cells in columns:
        room -= max(len(part) for part in [*heading.split("\n"), *cells]) + 2
        if rows and room < 0:
            break
        table.add_column(heading, justify="right", no_wrap=True)
        rows.append(cells)
    for row in zip(*rows, strict=True):
        table.add_row(*row)
    console.print(table)


def plain_table(title: str, tight: bool = False) -> Table:
    """An empty table in the style of all of them; `tight` leaves no space between columns."""
    return Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 0 if tight else 1, 0, 0))


def _known(frame: pd.DataFrame, name: str) -> bool:
    return name in frame and bool(frame[name].notna().any())


def _scores(title: str, frame: pd.DataFrame, columns: list[str], order: str, width: int) -> Iterator[Table]:
    """The columns in as many tables as the width needs; the labels stand in the first."""
    labels = [label.replace(",", ", ") for label in frame["labels"]]
    cells = {name: [number(value) for value in frame[name]] for name in columns}
    heads = {name: _heading(name, name == order) for name in columns}
    wide = {name: max(len(part) for part in [*heads[name].split("\n"), *cells[name]]) + 2 for name in columns}
    left, first = list(columns), True
    while left:
        table = plain_table(title if first else "(continued)")
        table.add_column("head", no_wrap=True)
        room = width - 4 - max(len(head) for head in ["head", *frame["head"].tolist()])
        if first:
            table.add_column("label", no_wrap=True)
            room -= max(len(label) for label in [*labels, "uniform"]) + 2
        shown = []
        while left and (not shown or room >= wide[left[0]]):
            room -= wide[left[0]]
            shown.append(left.pop(0))
        for name in shown:
            table.add_column(f"[bold]{heads[name]}[/]" if name == order else heads[name], justify="right", no_wrap=True)
        for i, head in enumerate(frame["head"]):
            table.add_row(head, *([labels[i]] if first else []), *(cells[name][i] for name in shown))
        table.add_section()
        even = (number(_uniform(frame, name)) for name in shown)
        table.add_row(*(["", "uniform"] if first else ["even"]), *even, style="dim")
        yield table
        first = False


def _heading(name: str, chosen: bool) -> str:
    words = name.replace(f"_tau_{TAU_SHOWN:g}", f"_τ={TAU_SHOWN:g}").replace("_", "\n")
    return f"{words} ↓" if chosen else words


def _uniform(frame: pd.DataFrame, name: str) -> float:
    """What uniform attention scores, over the heads of the table."""
    even = name.replace("_tau_", "_uniform_tau_") if "_tau_" in name else f"{name}_uniform"
    return float(np.mean(frame[even].to_numpy())) if even in frame else math.nan
