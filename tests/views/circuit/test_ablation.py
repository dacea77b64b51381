"""Figures of ablation: the effects and their intervals as they were measured, and what was not asked for left out."""

import numpy as np
import pytest
import torch
import xarray as xr

import metaint
from metaint.errors import InputError
from metaint.toys.small import small_transformer
from metaint.views.circuit.words import figure as digits
from tests.circuits.planted import circuit_model

SETS = {"all <b>MLPs</b>": ["mlps"], "two heads": ["0.1", "1.0"]}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return small_transformer(norm="pre", n_layers=3, n_heads=4, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)


@pytest.fixture(scope="module")
def tokens():
    return torch.arange(12).repeat(3, 2)


def of(figure, kind, name=None):
    return [trace for trace in figure.data if trace.type == kind and name in (None, trace.name)]


def texts(figure):
    return [note.text for note in figure.layout.annotations]


def x_titles(figure):
    return [axis.title.text for axis in figure.select_xaxes()]


def assert_drawn(trace, data, name):
    """The numbers of the dataset, and its intervals."""
    np.testing.assert_array_equal(trace.x, data[name])
    np.testing.assert_allclose(trace.x + trace.error_x.array, data[f"{name}_high"])
    np.testing.assert_allclose(trace.x - trace.error_x.arrayminus, data[f"{name}_low"])


def test_every_effect_is_drawn_with_its_interval(model, tokens):
    data = metaint.ablate(model, tokens, ["heads", "mlps", "attns"], sets=SETS)
    figure = metaint.plot_ablation(data)
    (grid,) = of(figure, "heatmap")
    np.testing.assert_array_equal(grid.z, data["effect"])
    colours = figure.layout.coloraxis
    assert colours.cmax == -colours.cmin == float(abs(data["effect"]).max())
    low, high = (digits(float(data[f"effect_{end}"][2, 1]), True) for end in ("low", "high"))
    assert grid.customdata[2][1].startswith("head 2.1: ")
    mean, std = (float(data[f"effect_same_layer_{end}"][2, 1]) for end in ("mean", "std"))
    others = f"<br>other heads of the layer: mean {digits(mean, True)}, standard deviation {digits(std)}"
    assert grid.customdata[2][1].endswith(f" ({low} to {high}) nats{others}")
    assert_drawn(of(figure, "scatter", "MLP")[0], data, "mlp_effect")
    assert_drawn(of(figure, "scatter", "all heads of the layer")[0], data, "attn_effect")
    assert_drawn(of(figure, "scatter", "sets")[0], data, "set_effect")
    (draws,) = of(figure, "scatter", "random heads of the<br>same layers")
    np.testing.assert_array_equal(draws.x, data["set_effect_same_layer"].values.ravel())
    assert np.round(draws.y).tolist() == np.repeat([0, 1], 8).tolist()
    assert np.isnan(draws.x).tolist() == [True] * 8 + [False] * 8
    assert list(figure.layout.yaxis3.ticktext) == ["all &lt;b&gt;MLPs&lt;/b&gt;", "two heads"]
    strongest = int(abs(data["effect"]).argmax())
    assert f"{strongest // 4}.{strongest % 4}" in texts(figure)
    caption = next(text for text in texts(figure) if text.startswith("How to read"))
    assert "misleads" in caption
    assert x_titles(figure)[1] == "in context loss (nats): ablated minus whole"


@pytest.mark.parametrize(
    ("parts", "sets", "kinds"),
    [
        (["0.1", "2.3"], None, ["heatmap"]),
        (["mlps"], None, ["scatter"]),
        (None, SETS, ["scatter"]),
        (["0.1"], SETS, ["heatmap", "scatter"]),
        (["attn 1"], SETS, ["scatter", "scatter"]),
    ],
)
def test_what_was_not_asked_for_is_left_out(model, tokens, parts, sets, kinds):
    figure = metaint.plot_ablation(metaint.ablate(model, tokens, parts, sets=sets, random=0))
    assert [trace.type for trace in figure.data] == kinds
    assert all(x_titles(figure))
    if kinds[0] == "heatmap":
        assert figure.data[0].customdata[1][1] == "head 1.1: not asked for"
        assert set(texts(figure)) & {"0.1", "2.3"}


def test_a_circuit_stands_beside_random_ones():
    check = metaint.check_circuit(circuit_model(), ["0.1", "1.1"], random=6)
    figure = metaint.plot_check(check)
    for row, name in enumerate(("faithfulness", "completeness")):
        others, circuit = of(figure, "scatter")[2 * row : 2 * row + 2]
        np.testing.assert_array_equal(others.x, check[f"random_{name}"])
        assert circuit.x[0] == float(check[name])
        assert circuit.x[0] + circuit.error_x.array[0] == pytest.approx(float(check[f"{name}_high"]))
        assert circuit.x[0] - circuit.error_x.arrayminus[0] == pytest.approx(float(check[f"{name}_low"]))
    assert figure.layout.title.text == ("Circuit found" if check.attrs["found"] else "Circuit not found")
    assert "heads 0.1, 1.1" in figure.layout.title.subtitle.text
    assert figure == metaint.plot_check(check)


def test_what_is_no_result_is_refused(repeated_scan):
    for plot, argument, maker in (
        (metaint.plot_ablation, "ablation", "metaint.ablate"),
        (metaint.plot_check, "check", "metaint.check_circuit"),
    ):
        with pytest.raises(InputError, match=f"^{argument} is a DataTree: pass what {maker} gives"):
            plot(repeated_scan)
        with pytest.raises(InputError, match=f"^{argument} is a dataset without "):
            plot(xr.Dataset())
