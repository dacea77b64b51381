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

from metaint.circuits.parts import Part
from metaint.circuits.paths import EMBEDDING, LOGITS, Node, is_head
from metaint.measures.composition import composition, read_factor, write_factor
from metaint.models.folded import folded_layers
from metaint.models.memory import Memories


class Effect(NamedTuple):
    """What cutting something does to the metric: mean, interval, and share of what taking out all heads does."""

    effect: float
    low: float
    high: float
    share: float

    def attributes(self) -> dict[str, float]:
        """As they stand on nodes and edges."""
        return {"effect": self.effect, "effect_low": self.low, "effect_high": self.high, "share": self.share}

    def counts(self, threshold: float) -> bool:
        """Whether as much is lost, and more than chance explains."""
        return self.share >= threshold and (self.low > 0 or self.high < 0)


def name_of(node: Node) -> str:
    """A node's name in the graph: "5.1" for a head, "mlp 3" for the MLP of a layer, "embedding" and "logits"."""
    if isinstance(node, str):
        return node
    layer, head = node
    return f"mlp {layer}" if head is None else f"{layer}.{head}"


def add_nodes(
    graph: networkx.DiGraph,
    model: Any,
    heads: xr.Dataset,
    labels: Mapping[Part, list[str]],
    parts: Mapping[Part, Effect],
) -> None:
    graph.add_node(EMBEDDING, kind="embedding", layer=-1)
    scores = [str(name) for name, found in heads.items() if found.dims == ("layer", "head") and not _aside(str(name))]
    for part, effect in parts.items():
        layer, head = part
        found: dict[str, Any] = {"kind": "mlp" if head is None else "head", "layer": layer, **effect.attributes()}
        if head is not None:
            found |= {"head": head, "labels": ", ".join(labels.get(part, []))}
            known = {name: float(heads[name].sel(layer=layer, head=head)) for name in scores}
            found |= {name: score for name, score in known.items() if not math.isnan(score)}
        graph.add_node(name_of(part), **found)
    graph.add_node(LOGITS, kind="logits", layer=int(model.cfg.n_layers))


def _aside(name: str) -> bool:
    """Whether a variable of a scan stands beside a score: a baseline, a null, a bound, a count."""
    return name.endswith(("_uniform", "_null_mean", "_null_std", "_low", "_high", "_count"))


def add_edges(graph: networkx.DiGraph, model: Any, paths: Mapping[tuple[Node, Node], dict[str, Effect]]) -> None:
    read = _reads(model, [ends for ends in paths if all(is_head(node) for node in ends)])
    for ends, effects in paths.items():
        found: dict[str, Any] = {**effects[""].attributes()}
        single = {by: effect for by, effect in effects.items() if by and not math.isnan(effect.effect)}
        found |= {f"effect_{by}": effect.effect for by, effect in single.items()}
        found["by"] = max(single, key=lambda by: single[by].share) if single else ""
        graph.add_edge(*map(name_of, ends), **found, **read.get(ends, {}))


def _reads(model: Any, pairs: Sequence[tuple[Any, Any]]) -> dict[tuple[Any, Any], dict[str, float]]:
    """Composition of pairs of heads and the recall of one's keys of what the other writes, from weights alone."""
    if not pairs:
        return {}
    memories = Memories(model) if isinstance(getattr(model, "W_E", None), Tensor) else None
    layers = list(folded_layers(model)) if memories is None else memories.layers
    found = {}
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
        found[(layer, head), (later, head_to)] = scores
    return found
