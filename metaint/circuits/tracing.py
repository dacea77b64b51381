"""A trace in stages: parts, heads that stand in for each other, paths, the test; and the graph of what is known so far.

In: an experiment, and which heads have which labels. Out: a graph. Whatever a stage measures goes through the
experiment's ledger, and the graph is made from that: a trace that was cut short gives what it knows, marked unfinished.
"""

from dataclasses import dataclass, field
from typing import Any

import networkx
import xarray as xr
from torch import Tensor

from metaint.circuits.checks import Whole, check, nothing_to_explain
from metaint.circuits.counting import (
    at_first_position,
    by_ends,
    chosen,
    known_parts,
    known_paths,
    members_of,
    paths_between,
    race_parts,
    race_paths,
)
from metaint.circuits.experiment import CLEAN, Experiment, interval, name_of_set, run
from metaint.circuits.graph import Effect, add_edges, add_nodes
from metaint.circuits.groups import Group, stand_ins
from metaint.circuits.parts import Part, part_name
from metaint.circuits.paths import EMBEDDING, LOGITS, Node, Path, wiring_of
from metaint.circuits.race import FEW, JUDGED, Rules
from metaint.models.reading import Unavailable

# A part of whose effect this much is there where it is ablated at position 0 alone matters there alone.
_AT_FIRST = 0.8
UNFINISHED = "unfinished"


@dataclass
class Trace:
    """What is traced, and what is known of it; `stage` is what is being measured, "" once all is."""

    experiment: Experiment
    heads: xr.Dataset
    labels: dict[Part, list[str]]
    label: str
    target: str
    rules: Rules
    random: int
    least: float
    stage: str = "all heads"
    why: str = ""
    race: list[str] = field(default_factory=list)
    group: Group | None = None
    first: dict[Part, float] = field(default_factory=dict)
    paths: list[Path] = field(default_factory=list)
    closer: list[Path] = field(default_factory=list)
    followed: str = ""
    tested: xr.Dataset | None = None

    def __post_init__(self) -> None:
        subject = self.experiment.subject
        self.parts: list[Part] = [*subject.heads]
        self.parts += [(layer, None) for layer in subject.layers if subject.has_mlps]
        self.labelled = {head for head, names in self.labels.items() if self.label in names}
        self.whole = Whole(subject.heads)
        if self.experiment.patterns is not None:  # where heads look, MLPs decide too
            self.whole = Whole(self.parts, "all heads and MLPs")
        if len(self.parts) <= FEW:
            self.rules = Rules(self.rules.threshold, most=self.rules.most, seed=self.rules.seed, on=False)

    # ---- stages --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Every stage."""
        experiment, rules = self.experiment, self.rules
        run(experiment, [self.whole.parts], what=self.whole.name)
        total = self.total()
        self.stage = "parts"
        outcome = race_parts(experiment, self.parts, self.labelled, total, rules)
        self._note(outcome.sentence("parts"))
        self.why = nothing_to_explain(experiment, total, self.whole.name)
        if not self.why:
            self._run_within(total)
        self.stage = "the test"
        self._test(total)
        self.stage = ""

    def _run_within(self, total: Tensor) -> None:
        """What comes after the parts are known."""
        experiment, rules = self.experiment, self.rules
        few = min(JUDGED, len(total)) if rules.on else len(total)
        self.stage = "heads together"
        self.group = stand_ins(experiment, sorted(self.labelled, key=str), total, rules.threshold, few)
        effects = self._chosen(total)
        self.stage = "positions"
        counting = [part for part, effect in effects.items() if effect.counts(rules.threshold)]
        if counting:
            self.first = at_first_position(experiment, counting, few)
        self.stage = "paths"
        if not effects:
            return
        if experiment.patterns is not None:
            self.followed = "not followed: they are cut for predictions, and the target is where heads look"
            return
        try:
            wiring = wiring_of(experiment.subject, int(experiment.tokens.shape[1]))
        except Unavailable as reason:
            self.followed = f"not followed: {reason}"
            return
        self.paths, self.followed = paths_between(experiment, wiring, list(effects))
        outcome, self.closer = race_paths(experiment, wiring, self.paths, total, rules)
        self._note(outcome.sentence("paths"))

    def _test(self, total: Tensor) -> None:
        """Whether what was found is a circuit."""
        circuit = [part for part in self._members(total)[0] if part in self.whole.parts]
        of_target = circuit if not self.label else self.labelled.intersection(circuit)
        if not self.why and not of_target:
            self.why = _none_counts(self.experiment, self.labelled, self.label, total)
        if not self.why:
            options = {"race": self.rules.on, "whole": self.whole}
            self.tested = check(self.experiment, circuit, self.random, self.rules.seed, self.least, **options)

    def _note(self, sentence: str) -> None:
        self.race += [sentence] if sentence else []

    # ---- what is known -------------------------------------------------------------------------------------------

    def total(self) -> Tensor:
        """What ablating all that a circuit is part of does, by sequence, as far as that is known."""
        experiment = self.experiment
        every = name_of_set(experiment, self.whole.parts)
        upto = min(experiment.ledger.count(every), len(experiment.tokens))
        values = experiment.ledger.table([CLEAN, every], upto)
        return values[1] - values[0]

    def _chosen(self, total: Tensor) -> dict[Part, Effect]:
        """The parts that a circuit is made of, if they hold together."""
        effects = known_parts(self.experiment, self.parts, total)
        labelled = set(self.labelled)
        if self.group is not None:
            labelled |= set(self.group.heads)
        return {part: effects[part] for part in chosen(effects, labelled, self.rules.threshold, self.rules.most)}

    def _members(self, total: Tensor) -> tuple[dict[Part, Effect], dict[tuple[Node, Node], dict[str, Effect]]]:
        """The parts of the circuit, and the paths between them."""
        if self.why or len(total) < 2:
            return {}, {}
        threshold, experiment = self.rules.threshold, self.experiment
        parts = self._chosen(total)
        effects, closer = (known_paths(experiment, paths, total) for paths in (self.paths, self.closer))
        paths = by_ends(effects, closer, threshold)
        together = () if self.group is None else self.group.heads
        members = members_of(parts, list(paths), self.labelled, self.label, threshold, together)
        return {part: parts[part] for part in members}, paths

    def graph(self) -> networkx.DiGraph:
        """The circuit as far as it is known."""
        experiment, rules, subject = self.experiment, self.rules, self.experiment.subject
        members, paths = self._members(self.total())
        facts = {**subject.facts, **experiment.facts, "threshold": float(rules.threshold), "paths": self.followed}
        graph = networkx.DiGraph(**facts)
        graph.graph["target"] = self.target or experiment.metric.name
        graph.graph["whole"] = self.whole.name
        graph.graph.update(d_model=subject.shape.d_model, parallel_attn_mlp=subject.shape.sublayers == "parallel")
        graph.graph.update(race="; ".join(self.race), finished=not self.stage)
        add_nodes(graph, subject, self.heads, self.labels, members)
        nodes = {*members, EMBEDDING, LOGITS}
        add_edges(graph, subject, {ends: effects for ends, effects in paths.items() if nodes.issuperset(ends)})
        for part, share in self.first.items():
            if part in members:
                graph.nodes[part_name(part)].update(
                    first_position=share, positions="first" if share >= _AT_FIRST else "all"
                )
        self._add_group(graph)
        graph.graph.update(self._verdict())
        return graph

    def _add_group(self, graph: networkx.DiGraph) -> None:
        if self.group is None:
            return
        graph.graph["groups"] = self.group.sentence(self.experiment.metric.name)
        for part, gain in zip(self.group.heads, self.group.gains, strict=True):
            if (name := part_name(part)) in graph:
                graph.nodes[name].update(group=1, gain=gain.effect, gain_share=gain.share)

    def _verdict(self) -> dict[str, Any]:
        """Whether heads are a circuit, as attributes of the graph."""
        if self.stage:
            why = f"Stopped while measuring {self.stage}, so that nothing is said of what was not measured yet."
            return {"found": False, "verdict": UNFINISHED, "why": why}
        if self.why or self.tested is None:
            return {"found": False, "verdict": "not found", "why": self.why}
        tested = self.tested
        attributes: dict[str, Any] = {name: float(tested[name]) for name in ("clean", "ablated")}
        for name in ("faithfulness", "completeness"):
            attributes |= {name + end: float(tested[name + end]) for end in ("", "_low", "_high")}
            if tested.sizes["random"]:
                attributes[f"random_{name}_mean"] = float(tested[f"random_{name}"].mean())
                attributes[f"random_{name}_max"] = float(tested[f"random_{name}"].max())
        attributes |= {name: bool(tested.attrs[name]) for name in ("found", "better_than_random")}
        attributes |= {name: tested.attrs[name] for name in ("verdict", "least", "why")}
        return {**attributes, "random": tested.sizes["random"]}


def _none_counts(experiment: Experiment, labelled: set[Part], label: str, total: Tensor) -> str:
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
