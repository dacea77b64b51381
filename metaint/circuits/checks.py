"""Whether a set of heads is a circuit: does it do alone what the model does, is little left without it, and would any
other heads do as well?

In: a model, tokens and heads. Out: faithfulness, completeness and the same of random circuits. After Wang et al. 2022,
"Interpretability in the Wild", for the two questions; both are put here as shares of what all heads bring.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from metaint.circuits.experiment import Experiment, interval, run, set_up
from metaint.circuits.metrics import MetricFunction
from metaint.circuits.parts import Head, all_heads, part_name
from metaint.circuits.scan_metrics import ScanMetric
from metaint.circuits.subject import subject_of
from metaint.errors import InputError, door
from metaint.models.describe import Shape
from metaint.models.protocol import Model

# A circuit beats random ones if at most this share of them does as well.
LEVEL = 0.05
# Random circuits, from the most to the least like: the first kind of which there are `ENOUGH` is drawn from.
KINDS = (
    "of other heads, as many in each layer",
    "of as many other heads",
    "of as many heads, some of its own among them",
)
ENOUGH = 5
# A share and the interval around it.
_ENDS = ("", "_low", "_high")


@door
def check_circuit(
    model: Model,
    heads: Sequence[str],
    tokens: Int[Tensor, "batch position"] | str | None = None,
    how: str = "mean",
    metric: str | MetricFunction | ScanMetric = "in_context_loss",
    *,
    random: int = 50,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """Test `heads` (names such as "5.1") as a circuit for `metric`; the other arguments are `metaint.ablate`'s.

    Gives, each share with a 95 % bootstrap interval over sequences in `_low` and `_high`:

    - `faithfulness`: the share of what all heads together bring to the metric that is there with every other head
      ablated. 1 is a circuit that does it alone, 0 one that does nothing; below 0 or above 1 heads pull against each
      other.
    - `completeness`: the share that is lost with the circuit alone ablated; below 1 other heads can do without it.
    - `all_heads`: what all heads bring, the metric of the model minus that with all heads ablated, in its own units;
      MLPs stay. `clean` and `ablated` are the two metrics.
    - `random_faithfulness`, `random_completeness` (random): the same of up to `random` circuits of other heads with as
      many in each layer, none drawn twice; where there are fewer than 5, of as many other heads in any layers, or else
      of as many of all heads (then faithfulness alone is compared, since without one of its heads most circuits are
      lost).
    - `attrs["found"]`: 1 where both shares are above 0, each with its interval, at most 5 % of the random circuits do
      as well in either respect (with none to compare with: both above one half), and what all heads bring is more than
      chance. `attrs["why"]` says it in a sentence.

    Raises InputError as `ablate` does, and for no heads. Source: Wang et al. 2022, "Interpretability in the Wild".

    >>> import metaint, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> tokens = metaint.tasks.repeated_tokens(50, 8, batch=4)
    >>> checked = metaint.check_circuit(model, ["0.1", "1.0"], tokens, random=2)
    >>> checked["faithfulness"].dims, checked["random_faithfulness"].sizes["random"], checked.attrs["heads"]
    ((), 2, '0.1, 1.0')
    """
    if isinstance(heads, str) or not heads:
        raise InputError(f'heads is {heads!r}: give a list of names such as ["0.1", "5.1"].')
    if random < 0:
        raise InputError(f"random is {random}: give how many random circuits to compare with, or 0.")
    subject = subject_of(model)
    circuit = sorted({subject.head(name) for name in heads})
    experiment = set_up(subject, tokens, how, metric, batch_size=batch_size, seed=seed, progress=progress)
    return check(experiment, circuit, random, seed)


def check(experiment: Experiment, circuit: Sequence[Head], random: int, seed: int) -> xr.Dataset:
    """`check_circuit` within an experiment."""
    subject = experiment.subject
    every = subject.heads
    others, kind = random_circuits(subject.shape, circuit, random, seed)
    sets = [set(circuit), *map(set, others)]
    weights = experiment.weights[None]
    values = weights * run(experiment, [every, *(set(every) - heads for heads in sets), *sets])
    clean, empty = values[:1], values[1:2]
    alone, without = values[2:].split(len(sets))
    shares = {
        "faithfulness": interval(alone - empty, over=clean - empty),
        "completeness": interval(clean - without, over=clean - empty),
    }
    data = xr.Dataset(coords={"random": range(len(others))})
    for name, rows in shares.items():
        data = data.assign(_with_ends(name, rows[0]))
        data[f"random_{name}"] = (("random",), rows[1:, 0])
    data = data.assign(_with_ends("all_heads", interval(clean - empty, over=weights)[0]))
    data["clean"], data["ablated"] = interval(clean, over=weights)[0, 0], interval(empty, over=weights)[0, 0]
    holds, why = False, nothing_to_explain(experiment, (empty - clean)[0])
    if not why:
        holds, why = _verdict(data, experiment.metric.name, kind, len(circuit) == len(every))
    data.attrs = {**subject.facts, **experiment.facts, "heads": ", ".join(map(part_name, circuit))}
    data.attrs |= {"found": int(holds), "why": why}
    return data


def _with_ends(name: str, values: Sequence[float]) -> dict[str, float]:
    """A share and the ends of its interval as three variables."""
    return {name + end: value for end, value in zip(_ENDS, values, strict=True)}


class _Pool(NamedTuple):
    """Groups of heads, and how many to draw from each."""

    groups: list[list[Head]]
    sizes: list[int]

    @property
    def count(self) -> int:
        """How many choices there are."""
        return math.prod(math.comb(len(group), size) for group, size in zip(self.groups, self.sizes, strict=True))

    def all(self) -> list[list[Head]]:
        """Every choice."""
        choices: list[list[Head]] = [[]]
        for group, size in zip(self.groups, self.sizes, strict=True):
            choices = [[*before, *more] for before in choices for more in combinations(group, size)]
        return choices

    def drawn(self, rng: np.random.Generator) -> list[Head]:
        """One choice at random."""
        heads = []
        for group, size in zip(self.groups, self.sizes, strict=True):
            heads += [group[i] for i in rng.permutation(len(group))[:size]]
        return heads


def random_circuits(shape: Shape, circuit: Sequence[Head], count: int, seed: int) -> tuple[list[list[Head]], str]:
    """Up to `count` other circuits of as many heads, and of what kind they are: one of `KINDS`."""
    every = all_heads(shape)
    free = [head for head in every if head not in circuit]
    layers = range(shape.n_layers)
    by_layer = [[head for head in free if head[0] == layer] for layer in layers]
    pools = [
        _Pool(by_layer, [sum(head[0] == layer for head in circuit) for layer in layers]),
        _Pool([free], [len(circuit)]),
        _Pool([every], [len(circuit)]),
    ]
    number = next((i for i, pool in enumerate(pools) if pool.count >= ENOUGH), len(pools) - 1)
    pool, kind = pools[number], KINDS[number]
    if pool.count <= count + 1:
        return [heads for heads in pool.all() if set(heads) != set(circuit)][:count], kind
    rng = np.random.default_rng(seed)
    seen, circuits = {frozenset(circuit)}, []
    while len(circuits) < count:
        heads = pool.drawn(rng)
        if frozenset(heads) not in seen:
            seen.add(frozenset(heads))
            circuits.append(sorted(heads))
    return circuits, kind


def nothing_to_explain(experiment: Experiment, total: Float[Tensor, " sequence"]) -> str:
    """Why there can be no circuit, given what taking out all heads does to the metric of each sequence; or ""."""
    mean, low, high = interval(total[None])[0]
    name = experiment.metric.name
    if not (low > 0 or high < 0):
        return f"Taking out all heads changes {name} by no more than chance, so there is nothing to explain."
    if mean * {"lower": 1, "higher": -1, "": mean}[experiment.metric.better] < 0:
        return f"Taking out all heads makes {name} better, so there is nothing to explain."
    return ""


def _verdict(data: xr.Dataset, metric: str, kind: str, whole: bool) -> tuple[bool, str]:
    """Whether the circuit is one, and why, in a sentence."""
    clauses = [f"{_percent(data, 'faithfulness')} of what all heads bring to {metric} is there with the circuit alone"]
    clauses.append(f"{_percent(data, 'completeness')} is lost without it")
    count, low = data.sizes["random"], min(float(data["faithfulness_low"]), float(data["completeness_low"]))
    if count == 0:
        why = "every head is in it" if whole else "no random circuit was asked for"
        return low > 0.5, f"{'; '.join(clauses)}; {why}, so that it is compared with no other."
    as_faithful = int((data["random_faithfulness"] >= data["faithfulness"]).sum())
    as_complete = int((data["random_completeness"] >= data["completeness"]).sum())
    as_well = f"{as_faithful} bring as much alone and {as_complete} lose as much"
    clauses.append(f"of {count} random circuits {kind}, {as_well}")
    beats = as_faithful <= LEVEL * count and (as_complete <= LEVEL * count or kind == KINDS[-1])
    if low <= 0:
        clauses.append("not found, since one of both shares may be 0")
    elif not beats:
        clauses.append("not found, since random circuits do as well")
    return beats and low > 0, f"{'; '.join(clauses)}."


def _percent(data: xr.Dataset, name: str) -> str:
    low, middle, high = (round(100 * float(data[name + suffix])) for suffix in ("_low", "", "_high"))
    return f"{middle} % ({low} to {high} %)"
