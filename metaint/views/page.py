"""Figures as one HTML file that needs no network.

In: plotly figures by name. Out: a page with plotly's script inside, once.
"""

import os
from collections.abc import Mapping
from html import escape
from pathlib import Path

from plotly import graph_objects as go
from plotly.offline import get_plotlyjs

from metaint.errors import InputError, StoreError
from metaint.views.panels import WIDTH


def write_page(figures: Mapping[str, go.Figure], path: str | Path, title: str) -> Path:
    """Write figures to one HTML file that needs no network; an earlier file is replaced once the new one is whole.

    StoreError if it can't be written.
    """
    if not figures:
        raise InputError("figures is empty: pass at least one figure.")
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        aside.write_text(_page(figures, title), encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise StoreError(f"the page could not be written to {path} ({error.strerror or error}).") from error
    finally:
        aside.unlink(missing_ok=True)
    return path


def _page(figures: Mapping[str, go.Figure], title: str) -> str:
    parts = []
    for i, (name, figure) in enumerate(figures.items()):
        html = figure.to_html(
            full_html=False, include_plotlyjs=False, div_id=f"figure-{i}", config={"displaylogo": False}
        )
        parts.append(f'<section id="{escape(name)}">{html}</section>')
    links = " · ".join(f'<a href="#{escape(name)}">{escape(name)}</a>' for name in figures)
    # The policy lets nothing be fetched, whatever a figure asks for.
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>
<style>body {{ font-family: sans-serif; max-width: {WIDTH + 20}px; margin: 1rem auto; padding: 0 10px }}
section {{ overflow-x: auto; margin-top: 2rem }}</style>
<script>{get_plotlyjs()}</script></head>
<body><h1>{escape(title)}</h1><nav>{links}</nav>
{"".join(parts)}</body></html>
"""
