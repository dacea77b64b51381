"""The figure of an ablation curve: the numbers as they were measured, each draw, and the verdict in words."""

import numpy as np
import pytest
import torch
import xarray as xr

import metaint
from metaint.errors import InputError
from metaint.toys.small import small_transformer

TOKENS = torch.arange(12).repeat(3, 2)
SHARES = [0.05, 0.1, 0.3, 1.0]


@pytest.fixture(scope="module")
def curve():
    torch.manual_seed(0)
    model = small_transformer(norm="pre", n_layers=3, n_heads=4, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    return metaint.ablation_curve(model, metaint.scan(model, TOKENS), "first_token", SHARES, tokens=TOKENS, random=6)


def named(figure, part):
    (trace,) = [trace for trace in figure.data if trace.name and part in trace.name.replace("<br>", " ")]
    return trace


def test_each_curve_is_drawn_with_its_band(curve):
    figure = metaint.plot_ablation_curve(curve)
    x = np.log10(SHARES)
    names = {"effect": "highest first token", "norm_effect": "write most", "random_mean": "of the same layers, mean"}
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    for name, words in names.items():
        trace = named(figure, words)
        np.testing.assert_allclose(trace.x, x)
        np.testing.assert_array_equal(trace.y, curve[name])
        known = curve[name].notnull().values
        assert any(np.array_equal(band.y[: known.sum()], curve[f"{name}_high"].values[known]) for band in bands)
        assert list(trace.text) == ["5 %, 1 head", "10 %, 1 head", "30 %, 4 heads", "100 %, 12 heads"]
    draws = named(figure, "6 random draws")
    np.testing.assert_array_equal(np.reshape(draws.y, (6, 5))[:, :4], curve["random_effect"].values.T)
    assert list(figure.layout.xaxis.ticktext)[::3] == ["5 %<br>1 head", "100 %<br>12 heads"]
    assert figure.layout.title.text == "first_token is not load-bearing here"
    caption = next(note.text for note in figure.layout.annotations if note.name == "caption").replace("<br>", " ")
    assert caption.startswith(f"Verdict: {curve.attrs['verdict']} How to read: ")
    assert "misleads" in caption
    assert "in context loss 3." in figure.layout.title.subtitle.text or "loss 4." in figure.layout.title.subtitle.text
    assert figure == metaint.plot_ablation_curve(curve)


def test_without_comparison_no_draw_is_drawn(curve):
    """One share, every head of it drawn again."""
    model = small_transformer(norm="pre", n_layers=2, n_heads=1, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    alone = metaint.ablation_curve(model, metaint.scan(model, TOKENS), shares=[0.5], tokens=TOKENS)
    figure = metaint.plot_ablation_curve(alone)
    assert not [trace for trace in figure.data if trace.name and "random" in trace.name]
    low, high = figure.layout.xaxis.range
    assert low < np.log10(0.5) - 0.1 < np.log10(0.5) + 0.1 < high
    assert alone.attrs["load_bearing"] in figure.layout.title.text or "cannot be told" in figure.layout.title.text


def test_what_is_no_curve_is_refused(repeated_scan):
    for given, what in ((repeated_scan, "a DataTree"), (xr.Dataset(), "a dataset without curves")):
        with pytest.raises(InputError, match=f"^curve is {what}: pass what metaint.ablation_curve gives.$"):
            metaint.plot_ablation_curve(given)
