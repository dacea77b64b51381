"""`trace_circuit`: from head scores and ablations to a graph of what reads what, and whether it holds.

In: a model, tokens, and a scan of its heads. Out: a `networkx.DiGraph` of typed attributes. Nodes are those parts that
a metric hangs on, edges the direct paths between them that it hangs on; each edge also says how much of what the writer
writes the reader reads, from their weights alone (`measures/composition.py`).
"""

from collections.abc import Sequence
from typing import Any

import networkx
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from metaint.circuits.checks import check, nothing_to_explain
from metaint.circuits.counting import members_of, parts_that_count, paths_that_count
from metaint.circuits.experiment import Experiment, interval, run, set_up
from metaint.circuits.graph import add_edges, add_nodes
from metaint.circuits.metrics import MetricFunction
from metaint.circuits.parts import Part
from metaint.circuits.paths import EMBEDDING, LOGITS
from metaint.circuits.subject import Subject, subject_of
from metaint.errors import InputError, door
from metaint.models.protocol import Model
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


@door
def trace_circuit(
    model: Model,
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

    - `tokens`: as in `metaint.ablate`, two sequences or more.
    - `scan`: a scan of the model's heads on these tokens; None makes one.
    - `target`: "induction" or "previous_token" (the heads labelled so, and the in-context loss), "averaging" (those
      heads, and the loss of all next tokens), or a metric of your own (logits, tokens) -> values [batch].
    - `how`: "mean", "zero" or "resample", as in `metaint.ablate`.
    - `threshold`: the share of what all heads bring to the metric that a part must bring in order to count.
    - `most`: the number of parts at most.
    - `random`: random circuits to compare with, as in `metaint.check_circuit`.
    - `batch_size`, `seed`, `progress`: as in `metaint.ablate`.

    Parts that count: heads with the target's label; heads and MLPs without which at least `threshold` of what all heads
    bring is lost, with an interval that leaves out 0. Between these, and from the embedding and to the logits, each
    direct path is cut (`circuits/paths.py`), and is an edge where that loses as much, by the same rule. Labelled heads
    that write to nothing are dropped, and around previous-token or averaging heads all parts that no path joins to one
    of them.

    Gives a graph whose nodes are "embedding", heads as "5.1", "mlp 3" and "logits":

    - nodes have `kind`, `layer` (-1 for the embedding, n_layers for the logits); `effect` of ablating the part on the
      metric, in its units, `effect_low`, `effect_high` (95 % bootstrap over sequences), and `share`, the effect over
      that of ablating all heads; heads also `head`, `labels` (joined by commas) and the scan's scores by name;
    - edges have the same four for cutting the path; `effect_q`, `effect_k`, `effect_v` of cutting it for a head's
      queries, keys or values alone, and `by`, the strongest of these (elsewhere ""); between heads `q_composition`,
      `k_composition`, `v_composition` and their `_z` over chance, and `key_composition_recall` with its `_chance`;
    - the graph's attributes tell of model and metric, `faithfulness`, `completeness` and random circuits
      (`metaint.check_circuit`, heads alone), `found`, and `why` in a sentence: a circuit that does not beat random ones
      is not found. `paths` tells which direct paths could not be followed, where the audit or positions forbid it.

    Parts are taken out one at a time, so heads that stand in for each other are missed: where that leaves no labelled
    head, `why` tells what they bring together.

    Raises InputError for a bidirectional model, arguments that cannot be used and tokens without what the metric
    measures, HookAuditError for unusable hooks.

    >>> import metaint
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> graph = metaint.trace_circuit(model, metaint.tasks.repeated_tokens(50, 8, batch=4), random=2)
    >>> sorted({"embedding", "logits"} & set(graph)), graph.graph["found"]
    (['embedding', 'logits'], False)
    """
    label, metric = _target(target)
    _check_numbers(how, threshold, most, random)
    subject = subject_of(model)
    if not subject.shape.causal:
        raise InputError("model attends in both directions: circuits are traced in models that predict the next token.")
    options = {"batch_size": batch_size, "seed": seed, "progress": progress}
    experiment = set_up(subject, tokens, how, metric, **options)
    if len(experiment.tokens) < 2:
        raise InputError("tokens is one sequence: intervals are over sequences, so give two or more.")
    scan = scan_model(model, experiment.tokens, seed=seed, progress=progress) if scan is None else scan
    heads = _checked(subject, heads_of(scan))
    labels = _labels(heads)
    labelled = [head for head, names in labels.items() if label in names]
    parts, total = parts_that_count(experiment, set(labelled), threshold, most)
    if why := nothing_to_explain(experiment, total):
        parts = {}
    paths, followed = paths_that_count(experiment, parts, total, threshold) if parts else ({}, "")
    members = members_of(parts, list(paths), set(labelled), label, threshold)
    graph = networkx.DiGraph(**subject.facts, **experiment.facts, threshold=float(threshold), paths=followed)
    graph.graph["target"] = label or experiment.metric.name
    graph.graph.update(d_model=subject.shape.d_model, parallel_attn_mlp=subject.shape.sublayers == "parallel")
    nodes = {*members, EMBEDDING, LOGITS}
    add_nodes(graph, subject, heads, labels, {part: parts[part] for part in members})
    add_edges(graph, subject, {ends: effects for ends, effects in paths.items() if nodes.issuperset(ends)})
    circuit = [part for part in members if part[1] is not None]
    if not why and not (circuit if not label else set(circuit) & set(labelled)):
        why = _none_counts(experiment, labelled, label, total)
    graph.graph.update({"found": False, "why": why} if why else _tested(experiment, circuit, random, seed))
    return graph


def _check_numbers(how: str, threshold: float, most: int, random: int) -> None:
    if how not in _HOW:
        raise InputError(f"how is {how!r}: choose one of {', '.join(_HOW)}.")
    if not 0 < threshold < 1 or most < 1 or random < 0:
        raise InputError(
            f"threshold is {threshold}, most {most} and random {random}: give a share between 0 and 1, and whole "
            "numbers of parts and of random circuits."
        )


def _target(target: str | MetricFunction) -> tuple[str, str | MetricFunction]:
    if callable(target):
        return "", target
    name = str(target).replace("-", "_")
    if name not in TARGETS:
        raise InputError(f"target is {target!r}: choose {', '.join(TARGETS)}, or give a function (logits, tokens).")
    return TARGETS[name]


def _checked(subject: Subject, heads: xr.Dataset) -> xr.Dataset:
    shape, n_layers, n_heads = subject.shape, heads.sizes["layer"], heads.sizes["head"]
    if (n_layers, n_heads) != (shape.n_layers, shape.n_heads) or "step" in heads.dims:
        raise InputError(
            f"scan holds {n_layers} layers x {n_heads} heads, and the model has {shape.n_layers} x {shape.n_heads}: "
            "give a scan of this model, of one checkpoint."
        )
    return heads


def _labels(heads: xr.Dataset) -> dict[Part, list[str]]:
    """The labels of each head that has any."""
    labels: dict[Part, list[str]] = {}
    table = label_heads(heads)
    for layer, head, label in zip(table["layer"], table["index"], table["label"], strict=True):
        if label != "none":
            labels.setdefault((int(layer), int(head)), []).append(str(label))
    return labels


def _none_counts(experiment: Experiment, labelled: Sequence[Any], label: str, total: Tensor) -> str:
    """Why no head of the target is in the circuit; several may stand in for each other, so they are tried together."""
    metric = experiment.metric.name
    if not labelled:
        kind = f"labelled {label}" if label else f"that counts for {metric}"
        return f"The model has no head {kind}."
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
    attributes: dict[str, Any] = {name: float(tested[name]) for name in ("clean", "ablated")}
    for name in ("faithfulness", "completeness"):
        attributes |= {name + end: float(tested[name + end]) for end in ("", "_low", "_high")}
        if tested.sizes["random"]:
            attributes[f"random_{name}_mean"] = float(tested[f"random_{name}"].mean())
            attributes[f"random_{name}_max"] = float(tested[f"random_{name}"].max())
    attributes |= {"random": tested.sizes["random"], "found": bool(tested.attrs["found"]), "why": tested.attrs["why"]}
    return attributes
