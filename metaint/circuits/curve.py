"""Does a score tell which heads matter? `ablation_curve`: the heads that score highest are ablated together, more and
more of them, beside random heads of the same layers and beside those that write most.

In: a model, a scan of it, the name of a score. Out: curves of a metric with intervals over sequences, and the area
between them.
"""

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from metaint.circuits.beside import PartSet, check_random, drawn_from, random_orders
from metaint.circuits.curve_verdict import with_verdict
from metaint.circuits.experiment import Experiment, interval, run, set_up
from metaint.circuits.metrics import MetricFunction
from metaint.circuits.parts import Head, part_name
from metaint.circuits.ranking import NORM, head_variables, output_norms, ranked, scores_of
from metaint.circuits.scan_metrics import ScanMetric
from metaint.circuits.subject import Subject, subject_of
from metaint.errors import InputError
from metaint.models.protocol import Model

AGAINST = ("random-same-layers", "random")
# A mean and the interval around it.
_ENDS = ("", "_low", "_high")


def ablation_curve(
    model: Model,
    scan: xr.DataTree | xr.Dataset,
    score: str = "induction",
    shares: Sequence[float] = (0.01, 0.02, 0.05, 0.1, 0.2),
    against: str = "random-same-layers",
    *,
    tokens: Int[Tensor, "batch position"] | str | None = None,
    how: str = "mean",
    metric: str | MetricFunction | ScanMetric = "in_context_loss",
    random: int = 25,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """What becomes of `metric` as the heads with the highest `score` are ablated together, more and more of them.

    - `scan`: a scan of the model, or a group of it.
    - `score`: a variable (layer, head) of it, such as "induction" or "output_share"; the highest come first.
    - `shares`: of all heads that attend, each above 0 and at most 1, rounded to whole heads, one at least.
    - `against`: "random-same-layers", as many random heads in each layer, from the heads that are not ablated where
      enough remain; or "random", as many of any layers.
    - `tokens`: two sequences or more, else as in `metaint.ablate`; `how`, `metric`, `batch_size` too.
    - `random`: how many random draws stand beside the ranking, by `seed`.
    - `progress`: show a bar after two seconds.

    Effects are means over sequences of the metric after minus before, in its own units, with 95 % bootstrap intervals
    over sequences in `_low` and `_high`:

    - `effect` (share) with the heads that score highest ablated, `norm_effect` (share) with those that write most (mean
      length of z W_O: the scan's `output_norm`, or else measured on these tokens; `attrs["norm_from"]` says which);
    - `random_effect` (share, draw), with their mean in `random_mean` (share); NaN where no other heads are left;
    - `difference` (share), `effect` minus `random_mean`, paired by sequence;
    - `area`, the area between the two curves over the logarithm of the share, divided by its width: the mean
      difference along the curve, in units of the metric; `norm_area` of the heads that write most, and `random_area`
      (draw) of each draw, beside the same mean of draws;
    - `clean`, the metric before, and `all_heads`, the effect of ablating every head;
    - `count` (share), how many heads, `overlap` (share), what part of the random ones score high too; `top`, `norm_top`
      (rank), their names.

    `attrs["load_bearing"]` is "yes" where the heads that score highest do more harm than random ones: the interval of
    `area` leaves out 0, at most 5 % of the draws do as much, and it is at least 2 % of what all heads bring; else "no",
    or "unknown" where there is nothing to compare with. `attrs["verdict"]` says it in a sentence, with what would
    refute it. It speaks of this metric on these tokens.

    Raises InputError as `ablate` does, and for a score that the scan does not have.

    >>> import metaint
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=4, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> tokens = metaint.tasks.repeated_tokens(50, 8, batch=4)
    >>> curve = metaint.ablation_curve(model, metaint.scan(model, tokens), shares=[0.1, 0.3], tokens=tokens, random=5)
    >>> curve["count"].values.tolist(), dict(curve["random_effect"].sizes), curve.attrs["load_bearing"]
    ([1, 2], {'share': 2, 'draw': 5}, 'no')
    """
    check_random(random, 1)
    if against not in AGAINST:
        raise InputError(f"against is {against!r}: choose one of {', '.join(AGAINST)}.")
    subject = subject_of(model)
    shares = _checked(shares)
    scores = scores_of(scan, score, subject)
    options = {"batch_size": batch_size, "seed": seed, "progress": progress}
    experiment = set_up(subject, tokens, how, metric, **options)
    if len(experiment.tokens) < 2:
        raise InputError("tokens is one sequence: intervals are over sequences, so give two or more.")
    in_scan = NORM in head_variables(scan)
    norms = scores_of(scan, NORM, subject) if in_scan else output_norms(experiment)
    tops = ranked(scores), ranked(norms)
    sets = _sets(subject, tops, shares, random_orders(subject.shape, random, seed), against == AGAINST[0])
    data = _curves(experiment, sets)
    facts = {"score": score, "against": against, "norm_from": "the scan" if in_scan else "these tokens"}
    data.attrs |= {**subject.facts, **experiment.facts, **facts}
    return with_verdict(data, experiment.metric.better)


def _checked(shares: Iterable[float]) -> list[float]:
    values = list(shares) if isinstance(shares, Iterable) and not isinstance(shares, str) else []
    numbers = [float(share) for share in values if isinstance(share, Real) and 0 < share <= 1]
    if not numbers or len(numbers) < len(values):
        raise InputError(f"shares is {shares!r}: give shares of all heads above 0 and at most 1, such as [0.01, 0.1].")
    return sorted(set(numbers))


class _Sets(NamedTuple):
    """What is ablated together at each share: the heads that score highest, those that write most, and each draw."""

    shares: Sequence[float]
    every: PartSet
    top: Sequence[Head]
    norm_top: Sequence[Head]
    counts: Sequence[int]
    # None where every head of the ranking was drawn again, since no others are left.
    draws: Sequence[Sequence[PartSet | None]]

    def first(self, heads: Sequence[Head]) -> list[PartSet]:
        """So many of these heads, at each share."""
        return [frozenset(heads[:count]) for count in self.counts]

    @property
    def compared(self) -> list[bool]:
        """At which shares there are others to compare with."""
        return [None not in draws for draws in self.draws]

    @property
    def overlap(self) -> list[float]:
        """What part of the drawn heads are in the ranking too."""
        shares = []
        for top, draws in zip(self.first(self.top), self.draws, strict=True):
            common = [len(top if draw is None else top & draw) / len(top) for draw in draws]
            shares.append(float(np.mean(common)))
        return shares


def _sets(
    subject: Subject,
    tops: tuple[Sequence[Head], Sequence[Head]],
    shares: Sequence[float],
    orders: Sequence[Sequence[Head]],
    same_layers: bool,
) -> _Sets:
    """`tops` are all heads by score and by length, `orders` all heads at random."""
    every, draws = subject.heads, []
    counts = [min(max(1, round(share * len(every))), *map(len, tops)) for share in shares]
    for count in counts:
        top = frozenset(tops[0][:count])
        drawn = [drawn_from(order, top, same_layers) for order in orders]
        draws.append([None if draw == top else draw for draw in drawn])
    by_score, by_norm = (top[: max(counts)] for top in tops)
    return _Sets(shares, frozenset(every), by_score, by_norm, counts, draws)


def _curves(experiment: Experiment, sets: _Sets) -> xr.Dataset:
    """All that is measured; each set of heads is run once, however often it comes up."""
    by_score, by_norm = sets.first(sets.top), sets.first(sets.norm_top)
    drawn = [draw for draws in sets.draws for draw in draws if draw is not None]
    together = list(dict.fromkeys([sets.every, *by_score, *by_norm, *drawn]))
    values = run(experiment, together) * experiment.weights
    clean, changes = values[0], dict(zip(together, values[1:] - values[:1], strict=True))
    score, norm = (torch.stack([changes[heads] for heads in each]) for each in (by_score, by_norm))
    draws = torch.full((len(sets.shares), len(sets.draws[0]), len(clean)), torch.nan, dtype=values.dtype)
    for i, row in enumerate(sets.draws):
        for j, draw in enumerate(row):
            if draw is not None:
                draws[i, j] = changes[draw]
    mean, along = draws.mean(1), _along(sets)
    curves = {"effect": score, "norm_effect": norm, "random_mean": mean, "difference": score - mean}
    numbers = {"area": _area(score - mean, along), "norm_area": _area(norm - mean, along)}
    numbers |= {"clean": clean, "all_heads": changes[sets.every]}
    data = xr.Dataset(coords={"share": list(sets.shares), "draw": range(draws.shape[1])})
    for name, rows in curves.items():
        data = data.assign(_with_ends(name, ("share",), _intervals(experiment, rows)))
    for name, row in numbers.items():
        data = data.assign(_with_ends(name, (), _intervals(experiment, row[None])[0]))
    of_draws = _intervals(experiment, draws.flatten(0, 1))[:, 0].reshape(draws.shape[:2])
    data["random_effect"] = (("share", "draw"), of_draws)
    data["random_area"] = ("draw", _intervals(experiment, _area(draws - mean[:, None], along))[:, 0])
    data["count"], data["overlap"] = ("share", list(sets.counts)), ("share", sets.overlap)
    data["top"] = ("rank", [part_name(head) for head in sets.top])
    data["norm_top"] = ("rank", [part_name(head) for head in sets.norm_top])
    data.attrs["distinct"] = len({tuple(column) for column in zip(*sets.draws, strict=True)})
    return data.assign_coords(rank=range(1, len(sets.top) + 1))


def _intervals(experiment: Experiment, rows: Float[Tensor, "row sequence"]) -> np.ndarray:
    """Mean, low and high of each row."""
    return interval(rows, over=experiment.weights[None])


def _with_ends(name: str, dims: tuple[str, ...], values: np.ndarray) -> dict[str, Any]:
    """A mean and the ends of its interval as three variables."""
    return {name + end: (dims, value) for end, value in zip(_ENDS, np.moveaxis(values, -1, 0), strict=True)}


def _along(sets: _Sets) -> Float[Tensor, " share"]:
    """What each share weighs in a mean along the logarithm of the share, by the trapezoidal rule; 0 where there is
    nothing to compare with."""
    compared = torch.tensor(sets.compared)
    weights = torch.zeros(len(compared), dtype=torch.float64)
    places = torch.tensor(sets.shares, dtype=torch.float64)[compared].log()
    gaps = places.diff()
    halves = (torch.cat([gaps, gaps[:0].new_zeros(1)]) + torch.cat([gaps.new_zeros(1), gaps])) / 2
    weights[compared] = halves / halves.sum() if len(places) > 1 else 1.0
    return weights


def _area(curves: Float[Tensor, "share *rest"], along: Float[Tensor, " share"]) -> Float[Tensor, "*rest"]:
    """The mean along a curve; not a number where nothing can be compared."""
    some = along > 0
    if not bool(some.any()):
        return torch.full(curves.shape[1:], torch.nan, dtype=curves.dtype)
    return torch.einsum("s,s...->...", along[some], curves[some])
