"""The figure of /residual: the scan's own numbers, one panel under the other, and how to read them."""

import numpy as np
import pytest

import metaint
from tests.builders import available_kinds, build


@pytest.fixture(scope="module")
def scan(gpt2, repeated):
    return metaint.scan(gpt2, repeated, [metaint.ResidualProbe()])


def lines_of(figure, row):
    """What the legend names, in one panel, by name."""
    axis = f"y{row if row > 1 else ''}"
    return {t.name: t for t in figure.data if t.yaxis == axis and t.name and t.customdata is not None}


def caption_of(figure):
    return next(note.text for note in figure.layout.annotations if note.name == "caption")


def test_one_scan_has_a_panel_for_lengths_growth_and_cosines(scan):
    data, figure = scan["residual"], metaint.plot_residual(scan)
    lengths = lines_of(figure, 1)
    assert list(lengths) == ["position 0", "positions 1–3", "positions 4–15", "positions 16–63", "positions 64+"][:4]
    assert np.array_equal(lengths["positions 4–15"].y, data["norm_geometric"].sel(position="4-15"))
    assert np.array_equal(lengths["positions 4–15"].customdata, data["norm_quantile"].sel(position="4-15")[[0, -1]].T)
    assert figure.layout.yaxis.type == "log"
    growth = next(t for t in figure.data if t.name == "growth")
    assert growth.yaxis == "y2"
    assert np.array_equal(growth.y, data["growth"])
    assert np.array_equal(growth.customdata[:, 1], data["growth_high"])
    assert np.array_equal(next(t for t in figure.data if t.name == "if orthogonal").y, data["growth_orthogonal"])
    cosines = lines_of(figure, 3)
    assert np.array_equal(cosines["attention"].y, data["cos_stream_attn"])
    assert np.array_equal(cosines["MLP"].y, data["cos_stream_mlp"])
    stripe = next(t for t in figure.data if t.name == "unrelated directions")
    assert max(stripe.y) == pytest.approx(2 * data["cos_null_std"].item())
    assert figure.layout.xaxis.matches == figure.layout.xaxis2.matches == "x3"


def test_several_scans_are_compared_after_position_0(scan):
    figure = metaint.plot_residual({"one": scan, "two": scan["residual"], "three": scan["residual"].to_dataset()})
    drawn = [t for t in figure.data if t.yaxis == "y" and t.fill is None and t.x[0] is not None]
    assert [t.name for t in drawn] == ["one", "two", "three"]
    assert len({t.line.color for t in drawn}) == 3
    data = scan["residual"].sel(position=["1-3", "4-15", "16-63"])
    counts = data["norm_count"]
    mean = np.exp((counts * np.log(data["norm_geometric"])).sum("position") / counts.sum("position"))
    assert drawn[1].y == pytest.approx(mean.values)
    assert "position 0 left out" in caption_of(figure).replace("<br>", " ")
    assert figure.layout.legend2.y == pytest.approx(figure.layout.yaxis2.domain[1])


def test_it_says_how_to_read_it_and_when_it_misleads(scan):
    for scans in (scan, {"one": scan, "two": scan}):
        figure = metaint.plot_residual(scans)
        assert all(figure.layout[a].title.text for a in figure.layout if a.startswith("yaxis"))
        assert figure.layout.xaxis3.title.text
        caption = caption_of(figure)
        assert caption.startswith("How to read: ")
        assert "It misleads" in caption.replace("<br>", " ")
        assert max(len(line) for line in caption.split("<br>")) <= 150
        assert len(caption.split("<br>")) <= 7


def test_attention_alone_and_one_sequence_are_drawn(repeated):
    kind = next((k for k in available_kinds() if k.endswith("attn-only")), available_kinds()[0])
    figure = metaint.plot_residual(metaint.scan(build(kind), repeated[:1], [metaint.ResidualProbe()]))
    assert not any(t.name == "MLP" for t in figure.data)


def test_without_writes_there_is_no_panel_of_cosines(scan):
    blind = scan["residual"].to_dataset()
    for part in ("attn", "mlp"):
        blind[f"cos_stream_{part}"] = blind[f"cos_stream_{part}"] * np.nan
    figure = metaint.plot_residual(blind)
    assert "yaxis3" not in figure.layout
    assert "cosine" not in caption_of(figure)


def test_a_first_block_that_would_flatten_the_others_is_off_the_scale(scan):
    steep = scan["residual"].to_dataset().isel(block=[0, 1, 1, 1])
    steep["growth"] = ("block", [30.0, 1.1, 1.2, 1.1])
    figure = metaint.plot_residual(steep.assign_coords(block=range(4)))
    note = next(a for a in figure.layout.annotations if a.name != "caption")
    assert note.text.startswith("block 0 is off the scale (30")
    assert figure.layout.yaxis2.range[1] < 2
    assert note.yref == "y2 domain"
