"""Figures and pages: they show the scan's own numbers, say how to read them, and need no network."""

import re
import subprocess
import sys

import numpy as np
import pytest

import metaint
from metaint.errors import InputError, StoreError
from metaint.views import figures
from metaint.views.page import write_page
from tests.builders import available_kinds, build

PLOTS = ("plot_norms", "plot_growth", "plot_inner_loss", "plot_agreement", "plot_norm_loss")


@pytest.fixture(scope="module")
def both(gpt2, repeated):
    return metaint.scan(gpt2, repeated, [metaint.ResidualProbe(), metaint.InnerProbe()])


def line_of(figure, name):
    return next(t for t in figure.data if t.name == name and t.customdata is not None)


@pytest.mark.parametrize("plot", PLOTS)
def test_every_figure_has_labels_and_a_caption(both, plot):
    for scans in (both, {"one": both, "two": both, "three": both}):
        figure = getattr(figures, plot)(scans)
        assert figure.layout.title.text
        last = max((a for a in figure.layout if a.startswith("yaxis")), key=lambda axis: int(axis[5:] or 1))
        assert all(figure.layout[a].title.text for a in figure.layout if a.startswith("yaxis"))
        assert figure.layout[last.replace("y", "x", 1)].title.text
        caption = next(a.text for a in figure.layout.annotations if a.name == "caption")
        assert "How to read" in caption
        assert max(len(line) for line in caption.split("<br>")) <= 150


def test_lines_are_the_scan_s_numbers(both):
    residual, inner = both["residual"], both["inner"]
    assert np.array_equal(line_of(figures.plot_growth(both), "growth").y, residual["growth"])
    loss = line_of(figures.plot_inner_loss(both), "loss")
    assert np.array_equal(loss.y, inner["loss"])
    assert np.array_equal(loss.customdata[:, 0], inner["loss_low"])
    cosines = [t for t in figures.plot_agreement(both).data if t.name == "next token"]
    for trace, part in zip(cosines, ("", "_attn", "_mlp"), strict=True):
        assert np.array_equal(trace.y, inner[f"step_gradient_cosine{part}"])
    dots = figures.plot_norm_loss(both, layer=1).data[0]
    assert np.array_equal(dots.x, inner["token_norm"].sel(layer=1))
    assert np.array_equal(dots.y, inner["token_loss"].sel(layer=1))
    norms = next(t for t in figures.plot_norms(both).data if t.name and "4–15" in t.name)
    assert np.array_equal(norms.y, residual["norm_geometric"].sel(position="4-15"))


def test_one_sequence_and_attention_alone_are_drawn(repeated):
    kind = next((k for k in available_kinds() if k.endswith("attn-only")), available_kinds()[0])
    scan = metaint.scan(build(kind), repeated[:1], [metaint.ResidualProbe(), metaint.InnerProbe()])
    assert len(figures.stream_figures(scan)) == 5
    assert len([a for a in figures.plot_agreement(scan).layout if a.startswith("yaxis")]) == 2  # no MLP


def test_legends_stand_beside_their_panels(both):
    figure = figures.plot_growth({"one": both, "two": both})
    assert figure.layout.legend.y == pytest.approx(figure.layout.yaxis.domain[1])
    assert figure.layout.legend2.y == pytest.approx(figure.layout.yaxis2.domain[1])


def test_what_can_not_be_drawn_is_said(gpt2, repeated_scan, both):
    with pytest.raises(InputError, match=r"the scan has no /residual group: scan with metaint\.ResidualProbe"):
        figures.plot_norms(repeated_scan)
    with pytest.raises(InputError, match=r"^scans have no /residual or /inner group in common"):
        figures.stream_figures({"a": both, "b": repeated_scan})
    with pytest.raises(InputError, match=r"^layer is 7: the scan of .* has layers 0 to 2\.$"):
        figures.plot_norm_loss(both, layer=7)
    with pytest.raises(InputError, match="nothing was read yet"):
        figures.plot_norms(metaint.ResidualProbe().to_scan())


def test_a_page_is_one_file_that_needs_no_network(both, tmp_path):
    path = write_page(figures.stream_figures({"a <b>": both, "c": both}), tmp_path / "p.html", "a <title>")
    page = path.read_text()
    assert "<title>a &lt;title&gt;</title>" in page
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="?(https?:)?//', page)
    assert page.count("<script>/**") == 1  # plotly's own, once
    assert "default-src 'none'" in page
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(StoreError, match="could not be written"):
        write_page(figures.stream_figures(both), tmp_path / "absent" / "p.html", "x")


def test_plotly_is_loaded_when_a_figure_is_drawn():
    code = "import sys, metaint.cli, metaint.views.streams; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
