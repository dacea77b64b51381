"""The report: one file with everything a scan holds, whose texts stay texts, and which works in a browser offline."""

import html
import re

import numpy as np
import pytest
import xarray as xr

import metaint
from metaint.errors import InputError, StoreError
from metaint.views.groups.catalogue import VIEWS
from metaint.views.report import figures_of, labelled_heads, report
from tests.labs.birth.test_figures import recording as birth_recording
from tests.views.circuit.circuits import of_gpt2
from tests.views.groups.test_heads import planted

HOSTILE = "</script><img src=x onerror=alert(1)>"
PROBES = ("HeadProbe", "ResidualProbe", "InnerProbe", "SaturationProbe", "WeightProbe")
FIGURES = {
    "heads": ["heads"],
    "residual": ["residual"],
    "inner": ["inner"],
    "saturation": ["saturation", "head_saturation"],
    "memory": ["memory"],
    "weights": ["weights"],
}


@pytest.fixture(scope="module")
def scan(gpt2, repeated):
    probes = [getattr(metaint, name)() for name in PROBES]
    return metaint.scan(gpt2, repeated, [*probes, metaint.MemoryProbe(30)], seed=7)


@pytest.fixture(scope="module")
def page(scan, tmp_path_factory):
    return report(scan, tmp_path_factory.mktemp("report") / "report.html").read_text()


def recorded(scan, steps=(0, 10)):
    """Two records of a scan, the heads of the first without any label, as `read_recording` gives them."""
    groups = {
        f"/{name}": node.to_dataset().expand_dims(step=list(steps)).copy() for name, node in scan.children.items()
    }
    groups["/heads"] = groups["/heads"].map(lambda values: values.where(values["step"] > 0, 0.1))
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = dict(scan.attrs)
    return tree


def test_every_figure_the_groups_allow_is_there_with_its_source(scan, page):
    found = figures_of(scan)
    assert {group: list(figures) for group, figures in found.items()} == FIGURES
    assert page.count("Plotly.newPlot(") - page.split("</head>")[0].count("Plotly.newPlot(") == 7
    assert page.count('<p class="source">Source: ') == 7
    for group in FIGURES:
        assert html.escape(VIEWS[group].source) in page
    ids = re.findall(r'<section id="([^"]+)"', page)
    assert len(set(ids)) == len(ids) == 9
    links = dict(re.findall(r'<li><a href="#([^"]+)">([^<]+)</a></li>', page))
    assert list(links) == ids
    titles = [figure.layout.title.text for figures in found.values() for figure in figures.values()]
    assert [html.unescape(told) for told in links.values()] == ["Provenance", "Labelled heads", *titles]


def test_it_needs_no_network_and_loads_plotly_once(page, tmp_path, scan):
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page.split("</head>")[0].split("<script>")[0])
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", page.split("</head>")[1])
    assert page.count("<script>/**") == 1
    assert len(page) < 12e6
    path = report(scan, tmp_path / "r.html")
    assert [path] == list(tmp_path.iterdir())
    with pytest.raises(StoreError, match="could not be written"):
        report(scan, tmp_path / "absent" / "r.html")


def test_provenance_tells_what_was_read(scan, page):
    rows = dict(re.findall(r"<tr><th>([^<]+)</th><td>([^<]*)</td></tr>", page))
    attributes = scan.attrs
    assert rows["model"] == html.escape(attributes["model"])
    assert rows["seed"] == "7"
    assert rows["tokens (sequences, length)"] == "6, 64"
    assert rows["begins with BOS"] == "no"
    assert rows["torch version"] == attributes["torch_version"]
    assert rows["read for /heads"] == "384 tokens in 6 sequences"
    assert {"weights", "dtype", "device", "task", "metaint version"} <= set(rows)


def test_labels_stand_in_the_table_with_their_evidence(tmp_path):
    scan = planted(80, 64)
    page = report(scan, tmp_path / "r.html").read_text()
    table = re.search(r"<tbody>(.*?)</tbody>", page, re.S).group(1)
    cells = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in table.split("</tr>")[:-1]]
    expected = metaint.label_heads(scan).query("label != 'none'").sort_values("margin", ascending=False)
    assert [row[:3] for row in cells] == [
        [row["head"], row["label"], f"{row['score']:.3f}"] for row in expected.to_dict("records")
    ]
    assert "5117 of 5120 heads earned no label" in page


def test_views_come_before_the_figures_and_share_their_scripts(gpt2, repeated, tmp_path):
    tokens = repeated[0, :16]
    views = {
        "<b>One": metaint.show_attention(gpt2, tokens, "0.1", how="canvas"),
        "Two": metaint.show_circuit(of_gpt2(), gpt2, tokens),
        "Three": metaint.show_tokens(["a", "b"], [1.0, 0.5]),
    }
    scan = planted()
    page = scan.metaint.report(tmp_path / "r.html", views).read_text()
    titles = [html.unescape(told) for told in re.findall(r'<li><a href="#[^"]+">([^<]+)</a></li>', page)]
    assert titles == ["Provenance", "Labelled heads", *views, "Scores of the heads"]
    for view in views.values():
        assert page.count(view.body) == 1
        assert not view.source or html.escape(view.source) in page
        for script in view.scripts:
            assert page.count(script) == 1
            assert page.index(script) < page.index('class="metaint-attention"')
    assert "<b>One" not in page


def test_heads_to_show_are_those_with_a_label():
    assert labelled_heads(planted(3, 12)) == ["0.1", "1.0", "2.11"]
    assert labelled_heads(planted(3, 12), most=2) == ["0.1", "2.11"]
    assert labelled_heads(recorded(planted(3, 12))) == ["0.1", "1.0", "2.11"]


def test_texts_of_models_stay_texts(tmp_path):
    scan = planted()
    scan.attrs |= {"model": HOSTILE, "source": HOSTILE, "<b>key": '"><script>alert(2)</script>'}
    page = report(scan, tmp_path / "r.html").read_text()
    body = page.split("</head>")[1]
    assert HOSTILE not in page
    assert "<img" not in body
    assert "<script>alert" not in body
    assert html.escape(HOSTILE) in body
    assert len(re.findall(r"<script\b", body)) == len(re.findall(r"</script>", body)) == 2  # the figure's, and ours


def test_a_recording_is_drawn_over_its_steps_and_at_the_last(scan, tmp_path):
    found = figures_of(recorded(scan))
    assert {group: list(figures) for group, figures in found.items()} == {"training": ["training"], **FIGURES}
    assert next(iter(found)) == "training"
    assert found["training"]["training"] == metaint.plot_training(recorded(scan))
    last = found["heads"]["heads"]
    np.testing.assert_array_equal(last.data[0].z, scan["heads"]["induction"].values)
    assert " at step 10: " in last.layout.title.subtitle.text
    page = report(recorded(planted()), tmp_path / "r.html").read_text()
    assert "Labelled heads at step 10" in page
    assert "2, from 0 to 10" in page
    assert "previous_token</td>" in page
    birth = figures_of(birth_recording())["training"]["training"]
    assert birth.layout.title.text == "Birth of an induction head"


def test_a_scan_without_any_group_is_refused(tmp_path):
    for scan in (xr.DataTree(), xr.DataTree.from_dict({"/heads": xr.Dataset(), "/mine": xr.Dataset({"x": 1})})):
        with pytest.raises(
            InputError, match=r"^scan has no group that can be drawn: it needs one of heads, outputs, residual"
        ):
            report(scan, tmp_path / "r.html")
    assert not list(tmp_path.iterdir())
