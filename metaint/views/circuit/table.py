"""A circuit in the terminal: what it was tested for, its parts, and the paths between them."""

import math
from collections.abc import Mapping
from typing import Any

import networkx
from rich.console import Console
from rich.markup import escape

from metaint.views.circuit.words import BY, figure, heading, labels_of, percent, value
from metaint.views.drawing.terminal import plain_table


def print_circuit(console: Console, circuit: networkx.DiGraph) -> None:
    """Whether a circuit was found, then a row for each part and for each direct path, those that bring most first."""
    title, verdict, said = heading(circuit.graph)
    console.print(f"[bold]{escape(title)}: {verdict}[/]")
    for sentence in said:
        console.print(escape(sentence))
    console.print()
    parts = [(name, data) for name, data in circuit.nodes(data=True) if data["kind"] in ("head", "mlp")]
    if parts:
        words, numbers = ("part", "label"), ("ablated", "95 % from", "to", "share", "sequences")
        table = plain_table("Parts", words, numbers)
        table.add_column("where")
        for name, data in sorted(parts, key=_share, reverse=True):
            table.add_row(escape(name), escape(", ".join(labels_of(data))), *_effect(data), *_measured(data))
        console.print(table)
    paths = [((writer, reader), data) for writer, reader, data in circuit.edges(data=True)]
    if paths:
        numbers = ("cut", "95 % from", "to", "share", "composition (z)")
        table = plain_table("Direct paths", ("from", "to", "by"), numbers)
        for (writer, reader), data in sorted(paths, key=_share, reverse=True):
            by = BY.get(data.get("by", ""), "")
            table.add_row(escape(writer), escape(reader), by, *_effect(data), _composition(data))
        console.print(table)
    whole = escape(str(circuit.graph.get("whole", "all heads")))
    console.print(
        f"[dim]ablated, cut: {escape(str(circuit.graph.get('metric', 'the metric')))} with the part ablated or the "
        f"path cut, minus without; share: of what ablating {whole} does; composition: how much of what is written is "
        "read there, by the weights, and z over chance. Parts below the threshold are left out: a circuit tells what "
        "could be found here, not all that takes part.[/]\n"
    )


def _share(item: tuple[Any, Mapping[str, Any]]) -> float:
    return value(item[1], "share")


def _effect(data: Mapping[str, Any]) -> list[str]:
    low, high = (figure(value(data, name), True) for name in ("effect_low", "effect_high"))
    return [figure(value(data, "effect"), True), low, high, percent(value(data, "share"))]


def _measured(data: Mapping[str, Any]) -> tuple[str, str]:
    """On how many sequences, and where a part matters if that is at one position."""
    count = value(data, "sequences")
    where = "position 0 alone" if data.get("positions") == "first" else ""
    return "" if math.isnan(count) else f"{count:.0f}", where


def _composition(data: Mapping[str, Any]) -> str:
    """By that of queries, keys and values which the path counts for most."""
    by = data.get("by", "")
    if not by or f"{by}_composition" not in data:
        return ""
    return f"{figure(value(data, f'{by}_composition'))} ({figure(value(data, f'{by}_composition_z'), True)})"
