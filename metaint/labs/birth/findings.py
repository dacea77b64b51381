"""What a run of the birth lab shows: when each memory passed one half, and what the model could do by then.

In: a recording with `/memory` and `/training`. Out: a row of numbers, tables for the terminal, and one line.
"""

import math
from typing import Any

import pandas as pd
import xarray as xr
from rich.console import Console

from metaint.labs.birth.settings import Settings
from metaint.scans.curves import first_passing, memory_curves
from metaint.views.drawing.terminal import number, plain_table

# What is counted as formed, and as done.
HALF, DONE = 0.5, 0.9
_WORDS = {"W_K1": "W_K1", "W_K1_early": "W_K1 (first 64)", "accuracy": "accuracy"}
_MEMORY_COLUMNS = {
    "memory": "memory", "recall": "recall", "chance": "chance", "gradient": "first\ngradient", "half": "half at\nstep",
}  # fmt: skip
_FACTS = ("triggers", "trigger_count", "outputs", "layers", "frozen", "seed", "steps")


def describe(settings: Settings, recording: xr.DataTree, gradients: xr.Dataset) -> dict[str, Any]:
    """Numbers of one run: what it ends with, when each memory and the accuracy first passed one half (`half_<name>`,
    of recorded steps, NaN for never), what the first gradient of each matrix recalls, and the order in words."""
    training, curves = recording["training"].to_dataset(), memory_curves(recording)
    last, memories = training.isel(step=-1), _memories(curves)
    row: dict[str, Any] = {"run": settings.name, **{name: getattr(settings, name) for name in _FACTS}}
    row |= {str(name): float(value) for name, value in last.data_vars.items()}
    row |= {str(name): float(curves[name][-1]) for name in curves.data_vars}
    passed = {name: first_passing(curves, name, HALF) for name in memories}
    both = training.assign_coords(step=curves["step"])
    passed["accuracy"] = first_passing(both, "accuracy", HALF)
    row |= {f"half_{name}": math.nan if step is None else step for name, step in passed.items()}
    done = first_passing(both, "accuracy", DONE)
    row["done_accuracy"] = math.nan if done is None else done
    first = memory_curves(xr.DataTree.from_dict({"/memory": gradients.expand_dims(step=[0])}))
    row |= {f"gradient_{name}": float(first[name][0]) for name in memories}
    row["order"] = in_order(passed, {**{n: row[n] for n in memories}, "accuracy": row["accuracy"]})
    return row


def in_order(passed: dict[str, int | None], ended: dict[str, float]) -> str:
    """Names by the step at which they passed one half, and what those that never did ended at."""
    formed = sorted((step, name) for name, step in passed.items() if step is not None)
    never = [f"{_word(name)} not yet ({ended[name]:.2f})" for name, step in passed.items() if step is None]
    return ", ".join([*(f"{_word(name)} at {step}" for step, name in formed), *never])


def last_line(row: dict[str, Any]) -> str:
    """Accuracy, and when each memory passed one half, of one run."""
    return (
        f"{row['run']}: in-context accuracy {row['accuracy']:.3f} after {row['steps']} steps "
        f"({row['accuracy_without_copies']:.3f} without copies; copying alone scores {row['copy_accuracy']:.3f}); "
        f"passed one half: {row['order']}"
    )


def print_findings(console: Console, summary: pd.DataFrame) -> None:
    """A table of what the runs can do and one of their memories, and how to read them."""
    whole: Any = summary[~summary["order"].str.startswith("diverged")]
    behaviour = {
        "accuracy": "accuracy", "accuracy_without_copies": "without\ncopies", "copy_accuracy": "copying\nalone",
        "done_accuracy": f"{DONE:g} at\nstep", "accuracy_uniform": "uniform\noutputs",
        "accuracy_bigram": "bigram\noutputs", "accuracy_test": "unseen\noutputs", "induction_mass": "induction\nmass",
        "induction_uniform": "uniform\nattention", "previous_mass": "previous\nmass", "loss_bigram": "bigram\nloss",
    }  # fmt: skip
    _print(console, "What it can do", whole, behaviour)
    _print(console, "What its memories recall", _by_memory(whole), _MEMORY_COLUMNS)
    console.print(
        "[dim]Accuracy is of positions whose target the context tells (a trigger seen before); copying alone is what "
        "repeating the current token scores there, and chance. Each recall is of one matrix, alone: W_O a token's own "
        "logit, W_K2 what layer 1 wrote of a token (over the triggers where these are fixed), W_K1 the position "
        "before; first gradient: what minus its gradient at step 0 recalls; half at: the record from which on it is "
        "one half or more, which a handful of fixed triggers may be by luck: for the order of the memories train with "
        "random ones (--triggers random). A recall of 1 does not mean that the circuit works: the probes don't see the "
        "crosstalk of the rest of the stream, so read them beside the accuracy; and a circuit can work while W_K1 "
        "recalls early positions alone.[/]\n"
    )
    failed: Any = summary[summary["order"].str.startswith("diverged")]
    for row in failed.to_dict("records"):
        console.print(f"{row['run']} {row['order']}", markup=False)


def _by_memory(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a run and memory."""
    rows = []
    for row in frame.to_dict("records"):
        for name in ("W_O1", "W_O2", "W_K2", "W_K2_all", "W_K1_early", "W_K1"):
            applies = f"gradient_{name}" in row or (name == "W_K2_all" and row["triggers"] == "fixed")
            if applies and not math.isnan(row.get(name, math.nan)):
                parts = {part: row.get(f"{part}_{name}", math.nan) for part in ("gradient", "half")}
                rows.append({"run": row["run"], "memory": _word(name), "recall": row[name], **parts})
                rows[-1]["chance"] = row[f"{name}_chance"]
        if not math.isnan(row.get("W_F_kl", math.nan)):
            rows.append({"run": row["run"], "memory": "W_F (KL in nats)", "recall": row["W_F_kl"]})
    return pd.DataFrame(rows)


def _print(console: Console, title: str, frame: pd.DataFrame, columns: dict[str, str]) -> None:
    table = plain_table(title, tight=True)
    table.add_column("run", overflow="fold")
    shown = {name: word for name, word in columns.items() if name in frame and bool(frame[name].notna().any())}
    for name, word in shown.items():
        justify = "left" if name == "memory" else "right"
        table.add_column(word, justify=justify)
    last = ""
    for row in frame.to_dict("records"):
        run = "" if row["run"] == last else row["run"]
        table.add_row(run, *(_cell(name, row[name]) for name in shown))
        last = row["run"]
    console.print(table)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if math.isnan(value):
        return "–"
    return f"{value:.0f}" if name in ("done_accuracy", "half") else number(value)


def _memories(curves: xr.Dataset) -> list[str]:
    names = [n for n in map(str, curves.data_vars) if not n.endswith(("_chance", "_kl", "_all"))]
    if "W_K1" in curves and curves["W_K1_early"].equals(curves["W_K1"]):  # there are no later positions
        names.remove("W_K1_early")
    return names


def _word(name: str) -> str:
    return _WORDS.get(name, name.replace("_all", " (all)"))
