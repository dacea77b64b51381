"""What counts for a metric: parts without which enough is lost, direct paths between them, and what a circuit is of.

In: an experiment, and what ablating all heads does in it. Out: parts and paths, with the effect of cutting each.
"""

from collections.abc import Mapping, Sequence

import networkx
from jaxtyping import Float
from torch import Tensor

from metaint.circuits.experiment import Experiment, interval, run
from metaint.circuits.graph import Effect
from metaint.circuits.parts import Part
from metaint.circuits.paths import EMBEDDING, LOGITS, Node, Path, Wiring, cut, is_head, wiring_of, writers_of
from metaint.models.reading import Unavailable


def parts_that_count(
    experiment: Experiment, labelled: set[Part], threshold: float, most: int
) -> tuple[dict[Part, Effect], Float[Tensor, " sequence"]]:
    """The effect of each part that counts or is labelled, at most so many; and that of all heads, by sequence."""
    subject = experiment.subject
    every: list[Part] = [*subject.heads]
    parts = every + [(layer, None) for layer in subject.layers if subject.has_mlps]
    values = run(experiment, [every, *([part] for part in parts)])
    total = values[1] - values[0]
    effects = dict(zip(parts, _effects(values[2:] - values[:1], total), strict=True))
    ranked = sorted(parts, key=lambda part: (part in labelled, effects[part].share), reverse=True)
    counting = [part for part in ranked if part in labelled or effects[part].counts(threshold)]
    return {part: effects[part] for part in parts if part in counting[:most]}, total


def _effects(changes: Float[Tensor, "row sequence"], total: Float[Tensor, " sequence"]) -> list[Effect]:
    mean, low, high = interval(changes).T
    return [Effect(*map(float, row)) for row in zip(mean, low, high, mean / float(total.nanmean()), strict=True)]


def paths_that_count(
    experiment: Experiment, parts: Mapping[Part, Effect], total: Tensor, threshold: float
) -> tuple[dict[tuple[Node, Node], dict[str, Effect]], str]:
    """For each pair joined by a path that counts, the effects by "" (the whole path), "q", "k" and "v"; and what is to
    be said of paths that were not followed."""
    subject, notes = experiment.subject, []
    try:
        wiring = wiring_of(subject, int(experiment.tokens.shape[1]))
    except Unavailable as reason:
        return {}, f"not followed: {reason}"
    nodes: list[Node] = [EMBEDDING, *parts]
    readers: list[Node] = [*parts, LOGITS]
    if experiment.whole_passes and any(head is None for _, head in parts):
        readers = [reader for reader in readers if reader == LOGITS or is_head(reader)]
        notes.append(f"those into MLPs not followed: {experiment.whole_passes}")
    if wiring.opaque:
        notes.append(f"those by queries and keys not followed: {wiring.opaque}")
    whole = []
    for reader in readers:
        by = "" if not is_head(reader) else "v" if wiring.opaque else "qkv"
        whole += [Path(writer, reader, by) for writer in writers_of(subject, reader, nodes)]
    first = _effects_of(experiment, wiring, whole, total)
    counting = [path for path in whole if first[path].counts(threshold)]
    effects = {(path.writer, path.reader): {"": first[path]} for path in counting}
    closer = [path._replace(by=by) for path in counting if is_head(path.reader) for by in "qkv"]
    for path, effect in _effects_of(experiment, wiring, closer, total).items():
        effects[path.writer, path.reader][path.by] = effect
    return effects, "; ".join(notes)


def _effects_of(experiment: Experiment, wiring: Wiring, paths: Sequence[Path], total: Tensor) -> dict[Path, Effect]:
    if not paths:
        return {}
    values = cut(experiment, wiring, paths)
    return dict(zip(paths, _effects(values[1:] - values[:1], total), strict=True))


def members_of(
    parts: Mapping[Part, Effect],
    paths: Sequence[tuple[Node, Node]],
    labelled: set[Part],
    label: str,
    threshold: float,
) -> list[Part]:
    """The parts that count by themselves or by a way to the logits, and that the target is about."""
    ways = networkx.DiGraph(paths)
    ways.add_nodes_from([*parts, LOGITS])
    to_logits = networkx.ancestors(ways, LOGITS)
    members = [part for part, effect in parts.items() if effect.counts(threshold) or part in to_logits]
    if label in ("", "induction"):
        return members
    inner = ways.subgraph(members)
    near = labelled & set(members)
    for part in tuple(near):
        near |= networkx.ancestors(inner, part) | networkx.descendants(inner, part)
    return [part for part in members if part in near]
