"""A comparison of two scans as tables: its largest differences, what is said of each score, labels that came and went.

In: what `metaint.compare` gives. Out: tables for the figure, and what the terminal prints.
"""

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from rich.console import Console

from metaint.errors import InputError
from metaint.views.drawing.panels import short_name
from metaint.views.drawing.terminal import number, plain_table, print_columns

# Scores that are shown, as far as both scans have them; others say the same of parts or of other places.
MAIN = (
    "induction", "prefix_match_correct", "previous_token", "current_token", "duplicate_token", "first_token",
    "local_mass", "averaging", "max_weight", "entropy", "effective_keys", "distance_mean", "output_share",
    "sink_drain", "first_token_output", "induction_written", "copying_deviations", "following_deviations",
)  # fmt: skip
# Differences with a q-value up to this are called sure.
SURE = 0.05


def check_comparison(comparison: Any) -> None:
    """InputError for anything but what `metaint.compare` gives."""
    if not isinstance(comparison, xr.Dataset) or not {"difference", "spearman"} <= set(comparison.data_vars):
        what = "another dataset" if isinstance(comparison, xr.Dataset) else f"a {type(comparison).__name__}"
        raise InputError(f"comparison is {what}: pass what metaint.compare gives.")


def shown_scores(comparison: xr.Dataset) -> list[str]:
    """The main scores that are known in both; all, where none of these is; on repeated tokens the stripe alone."""
    known = comparison["difference"].notnull().any(("layer", "head"))
    names = [str(name) for name in comparison["score"].values[known.values]]
    if not names:
        raise InputError("comparison has no score that both scans know: read tokens on which some are defined.")
    main = [name for name in MAIN if name in names]
    if "induction" in main and "prefix_match_correct" in main:
        main.remove("prefix_match_correct")
    return main or names


def difference_frame(comparison: xr.Dataset) -> pd.DataFrame:
    """One row for each shown score and head: head, score, a, b, difference, low, high, q_value, spread (the standard
    deviation of the heads), and in_spreads, the difference over it. Sure ones first, then by size in spreads."""
    shown = comparison.sel(score=shown_scores(comparison))
    names = ["a", "b", "difference", "low", "high", "q_value", "spread"]
    table = shown[names].assign(in_spreads=shown["difference"] / shown["spread"].where(shown["spread"] > 0))
    frame = table.drop_vars("group").to_dataframe(["score", "layer", "head"]).reset_index()
    frame = frame.dropna(subset=["difference"])
    frame["head"] = [f"{layer}.{head}" for layer, head in zip(frame["layer"], frame["head"], strict=True)]
    frame["unsure"], frame["size"] = ~(frame["q_value"] <= SURE), frame["in_spreads"].abs()
    frame = frame.sort_values(["unsure", "size"], ascending=[True, False], kind="stable", ignore_index=True)
    return frame.loc[:, ["head", "score", "in_spreads", *names]]


def changed_labels(comparison: xr.Dataset) -> pd.DataFrame:
    """One row for each label that was gained or lost: label, head, change, borderline, layer, index."""
    rows = []
    for change in ("gained", "lost"):
        if change not in comparison:
            continue
        held = comparison[change].transpose("label", "layer", "head").values
        near = comparison["borderline"].transpose("label", "layer", "head").values
        for at in np.argwhere(held):
            k, i, j = at.tolist()
            layer, index = int(comparison["layer"].values[i]), int(comparison["head"].values[j])
            row = {"label": str(comparison["label"].values[k]), "head": f"{layer}.{index}", "change": change}
            rows.append({**row, "borderline": bool(near[k, i, j]), "layer": layer, "index": index})
    return pd.DataFrame(rows, columns=["label", "head", "change", "borderline", "layer", "index"])


def described(comparison: xr.Dataset) -> str:
    """What was compared, and how, in a line."""
    a, b = (short_name(str(comparison.attrs.get(side, side))) for side in ("a", "b"))
    sequences = comparison.attrs.get("sequences", 0)
    how = f"paired by sequence, {sequences} of them"
    if not comparison.attrs.get("paired"):
        how = f"unpaired, since {comparison.attrs.get('unpaired', 'the tokens are not known')}"
    return f"{b} less {a}: {how}"


# ---- the terminal -----------------------------------------------------------------------------------------------


def print_comparison(console: Console, comparison: xr.Dataset, top: int = 10) -> None:
    """The largest differences, what is said of each score, and labels gained and lost."""
    console.print(described(comparison), soft_wrap=False)
    _print_differences(console, difference_frame(comparison), top)
    _print_scores(console, comparison)
    if "gained" in comparison:
        _print_labels(console, comparison)


def _print_differences(console: Console, frame: pd.DataFrame, top: int) -> None:
    sure = int(np.sum(frame["q_value"].to_numpy() <= SURE))
    if not bool(frame["difference"].any()):
        console.print(f"\nNothing differs: {len(frame)} scores of heads are the same in both.")
        return
    shown = frame.head(top) if top else frame
    table = plain_table(f"Largest differences ({sure} of {len(frame)} are sure)", tight=console.width < 90)
    for name in ("head", "score"):
        table.add_column(name, no_wrap=True)
    for name in ("a", "b", "b - a", "interval", "q", "spreads"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in shown.to_dict("records"):
        interval = f"{number(row['low'])} to {number(row['high'])}" if row["low"] == row["low"] else ""
        cells = (number(row["a"]), number(row["b"]), f"[bold]{number(row['difference'])}[/]", interval)
        table.add_row(row["head"], row["score"], *cells, number(row["q_value"]), f"{row['in_spreads']:.1f}")
    console.print(table)
    console.print(
        "[dim]interval: 95 %; q: sure up to 0.05, among all heads; spreads: the difference over the standard "
        "deviation of the heads' scores. A difference can be sure and too small to matter.[/]\n"
    )


def _print_scores(console: Console, comparison: xr.Dataset) -> None:
    names = shown_scores(comparison)
    shown = comparison.sel(score=names)
    sure = (shown["q_value"] <= SURE).sum(("layer", "head")).values
    mean = abs(shown["difference"]).mean(("layer", "head")).values
    columns = [
        ("score", names),
        ("rank\nagreement", [number(value) for value in shown["spearman"].values]),
        ("mean\n|b - a|", [f"{value:.1g}" for value in mean]),
        ("heads that\nsurely differ", [str(int(count)) for count in sure]),
    ]
    print_columns(console, "What is said of each score", columns)
    console.print("[dim]rank agreement: Spearman's, over all heads.[/]\n")


def _print_labels(console: Console, comparison: xr.Dataset) -> None:
    counts = {name: comparison[name].sum(("layer", "head")).values for name in ("kept", "gained", "lost")}
    held = np.sum(list(counts.values()), axis=0) > 0
    if not held.any():
        console.print("No head earns a label in either.")
        return
    columns = [("label", [str(name) for name in comparison["label"].values[held]])]
    columns += [(name, [str(int(count)) for count in counts[name][held]]) for name in counts]
    columns += [("shared", [number(value) for value in comparison["jaccard"].values[held]])]
    print_columns(console, "Labels", columns)
    changes = changed_labels(comparison)
    for change in ("gained", "lost"):
        for label, rows in changes.query("change == @change").groupby("label", sort=False):
            heads = [head + "*" * near for head, near in zip(rows["head"], rows["borderline"], strict=True)]
            console.print(f"{change} [bold]{label}[/]: {', '.join(heads)}")
    console.print("[dim]shared: of what either has; *: near the line, so that other tokens may undo it.[/]")
