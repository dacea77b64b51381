"""A race: everything is measured on a few sequences, and what could still count on more; what that missed is estimated.

In: a way to measure the change that cutting each of many things makes to a metric, and what cutting all heads makes.
Out: which were dropped as being below the line, and how many of a sample of these, measured until it is plain, count
after all. Nothing but the ablations themselves decides: on SmolLM2 one plain gradient ranks the head that matters most
in the middle of all, and a part of the time that it saves is better spent on two sequences.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

# The line: the share of what all heads bring from which on something counts.
THRESHOLD = 0.02
# So few are all measured on everything: there is nothing to save.
FEW = 32
# Sequences of the first round; each round doubles them.
FIRST = 2
# After the first round goes on what in either sequence comes within this factor of the line.
SAFETY = 2.0
# Sequences from which on an interval decides, and from which on one that is precise enough is left at that.
JUDGED, SETTLED = 4, 8
# Half an interval, in standard errors: over four sequences 94 % of intervals hold, over eight 98 %.
ERRORS = 3.0
# What was dropped is tried in a sample of so many: where none counts, at most 7 % of the others do.
SAMPLE = 40

# The changes [item, sequence] of these items on so many sequences.
Measure = Callable[[Sequence[int], int], Tensor]


@dataclass(frozen=True)
class Rules:
    """What a race goes by; `on` False measures everything on all sequences.

    `threshold` is the line, `most` how many of those that count are wanted, `precision` half the width that an interval
    may have; `threshold` and `precision` are shares of what all heads bring.
    """

    threshold: float
    precision: float = 0.0
    most: int = 1_000_000
    seed: int = 0
    on: bool = True
    sample: int = SAMPLE


@dataclass
class Outcome:
    """What a race dropped, by number: `below` the line, of these the `sampled` ones, and `weaker` than enough others.

    `counted` are those of the sample that count after all.
    """

    below: list[int] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    weaker: list[int] = field(default_factory=list)

    @property
    def missed(self) -> float:
        """The largest share of what was dropped unseen that may count, at 95 %."""
        if len(self.sampled) == len(self.below):
            return 0.0
        return upper_bound(len(self.counted), len(self.sampled))

    def sentence(self, what: str) -> str:
        """What is to be said of the race, "" where nothing was dropped."""
        if not self.below:
            return ""
        number, tried = len(self.counted), len(self.sampled)
        count = "none counts" if not number else f"{number} counts" if number == 1 else f"{number} count"
        if tried == len(self.below):
            return f"all {tried} {what} below the line were measured until it was plain, and {count}"
        return f"of {tried} {what} out of {len(self.below)} below the line, {count} (at most {_percent(self.missed)})"


def race(measure: Measure, count: int, always: Iterable[int], total: Tensor, rules: Rules) -> Outcome:
    """Measures `count` things, those of `always` on as many sequences as any; `total` [sequence] is what cutting all
    heads changes."""
    sequences, kept, outcome = len(total), set(always), Outcome()
    if not rules.on or count <= FEW:
        measure(range(count), sequences)
        return outcome
    going, settled = list(range(count)), []
    for end in _rounds(sequences):
        changes = measure(going, end)
        if end == sequences:
            break
        low, high = _bounds(changes, total[:end])
        cutoff = _cutoff(low, [i in kept for i in going], rules)
        left = []
        for i, largest in zip(going, high.tolist(), strict=True):
            if i in kept or math.isnan(largest) or largest >= cutoff:
                left.append(i)
            else:
                (outcome.below if largest < rules.threshold else outcome.weaker).append(i)
        plain = _plain(low, high, end, rules)
        settled = [i for i, is_plain in zip(going, plain, strict=True) if is_plain]
        going = [i for i in left if i not in settled]
    outcome.below.sort()
    _try_sample(measure, total, rules, outcome)
    return outcome


def _rounds(sequences: int) -> list[int]:
    """How many sequences each round ends at."""
    ends, end = [], FIRST
    while end < sequences:
        ends.append(end)
        end *= 2
    return [*ends, sequences]


def _bounds(changes: Float[Tensor, "item sequence"], total: Float[Tensor, " sequence"]) -> tuple[Tensor, Tensor]:
    """Between which shares of what all heads bring each lies: NaN where too few sequences tell."""
    shares = changes / total.nanmean()
    known = (~shares.isnan()).sum(1)
    if len(total) < JUDGED:
        largest = shares.nan_to_num(nan=-math.inf).amax(1) * SAFETY
        return torch.full_like(largest, -math.inf), largest.masked_fill(known < 1, math.nan)
    mean = shares.nanmean(1)
    error = ((shares - mean[:, None]).square().nansum(1) / (known - 1) / known).sqrt()
    return mean - ERRORS * error, mean + ERRORS * error


def _cutoff(low: Tensor, kept: Sequence[bool], rules: Rules) -> float:
    """The line, or, where as many as are wanted certainly lie higher, where the last of these certainly lies."""
    others = [least for least, always in zip(low.tolist(), kept, strict=True) if not always and not math.isnan(least)]
    room = max(1, rules.most - sum(kept), rules.most // 2)
    certain = sorted(others, reverse=True)[:room]
    return max(rules.threshold, certain[-1]) if len(certain) == room else rules.threshold


def _plain(low: Tensor, high: Tensor, sequences: int, rules: Rules) -> list[bool]:
    """Whether each is known well enough to be left at that: on one side of the line, and precisely."""
    if sequences < SETTLED:
        return [False] * len(low)
    one_side = (low >= rules.threshold) | (high < rules.threshold)
    return (one_side & ((high - low) / 2 <= rules.precision)).tolist()


def _try_sample(measure: Measure, total: Tensor, rules: Rules, outcome: Outcome) -> None:
    """Measures some of what was dropped on more sequences, until each is on one side of the line."""
    below, sequences = outcome.below, len(total)
    generator = torch.Generator().manual_seed(rules.seed)
    chosen = torch.randperm(len(below), generator=generator)[: rules.sample].tolist()
    outcome.sampled = going = sorted(below[i] for i in chosen)
    for end in [end for end in _rounds(sequences) if end >= min(JUDGED, sequences)]:
        if not going:
            return
        changes = measure(going, end)
        low, high = _bounds(changes, total[:end])
        if end == sequences:
            low = (changes / total.nanmean()).nanmean(1)
        outcome.counted += [i for i, least in zip(going, low.tolist(), strict=True) if least >= rules.threshold]
        unclear = (low < rules.threshold) & (high >= rules.threshold)
        going = [i for i, is_unclear in zip(going, unclear.tolist(), strict=True) if is_unclear]


def upper_bound(successes: int, trials: int, level: float = 0.95) -> float:
    """The largest probability under which so few successes are not rarer than 1 - level: Clopper and Pearson 1934,
    "The Use of Confidence or Fiducial Limits", one-sided."""
    if successes >= trials:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):  # to the last bit
        middle = (low + high) / 2
        terms = (math.comb(trials, k) * middle**k * (1 - middle) ** (trials - k) for k in range(successes + 1))
        low, high = (middle, high) if sum(terms) > 1 - level else (low, middle)
    return high


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
