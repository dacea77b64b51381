"""Order and places in the rows of a layered drawing, found by sweeping over the rows, up and down.

In: rows of items (boxes, and lanes of lines that pass) and links between neighbouring rows. Out: rows in an order with
few crossings, and a place for each item. Nothing is random.
"""

from bisect import bisect_right, insort
from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

_ORDERING, _SETTLING, _STRAIGHTENING = 24, 40, 24
T = TypeVar("T", bound=Hashable)
# A place and how much it is wanted.
Wish = tuple[float, float]


class Link(NamedTuple):
    """Two items of neighbouring rows; the upper one wants to stand `shift` to the right of the lower one, with so much
    weight, and is met `nudge` places right of it when crossings are counted."""

    lower: Hashable
    upper: Hashable
    shift: float = 0.0
    weight: float = 1.0
    nudge: float = 0.0


# ---- order -------------------------------------------------------------------------------------------------------


def ordered(rows: Sequence[Sequence[T]], links: Sequence[Link]) -> list[list[T]]:
    """The rows in the order with the fewest crossings that sweeps of barycentres found."""
    now = [list(row) for row in rows]
    below: dict[Hashable, list[tuple[Hashable, float]]] = {}
    above: dict[Hashable, list[tuple[Hashable, float]]] = {}
    for link in links:
        above.setdefault(link.lower, []).append((link.upper, link.nudge))
        below.setdefault(link.upper, []).append((link.lower, 0.0))
    best, fewest = now, crossings(now, links)
    for sweep in range(_ORDERING):
        now = [list(row) for row in now]
        near, order = (above, range(len(now) - 1, -1, -1)) if sweep % 2 else (below, range(len(now)))
        for before, at in pairwise(order):
            now[at] = _by_barycentre(now[at], now[before], near)
        crossed = crossings(now, links)
        if crossed < fewest:
            best, fewest = now, crossed
    return best


def _by_barycentre(
    row: Sequence[T], before: Sequence[T], near: Mapping[Hashable, Sequence[tuple[Hashable, float]]]
) -> list[T]:
    """Without neighbours an item keeps its place; the sort is stable, so that ties do too."""
    place: dict[Hashable, int] = {item: i for i, item in enumerate(before)}
    key: dict[Hashable, float] = {}
    for i, item in enumerate(row):
        ends = [place[other] + nudge for other, nudge in near.get(item, ())]
        key[item] = sum(ends) / len(ends) if ends else i * len(before) / len(row)
    return sorted(row, key=key.__getitem__)


def crossings(rows: Sequence[Sequence[Hashable]], links: Sequence[Link]) -> int:
    """How many pairs of links cross."""
    place = {item: i for row in rows for i, item in enumerate(row)}
    above: dict[Hashable, list[float]] = {}
    for link in links:
        above.setdefault(link.lower, []).append(place[link.upper] + link.nudge)
    count = 0
    for row in rows:
        seen: list[float] = []
        for item in row:
            ends = above.get(item, [])
            count += sum(len(seen) - bisect_right(seen, end) for end in ends)
            for end in ends:
                insort(seen, end)
    return count


# ---- places ------------------------------------------------------------------------------------------------------


def settled(rows: Sequence[Sequence[T]], links: Sequence[Link], sizes: Mapping[T, float]) -> dict[T, float]:
    """The middle of each item of so much room, in the order of the rows and overlapping nowhere.

    First links run sideways least in squares, then, so that most run straight and few turn, in absolute numbers.
    """
    middles: dict[T, float] = {}
    for row in rows:
        middles |= zip(row, _kept_apart([(0.0, 1.0)] * len(row), [sizes[item] for item in row]), strict=True)
    near: dict[Hashable, list[tuple]] = {item: [] for item in sizes}
    for lower, upper, shift, weight, _ in links:
        near[upper].append((lower, shift, weight, False))
        near[lower].append((upper, -shift, weight, True))

    def wishes(item: T, upward: bool, ahead: float) -> list[Wish]:
        """With less heed to the rows ahead than to those just placed, so that what one end needs reaches the other."""
        return [(middles[o] + d, w * (ahead if above == upward else 1)) for o, d, w, above in near[item]]

    for sweep in range(_SETTLING):
        upward = sweep % 2 == 0
        for row in rows if upward else rows[::-1]:
            wanted = [_mean(wishes(item, upward, 0.3), middles[item]) for item in row]
            middles |= zip(row, _kept_apart(wanted, [sizes[item] for item in row]), strict=True)
    for sweep in range(_STRAIGHTENING):
        upward = sweep % 2 == 0
        for row in rows if upward else rows[::-1]:
            _move(row, [_median(wishes(item, upward, 0.9), middles[item]) for item in row], sizes, middles)
    return middles


def _mean(wishes: Sequence[Wish], default: float) -> Wish:
    total = sum(weight for _, weight in wishes)
    return (sum(x * weight for x, weight in wishes) / total, total) if wishes else (default, 0.01)


def _median(wishes: Sequence[Wish], default: float) -> float:
    left = sum(weight for _, weight in wishes) / 2
    for x, weight in sorted(wishes):
        left -= weight
        if left <= 0:
            return x
    return default


def _kept_apart(wanted: Sequence[Wish], sizes: Sequence[float]) -> list[float]:
    """The places nearest to those wanted (least squares) that keep the order and overlap nowhere.

    What is left of each place after all that must come before it may only grow: isotonic regression, solved by pooling
    neighbours that are out of order.
    """
    before = [0.0]
    for left, right in pairwise(sizes):
        before.append(before[-1] + (left + right) / 2)
    pools: list[tuple[float, float, int]] = []
    for (x, weight), room in zip(wanted, before, strict=False):
        pools.append((x - room, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (x1, w1, n1), (x2, w2, n2) = pools[-2:]
            pools[-2:] = [((x1 * w1 + x2 * w2) / (w1 + w2), w1 + w2, n1 + n2)]
    free = [x for x, _, count in pools for _ in range(count)]
    return [x + room for x, room in zip(free, before, strict=False)]


def _move(row: Sequence[T], wanted: Sequence[float], sizes: Mapping[T, float], middles: dict[T, float]) -> None:
    """Moves each item as near to where it is wanted as its neighbours let it, from left to right and back, so that
    neighbours that want the same way follow each other."""
    for order in (range(len(row)), range(len(row) - 1, -1, -1)):
        for i in order:
            x, half = wanted[i], sizes[row[i]] / 2
            if i:
                x = max(x, middles[row[i - 1]] + sizes[row[i - 1]] / 2 + half)
            if i + 1 < len(row):
                x = min(x, middles[row[i + 1]] - sizes[row[i + 1]] / 2 - half)
            middles[row[i]] = x
