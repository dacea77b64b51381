"""The hook audit of a model in the terminal."""

import math

import pandas as pd
from rich.console import Console
from rich.markup import escape

from metaint.views.drawing.terminal import plain_table

_COLOURS = {"holds": "green", "fails": "red", "unavailable": "yellow"}


def print_audit(console: Console, checks: pd.DataFrame, name: str) -> None:
    """What `metaint.audit` found, one line a check."""
    table = plain_table(f"Hook audit of {name}")
    for column in ("check", "status", "difference", "where", "note"):
        table.add_column(column, overflow="fold")
    table.columns[2].justify = "right"
    for row in checks.to_dict("records"):
        size = "" if math.isnan(row["difference"]) else f"{row['difference']:.1e}"
        status = f"[{_COLOURS[row['status']]}]{row['status']}[/]"
        table.add_row(row["check"], status, size, escape(row["where"]), escape(row["note"]))
    console.print(table)
