"""The command that sets two scans beside each other."""

from pathlib import Path
from typing import Annotated

import typer

from metaint.shell.common import check_page, check_range, console, reading


def compare(
    scan_a: Annotated[Path, typer.Argument(help="A scan that --out wrote.")],
    scan_b: Annotated[Path, typer.Argument(help="Another, of a model of the same shape.")],
    top: Annotated[int, typer.Option(help="Print so many of the largest differences; 0 for all.")] = 10,
    figures: Annotated[Path | None, typer.Option(help="Draw the comparison on this HTML page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every score of every head.")] = False,
) -> None:
    """What differs between SCAN_A and SCAN_B: scores with intervals, labels gained and lost, rank agreement."""
    check_range("--top", top, 0)
    check_page(figures)
    import json

    import metaint
    from metaint.views.comparison.figure import plot_comparison
    from metaint.views.comparison.table import print_comparison
    from metaint.views.drawing.page import write_page
    from metaint.views.groups.group_view import group_json

    loaded = [metaint.load(path) for path in (scan_a, scan_b)]
    with reading(scan_b, "scan"):
        comparison = metaint.compare(*loaded).assign_attrs(a=str(scan_a), b=str(scan_b))
    if figures is not None:
        write_page({"comparison": plot_comparison(comparison)}, figures, f"metaint: {scan_a} and {scan_b}")
    if as_json:
        print(json.dumps(group_json(comparison), indent=1, default=str))
        return
    print_comparison(console(), comparison, top)
    if figures is not None:
        console().print(f"saved to {figures}")
