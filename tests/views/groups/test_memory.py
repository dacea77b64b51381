"""Tables and figure of /memory: the scan's own numbers, beside chance, and words for what isn't known."""

import io

import numpy as np
import pytest
import xarray as xr
from rich.console import Console

import metaint
from metaint.errors import InputError
from metaint.views.drawing.page import write_page
from metaint.views.groups.memory import memory_frame, pairs_frame, plot_memory, print_memory

HEADS = ("layer", "head")
PAIRS = (*HEADS, "layer_to", "head_to")


@pytest.fixture(scope="module")
def read(gpt2, repeated):
    return metaint.scan(gpt2, repeated, [metaint.MemoryProbe(30)])


def planted(layers=12, heads=12, pairs=True, known=True, positions=True, behaviour=True):
    """A scan with distinct recalls in no order."""
    generator = np.random.default_rng(layers)

    def drawn(*shape, there=True):
        return generator.permutation(np.linspace(0, 0.97, int(np.prod(shape)))).reshape(shape) * (
            1 if there else np.nan
        )

    data, coords = {}, {"layer": range(layers), "head": range(heads)}
    for name, there, chance in (
        ("previous_position_recall", positions, 1 / 63),
        ("previous_position_mass", positions, 0.05),
        ("ov_recall", known, 2e-5),
        ("ov_recall_top5", known, 1e-4),
    ):
        data[name] = (HEADS, drawn(layers, heads, there=there))
        data[f"{name}_chance"] = ((), chance if there else np.nan)
    data["key_composition_recall_chance"] = ((), 1 / 30 if pairs and known else np.nan)
    if pairs:
        values = drawn(layers, heads, layers, heads, there=known)
        later = np.arange(layers)[:, None] < np.arange(layers)
        data["key_composition_recall"] = (PAIRS, np.where(later[:, None, :, None], values, np.nan))
        coords |= {"layer_to": range(layers), "head_to": range(heads)}
    for name, share in (("in_context_accuracy", 0.41), ("first_occurrence_accuracy", 0.05)):
        data[name] = ((), share if behaviour else np.nan)
        data[f"{name}_count"] = ((), 1234.0 if behaviour else 0.0)
    tree = xr.DataTree.from_dict({"/memory": xr.Dataset(data, coords, {"tokens_read": 30, "embedding": "token"})})
    tree.attrs["model"] = "some-model"
    return tree


def printed(scan, width=200):
    console = Console(width=width, file=io.StringIO())
    print_memory(console, scan)
    return console.file.getvalue()


def sentence(text):
    return " ".join(text.split())


def words_of(figure):
    return [" ".join(a.text.split("<br>")) for a in figure.layout.annotations]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_fit(read, width):
    for scan in (read, planted(), planted(40, 20, pairs=False), planted(known=False)):
        text = printed(scan, width)
        assert max(len(line) for line in text.splitlines()) <= width
        assert "…" not in text


def test_tables_begin_with_the_strongest_and_end_with_chance():
    scan = planted()
    tables = printed(scan).split("top 8 of")
    assert len(tables) == 4
    for name, table in zip(("ov_recall", "previous_position_recall"), tables[1:3], strict=True):
        values = scan["memory"][name].values
        best = sorted(np.ndindex(values.shape), key=lambda place: -values[place])[:8]
        rows = [line.split() for line in table.splitlines() if line.strip() and line.split()[0].count(".") == 1]
        assert [row[:2] for row in rows[:8]] == [[f"{i}.{j}", f"{values[i, j]:.3f}"] for i, j in best]
    assert tables[1].split("chance")[1].split()[:2] == ["2e-05", "1e-04"]
    pairs = scan["memory"]["key_composition_recall"].values
    i, j, later, k = np.unravel_index(np.nanargmax(pairs), pairs.shape)
    assert f"{i}.{j} → {later}.{k}" in tables[3].splitlines()[5]
    assert f"{np.nanmax(pairs):.3f}" in tables[3].splitlines()[5]
    assert "9504" in tables[3].splitlines()[0]
    assert "0.033" in tables[3]


def test_behaviour_is_told_with_counts(read):
    text = sentence(printed(planted()))
    assert "in context 0.410 of 1234, at first occurrences 0.050 of 1234" in text
    assert "a recall of 1 does not mean that the circuit works" in text
    data = read["memory"]
    share, count = data["in_context_accuracy"].item(), int(data["in_context_accuracy_count"])
    assert f"in context {share:.3f} of {count}" in sentence(printed(read))
    assert "not known, no predictions were read" in printed(planted(behaviour=False))


def test_what_is_not_known_is_said_in_words():
    blind = sentence(printed(planted(known=False, positions=False, behaviour=False)))
    assert "OV recall is not known: the audit doesn't find" in blind
    assert "Recall of the previous position is not known" in blind
    assert "Key composition is not known: it is asked of pairs of heads in different layers" in blind
    assert "top" not in blind.split("Behaviour")[0]
    assert "pairs are left out in a model of so many heads" in printed(planted(40, 20, pairs=False))
    figure = plot_memory(planted(known=False, positions=False))
    assert sum("is not known" in words for words in words_of(figure)) == 3
    assert not [trace for trace in figure.data if trace.type == "heatmap"]
    assert any("so many heads" in words for words in words_of(plot_memory(planted(40, 20, pairs=False))))


def test_frames_hold_every_recall_and_its_chance(read):
    data = read["memory"]
    frame = memory_frame(read)
    assert len(frame) == data["ov_recall"].size
    row = frame[(frame["layer"] == 1) & (frame["head"] == 2)].iloc[0]
    for name in ("ov_recall", "ov_recall_top5", "previous_position_recall", "previous_position_mass"):
        np.testing.assert_equal(row[name], data[name][1, 2].item())
        np.testing.assert_equal(row[f"{name}_chance"], data[f"{name}_chance"].item())
    pairs = pairs_frame(read)
    assert (pairs["layer"] < pairs["layer_to"]).all()
    assert len(pairs) == int(data["key_composition_recall"].notnull().sum())
    at = {name: int(pairs.iloc[3][name]) for name in PAIRS}
    assert pairs.iloc[3]["key_composition_recall"] == data["key_composition_recall"].sel(at).item()
    assert len(pairs_frame(planted(40, 20, pairs=False))) == 0


@pytest.mark.parametrize(("layers", "heads", "pairs"), [(12, 12, True), (80, 64, False), (2, 1, True)])
def test_the_figure_draws_what_it_says(layers, heads, pairs, tmp_path):
    scan = planted(layers, heads, pairs)
    figure = plot_memory(scan)
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    for drawn, name in zip(maps, ("previous_position_recall", "ov_recall"), strict=True):
        np.testing.assert_array_equal(drawn.z, scan["memory"][name].values)
    assert maps[1].customdata[1][0] == "1.0"
    assert figure.layout.xaxis2.title.text == "head: OV recall (chance 2e-05)"
    assert [figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax] == [0, 1]
    if pairs:
        dots = next(trace for trace in figure.data if trace.type == "scatter")
        known = np.sort(scan["memory"]["key_composition_recall"].values.ravel())
        known = known[~np.isnan(known)][::-1][:20]
        assert list(dots.x) == known.tolist()
        assert len(figure.layout.yaxis3.ticktext) == min(20, len(known))
        assert figure.layout.shapes[0].x0 == pytest.approx(1 / 30)
    assert figure.layout.title.subtitle.text == "some-model: 30 tokens read"
    caption = words_of(figure)[-1]
    assert "How to read" in caption
    assert "It misleads" in caption
    write_page({"memory": figure}, tmp_path / "page.html", "t")


def test_a_scan_without_it_is_refused(repeated_scan):
    for function in (plot_memory, memory_frame, pairs_frame, lambda scan: print_memory(Console(), scan)):
        with pytest.raises(InputError, match=r"no /memory group: scan with metaint\.MemoryProbe\(\)"):
            function(repeated_scan)
