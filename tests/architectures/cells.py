"""One architecture, cell by cell: what metaint says of it beside what transformers computes.

In: a name of the zoo. Out: for each cell an `Outcome`: equal, refused (with the sentence), nan, WRONG, ERROR (something
else than a sentence came), or no reference.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import metaint
from metaint.scans.labels import THRESHOLDS
from tests.architectures.reference import Reference, Run
from tests.architectures.zoo import ZOO, build, tokenizer
from tests.builders import quiet
from tests.measures import plain

KINDS = ("previous_token", "current_token", "first_token", "duplicate_token", "prefix_match")
STATISTICS = ("entropy", "max_weight", "averaging", "distance_mean")
KAPPA = 4.0
# Rounding in float32, through a model that is drawn to be far from linear; of values near or above one, and of small.
RELATIVE, ABSOLUTE = 2e-3, 2e-5


@dataclass(frozen=True)
class Outcome:
    """What became of one cell."""

    status: str
    note: str = ""
    difference: float = math.nan


class Subject:
    """An architecture as transformers runs it and as metaint reads it, on the same tokens."""

    def __init__(self, name: str) -> None:
        self.name, self.entry = name, ZOO[name]
        self.causal = not self.entry.auto.endswith("MaskedLM")
        self.hugging_face = build(name)
        self.reference = Reference(self.hugging_face, self.entry.attends)
        generator = torch.Generator().manual_seed(1)
        block = torch.randint(3, 100, (3, 10), generator=generator)
        self.tokens = torch.cat([block, block], 1)

    @cached_property
    def model(self) -> Any:
        """Opened by metaint; the sentence of a refusal comes again at each cell."""
        with quiet():
            return metaint.open_model(self.hugging_face, tokenizer=tokenizer())

    @cached_property
    def clean(self) -> Run:
        return self.run()

    @property
    def places(self) -> list[tuple[int, int]]:
        """A head of the first and one of the last layer that attend."""
        attends = self.reference.attends
        if not attends:
            raise NoReference("no layer attends")
        return [(attends[0], 1), (attends[-1], 3)]

    def run(self, mask: Tensor | None = None, **changes: Any) -> Run:
        """transformers' own pass."""
        return _own(lambda: self.reference.run(self.tokens, mask, **changes))

    def padded(self, left: bool) -> Tensor:
        """A mask that leaves out some tokens of each sequence but the first."""
        mask = torch.ones_like(self.tokens)
        for row, count in enumerate((0, 3, 5)):
            mask[row, slice(0, count) if left else slice(mask.shape[1] - count, None)] = 0
        return mask


class NoReference(Exception):
    """transformers' own modules do not give what would be compared."""


def _own(compute: Callable[[], Any]) -> Any:
    try:
        return compute()
    except Exception as error:  # an architecture that the reference does not fit
        raise NoReference(f"{type(error).__name__}: {error}".splitlines()[0][:150]) from error


def cells_of(name: str) -> Iterator[tuple[str, Outcome]]:
    """Every cell of an architecture."""
    subject = Subject(name)
    for cell, check in CELLS.items():
        yield cell, _outcome(check, subject)


def _outcome(check: Callable[[Subject], Iterator[tuple[Any, Any]]], subject: Subject) -> Outcome:
    worst = Outcome("equal", difference=0.0)
    try:
        with quiet():
            for actual, expected in check(subject):
                worst = _worse(worst, _compared(np.asarray(actual), np.asarray(expected)))
    except metaint.MetaintError as error:
        return Outcome("refused", str(error))
    except NoReference as error:
        return Outcome("no reference", str(error))
    except Exception as error:
        return Outcome("ERROR", f"{type(error).__name__}: {error}".splitlines()[0][:200])
    return worst


def _compared(actual: np.ndarray, expected: np.ndarray) -> Outcome:
    if actual.shape != expected.shape:
        return Outcome("WRONG", f"shape {actual.shape}, expected {expected.shape}")
    if np.isnan(actual[~np.isnan(expected)]).any():
        return Outcome("nan", "not a number where there is one")
    if (np.isnan(expected) & ~np.isnan(actual)).any():
        return Outcome("WRONG", "a number where there is none")
    known = ~np.isnan(expected)
    difference = float(np.abs(actual[known] - expected[known]).max(initial=0))
    scale = float(np.abs(expected[known]).max(initial=0))
    status = "equal" if difference <= RELATIVE * scale + ABSOLUTE else "WRONG"
    return Outcome(status, "" if status == "equal" else f"off by {difference:.2g} of {scale:.2g}", difference)


def _worse(one: Outcome, other: Outcome) -> Outcome:
    order = ("equal", "nan", "WRONG")
    ranks = [(order.index(o.status), o.difference if math.isfinite(o.difference) else 0.0) for o in (one, other)]
    return one if ranks[0] >= ranks[1] else other


# ---- the cells ---------------------------------------------------------------------------------------------------


def logits(subject: Subject) -> Iterator[tuple[Any, Any]]:
    """The bridge's logits."""
    with torch.no_grad():
        actual = subject.model(subject.tokens)
    yield getattr(actual, "logits", actual), subject.clean.logits


def heads(subject: Subject, mask: Tensor | None = None) -> Iterator[tuple[Any, Any]]:
    """Head scores from the model's own attentions, one query at a time."""
    scan = metaint.scan(subject.model, subject.tokens, attention_mask=mask)["heads"]
    run = subject.clean if mask is None else subject.run(mask)
    if mask is None and "sink_mass" in scan:
        yield scan.sink_mass, torch.stack([1 - a[:, :, 1:].sum(-1).mean((0, 2)) for a in run.attentions])
    yield from _scores(subject, scan, run, torch.ones_like(subject.tokens) if mask is None else mask)


def left_padding(subject: Subject) -> Iterator[tuple[Any, Any]]:
    return heads(subject, subject.padded(left=True))


def right_padding(subject: Subject) -> Iterator[tuple[Any, Any]]:
    return heads(subject, subject.padded(left=False))


def _scores(subject: Subject, scan: Any, run: Run, mask: Tensor) -> Iterator[tuple[Any, Any]]:
    shape = (len(subject.reference.layers), subject.reference.heads)
    if len(run.attentions) != len(subject.reference.attends):
        raise NoReference(f"transformers tells the attention of {len(run.attentions)} layers")
    expected = {name: np.full(shape, np.nan) for name in (*KINDS, *STATISTICS)}
    runs = zip(subject.reference.attends, run.attentions, subject.clean.attentions, strict=True)
    for layer, attention, clean in runs:
        window = _window(clean) if subject.causal else len(subject.tokens[0])
        for head in range(shape[1]):
            for name, value in _plain_scores(subject, attention[:, head].tolist(), mask, window).items():
                expected[name][layer, head] = value
    for name, values in expected.items():
        yield scan[name].values, values


def _window(attention: Tensor) -> int:
    """How many keys the farthest-sighted query of a causal layer sees, by the weights that are not 0."""
    *_, query, key = attention.nonzero(as_tuple=True)
    return int((query - key).max()) + 1


def _plain_scores(subject: Subject, patterns: list[Any], mask: Tensor, window: int) -> dict[str, float]:
    sums = dict.fromkeys((*KINDS, *STATISTICS), 0.0)
    counts = dict.fromkeys(sums, 0)
    rows = zip(patterns, subject.tokens.tolist(), mask.tolist(), strict=True)
    for pattern, tokens, real in rows:
        for query in (q for q in range(len(tokens)) if plain.counted(real, q)):
            nearest = query - window + 1
            for kind in KINDS:
                keys = plain.keys_of(kind, tokens, real, query, subject.causal)
                if keys := [key for key in keys if key >= nearest]:
                    sums[kind] += sum(pattern[query][key] for key in keys)
                    counts[kind] += 1
            total = sum(pattern[query])  # less than one where a learnt sink takes the rest
            row = [weight / total for weight in pattern[query]]
            seen = [is_real and key >= nearest for key, is_real in enumerate(real)]
            statistics = plain.statistics_of(row, seen, query, subject.causal)
            for name in STATISTICS:
                sums[name] += statistics[name]
                counts[name] += 1
    return {name: sums[name] / counts[name] for name in sums if counts[name]}


def residual(subject: Subject) -> Iterator[tuple[Any, Any]]:
    """Mean norms of the streams between layers, over all positions."""
    scan = metaint.scan(subject.model, subject.tokens, [metaint.ResidualProbe()])["residual"]
    weighted = (scan.norm_mean * scan.norm_count).sum("position") / scan.norm_count.sum("position")
    yield weighted.values, [float(stream.norm(dim=-1).mean()) for stream in subject.clean.streams]


def ablation(subject: Subject) -> Iterator[tuple[Any, Any]]:
    """What one head's silence does to the loss, for a head of the first and the last layer that attend."""
    tokens, places = subject.tokens, subject.places
    names, metric = [f"{layer}.{head}" for layer, head in places], "next_token_loss" if subject.causal else _loss
    effects = metaint.ablate(subject.model, tokens, names, how="zero", metric=metric, random=0)
    runs = [subject.clean, *(subject.run(silent=place) for place in places)]
    clean, *changed = (_loss(run.logits, tokens) for run in runs)
    yield effects.clean, float(clean.mean())
    for (layer, head), loss in zip(places, changed, strict=True):
        yield effects.effect.sel(layer=layer, head=head), float((loss - clean).mean())


def outputs(subject: Subject) -> Iterator[tuple[Any, Any]]:
    """How long what a head writes is, for a head of the first and of the last layer that attend."""
    tokens, places = subject.tokens, subject.places
    lengths = metaint.scan(subject.model, tokens, [metaint.OutputProbe()])["outputs"]["output_norm"]
    expected = [_own(partial(subject.reference.write_length, layer, head, tokens)) for layer, head in places]
    for (layer, head), length in zip(places, expected, strict=True):
        yield lengths.sel(layer=layer, head=head), length


def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """The loss of the next token [batch]."""
    return -logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0].mean(-1)


def labels(subject: Subject) -> Iterator[tuple[Any, Any]]:
    """Labels at low thresholds, beside those of a scan made of the model's own attentions."""
    from transformer_lens import ActivationCache

    scan = metaint.scan(subject.model, subject.tokens)
    shape = (3, subject.reference.heads, subject.tokens.shape[1], subject.tokens.shape[1])
    cache: dict[str, Tensor] = {
        f"blocks.{layer}.attn.hook_pattern": torch.zeros(shape) for layer in range(len(subject.reference.layers))
    }
    for layer, attention in zip(subject.reference.attends, subject.clean.attentions, strict=True):
        cache[f"blocks.{layer}.attn.hook_pattern"] = attention
    own = metaint.read_cache(ActivationCache(cache, subject.model), subject.tokens)
    low = dict.fromkeys(THRESHOLDS, 0.05)
    tables = [metaint.label_heads(each, low, margin=0.01, deviations=0.0) for each in (scan, own)]
    first, second = (set(zip(table["head"], table["label"], strict=True)) for table in tables)
    yield len(first ^ second), 0


def recalls(subject: Subject) -> Iterator[tuple[Any, Any]]:
    """`ov_recall` of a head of the first and the last layer that attend."""
    tokens, places = torch.arange(3, 100), subject.places
    probe = metaint.MemoryProbe(tokens.tolist())
    found = metaint.scan(subject.model, subject.tokens, [probe])["memory"]["ov_recall"]
    expected = [_own(partial(subject.reference.ov_recall, layer, head, tokens)) for layer, head in places]
    for (layer, head), value in zip(places, expected, strict=True):
        yield found.sel(layer=layer, head=head), value


def saturation(subject: Subject) -> Iterator[tuple[Any, Any]]:
    """Predictions and streams at scores times four, and how far each head's own attention is from saturated."""
    scan = metaint.scan(subject.model, subject.tokens, [metaint.SaturationProbe([1, KAPPA])])["saturation"]
    run = subject.run(kappa=KAPPA)
    at = slice(1, -1) if subject.causal else slice(1, None)
    own, scaled = (each.logits[:, at].double().log_softmax(-1) for each in (subject.clean, run))
    yield scan.kl.sel(scale=KAPPA), float((own.exp() * (own - scaled)).sum(-1).mean())
    streams = zip(subject.clean.streams[1:], run.streams[1:], strict=True)
    cosines = [torch.cosine_similarity(a.double(), b.double(), dim=-1)[:, 1:].mean() for a, b in streams]
    yield scan.similarity.sel(scale=KAPPA), torch.stack(cosines)
    expected = np.full((len(subject.reference.layers), subject.reference.heads), np.nan)
    for layer, attention in zip(subject.reference.attends, subject.clean.attentions, strict=True):
        rest = 1 - attention.sum(-1, keepdim=True)  # a learnt sink's
        rows = torch.cat([attention, rest * (rest > 1e-4)], -1)[:, :, 1:]
        beside = rows / rows.amax(-1, keepdim=True)
        ties = (beside >= math.exp(-1e-5)).double().sum(-1)
        total = beside.double().sum(-1)
        expected[layer] = (1 - ties / total).mean((0, 2))
    yield scan.total_variation.sel(scale=1), expected


CELLS: dict[str, Callable[[Subject], Iterator[tuple[Any, Any]]]] = {
    "logits": logits,
    "heads": heads,
    "left padding": left_padding,
    "right padding": right_padding,
    "residual": residual,
    "ablation": ablation,
    "outputs": outputs,
    "labels": labels,
    "recalls": recalls,
    "saturation": saturation,
}
