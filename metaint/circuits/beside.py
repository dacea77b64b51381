"""Random heads of the same layers, to stand beside heads that are ablated: how much would any other have done?

In: the shape of a model, heads or sets of parts, a seed. Out: for each the heads or sets beside it.
"""

from collections.abc import Collection, Iterable, Mapping

import numpy as np

from metaint.circuits.parts import Head, Part
from metaint.errors import InputError
from metaint.models.describe import Shape

PartSet = frozenset[Part]


def check_random(random: int) -> None:
    """InputError unless this is a number of draws."""
    if isinstance(random, bool) or not isinstance(random, int | np.integer) or random < 0:
        raise InputError(f"random is {random!r}: give how many random heads or sets stand beside each, or 0.")


def heads_beside(shape: Shape, heads: Collection[Head], random: int, seed: int) -> dict[Head, list[Head]]:
    """For each head up to `random` other heads of its layer, drawn once a layer; all others where all heads are asked
    for, since they are known anyway."""
    rng, beside = np.random.default_rng(seed), {}
    for layer in sorted({layer for layer, _ in heads}):
        asked = [head for head in heads if head[0] == layer]
        order = [(layer, int(head)) for head in rng.permutation(shape.n_heads)]
        most = shape.n_heads if random and len(asked) == shape.n_heads else random
        for head in asked:
            beside[head] = [other for other in order if other != head][:most]
    return beside


def sets_beside(
    shape: Shape, sets: Mapping[str, Iterable[Part]], random: int, seed: int
) -> dict[str, list[PartSet | None]]:
    """For each set `random` draws of as many heads in each of its layers, its MLPs staying in; heads of the set itself
    come in only where too few others remain, and a draw that gives the set again is None."""
    rng, beside = np.random.default_rng(seed), {}
    for name, parts in sets.items():
        own = frozenset(parts)
        heads = [(layer, head) for layer, head in own if head is not None]
        mlps = own - set(heads)
        draws = [mlps | drawn_like(shape, heads, rng) for _ in range(random)]
        beside[name] = [None if draw == own else draw for draw in draws]
    return beside


def drawn_like(shape: Shape, heads: Collection[Head], rng: np.random.Generator) -> frozenset[Head]:
    """As many random heads in each layer; of `heads` themselves only where too few others remain."""
    drawn: list[Head] = []
    for layer in sorted({layer for layer, _ in heads}):
        order = [(layer, int(head)) for head in rng.permutation(shape.n_heads)]
        order.sort(key=lambda head: head in heads)  # stable: others first, each group in its random order
        drawn += order[: sum(head[0] == layer for head in heads)]
    return frozenset(drawn)
