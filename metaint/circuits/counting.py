"""What counts for a metric: parts without which enough is lost, direct paths between them, and what a circuit is of.

In: an experiment, and what ablating all heads does in it. Out: parts and paths, with the effect of cutting each, from
all that the experiment's ledger holds of them: a trace that was cut short is read as one that was not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import networkx
import torch
from jaxtyping import Float
from torch import Tensor

from metaint.circuits.experiment import CLEAN, Experiment, interval, name_of_set, run
from metaint.circuits.graph import Effect
from metaint.circuits.parts import Part, part_name
from metaint.circuits.paths import (
    EMBEDDING,
    LOGITS,
    Node,
    Path,
    Wiring,
    cut,
    is_head,
    name_of_path,
    writers_of,
)
from metaint.circuits.race import FIRST, Outcome, Rules, race
from metaint.scanning.progress import tell

# Dropped paths that are tried, in place of the larger sample of parts.
PATHS_TRIED = 20
# Parts that are named while a race runs.
_SHOWN = 8
T = TypeVar("T")


# ---- parts -------------------------------------------------------------------------------------------------------


def race_parts(
    experiment: Experiment, parts: Sequence[Part], labelled: set[Part], total: Tensor, rules: Rules
) -> Outcome:
    """Ablates each part on as many sequences as it takes; labelled ones on as many as any."""

    def measure(numbers: Sequence[int], upto: int) -> Tensor:
        values = run(experiment, [[parts[i]] for i in numbers], upto, f"parts, {upto} sequences")
        if experiment.progress:
            tell(f"most so far: {_strongest(known_parts(experiment, parts, total))}")
        return values[1:] - values[:1]

    always = [i for i, part in enumerate(parts) if part in labelled]
    return race(measure, len(parts), always, total, rules)


def _strongest(effects: Mapping[Part, Effect]) -> str:
    """The parts that bring most, with their shares."""
    ranked = sorted(effects, key=lambda part: effects[part].share, reverse=True)
    return ", ".join(f"{part_name(part)} {100 * effects[part].share:.0f} %" for part in ranked[:_SHOWN])


def known_parts(experiment: Experiment, parts: Sequence[Part], total: Tensor) -> dict[Part, Effect]:
    """The effect of each part that was measured on two sequences or more."""
    return _known(experiment, {part: name_of_set(experiment, [part]) for part in parts}, total)


def chosen(effects: Mapping[Part, Effect], labelled: set[Part], threshold: float, most: int) -> list[Part]:
    """The parts that count or are labelled, at most so many: labelled ones first, up to half of them where others
    count, then those that bring most."""
    ranked = sorted(effects, key=lambda part: effects[part].share, reverse=True)
    others = [part for part in ranked if part not in labelled and effects[part].counts(threshold)]
    first = [part for part in ranked if part in labelled][: max(most // 2, most - len(others))]
    members = {*first, *others[: most - len(first)]}
    return [part for part in effects if part in members]


def at_first_position(experiment: Experiment, parts: Sequence[Part], upto: int) -> dict[Part, float]:
    """Of the effect of each part, the share that is there where it is ablated at the first position alone."""
    first = torch.zeros(experiment.tokens.shape[1], dtype=torch.bool)
    first[0] = True
    sets = [[part] for part in parts]
    alone = run(replace(experiment, at=first), sets, upto, "parts at position 0 alone")
    everywhere = run(experiment, sets, upto)
    shares = (alone[1:] - alone[:1]).nanmean(1) / (everywhere[1:] - everywhere[:1]).nanmean(1)
    return dict(zip(parts, shares.tolist(), strict=True))


# ---- paths -------------------------------------------------------------------------------------------------------


def paths_between(experiment: Experiment, wiring: Wiring, parts: Sequence[Part]) -> tuple[list[Path], str]:
    """Every direct path between parts, from the embedding and to the logits; and what is said of those left out."""
    subject, notes = experiment.subject, []
    nodes: list[Node] = [EMBEDDING, *parts]
    readers: list[Node] = [*parts, LOGITS]
    if experiment.whole_passes and any(head is None for _, head in parts):
        readers = [reader for reader in readers if reader == LOGITS or is_head(reader)]
        notes.append(f"those into MLPs not followed: {experiment.whole_passes}")
    if wiring.opaque:
        notes.append(f"those by queries and keys not followed: {wiring.opaque}")
    paths = []
    for reader in readers:
        by = "" if not is_head(reader) else "v" if wiring.opaque else "qkv"
        paths += [Path(writer, reader, by) for writer in writers_of(subject, reader, nodes)]
    return paths, "; ".join(notes)


def race_paths(
    experiment: Experiment, wiring: Wiring, paths: Sequence[Path], total: Tensor, rules: Rules
) -> tuple[Outcome, list[Path]]:
    """Cuts each path on as many sequences as it takes, then those into heads that count by queries, keys and values
    alone; gives these too."""

    def measure(numbers: Sequence[int], upto: int) -> Tensor:
        values = cut(experiment, wiring, [paths[i] for i in numbers], upto, f"paths, {upto} sequences")
        return values[1:] - values[:1]

    outcome = race(measure, len(paths), (), total, replace(rules, sample=PATHS_TRIED, most=len(paths)))
    counting = [
        path for path, effect in known_paths(experiment, paths, total).items() if effect.counts(rules.threshold)
    ]
    closer = [path._replace(by=by) for path in counting if is_head(path.reader) for by in "qkv"]
    if closer:
        upto = min(FIRST, len(total)) if rules.on else len(total)
        cut(experiment, wiring, closer, upto, "paths by queries, keys, values")
    return outcome, closer


def known_paths(experiment: Experiment, paths: Sequence[Path], total: Tensor) -> dict[Path, Effect]:
    """The effect of each path that was measured on two sequences or more."""
    return _known(experiment, {path: name_of_path(path) for path in paths}, total)


def by_ends(
    effects: Mapping[Path, Effect], closer: Mapping[Path, Effect], threshold: float
) -> dict[tuple[Node, Node], dict[str, Effect]]:
    """For each pair joined by a path that counts, the effects by "" (the whole path), "q", "k" and "v"."""
    pairs = {(path.writer, path.reader): {"": effect} for path, effect in effects.items() if effect.counts(threshold)}
    for path, effect in closer.items():
        if (ends := (path.writer, path.reader)) in pairs:
            pairs[ends][path.by] = effect
    return pairs


# ---- both --------------------------------------------------------------------------------------------------------


def _known(experiment: Experiment, names: Mapping[T, str], total: Tensor) -> dict[T, Effect]:
    ledger, length = experiment.ledger, len(total)
    counts = {item: min(ledger.count(name), length) for item, name in names.items()}
    known: dict[T, Effect] = {}
    for count in sorted({count for count in counts.values() if count >= min(2, length)}):
        items = [item for item in names if counts[item] == count]
        values = ledger.table([CLEAN, *(names[item] for item in items)], count)
        known |= zip(items, effects_of(values[1:] - values[:1], total[:count]), strict=True)
    return {item: known[item] for item in names if item in known}


def effects_of(changes: Float[Tensor, "row sequence"], total: Float[Tensor, " sequence"]) -> list[Effect]:
    """Each row's mean with its interval, and as a share of `total`'s."""
    mean, low, high = interval(changes).T
    shares, count = mean / float(total.nanmean()), changes.shape[1]
    return [Effect(*map(float, row), sequences=count) for row in zip(mean, low, high, shares, strict=True)]


def members_of(
    parts: Mapping[Part, Effect],
    paths: Sequence[tuple[Node, Node]],
    labelled: set[Part],
    label: str,
    threshold: float,
    together: Sequence[Part] = (),
) -> list[Part]:
    """The parts that count by themselves, `together` with others or by a way to the logits, and that the target is
    about."""
    ways = networkx.DiGraph(paths)
    ways.add_nodes_from([*parts, LOGITS])
    to_logits = networkx.ancestors(ways, LOGITS) | set(together)
    members = [part for part, effect in parts.items() if effect.counts(threshold) or part in to_logits]
    if label in ("", "induction"):
        return members
    inner = ways.subgraph(members)
    near = labelled & set(members)
    for part in tuple(near):
        near |= networkx.ancestors(inner, part) | networkx.descendants(inner, part)
    return [part for part in members if part in near]
