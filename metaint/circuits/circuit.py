"""`trace_circuit`: from head scores and ablations to a graph of what reads what, and whether it holds.

In: a model, tokens, and a scan of its heads. Out: a `networkx.DiGraph` of typed attributes. Nodes are those parts that
a metric hangs on, edges the direct paths between them that it hangs on; each edge also says how much of what the writer
writes the reader reads, from their weights alone (`measures/composition.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import networkx
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from metaint.circuits.checks import check, nothing_to_explain
from metaint.circuits.experiment import Experiment, interval, run, set_up
from metaint.circuits.graph import Effect, add_edges, add_nodes
from metaint.circuits.metrics import MetricFunction
from metaint.circuits.parts import Part, all_heads
from metaint.circuits.paths import EMBEDDING, LOGITS, Node, Path, Wiring, cut, has_mlps, is_head, wiring_of, writers_of
from metaint.errors import InputError
from metaint.models.describe import facts_of, is_causal, sublayers_of
from metaint.models.reading import Unavailable
from metaint.scanning.scan import scan as scan_model
from metaint.scans.labels import heads_of, label_heads

# The label of the heads that a circuit is traced around, and the metric.
TARGETS = {
    "induction": ("induction", "in_context_loss"),
    "previous_token": ("previous_token", "in_context_loss"),
    "averaging": ("averaging", "next_token_loss"),
}
THRESHOLD = 0.02
_HOW = ("zero", "mean", "resample")


def trace_circuit(
    model: Any,
    tokens: Int[Tensor, "batch position"] | str | None = None,
    scan: xr.DataTree | xr.Dataset | None = None,
    target: str | MetricFunction = "induction",
    *,
    how: str = "mean",
    threshold: float = THRESHOLD,
    most: int = 16,
    random: int = 50,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> networkx.DiGraph:
    """The circuit of a model for `target`, tested.

    `target` is "induction" or "previous_token" (the heads labelled so, and the in-context loss), "averaging" (those
    heads, and the loss of all next tokens), or a metric of your own (logits, tokens) -> values [batch]. `scan` is a
    scan of the model's heads on these tokens, made here by default. `tokens` and `how` ("mean", "zero" or "resample")
    are as in `metaint.ablate`.

    Parts that count: heads with the target's label; heads and MLPs without which at least `threshold` of what all heads
    bring to the metric is lost, with an interval that leaves out 0; together at most `most`. Between these, and from
    the embedding and to the logits, each direct path is cut (`circuits/paths.py`), and is an edge where that loses as
    much, by the same rule. Labelled heads that write to nothing are dropped, and around previous-token or averaging
    heads all parts that no path joins to one of them.

    Nodes: "embedding", heads as "5.1", "mlp 3", "logits", with `kind`, `layer` (-1 for the embedding, n_layers for the
    logits), for heads `head`, `labels` (joined by commas) and the scan's scores by name; `effect` of ablating the part
    on the metric, `effect_low`, `effect_high` (95 % bootstrap over sequences), and `share`, the effect over that of
    ablating all heads. Edges: the same four for cutting the path, `effect_q`, `effect_k`, `effect_v` of cutting it for
    a head's queries, keys or values alone, and `by`, the strongest of these (elsewhere ""); between heads
    `q_composition`, `k_composition`, `v_composition` and their `_z` over chance, and `key_composition_recall` with its
    `_chance`. The graph's own attributes tell of model and metric, `faithfulness`, `completeness` and random circuits
    (`metaint.check_circuit`, heads alone), `found`, and `why` in a sentence: a circuit that doesn't beat random ones is
    not found. Parts are taken out one at a time, so heads that stand in for each other are missed: where that leaves
    no labelled head, `why` tells what they bring together. `paths` tells which direct paths could not be followed,
    where the audit or positions forbid it.

    Raises InputError for a bidirectional model, arguments that can't be used and tokens without what the metric
    measures, HookAuditError for unusable hooks.
    """
    label, metric = _target(target)
    if how not in _HOW:
        raise InputError(f"how is {how!r}: choose one of {', '.join(_HOW)}.")
    if not 0 < threshold < 1 or most < 1 or random < 0:
        raise InputError(
            f"threshold is {threshold}, most {most} and random {random}: give a share between 0 and 1, and whole "
            "numbers of parts and of random circuits."
        )
    if not is_causal(model):
        raise InputError("model attends in both directions: circuits are traced in models that predict the next token.")
    options = {"batch_size": batch_size, "seed": seed, "progress": progress}
    experiment = set_up(model, tokens, how, metric, **options)
    if len(experiment.tokens) < 2:
        raise InputError("tokens is one sequence: intervals are over sequences, so give two or more.")
    scan = scan_model(model, experiment.tokens, seed=seed, progress=progress) if scan is None else scan
    heads = _checked(model, heads_of(scan))
    labels = _labels(heads)
    parts, total = _parts(experiment, {part for part, names in labels.items() if label in names}, threshold, most)
    if why := nothing_to_explain(experiment, total):
        parts = {}
    paths, followed = _paths(experiment, parts, total, threshold) if parts else ({}, "")
    kept = _kept(parts, list(paths), {part for part in parts if label in labels.get(part, ())}, label, threshold)
    graph = networkx.DiGraph(**facts_of(model), **experiment.facts, threshold=float(threshold), paths=followed)
    graph.graph["target"] = label or experiment.metric.name
    graph.graph.update(d_model=int(model.cfg.d_model), parallel_attn_mlp=sublayers_of(model) == "parallel")
    add_nodes(graph, model, heads, labels, {part: parts[part] for part in kept})
    add_edges(graph, model, {ends: found for ends, found in paths.items() if {*ends} <= {*kept, EMBEDDING, LOGITS}})
    circuit = [part for part in kept if part[1] is not None]
    if not why and not any(not label or label in labels.get(part, ()) for part in circuit):
        why = _none_counts(experiment, [part for part, names in labels.items() if label in names], label, total)
    graph.graph.update({"found": False, "why": why} if why else _tested(experiment, circuit, random, seed))
    return graph


def _target(target: str | MetricFunction) -> tuple[str, str | MetricFunction]:
    if callable(target):
        return "", target
    name = str(target).replace("-", "_")
    if name not in TARGETS:
        raise InputError(f"target is {target!r}: choose {', '.join(TARGETS)}, or give a function (logits, tokens).")
    return TARGETS[name]


def _checked(model: Any, heads: xr.Dataset) -> xr.Dataset:
    sizes = (int(model.cfg.n_layers), int(model.cfg.n_heads))
    if (found := (heads.sizes["layer"], heads.sizes["head"])) != sizes or "step" in heads.dims:
        raise InputError(
            f"scan holds {found[0]} layers x {found[1]} heads, and the model has {sizes[0]} x {sizes[1]}: "
            "give a scan of this model, of one checkpoint."
        )
    return heads


def _labels(heads: xr.Dataset) -> dict[Part, list[str]]:
    found: dict[Part, list[str]] = {}
    table = label_heads(heads)
    for layer, head, label in zip(table["layer"], table["index"], table["label"], strict=True):
        if label != "none":
            found.setdefault((int(layer), int(head)), []).append(str(label))
    return found


# ---- what counts -------------------------------------------------------------------------------------------------


def _parts(
    experiment: Experiment, labelled: set[Part], threshold: float, most: int
) -> tuple[dict[Part, Effect], Float[Tensor, " sequence"]]:
    """The effect of each part that counts or is labelled, at most so many; and that of all heads, by sequence."""
    model = experiment.model
    every: list[Part] = [*all_heads(model)]
    parts = every + [(layer, None) for layer in range(int(model.cfg.n_layers)) if has_mlps(model)]
    values = run(experiment, [every, *([part] for part in parts)])
    total = values[1] - values[0]
    effects = dict(zip(parts, _effects(values[2:] - values[:1], total), strict=True))
    ranked = sorted(parts, key=lambda part: (part in labelled, effects[part].share), reverse=True)
    chosen = [part for part in ranked if part in labelled or effects[part].counts(threshold)][:most]
    return {part: effects[part] for part in parts if part in chosen}, total


def _effects(changes: Float[Tensor, "row sequence"], total: Float[Tensor, " sequence"]) -> list[Effect]:
    mean, low, high = interval(changes).T
    return [Effect(*map(float, row)) for row in zip(mean, low, high, mean / float(total.nanmean()), strict=True)]


def _paths(
    experiment: Experiment, parts: Mapping[Part, Effect], total: Tensor, threshold: float
) -> tuple[dict[tuple[Node, Node], dict[str, Effect]], str]:
    """For each pair joined by a path that counts, the effects by "" (the whole path), "q", "k" and "v"; and what is to
    be said of paths that were not followed."""
    model = experiment.model
    try:
        wiring = wiring_of(model, int(experiment.tokens.shape[1]))
    except Unavailable as reason:
        return {}, f"not followed: {reason}"
    nodes: list[Node] = [EMBEDDING, *parts]
    ends = [(writer, reader) for reader in [*parts, LOGITS] for writer in writers_of(model, reader, nodes)]
    said = []
    if experiment.whole_passes and any(head is None for _, head in parts):
        ends = [(writer, reader) for writer, reader in ends if isinstance(reader, str) or reader[1] is not None]
        said.append(f"those into MLPs not followed: {experiment.whole_passes}")
    if wiring.opaque:
        said.append(f"those by queries and keys not followed: {wiring.opaque}")
    whole = [Path(*pair, ("v" if wiring.opaque else "qkv") if is_head(pair[1]) else "") for pair in ends]
    first = _effects_of(experiment, wiring, whole, total)
    counting = [path for path in whole if first[path].counts(threshold)]
    closer = [Path(path.writer, path.reader, by) for path in counting if is_head(path.reader) for by in "qkv"]
    second = _effects_of(experiment, wiring, closer, total)
    found = {(path.writer, path.reader): {"": first[path]} for path in counting}
    for path, effect in second.items():
        found[path.writer, path.reader][path.by] = effect
    return found, "; ".join(said)


def _effects_of(experiment: Experiment, wiring: Wiring, paths: Sequence[Path], total: Tensor) -> dict[Path, Effect]:
    if not paths:
        return {}
    values = cut(experiment, wiring, paths)
    return dict(zip(paths, _effects(values[1:] - values[:1], total), strict=True))


def _kept(
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
    kept = [part for part, effect in parts.items() if effect.counts(threshold) or part in to_logits]
    if label in ("", "induction"):
        return kept
    about = set(labelled) & set(kept)
    inner = ways.subgraph(kept)
    near = set(about).union(*(networkx.ancestors(inner, part) | networkx.descendants(inner, part) for part in about))
    return [part for part in kept if part in near]


def _none_counts(experiment: Experiment, labelled: Sequence[Any], label: str, total: Tensor) -> str:
    """Why no head of the target is in the circuit; several may stand in for each other, so they are tried together."""
    metric = experiment.metric.name
    if not labelled:
        return f"The model has no head {f'labelled {label}' if label else f'that counts for {metric}'}."
    if len(labelled) == 1:
        return f"The one head labelled {label} doesn't count for {metric}."
    clean, without = run(experiment, [labelled])
    together, low, high = (round(100 * share) for share in interval((without - clean)[None], over=total)[0])
    return (
        f"None of the {len(labelled)} heads labelled {label} counts for {metric} by itself; ablated together they take "
        f"{together} % ({low} to {high} %) of what all heads bring."
    )


def _tested(experiment: Experiment, circuit: Sequence[Any], random: int, seed: int) -> dict[str, Any]:
    """Whether heads are a circuit, as attributes of the graph."""
    tested = check(experiment, circuit, random, seed)
    found: dict[str, Any] = {name: float(tested[name]) for name in ("clean", "ablated")}
    for name in ("faithfulness", "completeness"):
        found |= {name + suffix: float(tested[name + suffix]) for suffix in ("", "_low", "_high")}
        if tested.sizes["random"]:
            found[f"random_{name}_mean"] = float(tested[f"random_{name}"].mean())
            found[f"random_{name}_max"] = float(tested[f"random_{name}"].max())
    return found | {"random": tested.sizes["random"], "found": bool(tested.attrs["found"]), "why": tested.attrs["why"]}
