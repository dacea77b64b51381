"""`trace_circuit`: from head scores and ablations to a graph of what reads what, and whether it holds.

In: a model, tokens, and a scan of its heads. Out: a `networkx.DiGraph` of typed attributes. Nodes are those parts that
a metric hangs on, edges the direct paths between them that it hangs on; each edge also says how much of what the writer
writes the reader reads, from their weights alone (`measures/composition.py`).
"""

from pathlib import Path
from typing import Any

import networkx
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from metaint.circuits.checks import LEAST, check_least
from metaint.circuits.experiment import Experiment, set_up
from metaint.circuits.ledger import Ledger, checksum, weights_checksum
from metaint.circuits.metrics import MetricFunction
from metaint.circuits.parts import Part, part_name
from metaint.circuits.race import THRESHOLD, Rules
from metaint.circuits.scan_metrics import ScanMetric, scan_metric
from metaint.circuits.subject import Subject, subject_of
from metaint.circuits.tracing import Trace
from metaint.errors import InputError, door
from metaint.models.protocol import Model
from metaint.scanning.progress import has_bars, tell
from metaint.scanning.scan import scan as scan_model
from metaint.scans.labels import heads_of, label_heads

# The label of the heads that a circuit is traced around, and the metric.
TARGETS = {
    "induction": ("induction", "in_context_loss"),
    "previous_token": ("previous_token", "in_context_loss"),
    "averaging": ("averaging", "next_token_loss"),
}
# What is traced by where heads look: the origin of the attention sink.
SINK = "sink"
PRECISION = 0.05
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
    least: float = LEAST,
    race: bool = True,
    precision: float = PRECISION,
    journal: str | Path | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> networkx.DiGraph:
    """The circuit of a model for `target`, tested.

    - `tokens`: as in `metaint.ablate`, two sequences or more.
    - `scan`: a scan of the model's heads on these tokens; None makes one.
    - `target`: "induction" or "previous_token" (the heads labelled so, and the in-context loss), "averaging" (those
      heads, and the loss of all next tokens), or a metric of your own (logits, tokens) -> values [batch]; or "sink":
      what makes the heads labelled sink look at position 0, by how much they do. MLPs belong to that circuit too, all
      shares are of what all heads and MLPs bring, and no paths are followed.
    - `how`: "mean", "zero" or "resample", as in `metaint.ablate`.
    - `threshold`: the share of what all heads bring to the metric that a part must bring in order to count.
    - `most`: the number of parts at most.
    - `random`, `least`: random circuits to compare with, and the share from which on a circuit is found, as in
      `metaint.check_circuit`.
    - `race`: measure everything on few sequences, and on more what could still count (`circuits/race.py`); False
      measures everything on all. A model of few parts does not race.
    - `precision`: a racing part is left at fewer sequences where it plainly counts and half its interval is at most
      this share of what all heads bring.
    - `journal`: a file that results are written to as they come, and from which the same call goes on; to be deleted
      by its owner.
    - `batch_size`, `seed`, `progress`: as in `metaint.ablate`.

    Parts that count: heads with the target's label; heads and MLPs without which at least `threshold` of what all heads
    bring is lost, with an interval that leaves out 0. Between these, and from the embedding and to the logits, each
    direct path is cut (`circuits/paths.py`), and is an edge where that loses as much, by the same rule. Labelled heads
    that write to nothing are dropped, and around previous-token or averaging heads all parts that no path joins to one
    of them.

    Gives a graph whose nodes are "embedding", heads as "5.1", "mlp 3" and "logits":

    - nodes have `kind`, `layer` (-1 for the embedding, n_layers for the logits); `effect` of ablating the part on the
      metric, in its units, `effect_low`, `effect_high` (95 % bootstrap over sequences), `share`, the effect over that
      of ablating all heads, and `sequences`, on how many that was measured; `first_position`, the share of the effect
      that is there where the part is ablated at position 0 alone, and `positions`, "first" where that is 0.8 or more;
      heads also `head`, `labels` (joined by commas) and the scan's scores by name;
    - edges have the same five for cutting the path; `effect_q`, `effect_k`, `effect_v` of cutting it for a head's
      queries, keys or values alone, and `by`, the strongest of these (elsewhere ""); between heads `q_composition`,
      `k_composition`, `v_composition` and their `_z` over chance, and `key_composition_recall` with its `_chance`;
    - the graph's attributes tell of model and metric, `faithfulness`, `completeness` and random circuits
      (`metaint.check_circuit`, heads alone), `verdict` ("found", "part of a circuit" or "not found"), `found`,
      `better_than_random`, and `why` in a sentence. `race` says how many of what was dropped may count after all.
      `paths` tells which direct paths could not be followed, where the audit or positions forbid it.

    Parts are taken out one at a time, so heads that stand in for each other are missed; labelled heads are therefore
    taken out together too, one more at a time (`circuits/groups.py`): those of a group have `group` 1 and `gain`, what
    taking them out adds, and the graph's `groups` says it in a sentence. Where no labelled head is left, `why` tells
    what they bring together.

    An interrupt (Ctrl-C) once the first parts are measured gives the graph of what is known by then, with the verdict
    "unfinished" and `finished` False.

    Raises InputError for a bidirectional model, arguments that cannot be used and tokens without what the metric
    measures, HookAuditError for unusable hooks, StoreError for a journal of another trace.

    >>> import metaint
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> graph = metaint.trace_circuit(model, metaint.tasks.repeated_tokens(50, 8, batch=4), random=2)
    >>> sorted({"embedding", "logits"} & set(graph)), graph.graph["found"]
    (['embedding', 'logits'], False)
    """
    name, label, metric = _target(target)
    _check_numbers(how, threshold, most, random)
    check_least(least)
    if not precision >= 0:
        raise InputError(f"precision is {precision}: give half the width of an interval, a share such as {PRECISION}.")
    tell("looking at the model's hooks", progress)
    subject = subject_of(model)
    if not subject.shape.causal:
        raise InputError("model attends in both directions: circuits are traced in models that predict the next token.")
    options = {"batch_size": batch_size, "seed": seed, "progress": progress}
    if name == SINK:
        scan = _scanned(model, tokens, scan, seed, progress)
        metric = _sink_metric(_labels(_checked(subject, heads_of(scan))))
    experiment = set_up(subject, tokens, how, metric, **options)
    if len(experiment.tokens) < 2:
        raise InputError("tokens is one sequence: intervals are over sequences, so give two or more.")
    if journal is not None:
        experiment.ledger = Ledger(journal, _about(experiment))
    heads = _checked(subject, heads_of(_scanned(model, experiment.tokens, scan, seed, progress)))
    rules = Rules(threshold, precision, most, seed, race)
    trace = Trace(experiment, heads, _labels(heads), label, name, rules, random, least)
    try:
        trace.run()
    except KeyboardInterrupt:
        tell(f"stopped while measuring {trace.stage}", progress)
    finally:
        experiment.ledger.write()
    return trace.graph()


def _about(experiment: Experiment) -> dict[str, Any]:
    """What must be the same for results to be gone on from."""
    sums = {"weights": weights_checksum(experiment.subject.model), "tokens": checksum([experiment.tokens])}
    return sums | {name: experiment.facts[name] for name in ("metric", "how", "seed")}


def _check_numbers(how: str, threshold: float, most: int, random: int) -> None:
    if how not in _HOW:
        raise InputError(f"how is {how!r}: choose one of {', '.join(_HOW)}.")
    if not 0 < threshold < 1 or most < 1 or random < 0:
        raise InputError(
            f"threshold is {threshold}, most {most} and random {random}: give a share between 0 and 1, and whole "
            "numbers of parts and of random circuits."
        )


def _target(target: str | MetricFunction) -> tuple[str, str, str | MetricFunction]:
    """The target's name, the label of its heads and the metric; "" for what it does not have."""
    if callable(target):
        return "", "", target
    name = str(target).replace("-", "_")
    if name == SINK:
        return name, "", ""
    if name not in TARGETS:
        raise InputError(
            f"target is {target!r}: choose {', '.join(TARGETS)}, {SINK}, or give a function (logits, tokens)."
        )
    return name, *TARGETS[name]


def _scanned(model: Model, tokens: Any, scan: Any, seed: int, progress: bool) -> xr.DataTree | xr.Dataset:
    if scan is not None:
        return scan
    tell("scanning its heads", progress)
    return scan_model(model, tokens, seed=seed, progress=progress and has_bars())


def _sink_metric(labels: dict[Part, list[str]]) -> ScanMetric:
    """How much the heads that are labelled so look at position 0."""
    heads = [part_name(head) for head, names in labels.items() if SINK in names]
    if not heads:
        raise InputError(f"target is {SINK!r}, and no head of the model is labelled so: choose another.")
    return scan_metric("first_token", heads=heads)


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
