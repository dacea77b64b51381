"""The report: one file with everything a scan holds, whose texts stay texts, and which works in a browser offline."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import metaint
from metaint.errors import InputError, StoreError
from metaint.views.report import SOURCES, figures_of, open_scan, write_report
from tests.views.test_birth import recording as birth_recording
from tests.views.test_heads import planted

HOSTILE = "</script><img src=x onerror=alert(1)>"
PROBES = ("HeadProbe", "ResidualProbe", "InnerProbe", "SaturationProbe", "WeightProbe")
FIGURES = {
    "heads": ["heads"],
    "residual": ["norms", "growth"],
    "inner": ["inner_loss", "agreement", "norm_loss"],
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
    return write_report(scan, tmp_path_factory.mktemp("report") / "report.html").read_text()


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
    assert page.count("Plotly.newPlot(") - page.split("</head>")[0].count("Plotly.newPlot(") == 10
    assert page.count('<p class="source">Source: ') == 10
    for group in FIGURES:
        assert html.escape(SOURCES[group]) in page
    ids = re.findall(r'<section id="([^"]+)"', page)
    assert len(set(ids)) == len(ids) == 12
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
    path = write_report(scan, tmp_path / "r.html")
    assert [path] == list(tmp_path.iterdir())
    with pytest.raises(StoreError, match="could not be written"):
        write_report(scan, tmp_path / "absent" / "r.html")


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
    page = write_report(scan, tmp_path / "r.html").read_text()
    table = re.search(r"<tbody>(.*?)</tbody>", page, re.S).group(1)
    cells = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in table.split("</tr>")[:-1]]
    expected = metaint.label_heads(scan).query("label != 'none'").sort_values("margin", ascending=False)
    assert [row[:3] for row in cells] == [
        [row["head"], row["label"], f"{row['score']:.3f}"] for row in expected.to_dict("records")
    ]
    assert "5117 of 5120 heads earned no label" in page


def test_texts_of_models_stay_texts(tmp_path):
    scan = planted()
    scan.attrs |= {"model": HOSTILE, "source": HOSTILE, "<b>key": '"><script>alert(2)</script>'}
    page = write_report(scan, tmp_path / "r.html").read_text()
    body = page.split("</head>")[1]
    assert HOSTILE not in page
    assert "<img" not in body
    assert "<script>alert" not in body
    assert html.escape(HOSTILE) in body
    assert len(re.findall(r"<script\b", body)) == len(re.findall(r"</script>", body)) == 2  # the figure's, and ours


def test_a_recording_is_drawn_over_its_steps_and_at_the_last(scan, tmp_path):
    found = figures_of(recorded(scan))
    assert list(found["heads"]) == ["heads_over_training", "heads"]
    assert list(found["weights"]) == ["norm_growth", "weights"]
    assert list(found["saturation"]) == ["saturation_over_training", "saturation", "head_saturation"]
    last = found["heads"]["heads"]
    np.testing.assert_array_equal(last.data[0].z, scan["heads"]["induction"].values)
    assert " at step 10: " in last.layout.title.subtitle.text
    page = write_report(recorded(planted()), tmp_path / "r.html").read_text()
    assert "Labelled heads at step 10" in page
    assert "2, from 0 to 10" in page
    assert "previous-token</td>" in page
    assert list(figures_of(birth_recording())["training"]) == ["birth"]


def test_a_scan_without_any_group_is_refused(tmp_path):
    for scan in (xr.DataTree(), xr.DataTree.from_dict({"/heads": xr.Dataset(), "/mine": xr.Dataset({"x": 1})})):
        with pytest.raises(InputError, match=r"^scan has no group that can be drawn: it needs one of heads, residual"):
            write_report(scan, tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_scans_and_recordings_are_opened(gpt2, repeated, tmp_path):
    scan = metaint.scan(gpt2, repeated[:2])
    metaint.save(scan, tmp_path / "scan.zarr")
    xr.testing.assert_identical(
        open_scan(tmp_path / "scan.zarr")["heads"], metaint.load(tmp_path / "scan.zarr")["heads"]
    )
    recorder = metaint.Recorder(gpt2, [metaint.HeadProbe()], every=1, path=tmp_path / "run.zarr", tokens=repeated[:2])
    recorder(0)
    assert open_scan(tmp_path / "run.zarr")["heads"].sizes["step"] == 1
    with pytest.raises(StoreError, match="does not exist"):
        open_scan(tmp_path / "none.zarr")


# ---- in a browser -----------------------------------------------------------------------------------------------

WATCH = """<script>
window.seen = [];
window.alert = text => seen.push(`alert ${text}`);
console.error = (...words) => seen.push(words.join(" "));
addEventListener("error", event => seen.push(`error ${event.message}`), true);
addEventListener("unhandledrejection", event => seen.push(`rejection ${event.reason}`));
document.addEventListener("securitypolicyviolation", event => seen.push(`blocked ${event.blockedURI}`));
</script>"""
ASK = """<script>
addEventListener("load", () => setTimeout(() => {
  const rows = () => [...document.querySelectorAll(".sortable tbody tr")].filter(row => !row.hidden);
  const cells = i => rows().map(row => row.cells[i].textContent), told = {};
  const click = i => document.querySelectorAll(".sortable th button")[i].click();
  told.start = cells(0);
  click(2); told.score = cells(2); told.sorted = document.querySelectorAll(".sortable th")[2].ariaSort;
  click(2); told.reversed = cells(2);
  click(0); told.heads = cells(0);
  click(5); told.numberless = cells(5);
  const filter = document.querySelector("input.filter");
  filter.value = "INDUCTION"; filter.dispatchEvent(new Event("input")); told.filtered = cells(1);
  told.count = document.querySelector(".count").textContent;
  told.drawn = document.querySelectorAll(".main-svg .heatmaplayer").length > 0;
  told.images = document.querySelectorAll("img").length;
  told.fetched = performance.getEntriesByType("resource").length;
  told.heading = document.querySelector("h1").textContent;
  told.seen = seen;
  const found = document.createElement("pre");
  found.id = "found"; found.textContent = JSON.stringify(told);
  document.body.append(found);
}, 1500));
</script>"""


@pytest.fixture(scope="module")
def browsed(tmp_path_factory):
    """What a browser without a network makes of a hostile report, and of clicks in it."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no chromium on the path")
    scan = planted(3, 12)
    scan["heads"]["previous_token"][0, 10] = 0.7
    for end in ("low", "high"):
        scan["heads"][f"previous_token_{end}"][0, 10] = 0.7
    scan["heads"]["first_token_uniform"][:] = np.nan
    scan.attrs["model"] = HOSTILE
    path = write_report(scan, tmp_path_factory.mktemp("browser") / "report.html")
    page = path.read_text().replace("<title>", f"{WATCH}<title>", 1).replace("</body>", f"{ASK}</body>")
    path.write_text(page)
    return json.loads(html.unescape(dumped(browser, path)))


def dumped(browser: str, path: Path) -> str:
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", "--dump-dom")
    offline = "--host-resolver-rules=MAP * ~NOTFOUND"
    profile = f"--user-data-dir={path.parent / 'profile'}"
    ran = subprocess.run(
        [browser, *flags, offline, profile, path.as_uri()], capture_output=True, text=True, timeout=120
    )
    return re.search(r'<pre id="found">(.*?)</pre>', ran.stdout, re.S).group(1)


def test_a_click_sorts_and_a_text_filters(browsed):
    assert sorted(browsed["start"]) == ["0.1", "0.10", "1.0", "2.11"]
    assert browsed["score"] == ["0.950", "0.900", "0.800", "0.700"]
    assert browsed["sorted"] == "descending"
    assert browsed["reversed"] == browsed["score"][::-1]
    assert browsed["heads"] == ["0.1", "0.10", "1.0", "2.11"]  # by layer and head, not as numbers
    assert browsed["numberless"] == ["0.030", "0.030", "0.030", "–"]
    assert browsed["filtered"] == ["induction"]
    assert browsed["count"] == "1 of 4 shown"


def test_it_opens_offline_without_an_error_and_a_hostile_name_does_nothing(browsed):
    assert browsed["drawn"]
    assert browsed["seen"] == []
    assert browsed["fetched"] == 0
    assert browsed["images"] == 0
    assert browsed["heading"] == f"metaint: {HOSTILE}"
