"""Figures of the norm-growth lab: they show the recordings' own numbers, the fits, and how to read them."""

import math

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from metaint.errors import InputError
from metaint.labs.norm_growth import figures as norm_growth
from metaint.labs.norm_growth.run import train_run
from metaint.labs.norm_growth.settings import Settings
from metaint.measures.growth import fit_trends
from metaint.measures.saturation import EXPECTED_SLOPES
from metaint.scans import curves
from metaint.scans.labels import label_heads
from metaint.views.drawing.page import write_page
from metaint.views.groups import training
from tests.views.figures import caption_of

PLOTS = ("plot_norm_growth", "plot_training_saturation", "plot_training_heads")
TEXT = "the norm of the parameters grows as the square root of time; attention saturates. " * 20
NORM = "total_norm_without_embeddings"


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    sizes = {"n_layers": 6, "n_heads": 2, "d_model": 16, "length": 16, "batch": 2, "records": 4}
    return train_run(tmp_path_factory.mktemp("run"), Settings("pre", "adamw", 6, **sizes), TEXT)


@pytest.fixture(scope="module")
def six(recording):
    return {f"{norm}-{optimiser}": recording for norm in ("pre", "output", "post") for optimiser in ("adamw", "sgd")}


@pytest.fixture(scope="module")
def slopes():
    rows = [
        {"run": norm, "activation": name, "slope": k + 0.01, "low": k, "high": k + 0.02, "expected": k}
        for norm in ("pre", "output")
        for name, k in EXPECTED_SLOPES[norm].items()
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("plot", PLOTS)
def test_every_figure_says_how_to_read_it_and_when_it_misleads(recording, six, plot):
    for recordings in ({"one": recording}, six):
        figure = getattr(norm_growth, plot)(recordings)
        assert "How to read" in caption_of(figure)
        assert "It misleads" in caption_of(figure)
        told = "one" if len(recordings) == 1 else f"{len(recordings)} runs"
        assert figure.layout.title.subtitle.text == f"{told}, 6 steps"
        assert all(figure.layout[axis].title.text for axis in figure.layout if axis.startswith("yaxis"))
        named = [trace.name for trace in figure.data if trace.showlegend is not False]
        assert len(named) >= len(recordings)


def test_norms_are_drawn_over_root_steps_with_their_best_fit(recording, six):
    figure = norm_growth.plot_norm_growth(six)
    weights = recording["weights"].to_dataset()
    lines = [trace for trace in figure.data if trace.name and "R²" in trace.name]
    fits = [trace for trace in figure.data if trace.name and trace.name.startswith("fit of")]
    assert len(lines) == len(fits) == 6
    assert lines[0].x == pytest.approx(np.sqrt(weights["step"].values))
    assert lines[0].y == pytest.approx(weights[NORM].values)
    steps, norms = curves.steady_norms(recording)  # from the end of the warmup on
    assert steps.tolist() == [1, 2, 6]
    trends = fit_trends(steps, norms)
    assert all(f"{trend.r2:.3f}" in lines[0].name for trend in trends.values())
    best = max(trends, key=lambda name: trends[name].r2)
    assert fits[0].name == f"fit of {training.SIGNS[best]}"
    assert fits[0].x[0] == 1
    assert fits[0].y[0] == pytest.approx(trends[best].intercept + trends[best].slope)
    assert {line.line.color for line in lines} == {fit.line.color for fit in fits}
    assert figure.layout.xaxis.ticktext[-1] == "6"


def test_a_planted_square_root_is_a_straight_line(recording):
    planted = recording.copy(deep=True)
    weights = planted["weights"].to_dataset()
    weights[NORM] = ("step", 2 + np.sqrt(weights["step"].values))
    planted["weights"] = xr.DataTree(weights)
    figure = norm_growth.plot_norm_growth({"planted": planted})
    line, fit = figure.data
    assert "1.000" in line.name
    assert fit.name == "fit of √t"
    assert np.interp(line.x[1:], fit.x, fit.y) == pytest.approx(line.y[1:])


def test_saturation_has_a_panel_for_each_of_four_layers_and_its_null(recording, six):
    figure = norm_growth.plot_training_saturation(six)
    titles = [figure.layout[axis].title.text for axis in sorted(a for a in figure.layout if a.startswith("yaxis"))]
    assert titles == [f"similarity, layer {layer}" for layer in (0, 2, 3, 5)]
    data = recording["saturation"].to_dataset().sel(scale=math.inf, layer=5)
    last = [trace for trace in figure.data if trace.yaxis == "y4" and trace.fill is None and trace.x[0] is not None]
    solid, dashed = ([t for t in last if t.line.dash == dash] for dash in ("solid", "dash"))
    assert len(solid) == len(dashed) == 6
    assert solid[0].y == pytest.approx(data["similarity"].values)
    assert dashed[0].y == pytest.approx(data["similarity_null"].values)


def test_heads_are_counted_by_their_labels(recording):
    planted = recording.copy(deep=True)
    heads = planted["heads"].to_dataset()
    heads["max_weight"][-1, 2, 1], heads["max_weight_low"][-1, 2, 1] = 1.0, 1.0
    heads["tied_keys"].loc[{"step": heads["step"][-1], "layer": 2, "head": 1}] = 1.0
    planted["heads"] = xr.DataTree(heads)
    counts = curves.head_counts(planted)
    assert counts["argmax"].values.tolist() == [0] * (counts.sizes["step"] - 1) + [1]
    last = label_heads(heads.isel(step=-1, drop=True))["label"]
    assert counts["averaging"][-1] == (last == "averaging").sum()
    figure = norm_growth.plot_training_heads({"planted": planted})
    assert figure.data[0].y.tolist() == counts["argmax"].values.tolist()
    assert "of 12 heads" in caption_of(figure)


def test_slopes_stand_beside_those_expected(slopes):
    figure = norm_growth.plot_slopes(slopes)
    measured = [trace for trace in figure.data if trace.error_y.array is not None]
    assert [trace.name for trace in measured] == ["pre", "output"]
    assert measured[0].y == pytest.approx([1.01, 4.01, 3.01, 3.01, 3.01])
    assert sum(bool(trace.showlegend) for trace in figure.data if trace.name == "expected") == 1
    assert figure.layout.xaxis.ticktext == ("embedding", "scores", "attention adds", "MLP adds", "stream")
    assert "How to read" in caption_of(figure)
    with pytest.raises(InputError, match="table lacks expected: give the slopes of a study"):
        norm_growth.plot_slopes(slopes.drop(columns="expected"))
    with pytest.raises(InputError, match="table lacks rows"):
        norm_growth.plot_slopes(slopes.iloc[:0])


def test_recordings_without_the_group_are_refused(recording):
    for plot, group in zip(PLOTS, ("weights", "saturation", "heads"), strict=True):
        bare = recording.copy()
        del bare[group]
        with pytest.raises(InputError, match=f"the recording bare has no /{group} over steps"):
            getattr(norm_growth, plot)({"bare": bare})
        with pytest.raises(InputError, match="recordings is empty: pass a dict from names to recordings"):
            getattr(norm_growth, plot)({})
    soft = recording.copy()
    soft["saturation"] = xr.DataTree(soft["saturation"].to_dataset().sel(scale=[1.0]))
    with pytest.raises(InputError, match="has no kappa of infinity"):
        norm_growth.plot_training_saturation({"soft": soft})


def test_names_cannot_break_the_page(recording, slopes, tmp_path):
    figures = norm_growth.training_figures({"<b>x</b>": recording, "y": recording}, slopes)
    assert list(figures) == ["norms", "saturation", "heads", "slopes"]
    assert "&lt;b&gt;x&lt;/b&gt;" in figures["norms"].data[0].name
    assert write_page(figures, tmp_path / "page.html", "Training").stat().st_size > 1e5
