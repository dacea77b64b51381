"""A variable of a scan as a metric: where heads look, or how, while a part of the model is taken out.

In: the name of a measure of `/heads`, and the heads over which it is averaged. Out: one value for each sequence, read
at hook_pattern of each pass with the very code by which `HeadProbe` reads it.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaint.circuits.subject import Subject
from metaint.errors import InputError, door
from metaint.measures.attention import HEAD_MEASURES, Measure
from metaint.measures.tile import TAUS, Context, Tile
from metaint.models.invariants import pattern_hook
from metaint.models.reading import quietly
from metaint.probes.head_rows import check_rows
from metaint.probes.heads import HeadProbe
from metaint.probes.plan import Plan, plans_of
from metaint.probes.probe import Hook
from metaint.probes.stream import precise


@dataclass(frozen=True)
class ScanMetric:
    """What `scan_metric` gives: a measure and the heads that it is averaged over."""

    measure: Measure
    layers: tuple[int, ...] | None = None
    heads: tuple[str, ...] | None = None
    tau: float | None = None

    @property
    def name(self) -> str:
        """The measure and where it is read, such as "first_token of layers 18 to 29"."""
        measure = self.measure.name if self.tau is None else f"{self.measure.name} (tau {self.tau:g})"
        if self.heads is not None:
            return f"{measure} of {', '.join(self.heads)}"
        if self.layers is None:
            return f"{measure} of all heads"
        first, last = self.layers[0], self.layers[-1]
        if len(self.layers) > 2 and self.layers == tuple(range(first, last + 1)):
            return f"{measure} of layers {first} to {last}"
        if first == last:
            return f"{measure} of layer {first}"
        return f"{measure} of layers {', '.join(map(str, self.layers))}"


@door
def scan_metric(
    variable: str | Measure,
    *,
    layers: Iterable[int] | None = None,
    heads: Sequence[str] | None = None,
    tau: float | None = None,
) -> ScanMetric:
    """A variable of `/heads`, as the `metric` of `ablate` and `check_circuit`: its mean over heads.

    - `variable`: a measure's name, such as "first_token" or "entropy", or a measure made with `@metaint.kind` or
      `@metaint.statistic`; in the variable's own units.
    - `layers`: all heads of these layers; `heads`: these alone, such as "5.1"; neither: every head.
    - `tau`: which tolerance, for the variables that have several (`tied_keys` and its like).

    A sequence counts as often as it has queries for which the variable is defined, as in a scan, so that `clean` of
    `ablate` is the scan's variable averaged over the heads (`sink_rate`: each sequence counts once). No prediction is
    looked at: no logits are made, and a model that attends in both directions will do.

    Raises InputError for a variable that `/heads` does not have (lengths of the stream among them), for both `layers`
    and `heads`, and for `tau` where the variable has none.

    >>> import metaint
    >>> metaint.scan_metric("first_token", layers=range(18, 30)).name
    'first_token of layers 18 to 29'
    """
    measure = _measure(variable)
    if layers is not None and heads is not None:
        raise InputError("layers and heads are both given: give one of them, or neither for every head.")
    if isinstance(heads, str) or (heads is not None and not heads):
        raise InputError(f'heads is {heads!r}: give a list of names such as ["5.1", "5.5"], or leave it out.')
    if measure.per_tau and tau not in TAUS:
        raise InputError(f"tau is {tau}: give one of {', '.join(map(str, TAUS))}, for which {measure.name} is counted.")
    if tau is not None and not measure.per_tau:
        raise InputError(f"tau is {tau}, which {measure.name} has no use for: leave it out.")
    chosen_layers = None if layers is None else _layers(layers)
    chosen_heads = None if heads is None else tuple(dict.fromkeys(heads))
    return ScanMetric(measure, chosen_layers, chosen_heads, tau)


def _measure(variable: str | Measure) -> Measure:
    if isinstance(variable, Measure):
        return variable
    known = {measure.name: measure for measure in HEAD_MEASURES}
    if variable not in known:
        raise InputError(
            f"variable is {variable!r}: choose a measure of /heads ({', '.join(known)}), or give one made with "
            "@metaint.kind or @metaint.statistic."
        )
    return known[variable]


def _layers(layers: Iterable[int]) -> tuple[int, ...]:
    try:
        numbers = tuple(sorted({int(layer) for layer in layers}))
    except (TypeError, ValueError):
        numbers = ()
    if not numbers:
        raise InputError(f"layers is {layers!r}: give the numbers of layers, such as range(18, 30), or leave it out.")
    return numbers


class Patterns:
    """A scan metric on one model: which heads of which layers are read, and what a sequence counts."""

    def __init__(self, metric: ScanMetric, subject: Subject) -> None:
        self.probe = HeadProbe([metric.measure])
        self.measure = metric.measure
        self.slot = 0 if metric.tau is None else TAUS.index(metric.tau)
        self.shape = subject.shape
        self.heads = _heads(metric, subject)
        self.totals: dict[int, float] = {}

    @property
    def last(self) -> int:
        """The last layer that is read."""
        return max(self.heads)

    def weigh(self, batches: Iterable[Int[Tensor, "batch position"]]) -> Float[Tensor, " sequence"]:
        """What each sequence counts in a mean: the queries for which the variable is defined, on the CPU.

        Where layers of different windows are read they are not the same queries; each layer's mean is over its own.
        """
        by_batch = [self._counts(self._plans(tokens)) for tokens in batches]
        counts = {layer: torch.cat([part[layer] for part in by_batch]) for layer in self.heads}
        self.totals = {layer: float(count.sum()) for layer, count in counts.items()}
        if not any(self.totals.values()):
            return torch.zeros_like(next(iter(counts.values())))
        if nowhere := [layer for layer, total in self.totals.items() if total == 0]:
            raise InputError(
                f"layers of the metric have {nowhere[0]}, where the attention window leaves no position at which "
                f"{self.measure.name} is defined: name other layers, or give longer sequences."
            )
        shares = self.shares(counts)
        return shares * sum(self.totals.values()) / len(self.totals)

    def shares(self, counts: Mapping[int, Float[Tensor, " sequence"]]) -> Float[Tensor, " sequence"]:
        """The part of the whole mean that falls to each sequence."""
        n_heads = sum(len(heads) for heads in self.heads.values())
        parts = [len(heads) * counts[layer] / self.totals[layer] for layer, heads in self.heads.items()]
        return torch.stack(parts).sum(0) / n_heads

    def reader(self, tokens: Int[Tensor, "batch position"]) -> "Reader":
        plans = self._plans(tokens)
        device = tokens.device
        counts = {layer: count.to(device, precise(device)) for layer, count in self._counts(plans).items()}
        return Reader(self, plans, counts)

    def _plans(self, tokens: Int[Tensor, "batch position"]) -> list[Plan]:
        return plans_of(self.probe.kinds, Context.whole(tokens, causal=self.shape.causal), self.shape)

    def _counts(self, plans: list[Plan]) -> dict[int, Float[Tensor, " batch"]]:
        """Queries of each sequence for which the variable is defined, by layer, on the CPU."""
        by_plan: dict[int, Tensor] = {}
        for layer in self.heads:
            plan = plans[layer]
            if id(plan) not in by_plan:
                by_plan[id(plan)] = self._defined(plan)
        return {layer: by_plan[id(plans[layer])] for layer in self.heads}

    def _defined(self, plan: Plan) -> Float[Tensor, " batch"]:
        dtype = precise(plan.context.mask.device)
        sums, counts = self.probe.row_sums(plan, Tile(plan.context.uniform, plan.context), dtype)
        if self.measure.per_sequence is None:
            return counts[:, self.slot].double().cpu()
        return (~self.scores(sums, counts)[:, self.slot, 0].isnan()).double().cpu()

    def scores(
        self, sums: Float[Tensor, "batch slot head"], counts: Float[Tensor, "batch slot"]
    ) -> Float[Tensor, "batch slot head"]:
        """The variable of each sequence."""
        every = counts[..., None].expand_as(sums)
        return sums / every if self.measure.per_sequence is None else self.measure.per_sequence(sums, every)


def _heads(metric: ScanMetric, subject: Subject) -> dict[int, list[int]]:
    """The heads that are read, by layer."""
    if metric.heads is not None:
        by_layer: dict[int, list[int]] = {}
        for layer, head in sorted(subject.head(name) for name in metric.heads):
            by_layer.setdefault(layer, []).append(head)
        return by_layer
    attending = subject.shape.attending
    layers = attending if metric.layers is None else metric.layers
    if outside := [layer for layer in layers if layer not in subject.layers]:
        raise InputError(f"layers of the metric have {outside[0]}: this model's are 0 to {subject.layers[-1]}.")
    if outside := [layer for layer in layers if layer not in attending]:
        raise InputError(f"layers of the metric have {outside[0]}, which doesn't attend: name from {list(attending)}.")
    return {layer: list(range(subject.shape.n_heads)) for layer in layers}


@dataclass(frozen=True)
class Reader:
    """A scan metric on one batch: hooks that read it, and what they read as one value for each sequence."""

    patterns: Patterns
    plans: list[Plan]
    counts: dict[int, Float[Tensor, " batch"]]

    @property
    def last(self) -> int:
        return self.patterns.last

    def hooks(self, layers: Container[int], copies: Sequence[dict[int, Tensor]]) -> list[Hook]:
        """Hooks on those of the layers that are read, in a pass of the batch stacked once for each of `copies`.

        Each takes the score of each sequence and head [batch, head] by layer.
        """
        read = [layer for layer in self.patterns.heads if layer in layers]
        return [(pattern_hook(layer), partial(self._read, layer=layer, copies=copies)) for layer in read]

    def _read(self, pattern: Tensor, hook: Any, layer: int, copies: Sequence[dict[int, Tensor]]) -> None:
        patterns, dtype = self.patterns, precise(pattern.device)
        with quietly(pattern.device.type):
            for rows, scores in zip(pattern.detach().chunk(len(copies)), copies, strict=True):
                tile = Tile(rows, self.plans[layer].context)
                values = patterns.scores(*patterns.probe.row_sums(self.plans[layer], tile, dtype))
                check_rows(tile, layer)
                scores[layer] = values[:, patterns.slot, patterns.heads[layer]]

    def outcome(self, scores: Mapping[int, Float[Tensor, "batch head"]]) -> Float[Tensor, " batch"]:
        """The mean over heads, for each sequence; each layer counts by its queries, as `Patterns.weigh` has them."""
        patterns = self.patterns
        n_heads = sum(len(heads) for heads in patterns.heads.values())
        parts = []
        for layer in patterns.heads:
            share = self.counts[layer] / patterns.totals[layer]
            summed = scores[layer].sum(1).masked_fill(self.counts[layer] == 0, 0)
            parts.append(share * summed)
        return torch.stack(parts).sum(0) / n_heads / patterns.shares(self.counts)
