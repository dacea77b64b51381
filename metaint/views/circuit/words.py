"""What is said of a circuit, of its parts and of its paths, in plain text: numbers with what they are and their units.

In: the attributes of a graph, of a node, of an edge. Out: lines "what it is: value". What is missing is left out.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

from metaint.circuits.metrics import METRICS

BY = {"q": "queries", "k": "keys", "v": "values"}
# What each score of a head is called, and what it is counted in.
_OF_ATTENTION = " of its attention"
_SCORES = {
    "induction": ("induction", _OF_ATTENTION),
    "prefix_match": ("prefix match", _OF_ATTENTION),
    "prefix_match_recent": ("prefix match, most recent", _OF_ATTENTION),
    "previous_token": ("previous token", _OF_ATTENTION),
    "current_token": ("current token", _OF_ATTENTION),
    "duplicate_token": ("duplicate token", _OF_ATTENTION),
    "first_token": ("first token", _OF_ATTENTION),
    "local_mass": ("nearest tokens", _OF_ATTENTION),
    "max_weight": ("largest weight", _OF_ATTENTION),
    "averaging": ("averaging", " (1 is uniform)"),
    "entropy": ("entropy", " (1 is uniform)"),
    "effective_keys": ("effective keys", " tokens"),
    "effective_keys_l2": ("effective keys (L2)", " tokens"),
    "distance_mean": ("mean distance back", " tokens"),
    "distance_std": ("its standard deviation", " tokens"),
    "sink_rate": ("sink rate", " of sequences"),
}
_ASIDE = ("kind", "layer", "head", "labels", "effect", "effect_low", "effect_high", "share")
_ASIDE += ("sequences", "first_position", "positions", "group", "gain", "gain_share")
_LONGEST = 600


def value(data: Mapping[str, Any], name: str) -> float:
    """A number among attributes; NaN where there is none, or none that is finite."""
    given = data.get(name)
    if not isinstance(given, Real) or isinstance(given, bool):
        return math.nan
    try:
        number = float(given)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def plain(text: Any) -> str:
    """Text on one line, of bounded length, in which nothing hides or turns the reading direction."""
    shown = "".join(c if c.isprintable() else "\ufffd" for c in str(text)[: _LONGEST + 1])
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}…"


def labels_of(data: Mapping[str, Any]) -> list[str]:
    """The labels of a head; a file may hold anything in their place."""
    labels = data.get("labels")
    if not isinstance(labels, str):
        return []
    return [plain(label.strip()) for label in labels.split(",") if label.strip()]


def percent(share: float) -> str:
    """A share as a percentage: to a whole one from 10 on, to a tenth below."""
    if math.isnan(share):
        return "–"
    return f"{100 * share:.{int(0 < abs(share) < 0.0995)}f} %".replace("-", "−")


def figure(number: float, sign: bool = False) -> str:
    """Three significant digits."""
    return f"{number:{'+' if sign else ''}.3g}".replace("-", "−")


def node_lines(name: str, data: Mapping[str, Any], graph: Mapping[str, Any]) -> list[str]:
    """The name of a part, then its scores."""
    kind = data["kind"]
    if kind in ("embedding", "logits"):
        return [f"{kind}: what the first layer reads" if kind == "embedding" else f"{kind}: what the model predicts"]
    lines = [f"head {name}" if kind == "head" else name]
    if kind == "head":
        lines.append(f"labels: {', '.join(labels_of(data)) or 'none'}")
    lines += _effect(data, graph, "ablating")
    if kind == "head":
        lines += _scores(data)
    return lines


def edge_lines(writer: str, reader: str, data: Mapping[str, Any], graph: Mapping[str, Any]) -> list[str]:
    """The two ends of a path, then what cutting it does, and what the weights alone say."""
    by = BY.get(str(data.get("by", "")))
    lines = [f"{writer} → {reader}{f', by {by}' if by else ''}", *_effect(data, graph, "cutting")]
    for letter, word in BY.items():
        if not math.isnan(effect := value(data, f"effect_{letter}")):
            lines.append(f"cut for {word} alone: {figure(effect, True)}{unit_of(graph)}")
    for letter, word in BY.items():
        if not math.isnan(score := value(data, f"{letter}_composition")):
            z = value(data, f"{letter}_composition_z")
            lines.append(f"composition with {word}: {figure(score)}" + _given(f"z {figure(z, True)}", z))
    if not math.isnan(recall := value(data, "key_composition_recall")):
        chance = value(data, "key_composition_recall_chance")
        beside = _given(f"chance {percent(chance)}", chance)
        lines.append(f"key composition recall: {percent(recall)} of tokens{beside}")
    return lines


def heading(graph: Mapping[str, Any]) -> tuple[str, str, Sequence[str]]:
    """What the circuit is of; its verdict, or "not tested"; and what was measured, in sentences."""
    metric, target = plain(graph.get("metric", "")), plain(graph.get("target", ""))
    title = f"Circuit for {target or metric or 'an unnamed target'}"
    title += f", by {metric}" if metric and metric != target else ""
    title += f", in {plain(graph['model'])}" if graph.get("model") else ""
    verdict = "not tested"
    if isinstance(graph.get("found"), Real):
        verdict = "found" if graph["found"] else "not found"
    scores = ", ".join(part for name in ("faithfulness", "completeness") if (part := _interval(graph, name)))
    said = [f"{scores[0].upper()}{scores[1:]}."] if scores else []
    if isinstance(why := graph.get("why"), str) and why:
        said.append(plain(why))
    for name, lead in (("groups", "Heads that stand in: "), ("race", "Race: "), ("paths", "Direct paths: ")):
        if isinstance(sentence := graph.get(name), str) and sentence:
            said.append(f"{lead}{plain(sentence)}.")
    return title, plain(graph.get("verdict", verdict)), said


def _interval(graph: Mapping[str, Any], name: str) -> str:
    middle, low, high = (value(graph, name + suffix) for suffix in ("", "_low", "_high"))
    if math.isnan(middle):
        return ""
    return f"{name} {percent(middle)}{_given(f'95 % interval {percent(low)[:-2]} to {percent(high)}', low + high)}"


def _effect(data: Mapping[str, Any], graph: Mapping[str, Any], doing: str) -> Iterator[str]:
    effect, low, high, share = (value(data, name) for name in ("effect", "effect_low", "effect_high", "share"))
    if not math.isnan(effect):
        how = graph.get("how")
        way = f" ({plain(how)})" if isinstance(how, str) and how else ""
        interval = _given(f"95 %: {figure(low)} to {figure(high)}", low + high)
        yield f"effect of {doing}{way}: {figure(effect, True)}{unit_of(graph)}{interval}"
    if not math.isnan(share):
        whole = plain(graph.get("whole", "all heads"))
        use = ", helpful" * (share > 0) + ", harmful" * (share < 0)
        yield f"share of {whole}: {percent(share)}{use}"
    if not math.isnan(sequences := value(data, "sequences")):
        yield f"measured on: {sequences:.0f} sequences"
    if not math.isnan(first := value(data, "first_position")):
        yield f"of that at position 0 alone: {percent(first)}"
    if not math.isnan(gain := value(data, "gain_share")):
        yield f"adds, with its group ablated: {percent(gain)}"


def unit_of(graph: Mapping[str, Any]) -> str:
    """What an effect is counted in."""
    metric = plain(graph.get("metric", ""))
    if metric in METRICS and metric.endswith("_loss"):
        return " nats"
    return f" of {metric}" if metric else ""


def _given(words: str, known: float) -> str:
    return "" if math.isnan(known) else f" ({words})"


def _scores(data: Mapping[str, Any]) -> Iterator[str]:
    """The scores we know in their order, then whatever else is a number."""
    others = [name for name in data if name not in _SCORES and name not in _ASIDE]
    for name in [*_SCORES, *sorted(others, key=str)]:
        words, unit = _SCORES.get(name, (plain(name).replace("_", " "), ""))
        if not math.isnan(number := value(data, name)):
            yield f"{words}: {figure(number)}{unit}"
