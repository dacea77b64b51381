"""Whether a set of heads is a circuit: does it do alone what the model does, is little left without it, and would any
other heads do as well?

In: a model, tokens and heads. Out: faithfulness, completeness and the same of random circuits. After Wang et al. 2022,
"Interpretability in the Wild", for the two questions; both are put here as shares of what all heads bring.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from metaint.circuits.experiment import Experiment, interval, run, set_up
from metaint.circuits.metrics import MetricFunction
from metaint.circuits.parts import all_heads
from metaint.circuits.scan_metrics import ScanMetric
from metaint.errors import InputError
from metaint.models.describe import facts_of
from metaint.models.heads import head_of

# A circuit beats random ones if at most this share of them does as well.
LEVEL = 0.05
# Random circuits, from the most to the least like: the first kind of which there are `ENOUGH` is drawn from.
KINDS = (
    "of other heads, as many in each layer",
    "of as many other heads",
    "of as many heads, some of its own among them",
)
ENOUGH = 5
Head = tuple[int, int]


def check_circuit(
    model: Any,
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

    `faithfulness`: of what all heads together bring to the metric, the share that is there with every other head
    ablated; 1 is a circuit that does it alone, 0 one that does nothing, and below 0 or above 1 heads pull against each
    other. `completeness`: the share that is lost with the circuit alone ablated; below 1 other heads can do without it.
    What all heads bring is the metric of the model minus that with all heads ablated; MLPs stay. Each with a 95 %
    bootstrap interval over sequences, `_low` and `_high`. `random_faithfulness` and `random_completeness` (random) are
    those of up to `random` circuits of other heads with as many in each layer, none drawn twice; where there are fewer
    than 5, of as many other heads in any layers, or else of as many of all heads (then faithfulness alone is compared,
    since without one of its heads most circuits are lost). `attrs["found"]` is 1 where both shares are above 0
    and at most 5 % of these do as well in either respect (with none to compare with, where both are above one half),
    each with its interval, and where what all heads bring is more than chance; `attrs["why"]` says it in a sentence.

    Raises InputError as `ablate` does, and for no heads.
    """
    if isinstance(heads, str) or not heads:
        raise InputError(f'heads is {heads!r}: give a list of names such as ["0.1", "5.1"].')
    if random < 0:
        raise InputError(f"random is {random}: give how many random circuits to compare with, or 0.")
    circuit = sorted({head_of(model, name) for name in heads})
    experiment = set_up(model, tokens, how, metric, batch_size=batch_size, seed=seed, progress=progress)
    return check(experiment, circuit, random, seed)


def check(experiment: Experiment, circuit: Sequence[Head], random: int, seed: int) -> xr.Dataset:
    """`check_circuit` within an experiment."""
    model = experiment.model
    every = all_heads(model)
    others, kind = random_circuits(model, circuit, random, seed)
    sets = [set(circuit), *map(set, others)]
    weights = experiment.weights[None]
    values = weights * run(experiment, [every, *(set(every) - some for some in sets), *sets])
    clean, empty = values[:1], values[1:2]
    alone, without = values[2:].split(len(sets))
    bring = interval(clean - empty, over=weights)[0]
    kept = interval(alone - empty, over=clean - empty)
    lost = interval(clean - without, over=clean - empty)
    data = xr.Dataset(coords={"random": range(len(others))})
    for name, found in (("faithfulness", kept), ("completeness", lost)):
        for suffix, number in zip(("", "_low", "_high"), found[0], strict=True):
            data[name + suffix] = number
        data[f"random_{name}"] = (("random",), found[1:, 0])
    for suffix, number in zip(("", "_low", "_high"), bring, strict=True):
        data[f"all_heads{suffix}"] = number
    data["clean"], data["ablated"] = interval(clean, over=weights)[0, 0], interval(empty, over=weights)[0, 0]
    found, why = False, nothing_to_explain(experiment, (empty - clean)[0])
    if not why:
        found, why = _verdict(data, experiment.metric.name, kind, len(circuit) == len(every))
    data.attrs = {**facts_of(model), **experiment.facts, "heads": ", ".join(f"{i}.{j}" for i, j in circuit)}
    data.attrs |= {"found": int(found), "why": why}
    return data


def random_circuits(model: Any, circuit: Sequence[Head], count: int, seed: int) -> tuple[list[list[Head]], str]:
    """Up to `count` other circuits of as many heads, and of what kind they are: one of `KINDS`."""
    every = all_heads(model)
    free = [head for head in every if head not in circuit]
    layers = range(int(model.cfg.n_layers))
    sizes = [sum(layer == i for layer, _ in circuit) for i in layers]
    pools = [([[head for head in free if head[0] == i] for i in layers], sizes), ([free], [len(circuit)])]
    pools.append(([every], [len(circuit)]))
    counts = [math.prod(math.comb(len(group), n) for group, n in zip(*pool, strict=True)) for pool in pools]
    chosen = next((i for i, possible in enumerate(counts) if possible >= ENOUGH), len(pools) - 1)
    (groups, wanted), possible, kind = pools[chosen], counts[chosen], KINDS[chosen]
    rng = np.random.default_rng(seed)
    if possible <= count + 1:
        return [some for some in _products(groups, wanted) if set(some) != set(circuit)][:count], kind
    seen, found = {frozenset(circuit)}, []
    while len(found) < count:
        drawn = [
            group[i] for group, size in zip(groups, wanted, strict=True) for i in rng.permutation(len(group))[:size]
        ]
        if frozenset(drawn) not in seen:
            seen.add(frozenset(drawn))
            found.append(sorted(drawn))
    return found, kind


def _products(groups: Sequence[Sequence[Head]], sizes: Sequence[int]) -> list[list[Head]]:
    """Every choice of so many heads of each group."""
    found: list[list[Head]] = [[]]
    for group, size in zip(groups, sizes, strict=True):
        found = [[*some, *more] for some in found for more in combinations(group, size)]
    return found


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
    """Whether the circuit is one, and what was found in a sentence."""
    said = [f"{_percent(data, 'faithfulness')} of what all heads bring to {metric} is there with the circuit alone"]
    said.append(f"{_percent(data, 'completeness')} is lost without it")
    count, low = data.sizes["random"], min(float(data["faithfulness_low"]), float(data["completeness_low"]))
    if count == 0:
        why = "every head is in it" if whole else "no random circuit was asked for"
        return low > 0.5, f"{'; '.join(said)}; {why}, so that it is compared with no other."
    kept, lost = (int((data[f"random_{name}"] >= data[name]).sum()) for name in ("faithfulness", "completeness"))
    said.append(f"of {count} random circuits {kind}, {kept} bring as much alone and {lost} lose as much")
    beats = max(kept, 0 if kind == KINDS[-1] else lost) <= LEVEL * count
    if low <= 0:
        said.append("not found, since one of both shares may be 0")
    elif not beats:
        said.append("not found, since random circuits do as well")
    return beats and low > 0, f"{'; '.join(said)}."


def _percent(data: xr.Dataset, name: str) -> str:
    low, middle, high = (round(100 * float(data[name + suffix])) for suffix in ("_low", "", "_high"))
    return f"{middle} % ({low} to {high} %)"
