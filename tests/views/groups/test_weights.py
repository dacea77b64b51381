"""Tables of /weights: the scan's own numbers, whole at any width, readable by machines."""

import io
import json
import math

import numpy as np
import pytest
import xarray as xr
from rich.console import Console

import metaint
from metaint.errors import InputError
from metaint.views.export.scan_json import scan_json
from metaint.views.groups.group_view import group_json
from metaint.views.groups.weights import plot_weights, print_weights, weights_frame
from tests.builders import available_kinds, build
from tests.models.handmade import HandMade
from tests.views.figures import caption_of


@pytest.fixture(scope="module")
def scan(gpt2, repeated):
    return metaint.scan(gpt2, repeated, [metaint.WeightProbe()])


def printed(scan, width=200):
    console = Console(width=width, file=io.StringIO())
    print_weights(console, scan)
    return console.file.getvalue()


def rows(text):
    """The cells of the table of pairs."""
    table = text.split("Composition: top")[1].split("score: ")[0]
    return [line.split() for line in table.splitlines() if line.split()[:1] in (["Q"], ["K"], ["V"])]


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_tables_fit(scan, width):
    text = printed(scan, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    assert len(rows(text)) == 8
    assert all(len(row) == 6 for row in rows(text))


def test_tables_hold_the_scan_s_numbers(scan):
    assert f"{scan['weights']['full_ov_copying'].values.max():.3f}" in printed(scan)


def test_the_strongest_pairs_are_those_of_the_scan(scan):
    weights, text = scan["weights"], printed(scan)
    pairs = [
        (float(weights[f"{kind}_composition_z"][i, j, k, m]), float(weights[f"{kind}_composition"][i, j, k, m]), at)
        for kind in "qkv"
        for i, j, k, m in np.ndindex(2, 4, 2, 4)
        if i < k and (at := [kind.upper(), f"{i}.{j}", f"{k}.{m}"])
    ]
    assert f"Composition: top 8 of {len(pairs)} pairs" in text
    strongest = sorted(pairs, reverse=True)[:8]
    chance = f"{1 / math.sqrt(32):.3f}"
    assert rows(text) == [[*at, f"{score:.3f}", chance, f"{z:.1f}"] for z, score, at in strongest]
    assert f"K {float(np.nanmedian(weights['k_composition_z'])):.1f}" in text
    assert "misleads" in text


def scan_of(weights):
    return xr.DataTree.from_dict({"weights": weights})


def read(model):
    with metaint.attach(model, metaint.WeightProbe()) as probe:
        pass
    return scan_of(probe.to_dataset())


def test_pairs_that_are_not_known_are_not_shown(scan):
    kind = next(kind for kind in ("native-mlp-ln", "hooked") if kind in available_kinds())
    for other in (read(HandMade("not_a_number")), read(build(kind, n_layers=1))):
        assert "Composition" not in printed(other)
        assert "Norms of the parameters" in printed(other)
    weights = scan["weights"].to_dataset()
    partly = weights.copy(deep=True)
    for name, unknown in (("q", (...,)), ("k", (...,)), ("v", (0, slice(1, None)))):
        partly[f"{name}_composition_z"][unknown] = np.nan
    found = rows(printed(scan_of(partly)))
    assert [row[:2] for row in found] == [["V", "0.0"]] * 4
    left_out = weights.drop_vars([name for name in weights if "composition" in name]).assign_attrs(composition="left")
    assert "Composition of pairs of heads is left." in printed(scan_of(left_out))


def test_frame_and_json(scan):
    heads = weights_frame(scan)
    assert len(heads) == 8
    assert not any("composition" in name for name in heads)
    assert heads["qk_norm"].tolist() == scan["weights"]["qk_norm"].values.ravel().tolist()
    assert heads["parameter_norm_mlp"][5] == float(scan["weights"]["parameter_norm"].sel(layer=1, part="mlp"))
    found = json.loads(scan_json(scan), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["weights"]
    assert found == json.loads(json.dumps(group_json(scan["weights"].to_dataset())))
    assert found["attributes"]["parameters"] > 0
    pairs = found["variables"]["k_composition_z"]
    assert pairs["dims"] == ["layer", "head", "layer_to", "head_to"]
    assert pairs["data"][0][2][1][3] == float(scan["weights"]["k_composition_z"][0, 2, 1, 3])
    assert pairs["data"][1][2][1][3] is None


def test_a_scan_without_it_is_refused(repeated_scan):
    for function in (weights_frame, printed, plot_weights):
        with pytest.raises(InputError, match=r"no /weights group"):
            function(repeated_scan)


def test_the_figure_draws_the_scan_s_numbers(scan):
    weights, figure = scan["weights"], plot_weights(scan)
    by_name = {trace.name: trace for trace in figure.data if trace.name}
    for part in ("attention", "mlp", "norm"):
        np.testing.assert_array_equal(by_name[part].y, weights["parameter_norm"].sel(part=part).values)
    band, dots = (next(t for t in figure.data if t.xaxis == "x" and t.mode == mode) for mode in ("lines", "markers"))
    np.testing.assert_array_equal(dots.y, weights["full_ov_copying"].values.ravel())
    assert list(dots.customdata) == [f"{i}.{j}" for i in range(2) for j in range(4)]
    assert np.array_equal(np.round(dots.x), np.repeat([0, 1], 4))
    mean, std = (float(weights[f"full_ov_copying_null_{end}"][0, 0]) for end in ("mean", "std"))
    assert [max(band.y), min(band.y)] == pytest.approx([mean + 2 * std, mean - 2 * std])
    z = np.concatenate([weights[f"{kind}_composition_z"].values.ravel() for kind in "qkv"])
    drawn = [by_name[f"{kind} composition"] for kind in "QKV" if f"{kind} composition" in by_name]
    assert sorted(x for trace in drawn for x in trace.x) == sorted(z[np.isfinite(z)])[-20:]
    assert figure.layout.shapes[0].x0 == pytest.approx(np.nanmedian(z))
    top = np.argmax([max(trace.x) for trace in drawn])
    assert rows(printed(scan))[0][:3] == drawn[top].customdata[0].split(":")[0].replace("→ ", "").split()
    assert "How to read" in caption_of(figure)
    assert "It misleads" in caption_of(figure)


def test_the_figure_leaves_out_what_is_not_known(scan):
    weights = scan["weights"].to_dataset().copy(deep=True)
    weights["full_ov_copying"][:] = np.nan
    pairs = [name for name in weights if "composition" in str(name)]
    blind = weights.drop_vars(pairs).assign_attrs(composition="left out: 5120 heads")
    figure = plot_weights(scan_of(blind))
    assert figure.layout.yaxis.title.text == "OV copying"
    assert "yaxis3" not in figure.layout
    assert "Composition of pairs of heads is left out: 5120 heads." in caption_of(figure)
    blind["ov_copying"][:] = np.nan
    figure = plot_weights(scan_of(blind))
    assert "yaxis2" not in figure.layout
    assert "eigenvalues" not in caption_of(figure)
    weights["ov_copying"][:] = np.nan
    figure = plot_weights(scan_of(weights))
    legends = {trace.legend for trace in figure.data if trace.name and "composition" in trace.name}
    assert legends == {"legend2"}  # beside the second panel
    hostile = scan_of(weights)
    hostile.attrs["model"] = "<a href='http://x'>x</a>"
    assert "<a" not in plot_weights(hostile).layout.title.subtitle.text
