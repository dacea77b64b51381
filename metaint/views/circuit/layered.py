"""Where the parts of a layered graph are drawn: boxes in rows, the first row lowest, and lines that run upwards.

In: rows of boxes with their least widths, and lines between boxes of different rows. Out: a place for each box, and the
points of each line. The way of layered drawings since Sugiyama et al. 1981: in each row that a line passes it has a
lane of its own, so that no line crosses a box; `sweeps.py` then finds the order of boxes and lanes, and their places.
"""

from collections.abc import Container, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from metaint.views.circuit.sweeps import Link, ordered, settled

# Pixels: a box, the ports below it, a rail; between boxes, between lanes, around all; between rows at least and most.
BOX, PORT, RAIL = 48, 13, 26
_APART, _LANE, _MARGIN, _NEAR, _FAR = 18, 5, 6, 34, 120
# Pixels: a port with a letter at least, between ports, and what a box has beyond its lines.
_LETTER, _BETWEEN, _CORNERS = 16, 4, 16
# What straight lines are worth where none of the two ends is a lane, one is, or both are.
_STRAIGHT = (1.0, 3.0, 12.0)
# Ports of a box from left to right, and how far off its middle, in places of the row, lines to them are met.
_PORTS = {"q": -0.3, "k": 0.0, "v": 0.3, "": 0.4}
# A box by its name, or the lane of a line in a row.
Item = str | tuple[int, int]
Point = tuple[float, float]


class Line(NamedTuple):
    """From the top of one box to a port of a box in a higher row: "q", "k", "v", or "" for its lower side."""

    writer: str
    reader: str
    port: str = ""
    width: float = 1.0


class Box(NamedTuple):
    """Where a box is, and the ports with letters below it by their left and right ends."""

    left: float
    top: float
    width: float
    height: float
    ports: dict[str, Point]


class Layout(NamedTuple):
    """A drawing of so many pixels.

    A line has a curve from its first point to the second, straight up to the third, a curve to the fourth, and so on.
    """

    width: float
    height: float
    boxes: dict[str, Box]
    routes: list[list[Point]]


class _Docks(NamedTuple):
    """Where lines leave and enter boxes, and ports, counted from the middles of the boxes; and all widths."""

    leaving: dict[int, float]
    entering: dict[int, float]
    ports: dict[str, dict[str, Point]]
    widths: dict[str, float]


def arrange(
    rows: Sequence[Sequence[str]], widths: Mapping[str, float], lines: Sequence[Line], rails: Container[str] = ()
) -> Layout:
    """Lay out boxes of at least these widths in `rows`, and `lines` between them.

    A rail is alone in its row and as wide as the whole drawing, so that its lines run straight up or down from it.
    """
    chains = _chains(rows, lines, rails)
    items: list[list[Item]] = [[name for name in row if name not in rails] for row in rows]
    for chain in chains:
        for item in chain:
            if isinstance(item, tuple):
                items[item[1]].append(item)
    links = []
    for chain, line in zip(chains, lines, strict=True):
        for lower, upper in pairwise(chain):
            nudge = _PORTS[line.port] if isinstance(upper, str) else 0.0
            links.append(Link(lower, upper, nudge=nudge))
    items = ordered(items, links)
    docks = _docks(items, chains, lines, widths)
    sizes = {
        item: docks.widths[item] + _APART if isinstance(item, str) else lines[item[0]].width + _LANE
        for row in items
        for item in row
    }
    middles = settled(items, _pulls(chains, docks), sizes)
    begin = min((x - sizes[item] / 2 for item, x in middles.items()), default=0.0)
    end = max((x + sizes[item] / 2 for item, x in middles.items()), default=0.0)
    names = {name for row in rows for name in row}
    wide = max(end - begin, *(widths[name] for name in names if name in rails), 0.0)
    left = (begin + end - wide) / 2 - _MARGIN
    across = [_across(i, chain, docks, middles, left) for i, chain in enumerate(chains)]
    tops, bottoms, height = _heights(rows, lines, rails, docks, across)
    boxes = {}
    for name, r in _row_of(rows).items():
        if name in rails:
            boxes[name] = Box(_MARGIN, tops[r], wide, RAIL, {})
            continue
        x, width = middles[name] - left, docks.widths[name]
        ports = {port: (x + a, x + b) for port, (a, b) in docks.ports.get(name, {}).items()}
        boxes[name] = Box(x - width / 2, tops[r], width, BOX, ports)
    routes = [_route(rows, line, xs, tops, bottoms, boxes) for line, xs in zip(lines, across, strict=True)]
    return Layout(wide + 2 * _MARGIN, height, boxes, routes)


def _row_of(rows: Sequence[Sequence[str]]) -> dict[str, int]:
    return {name: r for r, row in enumerate(rows) for name in row}


def _chains(rows: Sequence[Sequence[str]], lines: Sequence[Line], rails: Container[str]) -> list[list[Item]]:
    """Each line as what it meets in every row: its lanes, and at its ends boxes that are no rails."""
    row_of, chains = _row_of(rows), []
    for i, line in enumerate(lines):
        chain: list[Item] = [(i, row) for row in range(row_of[line.writer], row_of[line.reader] + 1)]
        if line.writer not in rails:
            chain[0] = line.writer
        if line.reader not in rails:
            chain[-1] = line.reader
        chains.append(chain)
    return chains


# ---- where lines meet boxes --------------------------------------------------------------------------------------


def _docks(
    rows: Sequence[Sequence[Item]], chains: Sequence[Sequence[Item]], lines: Sequence[Line], least: Mapping[str, float]
) -> _Docks:
    """Lines side by side at both ends, in the order of where they come from or go to, so that they don't cross."""
    place = {item: i for row in rows for i, item in enumerate(row)}
    docks = _Docks({}, {}, {}, dict(least))
    rooms = [line.width + _LANE for line in lines]
    leaving: dict[str, list[int]] = {}
    entering: dict[str, dict[str, list[int]]] = {}
    for i in sorted(range(len(lines)), key=lambda i: place[chains[i][1]]):
        if isinstance(chains[i][0], str):
            leaving.setdefault(lines[i].writer, []).append(i)
    for i in sorted(range(len(lines)), key=lambda i: place[chains[i][-2]]):
        if isinstance(chains[i][-1], str):
            entering.setdefault(lines[i].reader, {}).setdefault(lines[i].port, []).append(i)
    for name, some in leaving.items():
        docks.widths[name] = max(docks.widths[name], _CORNERS + _side_by_side(some, rooms, docks.leaving))
    for name, ports in entering.items():
        docks.widths[name] = max(docks.widths[name], _CORNERS + _dock(name, ports, rooms, docks))
    return docks


def _side_by_side(some: Sequence[int], rooms: Sequence[float], into: dict[int, float], middle: float = 0) -> float:
    """Puts lines next to each other around a middle; how much room they take."""
    total = sum(rooms[i] for i in some)
    at = middle - total / 2
    for i in some:
        into[i] = at + rooms[i] / 2
        at += rooms[i]
    return total


def _dock(name: str, ports: Mapping[str, Sequence[int]], rooms: Sequence[float], docks: _Docks) -> float:
    """The ports of a box next to each other, each as wide as its lines need; how much room they take."""
    wide = {port: sum(rooms[i] for i in ports[port]) for port in sorted(ports, key=_PORTS.__getitem__)}
    wide = {port: max(room, _LETTER) if port else room for port, room in wide.items()}
    total = sum(wide.values()) + _BETWEEN * (len(wide) - 1)
    at, docks.ports[name] = -total / 2, {}
    for port, room in wide.items():
        _side_by_side(ports[port], rooms, docks.entering, at + room / 2)
        if port:
            docks.ports[name][port] = (at, at + room)
        at += room + _BETWEEN
    return total


def _pulls(chains: Sequence[Sequence[Item]], docks: _Docks) -> list[Link]:
    """What would let each line run straight."""
    links = []
    for i, chain in enumerate(chains):
        for lower, upper in pairwise(chain):
            leaving = docks.leaving[i] if isinstance(lower, str) else 0.0
            entering = docks.entering[i] if isinstance(upper, str) else 0.0
            weight = _STRAIGHT[isinstance(lower, tuple) + isinstance(upper, tuple)]
            links.append(Link(lower, upper, leaving - entering, weight))
    return links


# ---- the drawing -------------------------------------------------------------------------------------------------


def _across(i: int, chain: Sequence[Item], docks: _Docks, middles: Mapping[Item, float], left: float) -> list[float]:
    """How far right a line is in each row that it meets."""
    places = [middles[item] - left for item in chain]
    places[0] += docks.leaving.get(i, 0.0)
    places[-1] += docks.entering.get(i, 0.0)
    return places


def _heights(
    rows: Sequence[Sequence[str]],
    lines: Sequence[Line],
    rails: Container[str],
    docks: _Docks,
    across: Sequence[Sequence[float]],
) -> tuple[list[float], list[float], float]:
    """Top and bottom of each row, and of the drawing; rows are the further apart, the further lines run sideways."""
    row_of = _row_of(rows)
    sideways = [0.0] * len(rows)
    for line, xs in zip(lines, across, strict=True):
        for gap, (x, to) in enumerate(pairwise(xs), row_of[line.writer]):
            sideways[gap] = max(sideways[gap], abs(to - x))
    tops, bottoms, y = [0.0] * len(rows), [0.0] * len(rows), float(_MARGIN)
    for r in reversed(range(len(rows))):
        tops[r] = y
        rail, ports = any(name in rails for name in rows[r]), any(docks.ports.get(name) for name in rows[r])
        bottoms[r] = y + (RAIL if rail else BOX + PORT * ports)
        y = bottoms[r] + (min(max(_NEAR, sideways[r - 1] / 6), _FAR) if r else _MARGIN)
    return tops, bottoms, y


def _route(
    rows: Sequence[Sequence[str]],
    line: Line,
    across: Sequence[float],
    tops: Sequence[float],
    bottoms: Sequence[float],
    boxes: Mapping[str, Box],
) -> list[Point]:
    route: list[Point] = []
    for row, (x, to) in enumerate(pairwise(across), _row_of(rows)[line.writer]):
        route += [(x, tops[row]), (to, bottoms[row + 1])]
    box = boxes[line.reader]
    end = box.top + box.height + PORT * (line.port in box.ports)
    return [*route, (route[-1][0], end)] if end < route[-1][1] else route
