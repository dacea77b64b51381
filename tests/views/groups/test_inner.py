"""The figure of /inner: the scan's own numbers beside their nulls, and how to read them."""

import numpy as np
import pytest

import metaint
from tests.builders import available_kinds, build
from tests.views.figures import caption_of, lines_of, titles_of


@pytest.fixture(scope="module")
def scan(gpt2, repeated):
    return metaint.scan(gpt2, repeated, [metaint.InnerProbe()])


def test_lines_are_the_scan_s_numbers(scan):
    data, figure = scan["inner"], metaint.plot_inner(scan)
    loss, null, entropy = lines_of(figure, "nats")
    for line, name in ((loss, "loss"), (null, "loss_null"), (entropy, "prediction_entropy")):
        assert np.array_equal(line.y, data[name])
    assert np.array_equal(loss.customdata[:, 0], data["loss_low"])
    assert np.array_equal(lines_of(figure, "rank")[0].y, data["target_rank"])
    for title, part in (("block", ""), ("attention", "_attn"), ("MLP", "_mlp")):
        cosine, null = lines_of(figure, f"cosine, {title}")
        assert np.array_equal(cosine.y, data[f"step_gradient_cosine{part}"])
        assert np.array_equal(null.y, data[f"step_gradient_cosine_null{part}"])
        assert np.array_equal(cosine.customdata[:, 1], data[f"step_gradient_cosine{part}_high"])
    improved, null = lines_of(figure, "share improved")
    assert np.array_equal(improved.y, data["improved"])
    assert np.array_equal(null.y, data["improved_null"])


def test_fidelity_is_drawn_where_the_loss_surely_falls(scan):
    data = scan["inner"].to_dataset()
    data["loss_decrease_low"] = ("block", [-0.1, 0.1])
    line = lines_of(metaint.plot_inner(data), "fidelity")[0]
    assert np.array_equal(line.y, [np.nan, data["fidelity"][1]], equal_nan=True)
    data["loss_decrease_low"] = ("block", [-0.1, -0.1])
    figure = metaint.plot_inner(data)
    assert "fidelity" not in titles_of(figure)
    assert "fidelity" not in caption_of(figure)


def test_tokens_stand_apart_on_an_axis_of_their_own(scan):
    data, figure = scan["inner"], metaint.plot_inner(scan)
    last = len(titles_of(figure))
    (dots,) = lines_of(figure, "loss (nats)")
    assert np.array_equal(dots.x, data["token_norm"].isel(layer=-1))
    assert np.array_equal(dots.y, data["token_loss"].isel(layer=-1))
    assert f"{data['norm_loss_spearman'][-1].item():.3f} (" in dots.name
    assert f"partial {data['norm_loss_spearman_partial'][-1].item():.3f}" in dots.name
    axes = [figure.layout[f"xaxis{row if row > 1 else ''}"] for row in range(1, last + 1)]
    assert {axis.matches for axis in axes[:-2]} == {f"x{last - 1}"}
    assert axes[-2].matches is axes[-1].matches is None
    assert [axis.title.text is not None for axis in axes] == [False] * (last - 2) + [True, True]
    assert axes[-1].type == "log"


def test_several_scans_have_a_colour_each(scan):
    figure = metaint.plot_inner({"one": scan, "two": scan["inner"]})
    for title in titles_of(figure):
        colours = [line.marker.color for line in lines_of(figure, title)]
        assert len(set(colours)) == 2
        assert sorted(colours) == sorted(list(set(colours)) * (len(colours) // 2))
    assert sum(bool(t.showlegend) and t.name == "two" for t in figure.data) == 1


def test_it_says_how_to_read_it_and_when_it_misleads(scan):
    for scans in (scan, {"one": scan, "two": scan, "three": scan}):
        figure = metaint.plot_inner(scans)
        assert all(titles_of(figure))
        assert caption_of(figure).startswith("How to read: ")
        assert "It misleads early on, since the logit lens is biased" in caption_of(figure)
        lines = next(note.text for note in figure.layout.annotations if note.name == "caption").split("<br>")
        assert max(map(len, lines)) <= 150
        assert len(lines) <= 8
    tuned = scan["inner"].to_dataset().assign_attrs(lens="tuned lens")
    assert "a tuned lens was trained to predict the last layer" in caption_of(metaint.plot_inner(tuned))


def test_one_sequence_and_attention_alone_are_drawn(repeated):
    kind = next((k for k in available_kinds() if k.endswith("attn-only")), available_kinds()[0])
    figure = metaint.plot_inner(metaint.scan(build(kind), repeated[:1], [metaint.InnerProbe()]))
    assert titles_of(figure) == [
        "nats", "rank", "cosine, block", "cosine, attention", "share improved", "loss (nats)",
    ]  # fmt: skip
