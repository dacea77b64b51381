"""Layered drawings: no line crosses a box, no two boxes or lanes overlap, and lines run straight where they can."""

from itertools import combinations, pairwise, product

import numpy as np
import pytest

from metaint.views.circuit.layered import PORT, Line, arrange
from metaint.views.circuit.sweeps import Link, _kept_apart, crossings, ordered


def drawing(seed, rails=("bottom", "top")):
    """A random graph of a few boxes in each of six rows, and its layout."""
    rng = np.random.default_rng(seed)
    rows = [["bottom"], *([f"{r}.{i}" for i in range(rng.integers(1, 7))] for r in range(6)), ["top"]]
    row_of = {name: r for r, row in enumerate(rows) for name in row}
    pairs = [(a, b) for a, b in product(row_of, row_of) if row_of[a] < row_of[b]]
    lines = [
        Line(*pairs[i], "" if pairs[i][1] in rails else str(rng.choice(["q", "k", "v", ""])), float(rng.uniform(1, 7)))
        for i in rng.permutation(len(pairs))[:70]
    ]
    widths = {name: float(rng.uniform(40, 120)) for name in row_of}
    return rows, widths, lines, arrange(rows, widths, lines, rails)


def points(route, steps=40):
    """A line as many points: curves with upright ends from the first of each pair to the second, else straight."""
    found = []
    for i, ((x, y), (to_x, to_y)) in enumerate(pairwise(route)):
        for t in np.linspace(0, 1, steps):
            across = 3 * t**2 - 2 * t**3 if i % 2 == 0 else t
            # Both inner points of the curve are halfway up.
            up = (1.5 * t * (1 - t) + t**3) if i % 2 == 0 else t
            found.append((x + (to_x - x) * across, y + (to_y - y) * up))
    return np.array(found)


def overlap(a, b):
    across = min(a.left + a.width, b.left + b.width) - max(a.left, b.left)
    down = min(a.top + a.height, b.top + b.height) - max(a.top, b.top)
    return across > 0 and down > 0


@pytest.mark.parametrize("rails", [("bottom", "top"), ()])
@pytest.mark.parametrize("seed", range(4))
def test_boxes_are_apart_and_in_rows_that_go_upwards(seed, rails):
    rows, widths, _, layout = drawing(seed, rails)
    assert set(layout.boxes) == set(widths)
    for a, b in combinations(layout.boxes.values(), 2):
        assert not overlap(a, b)
    for lower, upper in pairwise(rows):
        for below, above in product(lower, upper):
            assert layout.boxes[above].top + layout.boxes[above].height + PORT < layout.boxes[below].top
    for name, box in layout.boxes.items():
        assert box.width >= widths[name]
        assert box.left >= 0
        assert box.left + box.width <= layout.width
        assert box.top >= 0
        assert box.top + box.height <= layout.height
        for (_, right), (left, _) in pairwise(sorted(box.ports.values())):
            assert right < left


@pytest.mark.parametrize("rails", [("bottom", "top"), ()])
@pytest.mark.parametrize("seed", range(4))
def test_lines_go_upwards_from_box_to_port_through_no_other(seed, rails):
    _, _, lines, layout = drawing(seed, rails)
    assert len(layout.routes) == len(lines)
    for line, route in zip(lines, layout.routes, strict=True):
        (x, y), (to_x, to_y) = route[0], route[-1]
        writer, reader = layout.boxes[line.writer], layout.boxes[line.reader]
        assert y == writer.top
        assert writer.left < x < writer.left + writer.width
        assert to_y == reader.top + reader.height + (PORT if line.port else 0)
        left, right = reader.ports[line.port] if line.port else (reader.left, reader.left + reader.width)
        assert left < to_x < right
        drawn = points(route)
        assert (np.diff(drawn[:, 1]) <= 1e-9).all()
        for name, box in layout.boxes.items():
            inside = (drawn[:, 0] > box.left) & (drawn[:, 0] < box.left + box.width)
            inside &= (drawn[:, 1] > box.top + 1e-9) & (drawn[:, 1] < box.top + box.height - 1e-9)
            assert not inside.any(), (line, name)


@pytest.mark.parametrize("seed", range(4))
def test_lines_that_pass_a_row_have_lanes_of_their_own(seed):
    _, _, lines, layout = drawing(seed)
    passing = {}
    for line, route in zip(lines, layout.routes, strict=True):
        for (x, y), (_, to_y) in list(pairwise(route))[1:-1:2]:
            passing.setdefault((y, to_y), []).append((x, line.width))
    assert passing
    for lanes in passing.values():
        for (x, width), (next_x, next_width) in pairwise(sorted(lanes)):
            assert next_x - x > (width + next_width) / 2


def test_a_line_alone_runs_straight():
    rows = [["a"], ["b", "c"], ["d", "e"], ["f"]]
    lines = [Line("a", "f"), Line("b", "d", "k"), Line("c", "e", "q", 3.0)]
    layout = arrange(rows, dict.fromkeys("abcdef", 60.0), lines)
    for route in layout.routes:
        assert np.ptp([x for x, _ in route]) == pytest.approx(0, abs=1e-6)


def test_rails_are_as_wide_as_everything_and_their_lines_upright():
    rows = [["bottom"], ["a", "b", "c"], ["top"]]
    lines = [Line("bottom", name, "v") for name in "abc"] + [Line(name, "top") for name in "abc"]
    layout = arrange(rows, dict.fromkeys(["bottom", "top", *"abc"], 50.0), lines, ("bottom", "top"))
    for route in layout.routes:
        assert np.ptp([x for x, _ in route]) == pytest.approx(0, abs=1e-6)
    for name in ("bottom", "top"):
        box = layout.boxes[name]
        assert box.left <= min(layout.boxes[other].left for other in "abc")
        assert box.left + box.width >= max(layout.boxes[other].left + 50 for other in "abc")


def test_a_drawing_without_lines():
    layout = arrange([["bottom"], ["top"]], {"bottom": 80.0, "top": 50.0}, [], ("bottom", "top"))
    assert layout.boxes["bottom"].width == layout.boxes["top"].width == 80


# ---- sweeps ------------------------------------------------------------------------------------------------------


def plain_crossings(rows, links):
    place = {item: i for row in rows for i, item in enumerate(row)}
    row_of = {item: r for r, row in enumerate(rows) for item in row}
    count = 0
    for a, b in combinations(links, 2):
        if row_of[a.lower] == row_of[b.lower]:
            lower = place[a.lower] - place[b.lower]
            upper = (place[a.upper] + a.nudge) - (place[b.upper] + b.nudge)
            count += lower * upper < 0
    return count


@pytest.mark.parametrize("seed", range(5))
def test_crossings_are_counted_and_grow_fewer(seed):
    rng = np.random.default_rng(seed)
    rows = [[f"{r}.{i}" for i in range(6)] for r in range(4)]
    pairs = [pair for lower, upper in pairwise(rows) for pair in product(lower, upper)]
    links = [Link(*pairs[i], nudge=float(rng.choice([-0.3, 0, 0.3]))) for i in rng.permutation(len(pairs))[:40]]
    assert crossings(rows, links) == plain_crossings(rows, links)
    found = ordered(rows, links)
    assert [sorted(row) for row in found] == [sorted(row) for row in rows]
    assert crossings(found, links) < crossings(rows, links)


def test_what_can_be_drawn_without_crossings_is():
    rows = [["a", "b", "c", "d"], ["e", "f", "g", "h"], ["i", "j", "k", "l"]]
    twisted = [Link(*pair) for pair in ("ah", "bg", "cf", "de", "hj", "gi", "fl", "ek")]
    assert crossings(rows, twisted) > 0
    assert crossings(ordered(rows, twisted), twisted) == 0


def test_ports_count_when_crossings_are_counted():
    """What is read by queries comes from the left of what is read by keys."""
    links = [Link("a", "x", nudge=0.0), Link("b", "x", nudge=-0.3)]
    assert crossings([["a", "b"], ["x"]], links) == 1
    assert ordered([["a", "b"], ["x"]], links) == [["b", "a"], ["x"]]


@pytest.mark.parametrize("seed", range(6))
def test_places_kept_apart_are_the_nearest(seed):
    """Against all ways to pool neighbours: the best of those that keep the order."""
    rng = np.random.default_rng(seed)
    wanted, weights, sizes = rng.normal(0, 20, 6), rng.uniform(0.1, 3, 6), rng.uniform(1, 20, 6)
    before = np.concatenate([[0], np.cumsum((sizes[:-1] + sizes[1:]) / 2)])
    free, best = wanted - before, None
    for cuts in product([False, True], repeat=5):
        pool = np.concatenate([[0], np.cumsum(cuts)])
        means = np.array([np.average(free[pool == p], weights=weights[pool == p]) for p in range(pool[-1] + 1)])[pool]
        if (np.diff(means) >= -1e-12).all():
            cost = (weights * (means - free) ** 2).sum()
            best = min(best or (np.inf, []), (cost, means.tolist()))
    found = _kept_apart(list(zip(wanted, weights, strict=True)), sizes.tolist())
    assert found == pytest.approx(np.array(best[1]) + before)
