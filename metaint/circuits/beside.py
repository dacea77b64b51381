"""Random heads of the same layers, to stand beside heads that are ablated: how much would any other have done?

In: the shape of a model, heads or sets of parts, a seed. Out: for each the heads or sets beside it.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from metaint.circuits.parts import Head, Part, all_heads
from metaint.errors import InputError
from metaint.models.describe import Shape

PartSet = frozenset[Part]


def check_random(random: int, least: int = 0) -> None:
    """InputError unless this is a number of draws."""
    if isinstance(random, bool) or not isinstance(random, int | np.integer) or random < least:
        raise InputError(
            f"random is {random!r}: give how many random heads or sets stand beside each, {least} or more."
        )


def random_orders(shape: Shape, random: int, seed: int) -> list[list[Head]]:
    """All heads in so many random orders."""
    rng, every = np.random.default_rng(seed), all_heads(shape)
    return [[every[i] for i in rng.permutation(len(every))] for _ in range(random)]


def heads_beside(shape: Shape, heads: Collection[Head], random: int, seed: int) -> dict[Head, list[Head]]:
    """For each head up to `random` other heads of its layer, drawn once a layer; all others where all heads are asked
    for, since they are known anyway."""
    (order,) = random_orders(shape, 1, seed)
    asked = Counter(layer for layer, _ in heads)
    beside = {}
    for head in heads:
        most = shape.n_heads if random and asked[head[0]] == shape.n_heads else random
        beside[head] = [other for other in order if other[0] == head[0] and other != head][:most]
    return beside


def sets_beside(
    shape: Shape, sets: Mapping[str, Iterable[Part]], random: int, seed: int
) -> dict[str, list[PartSet | None]]:
    """For each set `random` draws of as many heads in each of its layers, its MLPs staying in; heads of the set itself
    come in only where too few others remain, and a draw that gives the set again is None."""
    orders, beside = random_orders(shape, random, seed), {}
    for name, parts in sets.items():
        own = frozenset(parts)
        heads = frozenset((layer, head) for layer, head in own if head is not None)
        draws = [(own - heads) | drawn_from(order, heads) for order in orders]
        beside[name] = [None if draw == own else draw for draw in draws]
    return beside


def drawn_from(order: Sequence[Head], heads: Collection[Head], same_layers: bool = True) -> frozenset[Head]:
    """As many heads in each layer, or in all, the first in this order; of `heads` themselves only where too few others
    remain."""
    order = sorted(order, key=lambda head: head in heads)  # stable: others first, each part in its own order
    if not same_layers:
        return frozenset(order[: len(heads)])
    drawn: list[Head] = []
    for layer, count in Counter(layer for layer, _ in heads).items():
        drawn += [head for head in order if head[0] == layer][:count]
    return frozenset(drawn)
