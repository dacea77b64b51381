"""Tables and figures of /saturation: the scan's own numbers, whole at any width, readable by machines."""

import io
import json
import math

import pytest
from rich.console import Console

import metaint
from metaint.errors import InputError
from metaint.views.drawing.page import write_page
from metaint.views.export.scan_json import scan_json
from metaint.views.groups.saturation import (
    plot_head_saturation,
    plot_saturation,
    print_saturation,
    saturation_figures,
    saturation_frame,
)


@pytest.fixture(scope="module")
def scaled(gpt2, repeated):
    return metaint.scan(gpt2, repeated, [metaint.SaturationProbe()])


@pytest.fixture(scope="module")
def swept(gpt2, repeated):
    return metaint.saturate(gpt2, repeated, (4.0, 1024.0), faithful=True)


def printed(function, scan, width):
    console = Console(width=width, file=io.StringIO())
    function(console, scan)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_fit(scaled, swept, width):
    for function, scan in ((print_saturation, scaled), (print_saturation, swept)):
        text = printed(function, scan, width)
        assert max(len(line) for line in text.splitlines()) <= width
        assert "…" not in text


def test_tables_hold_the_scan_s_numbers(scaled, swept):
    text = printed(print_saturation, scaled, 200)
    for name in ("similarity", "kl", "loss_change"):
        for value in scaled["saturation"][name].isel(layer=-1, missing_dims="ignore").values:
            assert f"{abs(value):.3f}" in text
    nearest = scaled["saturation"]["total_variation"].isel(scale=0, layer=1)
    assert f"1.{int(nearest.argmin())}  {float(nearest.min()):.3f}" in text
    published = printed(print_saturation, swept, 200)
    assert "Published estimator" in published
    assert f"{float(swept['saturation']['attended_mean'][1, 2]):.3f}" in published


def test_frames_and_json(scaled):
    frame = saturation_frame(scaled)
    assert len(frame) == 7 * 2
    at = frame[(frame["scale"] == 4) & (frame["layer"] == 1)].iloc[0]
    assert at["similarity"] == float(scaled["saturation"]["similarity"].sel(scale=4, layer=1))
    assert at["kl"] == float(scaled["saturation"]["kl"].sel(scale=4))
    found = json.loads(scan_json(scaled), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["saturation"]["coordinates"]["scale"]["data"][-1] == "inf"
    assert found["saturation"]["variables"]["similarity"]["dims"] == ["scale", "layer"]
    assert math.isclose(found["saturation"]["variables"]["kl"]["data"][2], float(scaled["saturation"]["kl"][2]))


def test_figures_draw_what_they_say(scaled, swept, tmp_path):
    figure = plot_saturation(scaled)
    curves = [trace for trace in figure.data if trace.name == "scale 4"]
    assert list(curves[0].y) == scaled["saturation"]["similarity"].sel(scale=4).values.tolist()
    assert list(curves[1].y) == scaled["saturation"]["total_variation"].sel(scale=4).mean("head").values.tolist()
    null = next(trace for trace in figure.data if "other tokens" in trace.name)
    assert list(null.y) == scaled["saturation"]["similarity_null"].isel(scale=-1).values.tolist()
    grid = plot_head_saturation(scaled).data[0]
    assert grid.z.tolist() == scaled["saturation"]["total_variation"].isel(scale=0).values.tolist()
    assert grid.customdata[1][3] == "1.3"
    for scan, names in ((scaled, ["saturation", "head_saturation"]), (swept, ["saturation"])):
        figures = saturation_figures(scan)
        assert list(figures) == names
        assert all("How to read" in f.layout.annotations[-1].text for f in figures.values())
        assert all("mislead" in f.layout.annotations[-1].text for f in figures.values())
        write_page(figures, tmp_path / "page.html", "t")


def test_a_scan_without_it_is_refused(repeated_scan):
    for function in (plot_saturation, plot_head_saturation, saturation_frame):
        with pytest.raises(InputError, match=r"no /saturation group"):
            function(repeated_scan)
