"""How every table in the terminal looks, and how its numbers are written."""

import math
from collections.abc import Iterable

import numpy as np
import xarray as xr
from rich import box
from rich.console import Console
from rich.table import Table


def number(value: float) -> str:
    """Three decimals below 10, fewer above, a dash for what is not a number."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def numbers(values: xr.DataArray) -> list[str]:
    """The numbers of an array, one cell each."""
    return [number(value) for value in values.values.ravel().tolist()]


def head_at(values: xr.DataArray, which: str) -> list[str]:
    """The head that stands out in each layer ("argmax" or "argmin"), by name, and its value; a dash where unknown."""
    cells = []
    for layer, row in zip(values["layer"].values, values.values, strict=True):
        if np.isnan(row).any():
            cells.append("–")
            continue
        head = int(getattr(row, which)())
        cells.append(f"{layer}.{head}  {number(row[head])}")
    return cells


def plain_table(
    title: str, words: Iterable[str] = (), numbers: Iterable[str] = (), *, tight: bool = False, no_wrap: bool = False
) -> Table:
    """An empty table in the style of all of them, with columns of words, then of numbers at the right of theirs.

    `tight` leaves no space between columns; with `no_wrap` each of these columns keeps to one line.
    """
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, int(not tight), 0, 0))
    for name in words:
        table.add_column(name, no_wrap=no_wrap)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=no_wrap)
    return table


def cell_width(heading: str, cells: Iterable[str]) -> int:
    """Characters that a column takes, with the space beside it."""
    return max(len(part) for part in [*heading.split("\n"), *cells]) + 2


def print_columns(console: Console, title: str, columns: Iterable[tuple[str, list[str]]]) -> None:
    """A table of columns (heading, cells), right-aligned: as many as the width holds; the first are wanted most."""
    table = plain_table(title)
    room, shown = console.width - 2, []
    for heading, cells in columns:
        room -= cell_width(heading, cells)
        if shown and room < 0:
            break
        table.add_column(heading, justify="right", no_wrap=True)
        shown.append(cells)
    for row in zip(*shown, strict=True):
        table.add_row(*row)
    console.print(table)
