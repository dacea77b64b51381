"""The graph of a circuit: nodes and edges with typed attributes.

In: what was measured of a model's parts and of the paths between them. Out: a `networkx.DiGraph` whose attributes are
strings, whole numbers, floats and Booleans, so that it can be written to GraphML as it is.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import networkx
import xarray as xr
from torch import Tensor

from metaint.circuits.parts import Part, part_name
from metaint.circuits.paths import EMBEDDING, LOGITS, Node, is_head, node_name
from metaint.circuits.subject import Subject
from metaint.measures.composition import composition, read_factor, write_factor
from metaint.models.memory import Memories


class Effect(NamedTuple):
    """What cutting something does to the metric: mean, interval, share of what taking out all heads does, and on how
    many sequences that was measured."""

    effect: float
    low: float
    high: float
    share: float
    sequences: int = 0

    def attributes(self) -> dict[str, float | int]:
        """As they stand on nodes and edges."""
        ends = {"effect_low": self.low, "effect_high": self.high}
        return {"effect": self.effect, **ends, "share": self.share, "sequences": self.sequences}

    def counts(self, threshold: float) -> bool:
        """Whether as much is lost, and more than chance explains."""
        return self.share >= threshold and (self.low > 0 or self.high < 0)


def add_nodes(
    graph: networkx.DiGraph,
    subject: Subject,
    heads: xr.Dataset,
    labels: Mapping[Part, list[str]],
    parts: Mapping[Part, Effect],
) -> None:
    """The embedding, these parts with their effects, heads with their labels and scores, and the logits."""
    graph.add_node(EMBEDDING, kind="embedding", layer=-1)
    scores = [str(name) for name in heads if heads[name].dims == ("layer", "head") and not _aside(str(name))]
    for part, effect in parts.items():
        layer, head = part
        if head is None:
            graph.add_node(part_name(part), kind="mlp", layer=layer, **effect.attributes())
            continue
        at_head = heads.sel(layer=layer, head=head)
        known = {name: float(at_head[name]) for name in scores if not math.isnan(float(at_head[name]))}
        names = {"head": head, "labels": ", ".join(labels.get(part, []))}
        graph.add_node(part_name(part), kind="head", layer=layer, **effect.attributes(), **names, **known)
    graph.add_node(LOGITS, kind="logits", layer=subject.shape.n_layers)


def _aside(name: str) -> bool:
    """Whether a variable of a scan stands beside a score: a baseline, a null, a bound, a count."""
    return name.endswith(("_uniform", "_null_mean", "_null_std", "_low", "_high", "_count"))


def add_edges(graph: networkx.DiGraph, subject: Subject, paths: Mapping[tuple[Node, Node], dict[str, Effect]]) -> None:
    """These paths with their effects, and between heads what weights alone tell."""
    reads = _reads(subject, [ends for ends in paths if all(is_head(node) for node in ends)])
    for ends, effects in paths.items():
        single = {by: effect for by, effect in effects.items() if by and not math.isnan(effect.effect)}
        attributes: dict[str, Any] = effects[""].attributes()
        attributes |= {f"effect_{by}": effect.effect for by, effect in single.items()}
        attributes["by"] = max(single, key=lambda by: single[by].share) if single else ""
        graph.add_edge(*map(node_name, ends), **attributes, **reads.get(ends, {}))


def _reads(subject: Subject, pairs: Sequence[tuple[Any, Any]]) -> dict[tuple[Any, Any], dict[str, float]]:
    """Composition of pairs of heads and the recall of one's keys of what the other writes, from weights alone."""
    if not pairs:
        return {}
    layers, memories = subject.folded, None
    if isinstance(getattr(subject.model, "W_E", None), Tensor):
        memories = Memories(subject.model, layers=layers)
    reads = {}
    for (layer, head), (later, head_to) in pairs:
        query, key, value, out = (weight[head_to][None] for weight in layers[later])
        write = write_factor(layers[layer].W_V[head], layers[layer].W_O[head])[None]
        scores: dict[str, float] = {}
        for name, left, right in (("q", query, key.mT), ("k", key, query.mT), ("v", value, out)):
            score = composition(write, read_factor(left, right))
            scores |= {f"{name}_composition": float(score.score), f"{name}_composition_z": float(score.z)}
        if memories is not None:
            recall = memories.key_composition((layer, head), (later, head_to))
            scores |= {"key_composition_recall": recall.share(), "key_composition_recall_chance": recall.chance}
        reads[(layer, head), (later, head_to)] = scores
    return reads
