"""Pages of figures: one file that needs no network; and plotly is loaded when a figure is drawn, not before."""

import re
import subprocess
import sys

import pytest
from plotly import graph_objects as go

from metaint.errors import InputError, StoreError
from metaint.views.drawing.page import write_page

FIGURES = {"a <b>": go.Figure(go.Scatter(y=[1, 2])), "c": go.Figure(go.Scatter(y=[2, 1]))}


def test_a_page_is_one_file_that_needs_no_network(tmp_path):
    path = write_page(FIGURES, tmp_path / "p.html", "a <title>")
    page = path.read_text()
    assert "<title>a &lt;title&gt;</title>" in page
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="?(https?:)?//', page)
    assert page.count("<script>/**") == 1  # plotly's own, once
    assert "default-src 'none'" in page
    assert list(tmp_path.iterdir()) == [path]


def test_what_can_not_be_written_is_said(tmp_path):
    with pytest.raises(StoreError, match="could not be written"):
        write_page(FIGURES, tmp_path / "absent" / "p.html", "x")
    with pytest.raises(InputError, match=r"^figures is empty: pass at least one figure\.$"):
        write_page({}, tmp_path / "p.html", "x")


def test_plotly_is_loaded_when_a_figure_is_drawn():
    code = "import sys, metaint.shell.main, metaint.views.drawing.terminal; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
