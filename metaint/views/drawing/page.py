"""Figures as one HTML file that needs no network.

In: plotly figures by name. Out: a page with plotly's script inside, once. `document` and `figure_html` are its parts,
for pages that hold more.
"""

from collections.abc import Mapping
from html import escape
from pathlib import Path

from plotly import graph_objects as go
from plotly.offline import get_plotlyjs

from metaint.errors import InputError
from metaint.scans.whole import write_text
from metaint.views.drawing.panels import WIDTH
from metaint.views.drawing.view import POLICY


def write_page(figures: Mapping[str, go.Figure], path: str | Path, title: str) -> Path:
    """Write figures to one HTML file that needs no network; an earlier file is replaced once the new one is whole.

    StoreError if it can't be written.
    """
    if not figures:
        raise InputError("figures is empty: pass at least one figure.")
    names = [escape(name) for name in figures]
    parts = [figure_html(figure, i) for i, figure in enumerate(figures.values())]
    sections = [f'<section id="{name}">{part}</section>' for name, part in zip(names, parts, strict=True)]
    links = " · ".join(f'<a href="#{name}">{name}</a>' for name in names)
    write_text(Path(path), document(title, f"<nav>{links}</nav>\n{''.join(sections)}"))
    return Path(path)


def figure_html(figure: go.Figure, number: int) -> str:
    """A figure for the body of a `document`, in which no other has this number."""
    return figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=f"figure-{number}", config={"displaylogo": False}
    )


def document(title: str, body: str, style: str = "") -> str:
    """A whole page: its title as heading, then `body`, which is HTML already, as `style` is CSS.

    The policy lets nothing be fetched, whatever a figure asks for.
    """
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
{POLICY}
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>
<style>body {{ font-family: sans-serif; max-width: {WIDTH + 20}px; margin: 1rem auto; padding: 0 10px }}
section {{ overflow-x: auto; margin-top: 2rem }}
{style}</style>
<script>{get_plotlyjs()}</script></head>
<body><h1>{escape(title)}</h1>
{body}</body></html>
"""
