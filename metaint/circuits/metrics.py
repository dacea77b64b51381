"""What is measured of a model's predictions when a part of it is taken out: one value for each sequence.

In: logits and the tokens they were made from. Out: values `[batch]`, NaN for a sequence in which nothing counts, so
that the mean over sequences has an interval by resampling them. The built-in metrics look at single positions, whose
logits are all that is made; a metric of the user's own is called with all of them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from metaint.circuits.scan_metrics import ScanMetric
from metaint.errors import InputError
from metaint.measures.in_context import follower
from metaint.models.reading import widen

MetricFunction = Callable[[Tensor, Tensor], Tensor]


class Metric(NamedTuple):
    """A metric as passes compute it: at the positions of `where`, or with None a function of all logits.

    Without a `score` nothing is read of logits: a variable of a scan, which is read elsewhere.
    """

    name: str
    # "lower" or "higher", "" where only its owner knows.
    better: str
    where: Callable[[Int[Tensor, "batch position"]], Bool[Tensor, "batch position"]] | None
    score: MetricFunction | None


def in_context_loss(
    logits: Float[Tensor, "batch position vocab"], tokens: Int[Tensor, "batch position"]
) -> Float[Tensor, " batch"]:
    """Mean loss in nats where the next token is the one that followed the current token the last time.

    What an induction head gets right. NaN for a sequence without such a position.
    """
    return _of_all(METRICS["in_context_loss"], logits, tokens)


def induction_accuracy(
    logits: Float[Tensor, "batch position vocab"], tokens: Int[Tensor, "batch position"]
) -> Float[Tensor, " batch"]:
    """Share of the same positions as in `in_context_loss` whose most likely next token is the right one, 0 to 1."""
    return _of_all(METRICS["induction_accuracy"], logits, tokens)


def next_token_loss(
    logits: Float[Tensor, "batch position vocab"], tokens: Int[Tensor, "batch position"]
) -> Float[Tensor, " batch"]:
    """Mean loss in nats of the next token, at all positions but the last."""
    return _of_all(METRICS["next_token_loss"], logits, tokens)


def metric_of(metric: str | MetricFunction | ScanMetric) -> Metric:
    """A metric by name, or of the user's own: `metric(logits[batch, position, vocab], tokens) -> values[batch]`.

    Or a variable of a scan, which looks at no logits.

    Raises InputError for a name that is none of `METRICS`.
    """
    if isinstance(metric, ScanMetric):
        return Metric(metric.name, "", _nowhere, None)
    if callable(metric):
        return Metric(str(getattr(metric, "__name__", "metric")), "", None, metric)
    if metric not in METRICS:
        raise InputError(
            f"metric is {metric!r}: choose one of {', '.join(METRICS)}, or give a function (logits, tokens) -> values "
            "[batch], or metaint.scan_metric(...)."
        )
    return METRICS[metric]


def places_of(metric: Metric, tokens: Int[Tensor, "batch position"]) -> Bool[Tensor, "batch position"] | None:
    """The positions whose logits a metric looks at; None for all, and for a function of the user's own."""
    return None if metric.where is None else metric.where(tokens)


def values_of(
    metric: Metric, logits: Tensor, tokens: Int[Tensor, "batch position"], places: Bool[Tensor, "batch position"] | None
) -> Float[Tensor, " batch"]:
    """A metric's value for each sequence in float64: from the logits [row, vocab] of `places` in their order, or
    without places from all of them [batch, position, vocab].

    Raises InputError for a function that gives anything but one number a sequence.
    """
    assert metric.score is not None
    if places is None:
        values = metric.score(logits, tokens)
        if not isinstance(values, Tensor) or values.shape != tokens.shape[:1]:
            shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise InputError(f"metric gave {shape}: it must give one value for each of {len(tokens)} sequences.")
        return values.detach().double()
    batch, position = places.nonzero(as_tuple=True)
    scores = metric.score(logits, tokens[batch, position + 1]).double()
    sums = torch.zeros(len(tokens), dtype=torch.float64, device=scores.device).index_add_(0, batch, scores)
    count = places.sum(1)
    return (sums / count).masked_fill(count == 0, math.nan)


def _of_all(metric: Metric, logits: Tensor, tokens: Tensor) -> Tensor:
    places = places_of(metric, tokens)
    if places is not None:
        logits = logits[places]
    return values_of(metric, logits, tokens, places)


def _predictable(tokens: Tensor) -> Tensor:
    """Where the next token is what followed the current one the last time."""
    places = torch.zeros_like(tokens, dtype=torch.bool)
    places[:, :-1] = follower(tokens)[:, :-1] == tokens[:, 1:]
    return places


def _nowhere(tokens: Tensor) -> Tensor:
    return torch.zeros_like(tokens, dtype=torch.bool)


def _every(tokens: Tensor) -> Tensor:
    places = torch.ones_like(tokens, dtype=torch.bool)
    places[:, -1] = False
    return places


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(widen(logits), targets.long(), reduction="none")


def _right(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(-1) == targets).float()


METRICS = {
    "in_context_loss": Metric("in_context_loss", "lower", _predictable, _loss),
    "induction_accuracy": Metric("induction_accuracy", "higher", _predictable, _right),
    "next_token_loss": Metric("next_token_loss", "lower", _every, _loss),
}
