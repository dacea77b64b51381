"""What all figures are made of: panels of the asked heights, bands with gaps, names that stay text."""

import numpy as np
import pytest
import xarray as xr

from metaint.views.drawing.panels import Line, draw, log_scale, panels, wrapped


def test_panels_fill_the_figure_in_proportion():
    figure = panels(["a", "b", "c"], [1, 0.5, 0.5], apart=True)
    ends = [figure.layout[axis].domain for axis in ("yaxis", "yaxis2", "yaxis3")]
    heights = [top - bottom for bottom, top in ends]
    assert heights == pytest.approx([heights[0], heights[0] / 2, heights[0] / 2])
    assert [ends[0][1], ends[2][0]] == pytest.approx([1, 0])
    assert ends[1][0] - ends[2][1] > 2 * (ends[0][0] - ends[1][1])  # room for an axis above the one that stands apart
    assert [figure.layout[axis].matches for axis in ("xaxis", "xaxis2", "xaxis3")] == ["x2", None, None]


def test_bands_leave_gaps_and_single_points_are_seen():
    values = np.array([1.0, 2.0, np.nan, 4.0, np.nan])
    data = {f"x{end}": ("layer", values + by) for end, by in (("", 0.0), ("_low", -0.5), ("_high", 0.5))}
    figure = panels(["x"], [1])
    draw(figure, 1, {"scan": xr.Dataset(data, {"layer": range(5)})}, [Line("x", "x", "#0072B2")])
    band, line = figure.data
    np.testing.assert_array_equal(band.x, [0, 1, 1, 0, np.nan, 2.9, 3.1, 3.1, 2.9])
    np.testing.assert_array_equal(band.y, [1.5, 2.5, 1.5, 0.5, np.nan, 4.5, 4.5, 3.5, 3.5])
    assert "markers" in line.mode
    long = xr.Dataset({"x": ("layer", np.where(np.arange(30) == 7, np.nan, 1.0))}, {"layer": range(30)})
    for data, mode in ((long, "lines"), (long.where(long["layer"] != 9), "lines+markers")):
        figure = panels(["x"], [1])
        draw(figure, 1, {"scan": data}, [Line("x", "x", "#0072B2")])
        assert figure.data[0].mode == mode


def test_names_are_escaped_after_they_are_wrapped():
    assert wrapped("<b>bare</b>") == "&lt;b&gt;bare&lt;/b&gt;"
    assert wrapped("one & two & three & four") == "one &amp; two &amp; three &amp;<br>four"


def test_log_axes_have_ticks_that_fit():
    assert log_scale(np.array([1.0, 4.0])) == {"type": "log"}
    assert log_scale(np.array([1.0, 90.0]))["dtick"] == "D2"
    assert log_scale(np.array([1.0, 5e4]))["dtick"] == 1
