"""The figure of /heads: the scan's own numbers, each beside its baseline, and the labels where they were earned."""

import numpy as np
import pytest
import xarray as xr

import metaint
from metaint.errors import InputError
from metaint.views.groups.heads import plot_heads

KINDS = ("induction", "prefix_match", "previous_token", "duplicate_token", "first_token", "local_mass")
SHAPES = ("averaging", "max_weight", "entropy")


def planted(layers=12, heads=12, repeats=True):
    """Heads that do nothing in particular but for three: previous token 0.1, induction 1.0, sink at the last."""
    dims, generator = ("layer", "head"), np.random.default_rng(0)
    data = {}
    for name in (*KINDS, *SHAPES):
        values = generator.uniform(0, 0.2, (layers, heads))
        uniform, count = (np.full((layers, heads), value) for value in (1.0 if name in SHAPES else 0.03, 200.0))
        if name == "previous_token":
            values[0, 1] = 0.9
        if name in KINDS[:2]:
            values[1, 0] = 0.8
        if name == "first_token":
            values[-1, -1] = 0.95
        if name == "induction" and not repeats:
            values[:], count[:] = np.nan, 0
        data |= {name: (dims, values), f"{name}_uniform": (dims, uniform), f"{name}_count": (dims, count)}
        data |= {f"{name}_low": (dims, values - 0.01), f"{name}_high": (dims, values + 0.01)}
        if name in KINDS:
            data |= {
                f"{name}_null_{end}": (dims, 0 * uniform + value) for end, value in (("mean", 0.04), ("std", 0.01))
            }
    data["distance_mean"], data["distance_mean_count"] = (dims, 40 * data["entropy"][1]), data["entropy_count"]
    heads_read = xr.Dataset(data, {"layer": range(layers), "head": range(heads)}, {"tokens_seen": 99, "sequences": 3})
    tree = xr.DataTree.from_dict({"/heads": heads_read})
    tree.attrs["model"] = "some-model"
    return tree


def maps_of(figure):
    return {trace.name: trace for trace in figure.data if trace.type == "heatmap"}


def titles_of(figure):
    return [note.text for note in figure.layout.annotations if note.name != "caption"]


def dots_of(figure):
    """The marked heads by the axis of the map they are on."""
    return {t.xaxis: list(zip(t.y, t.x, strict=True)) for t in figure.data if t.type == "scatter"}


@pytest.mark.parametrize(("layers", "heads"), [(12, 12), (80, 64), (2, 1)])
def test_maps_hold_the_scan_s_numbers(layers, heads):
    scan = planted(layers, heads) if heads > 1 else planted(2, 2).isel(head=[0])
    figure = plot_heads(scan)
    maps = maps_of(figure)
    assert list(maps) == ["induction", *KINDS[2:], *SHAPES]
    for name, drawn in maps.items():
        np.testing.assert_array_equal(drawn.z, scan["heads"][name].values)
        assert np.shape(drawn.customdata) == (layers, heads)
        assert drawn.coloraxis == "coloraxis"
    assert [figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax] == [0, 1]
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]  # layer 0 above
    assert "How to read" in figure.layout.annotations[-1].text
    assert "It misleads" in " ".join(figure.layout.annotations[-1].text.split("<br>"))


def test_titles_and_hover_tell_baselines():
    figure = plot_heads(planted())
    assert "<b>previous token</b> · uniform 0.030" in titles_of(figure)
    assert "<b>entropy</b> · uniform 1.000" in titles_of(figure)
    told = maps_of(figure)["previous_token"].customdata[0][1]
    assert told == ("head 0.1: 0.900 (0.890 to 0.910)<br>uniform 0.030<br>null 0.040 ± 0.010<br><b>previous_token</b>")
    assert "null" not in maps_of(figure)["entropy"].customdata[0][1]
    windowed = planted()
    windowed["heads"]["local_mass_uniform"][1:] = 0.5
    assert "<b>local mass</b> · uniform 0.030 to 0.500" in titles_of(plot_heads(windowed))


@pytest.mark.parametrize("repeats", [True, False])
def test_labelled_heads_are_marked_on_the_map_that_earned_it(repeats):
    scan = planted(repeats=repeats)
    figure = plot_heads(scan)
    first = "induction" if repeats else "prefix_match"
    maps = maps_of(figure)
    assert next(iter(maps)) == first
    labels = metaint.label_heads(scan).query("label != 'none'")
    marked = dots_of(figure)
    earned = {"induction": first, "previous_token": "previous_token", "sink": "first_token"}
    assert set(labels["label"]) == set(earned)
    for label, score in earned.items():
        rows = labels[labels["label"] == label]
        assert marked.pop(maps[score].xaxis) == list(zip(rows["layer"], rows["index"], strict=True))
    assert not marked


def test_scores_of_another_unit_have_a_scale_of_their_own():
    figure = plot_heads(planted(), ["distance_mean", "entropy"])
    distance = maps_of(figure)["distance_mean"]
    assert distance.coloraxis is None
    assert distance.zmax == distance.z.max() > 1
    assert f"dark {distance.zmax:.3f}" in titles_of(figure)[0]


def test_a_real_scan_is_drawn(repeated_scan):
    maps = maps_of(plot_heads(repeated_scan))
    assert len(maps) == 8
    np.testing.assert_array_equal(maps["induction"].z, repeated_scan["heads"]["induction"].values)


def test_what_can_not_be_drawn_is_said(repeated_scan):
    with pytest.raises(InputError, match=r"^scores names 'induktion': give a list of some of previous_token, "):
        plot_heads(repeated_scan, ["entropy", "induktion"])
    with pytest.raises(InputError, match=r"^scores is 'entropy': give a list of some of "):
        plot_heads(repeated_scan, "entropy")
    with pytest.raises(InputError, match=r"^scores names 'tied_keys'"):
        plot_heads(repeated_scan, ["tied_keys"])
    with pytest.raises(InputError, match=r"^scores is \[\]"):
        plot_heads(repeated_scan, [])
    with pytest.raises(InputError, match=r"no /heads group: scan with metaint\.HeadProbe\(\)"):
        plot_heads(xr.DataTree())
    over_steps = xr.DataTree.from_dict({"/heads": repeated_scan["heads"].to_dataset().expand_dims(step=[0, 5])})
    with pytest.raises(InputError, match=r"^scan is a recording over steps: pass one of them, such as scan"):
        plot_heads(over_steps)
    plot_heads(over_steps.isel(step=-1))
