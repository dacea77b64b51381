"""Everything that stays the same while parts of a model are taken out, and passes with parts taken out.

In: a subject, tokens, what stands in for a part, a metric. Out: the metric of each sequence, for each set of parts.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaint.circuits.clean import Clean, clean_pass
from metaint.circuits.ledger import Ledger
from metaint.circuits.metrics import Metric, MetricFunction, metric_of, places_of, values_of
from metaint.circuits.parts import Part, part_name
from metaint.circuits.passes import outcomes
from metaint.circuits.scan_metrics import Patterns, ScanMetric
from metaint.circuits.stand import Stand, means_of
from metaint.circuits.subject import Subject
from metaint.circuits.trial import begins_anywhere
from metaint.circuits.variants import Variant
from metaint.errors import InputError
from metaint.measures.resampling import bootstrap_interval
from metaint.models.audit import require
from metaint.models.reading import steady
from metaint.probes.heads import HeadProbe
from metaint.scanning.given import given_inputs
from metaint.scanning.progress import progress_of

HOW = ("zero", "mean", "resample", "pattern_preserving")
# Tokens that are run at once by default: enough to keep a CPU busy, and few enough for its caches and for logits.
TOKENS = 4096
# A clean pass of so many tokens is remembered, for the next call that looks at the same sequences.
_REMEMBERED = 512
# What the model as it is is called in the ledger.
CLEAN = "clean"


@dataclass
class Experiment:
    """Everything that stays the same while parts of a model are taken out.

    `whole_passes` tells why passes do not begin in the middle of the model, "" where they do; `patterns` is what is
    read where the metric is a variable of a scan; `weights` is what each sequence counts in a mean; `at` is True at the
    positions where parts are taken out, None for all; `donors` is for each sequence the one it is resampled from.
    """

    subject: Subject
    tokens: Int[Tensor, "batch position"]
    how: str
    metric: Metric
    batch_size: int
    whole_passes: str
    weights: Float[Tensor, " batch"]
    patterns: Patterns | None = None
    at: Bool[Tensor, " position"] | None = None
    donors: Int[Tensor, " batch"] | None = None
    progress: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    # By layer, the mean of hook_z [head, d_head], of what the MLP writes and of the embedding [d_model].
    means: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    # The clean pass that was made last, if it is small: what asks for what, that pass, and what stands in.
    last: tuple[Any, Clean, Stand] | None = None


# ---- setting up --------------------------------------------------------------------------------------------------


def set_up(
    subject: Subject,
    tokens: Tensor | str | None,
    how: str,
    metric: str | MetricFunction | ScanMetric,
    *,
    positions: Iterable[int] | None = None,
    batch_size: int | None,
    seed: int,
    progress: bool = False,
) -> Experiment:
    """Checks of everything that can be checked before a pass is run; raises as `ablate` does."""
    if how not in HOW:
        raise InputError(f"how is {how!r}: choose one of {', '.join(HOW)}.")
    chosen = metric_of(metric)
    patterns = Patterns(metric, subject) if isinstance(metric, ScanMetric) else None
    _check_metric(subject, how, chosen, patterns)
    model = subject.model
    given = given_inputs(model, tokens, batch_size=batch_size, seed=seed)
    tokens = given.tokens
    at = None if positions is None else _marked(positions, tokens.shape[1])
    if batch_size is None:
        batch_size = max(1, TOKENS // tokens.shape[1])
    counted, weights = _counted(chosen, patterns, tokens, batch_size)
    donors = cycle(len(tokens), seed) if how == "resample" else None
    require(model, ["edit_z"])
    if how == "pattern_preserving":
        require(model, ["value_mix", "pattern_fires"])
    if patterns is not None:
        require(model, HeadProbe.audits)
    why = begins_anywhere(subject, progress)
    experiment = Experiment(subject, tokens, how, chosen, batch_size, why, weights, patterns, at, donors, progress)
    experiment.facts = {"metric": chosen.name, "how": how, "task": given.task, "seed": seed, "sequences": len(tokens)}
    experiment.facts["positions"] = counted
    experiment.facts["passes"] = f"whole ({why})" if why else "from the ablated layer"
    return experiment


def _check_metric(subject: Subject, how: str, metric: Metric, patterns: Patterns | None) -> None:
    """InputError for a metric that this model, or this way of ablating, does not have."""
    if patterns is not None and how == "pattern_preserving":
        raise InputError(
            f"how is 'pattern_preserving', and metric is {metric.name!r}, read from the patterns that it keeps as they "
            "were: choose zero, mean or resample."
        )
    if patterns is None and metric.where is not None and not subject.shape.causal:
        raise InputError(
            f"model attends in both directions, and metric is {metric.name!r}, a prediction of the next token: give a "
            "causal model, or a metric of your own."
        )


def _counted(
    metric: Metric, patterns: Patterns | None, tokens: Tensor, batch_size: int
) -> tuple[int, Float[Tensor, " batch"]]:
    """How many positions a metric looks at, and what each sequence counts in a mean; InputError for none."""
    if patterns is not None:
        weights = patterns.weigh(tokens.split(batch_size))
        if not bool(weights.any()):
            raise InputError(
                f"tokens hold no position where {metric.name} is defined: give longer ones, or such as repeat, or "
                "another metric."
            )
        return int(weights.sum()), weights
    places = places_of(metric, tokens)
    if places is not None and not bool(places.any()):
        raise InputError(
            f"tokens hold no position where {metric.name} is defined (the next token being what followed the current "
            "one before): give tokens that repeat, or another metric."
        )
    count = tokens.numel() if places is None else int(places.sum())
    return count, torch.ones(len(tokens), dtype=torch.float64)


def _marked(positions: Iterable[int], length: int) -> Bool[Tensor, " position"]:
    """True at these positions."""
    try:
        wanted = [operator.index(position) for position in positions]
    except TypeError:
        wanted = []
    if not wanted:
        raise InputError(f"positions is {positions!r}: give a list of whole numbers such as [0], or None for all.")
    if outside := [position for position in wanted if not 0 <= position < length]:
        raise InputError(f"positions has {outside[0]}: these sequences have positions 0 to {length - 1}.")
    marked = torch.zeros(length, dtype=torch.bool)
    marked[wanted] = True
    return marked


def cycle(count: int, seed: int) -> Int[Tensor, " batch"]:
    """For each sequence another one, none twice: all in one random cycle."""
    if count < 2:
        raise InputError("tokens is one sequence, and resampling takes another's activations: give two or more.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


# ---- running -----------------------------------------------------------------------------------------------------


def batches(
    experiment: Experiment, rows: Iterable[slice], *, mlps: bool = False, also: Sequence[str] = ()
) -> Iterator[tuple[Clean, Stand]]:
    """The clean pass of each batch of sequences, and what stands in for its parts; to be run within `steady`."""
    subject, tokens = experiment.subject, experiment.tokens
    if experiment.how == "mean" and not (experiment.means and (experiment.means["mlp"] or not mlps)):
        experiment.means = means_of(subject, tokens, experiment.batch_size, mlps or subject.has_mlps)
    preserve = experiment.how == "pattern_preserving"
    for some in rows:
        asked = (some.start, some.stop, mlps, tuple(also))
        if experiment.last is not None and experiment.last[0] == asked:
            yield experiment.last[1], replace(experiment.last[2], at=experiment.at)
            continue
        experiment.last = None
        places = places_of(experiment.metric, tokens[some])
        reader = None if experiment.patterns is None else experiment.patterns.reader(tokens[some])
        clean = clean_pass(subject, tokens[some], places, mlps=mlps, patterns=preserve, also=also, reader=reader)
        donor = None
        if experiment.donors is not None:
            given = tokens[experiment.donors[some].to(tokens.device)]
            donor = clean_pass(subject, given, torch.zeros_like(given, dtype=torch.bool), mlps=mlps)
        stand = Stand(experiment.how, clean, donor, experiment.means, experiment.at)
        if (some.stop - some.start) * tokens.shape[1] <= _REMEMBERED:
            experiment.last = asked, clean, stand
        yield clean, stand


def stretches(experiment: Experiment, names: Sequence[str], upto: int) -> list[tuple[slice, list[int]]]:
    """The batches in which something of the first `upto` sequences is not measured yet, and the numbers of what."""
    counts = [experiment.ledger.count(name) for name in names]
    ends = sorted({*(count for count in counts if count < upto), upto})
    batches: list[tuple[slice, list[int]]] = []
    for begin, end in pairwise(ends):
        numbers = [i for i, count in enumerate(counts) if count <= begin]
        starts = range(begin, end, experiment.batch_size)
        batches += [(slice(start, min(start + experiment.batch_size, end)), numbers) for start in starts]
    return batches


def run(
    experiment: Experiment, sets: Sequence[Iterable[Part]], upto: int | None = None, what: str = "ablate"
) -> Float[Tensor, "1+set sequence"]:
    """The metric of each sequence, of the model as it is and without each set of parts, in float64 on the CPU.

    Of the first `upto` sequences, or of all; what the experiment's ledger holds is not run again.
    """
    upto = len(experiment.tokens) if upto is None else upto
    every: list[list[Part]] = [[], *(sorted(set(parts), key=str) for parts in sets)]
    ledger, names = experiment.ledger, [name_of_set(experiment, parts) for parts in every]
    first_of = {name: i for i, name in reversed(list(enumerate(names)))}
    missing = stretches(experiment, list(first_of), upto)
    numbers = list(first_of.values())
    mlps = any(head is None for parts in every for _, head in parts)
    total = sum((rows.stop - rows.start) * len(some) for rows, some in missing)
    model = experiment.subject.model
    with steady(model), progress_of(what, total, experiment.progress and total > 0) as advance:
        for (rows, some), (clean, stand) in zip(
            missing, batches(experiment, [rows for rows, _ in missing], mlps=mlps), strict=True
        ):
            chosen = [numbers[i] for i in some]
            for i, value in variants_measured(experiment, clean, [stand.without(every[j]) for j in chosen]):
                ledger.add(names[chosen[i]], rows.start, value)
                advance(len(value))
    return ledger.table(names, upto)


def name_of_set(experiment: Experiment, parts: Iterable[Part]) -> str:
    """What a set of parts is called in the ledger."""
    names = sorted(map(part_name, parts))
    at = "" if experiment.at is None else f" at {experiment.at.nonzero().flatten().tolist()}"
    return f"without {', '.join(names)}{at}" if names else CLEAN


def variants_measured(
    experiment: Experiment, clean: Clean, variants: Sequence[Variant]
) -> Iterator[tuple[int, Float[Tensor, " batch"]]]:
    """The metric of each variant of a batch, with its number; an empty variant is the clean pass."""
    changed = []
    for i, variant in enumerate(variants):
        if variant.z or variant.mlp:
            changed.append(i)
        else:
            yield i, measured(experiment, clean, clean.outcome)
    rows, anywhere = experiment.batch_size, not experiment.whole_passes
    preserve = experiment.how == "pattern_preserving"
    for i, outcome in outcomes(clean, [variants[i] for i in changed], rows, anywhere, preserve):
        yield changed[i], measured(experiment, clean, outcome)


def measured(experiment: Experiment, clean: Clean, outcome: Tensor) -> Float[Tensor, " batch"]:
    """The metric of each sequence, from the outcome of a pass."""
    if clean.reader is not None:
        return outcome.double().cpu()
    return values_of(experiment.metric, outcome, clean.tokens, clean.places).cpu()


def interval(values: Float[Tensor, "row sequence"], over: Tensor | None = None) -> np.ndarray:
    """Mean, low and high [row, 3] of each row over its sequences, those with NaN left out; with `over` the ratio to the
    mean of that, on the same resamples."""
    known = ~values.isnan()
    counts = known.double() if over is None else over.nan_to_num() * known
    sums = values.nan_to_num()
    low, high = bootstrap_interval(sums.mT, counts.mT.expand_as(sums.mT))
    return torch.stack([sums.sum(1) / counts.sum(1).expand(len(sums)), low, high], 1).numpy()
