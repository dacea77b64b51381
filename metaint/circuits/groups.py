"""Heads that stand in for each other: each alone is missed by little, together they are worth much.

In: an experiment and heads with one label. Out: the group that taking out one more head at a time makes, greedily, with
what each adds; single ablations miss it, since what is left does the work.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metaint.circuits.counting import effects_of
from metaint.circuits.experiment import Experiment, run
from metaint.circuits.graph import Effect
from metaint.circuits.parts import Part, part_name

# Heads that are tried, those that bring most alone first, and heads in a group.
TRIED, MOST = 12, 8


class Group(NamedTuple):
    """Heads in the order in which they were taken out, what each adds to those before, all together, and the sum of
    what each takes alone."""

    heads: tuple[Part, ...]
    gains: tuple[Effect, ...]
    together: Effect
    alone: float

    def sentence(self, metric: str) -> str:
        """What is said of it."""
        share, names = self.together.share, ", ".join(map(part_name, self.heads))
        scale = share / self.together.effect
        low, high = sorted((self.together.low * scale, self.together.high * scale))
        return (
            f"{names} stand in for each other: ablated together they take {100 * share:.0f} % ({100 * low:.0f} to "
            f"{100 * high:.0f} %) of what all heads bring to {metric}, one at a time {100 * self.alone:.0f} % in sum"
        )


def stand_ins(
    experiment: Experiment, heads: Sequence[Part], total: Tensor, threshold: float, upto: int
) -> Group | None:
    """The group among these heads, or None: at each step joins the head whose loss, with the group lost too, is
    largest, as long as that counts; they are a group where together they take more than one at a time, by more than
    chance.

    Measured on the first `upto` sequences.
    """
    heads, total = list(heads), total[:upto]
    if len(heads) < 2:
        return None
    singles = run(experiment, [[head] for head in heads], upto, "heads together")
    alone = dict(zip(heads, singles[1:] - singles[:1], strict=True))
    sign = 1 if float(total.nanmean()) > 0 else -1
    heads.sort(key=lambda head: sign * float(alone[head].nanmean()), reverse=True)
    rest, group, gains, reached = heads[:TRIED], [], [], total * 0
    while rest and len(group) < MOST:
        values = run(experiment, [[*group, head] for head in rest], upto, "heads together")
        together = values[1:] - values[:1]
        effects = effects_of(together - reached, total)
        best = max(range(len(rest)), key=lambda i: effects[i].share)
        if group and not effects[best].counts(threshold):
            break
        group.append(rest.pop(best))
        gains.append(effects[best])
        reached = together[best]
    apart = torch.stack([alone[head] for head in group]).sum(0)
    together, excess, singly = effects_of(torch.stack([reached, reached - apart, apart]), total)
    if len(group) < 2 or not together.counts(threshold) or not excess.counts(threshold):
        return None
    return Group(tuple(group), tuple(gains), together, singly.share)
