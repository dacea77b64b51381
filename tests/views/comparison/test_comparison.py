"""A comparison in the terminal and as a figure: what is shown is what was found, at every width."""

import numpy as np
import pytest
import torch
import xarray as xr
from rich.console import Console

import metaint
from metaint.errors import InputError
from metaint.tasks import repeated_tokens
from metaint.toys.small import small_transformer
from metaint.views.comparison.figure import plot_comparison
from metaint.views.comparison.table import changed_labels, difference_frame, print_comparison, shown_scores

SIZES = {"n_layers": 2, "n_heads": 4, "d_model": 32, "d_mlp": 32, "d_vocab": 50, "n_ctx": 40}


@pytest.fixture(scope="module")
def scans():
    """A scan, and one of the same tokens in which a head became a previous-token head."""
    model = small_transformer(norm="pre", **SIZES)
    tokens = repeated_tokens(50, 20, batch=8, seed=0)
    scan = metaint.scan(model, tokens, [metaint.HeadProbe(), metaint.OutputProbe()])
    changed = scan.copy(deep=True)
    for end in ("", "_low", "_high", "_off_sink", "_off_sink_low", "_off_sink_high"):
        changed["heads"][f"previous_token{end}"].loc[{"layer": 1, "head": 3}] = 0.9
    return scan, changed


@pytest.fixture(scope="module")
def comparison(scans):
    return metaint.compare(*scans)


def test_the_largest_difference_comes_first(comparison):
    first = difference_frame(comparison).iloc[0]
    assert (first["head"], first["score"]) == ("1.3", "previous_token")
    assert first["difference"] == pytest.approx(first["b"] - first["a"])
    spread = float(comparison["a"].sel(score="previous_token").std())
    assert first["in_spreads"] == pytest.approx(first["difference"] / spread)


def test_on_repeated_tokens_the_stripe_alone_is_shown(comparison):
    assert "induction" in shown_scores(comparison)
    assert "prefix_match_correct" not in shown_scores(comparison)
    custom = comparison.sel(score=["prefix_match_recent"])
    assert shown_scores(custom) == ["prefix_match_recent"]


def test_labels_gained_have_a_row_each(comparison):
    changes = changed_labels(comparison)
    assert changes[["label", "head", "change"]].values.tolist() == [["previous_token", "1.3", "gained"]]
    assert changed_labels(comparison.drop_dims("label")).empty


@pytest.mark.parametrize("width", [80, 132])
def test_the_terminal_shows_it_uncut(comparison, width, capsys):
    print_comparison(Console(width=width), comparison.assign_attrs(a="a" * 60, b="b" * 60))
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= width
    assert "gained previous_token: 1.3" in out
    assert " 1.3 " in out
    assert "paired by sequence, 8 of them" in " ".join(out.split())


def test_nothing_that_differs_is_said(scans, capsys):
    print_comparison(Console(width=80), metaint.compare(scans[0], scans[0]))
    assert "Nothing differs" in capsys.readouterr().out


def test_maps_show_the_differences_and_triangles_the_labels(comparison):
    figure = plot_comparison(comparison)
    maps = {trace.name: trace for trace in figure.data if trace.type == "heatmap"}
    assert len(maps) == 6
    drawn = maps["previous_token"]
    np.testing.assert_array_equal(drawn.z, comparison["difference"].sel(score="previous_token").values)
    assert drawn.zmax == -drawn.zmin == pytest.approx(np.abs(drawn.z).max())
    assert "1.3: " in drawn.customdata[1][3]
    assert "gained previous token" in drawn.customdata[1][3]
    assert "gained" not in drawn.customdata[1][2]
    (gained,) = [trace for trace in figure.data if trace.name == "gained"]
    assert (list(gained.x), list(gained.y)) == ([3], [1])
    assert gained.xaxis == drawn.xaxis
    forest = next(trace for trace in figure.data if trace.name == "largest")
    assert forest.x[0] == pytest.approx(difference_frame(comparison)["in_spreads"][0])
    assert forest.y[0] == 0


def test_intervals_of_negative_differences_point_the_right_way(scans):
    figure = plot_comparison(metaint.compare(*scans[::-1]))
    forest = next(trace for trace in figure.data if trace.name == "largest")
    for ends in (forest.error_x.array, forest.error_x.arrayminus):
        assert (np.asarray(ends, dtype=float) >= 0).all()
    assert forest.x[0] < 0


def test_a_scan_beside_itself_and_outputs_alone_are_drawn(scans):
    assert plot_comparison(metaint.compare(scans[0], scans[0])).data
    assert plot_comparison(metaint.compare(scans[0]["outputs"], scans[1]["outputs"])).data


def test_anything_else_is_one_sentence(scans):
    with pytest.raises(InputError, match=r"comparison is a DataTree: pass what metaint\.compare gives"):
        plot_comparison(scans[0])
    with pytest.raises(InputError, match="comparison is another dataset"):
        plot_comparison(xr.Dataset())
    blank = metaint.compare(*scans)
    blank["difference"][:] = torch.nan
    with pytest.raises(InputError, match="no score that both scans know"):
        plot_comparison(blank)
