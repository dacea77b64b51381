"""Circuits drawn at random, of as many heads as one that is tested, and as like it as there are enough of.

In: the parts of a model, a circuit. Out: other circuits, none twice, and how like they are.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from metaint.circuits.parts import Part

# Random circuits, from the most to the least like: the first kind of which there are `ENOUGH` is drawn from.
KINDS = (
    "of other heads, as many in each layer",
    "of as many other heads",
    "of as many heads, some of its own among them",
)
ENOUGH = 5


class _Pool(NamedTuple):
    """Groups of heads, and how many to draw from each."""

    groups: list[list[Part]]
    sizes: list[int]

    @property
    def count(self) -> int:
        """How many choices there are."""
        return math.prod(math.comb(len(group), size) for group, size in zip(self.groups, self.sizes, strict=True))

    def all(self) -> list[list[Part]]:
        """Every choice."""
        choices: list[list[Part]] = [[]]
        for group, size in zip(self.groups, self.sizes, strict=True):
            choices = [[*before, *more] for before in choices for more in combinations(group, size)]
        return choices

    def drawn(self, rng: np.random.Generator) -> list[Part]:
        """One choice at random."""
        heads = []
        for group, size in zip(self.groups, self.sizes, strict=True):
            heads += [group[i] for i in rng.permutation(len(group))[:size]]
        return heads


def random_circuits(
    every: Sequence[Part], circuit: Sequence[Part], count: int, seed: int
) -> tuple[list[list[Part]], str]:
    """Up to `count` other circuits of as many of all these heads, and of as many MLPs where those are among them; and
    of what kind they are: one of `KINDS`."""
    free = [part for part in every if part not in circuit]
    layers = sorted({layer for layer, _ in every})
    by_layer = [_pool([part for part in free if part[0] == layer], circuit, layer) for layer in layers]
    alike = _Pool([group for pool in by_layer for group in pool.groups], [n for pool in by_layer for n in pool.sizes])
    pools = [alike, _pool(free, circuit), _pool(every, circuit)]
    number = next((i for i, pool in enumerate(pools) if pool.count >= ENOUGH), len(pools) - 1)
    pool, kind = pools[number], KINDS[number]
    if pool.count <= count + 1:
        return [heads for heads in pool.all() if set(heads) != set(circuit)][:count], kind
    rng = np.random.default_rng(seed)
    seen, circuits = {frozenset(circuit)}, []
    while len(circuits) < count:
        heads = pool.drawn(rng)
        if frozenset(heads) not in seen:
            seen.add(frozenset(heads))
            circuits.append(sorted(heads, key=_place))
    return circuits, kind


def _pool(parts: Sequence[Part], circuit: Sequence[Part], layer: int | None = None) -> _Pool:
    """Heads and MLPs among `parts`, as many of each as a circuit has, in one layer or in all."""
    counted = [head is None for of_part, head in circuit if layer in (None, of_part)]
    groups = [[part for part in parts if (part[1] is None) == is_mlp] for is_mlp in (False, True)]
    return _Pool(groups, [counted.count(False), counted.count(True)])


def _place(part: Part) -> tuple[int, float]:
    layer, head = part
    return layer, math.inf if head is None else head
