"""The figure of a recording: a panel for each thing recorded, along roots of steps, with the numbers recorded."""

import math

import numpy as np
import pytest
import xarray as xr
from plotly import graph_objects as go

import metaint
from metaint.errors import InputError
from metaint.measures.growth import fit_trends
from metaint.scans.curves import NORM
from metaint.views.groups.training import drawn_groups
from tests.labs.birth.test_figures import recording as birth_recording
from tests.views.figures import caption_of, lines_of, titles_of
from tests.views.groups.test_heads import planted

STEPS = np.array([0, 1, 4, 9, 25])
TITLES = ["loss", "accuracy", "lr", "labelled heads", "norm of the parameters"]
LAYERS = [f"similarity, layer {layer}" for layer in (0, 1, 3, 4)]


def recording(scale=1.0, **without):
    """Five records of a run whose norm is 1 + √step, and whose heads earn labels at the last two."""
    rise = np.arange(5) / 4
    scalars = {"held_out_loss": 3 - rise, "loss": 2.5 - rise, "accuracy": rise, "lr": 0.01 + 0 * rise}
    scalars["loss"] = np.where(STEPS > 0, scalars["loss"], np.nan)
    heads = planted(2, 3)["heads"].to_dataset().expand_dims(step=STEPS)
    heads = heads.map(lambda values: values.where(values["step"] > 5, 0.1))
    similarity = np.multiply.outer(1 - 0.1 * rise, np.multiply.outer([1.0, 0.9], np.linspace(1, 0.5, 5)))
    dims = ("step", "scale", "layer")
    saturation = {"similarity": (dims, similarity), "similarity_null": (dims, similarity / 3)}
    saturation |= {f"similarity_{end}": (dims, similarity * by) for end, by in (("low", 0.9), ("high", 1.1))}
    groups = {
        "training": xr.Dataset({name: ("step", values) for name, values in scalars.items()}, {"step": STEPS}),
        "heads": heads,
        "weights": xr.Dataset({NORM: ("step", scale * (1 + np.sqrt(STEPS)))}, {"step": STEPS}),
        "saturation": xr.Dataset(saturation, {"step": STEPS, "scale": [1.0, math.inf], "layer": range(5)}),
    }
    tree = xr.DataTree.from_dict({f"/{name}": data for name, data in groups.items() if without.get(name, True)})
    tree.attrs["model"] = "some-model"
    return tree


def drawn(figure, title):
    return {line.name: line for line in lines_of(figure, title)}


def test_a_run_has_a_panel_for_each_thing_recorded():
    tree = recording()
    figure = metaint.plot_training(tree)
    assert titles_of(figure) == TITLES + LAYERS
    assert figure.layout.title.subtitle.text == "some-model, 25 steps"
    scalars = tree["training"]
    for title, names in (("loss", ["loss", "held_out_loss"]), ("accuracy", ["accuracy"]), ("lr", ["lr"])):
        lines = drawn(figure, title)
        assert list(lines) == [name.replace("_", " ") for name in names]
        for line, name in zip(lines.values(), names, strict=True):
            np.testing.assert_array_equal(line.y, scalars[name].values)
    labels = drawn(figure, "labelled heads")
    assert {name: line.y.tolist() for name, line in labels.items()} == {
        name: [0, 0, 0, 1, 1] for name in ("previous token", "induction", "sink")
    }
    norm, fit = drawn(figure, "norm of the parameters").values()
    np.testing.assert_array_equal(norm.y, tree["weights"][NORM].values)
    assert fit.name == "fit of √t"
    assert fit.y == pytest.approx(1 + fit.x)
    assert fit_trends(STEPS, norm.y)["sqrt_t"].r2 == pytest.approx(1)
    for layer in (0, 1, 3, 4):
        at = tree["saturation"].to_dataset().sel(scale=math.inf, layer=layer)
        similarity, null = drawn(figure, f"similarity, layer {layer}").values()
        np.testing.assert_array_equal(similarity.y, at["similarity"])
        np.testing.assert_array_equal(null.y, at["similarity_null"])
        np.testing.assert_array_equal(similarity.customdata[:, 1], at["similarity_high"])


def test_all_panels_share_an_axis_of_roots_of_steps():
    figure = metaint.plot_training(recording())
    for trace in figure.data:
        if trace.fill is None and "fit" not in trace.name:
            assert trace.x == pytest.approx(np.sqrt(STEPS))
            assert list(trace.text) == [f"step {step}, " for step in STEPS]
            assert trace.hovertemplate.startswith("%{text}")
    last = len(titles_of(figure))
    assert {figure.layout[f"xaxis{row if row > 1 else ''}"].matches for row in range(1, last)} == {f"x{last}"}
    assert figure.layout[f"xaxis{last}"].title.text == "optimiser step (square-root scale)"
    assert figure.layout.xaxis.ticktext[-1] == "25"
    assert figure.layout.xaxis.tickvals[-1] == 5


def test_several_runs_keep_their_colours_where_one_lacks_a_part():
    bare = recording(training=False, saturation=False)
    figure = metaint.plot_training({"<b>bare</b>": bare, "whole": recording(2), "same": recording(3)})
    labels = [f"{label} heads" for label in ("previous_token", "induction", "sink")]
    assert titles_of(figure) == TITLES[:3] + labels + TITLES[4:] + LAYERS
    colours = {}
    for trace in figure.data:
        if trace.legendgroup is not None and trace.fill is None:
            colours.setdefault(trace.legendgroup, set()).add(trace.line.color)
    assert list(map(len, colours.values())) == [1, 1, 1]
    named = [t.name for t in figure.data if t.showlegend and t.legendgroup]
    assert sorted(named) == ["&lt;b&gt;bare&lt;/b&gt;", "same", "whole"]
    axis = f"y{titles_of(figure).index(TITLES[4]) + 1}"
    norms = [trace for trace in figure.data if trace.yaxis == axis and trace.line.dash == "solid"]
    assert [line.y[-1] for line in norms] == [6, 12, 18]
    assert figure.layout.title.subtitle.text == "3 runs, 25 steps"


def test_only_what_is_there_is_drawn_and_explained():
    figure = metaint.plot_training(recording(heads=False, saturation=False))
    assert titles_of(figure) == [title for title in TITLES if "heads" not in title]
    assert "Labels" not in caption_of(figure)
    soft = recording(training=False, heads=False, weights=False)
    soft["saturation"] = xr.DataTree(soft["saturation"].to_dataset().sel(scale=[1.0]))
    assert drawn_groups(soft) == set()
    unlabelled = recording(training=False, saturation=False, weights=False)
    unlabelled["heads"] = xr.DataTree(unlabelled["heads"].to_dataset().isel(step=[0, 1]))
    (line,) = drawn(metaint.plot_training(unlabelled), "labelled heads").values()
    assert line.y.tolist() == [0, 0]


def test_scalars_with_intervals_have_bands():
    tree = recording(heads=False, weights=False, saturation=False)
    loss = tree["training"]["loss"]
    data = tree["training"].to_dataset().assign(loss_low=loss - 0.1, loss_high=loss + 0.1)
    figure = metaint.plot_training(data)
    assert titles_of(figure) == TITLES[:3]
    band = next(t for t in figure.data if t.fill is not None)
    assert max(band.y) == pytest.approx(float(loss.max()) + 0.1)
    assert figure.layout.title.subtitle.text == "scan, 25 steps"


def test_it_says_how_to_read_it_and_when_it_misleads():
    for recordings in (recording(), {"one": recording(), "two": recording()}):
        caption = caption_of(metaint.plot_training(recordings))
        assert caption.startswith("How to read: scalars are those that the training loop gave. Labels: how many of 6 ")
        assert "It misleads where records are few" in caption
    caption = caption_of(metaint.plot_training(recording(training=False, heads=False)))
    assert "It misleads where a trend is taken for a law" in caption


def test_recordings_of_the_birth_lab_show_their_memories():
    tree = birth_recording()
    for recordings in (tree, {"one": tree, "two": tree}):
        assert metaint.plot_training(recordings).layout.title.text == "Birth of an induction head"
    assert metaint.plot_training({"birth": tree, "other": recording()}).layout.title.text == "Training"
    assert titles_of(metaint.plot_training(tree["training"]))[:2] == ["loss", "accuracy"]


def test_a_recording_a_node_and_a_dataset_are_drawn_alike():
    tree = recording(heads=False, weights=False, saturation=False)
    figures = [metaint.plot_training(given) for given in (tree, tree["training"], tree["training"].to_dataset())]
    assert len({go.Figure(figure.data).to_json() for figure in figures}) == 1
    assert [f.layout.title.subtitle.text for f in figures] == 2 * ["some-model, 25 steps"] + ["scan, 25 steps"]


def test_what_can_not_be_drawn_is_said(repeated_scan):
    name = repeated_scan.attrs["model"]
    with pytest.raises(InputError) as caught:
        metaint.plot_training(repeated_scan)
    assert str(caught.value) == (
        f"{name} holds nothing over steps to draw: record scalars, /heads, /weights, or /saturation with a kappa of "
        "infinity, and pass what metaint.read_recording gives."
    )
    for given, words in (
        ({}, r"^recordings is empty: pass a recording, or a dict from names to recordings\.$"),
        ([1], r"^recordings is a list: pass a recording, or a dict from names to recordings\.$"),
        (recording()["heads"], r"^the recording is a /heads group: pass a recording, or its /training\.$"),
        ({"a": xr.Dataset({"x": ("layer", [1.0])})}, r"^the recording a is no group of a scan: pass a recording, or "),
        ({"a": 3}, r"^the recording a is a int: pass a recording, or its /training\.$"),
    ):
        with pytest.raises(InputError, match=words):
            metaint.plot_training(given)
