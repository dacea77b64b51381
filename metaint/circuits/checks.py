"""Whether a set of heads is a circuit: does it do alone what the model does, is little left without it, and would any
other heads do as well?

In: a model, tokens and heads. Out: faithfulness, completeness and the same of random circuits. After Wang et al. 2022,
"Interpretability in the Wild", for the two questions; both are put here as shares of what all heads bring.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from metaint.circuits.experiment import Experiment, interval, run, set_up
from metaint.circuits.metrics import MetricFunction
from metaint.circuits.parts import Part, part_name
from metaint.circuits.random_circuits import KINDS, random_circuits
from metaint.circuits.scan_metrics import ScanMetric
from metaint.circuits.subject import subject_of
from metaint.errors import InputError, door
from metaint.models.protocol import Model

# A circuit beats random ones if at most this share of them does as well.
LEVEL = 0.05
# A circuit is found from this share on, of what all heads bring, in both respects.
LEAST = 0.5
VERDICTS = ("found", "part of a circuit", "not found")
# In a trace that races, so many random circuits on so many sequences are enough where they are plain: where none does
# half as well as the circuit, or more than this share of them as well.
PLAIN_CIRCUITS, PLAIN_SEQUENCES, PLAIN_SHARE = 20, 4, 0.25
# A share and the interval around it.
_ENDS = ("", "_low", "_high")


class Whole(NamedTuple):
    """What a circuit is part of, and what that is called."""

    parts: Sequence[Part]
    name: str = "all heads"


@door
def check_circuit(
    model: Model,
    heads: Sequence[str],
    tokens: Int[Tensor, "batch position"] | str | None = None,
    how: str = "mean",
    metric: str | MetricFunction | ScanMetric = "in_context_loss",
    *,
    random: int = 50,
    least: float = LEAST,
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
    - `attrs["verdict"]`, one of three: "not found" where one of both shares may be 0, where more than 5 % of the random
      circuits do as well in either respect, or where what all heads bring is no more than chance; else "found" where
      both shares are at least `least`, or "part of a circuit" (with none to compare with, "found" where both intervals
      are above `least`). `attrs["better_than_random"]` is 1 or 0, `attrs["found"]` 1 for "found" alone, and
      `attrs["why"]` says it in a sentence.

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
    check_least(least)
    subject = subject_of(model)
    circuit = sorted({subject.head(name) for name in heads})
    experiment = set_up(subject, tokens, how, metric, batch_size=batch_size, seed=seed, progress=progress)
    return check(experiment, circuit, random, seed, least)


def check_least(least: float) -> None:
    """InputError for a share that no circuit can be asked for."""
    if not 0 <= least < 1:
        raise InputError(f"least is {least}: give the share of what all heads bring from which on a circuit is found.")


def check(
    experiment: Experiment,
    circuit: Sequence[Part],
    random: int,
    seed: int,
    least: float = LEAST,
    *,
    race: bool = False,
    whole: Whole | None = None,
) -> xr.Dataset:
    """`check_circuit` within an experiment; with `race`, few random circuits on few sequences where these are plain.

    `whole` is what the circuit is part of, by default all heads.
    """
    whole = Whole(experiment.subject.heads) if whole is None else whole
    every = whole.parts
    others, kind = random_circuits(every, circuit, random, seed)
    circuit_alone = _shares(experiment, every, [circuit], None)
    compared = _compared(experiment, every, circuit, others, race)
    data = xr.Dataset(coords={"random": range(compared["faithfulness"].shape[0] - 1)})
    for name, rows in circuit_alone.items():
        data = data.assign(_with_ends(name, rows[0]))
        data[f"random_{name}"] = (("random",), compared[name][1:, 0])
    clean, empty = experiment.weights[None] * run(experiment, [every])
    weights = experiment.weights[None]
    data = data.assign(_with_ends("all_heads", interval((clean - empty)[None], over=weights)[0]))
    ends = interval(torch.stack([clean, empty]), over=weights)
    data["clean"], data["ablated"] = ends[:, 0]
    why, verdict, better = nothing_to_explain(experiment, empty - clean, whole.name), VERDICTS[-1], False
    if not why:
        own = {name: float(rows[0, 0]) for name, rows in compared.items()}
        told = f"what {whole.name} bring to {experiment.metric.name}"
        verdict, better, why = _verdict(data, own, told, kind, len(circuit) == len(every), least)
    data.attrs = {**experiment.subject.facts, **experiment.facts, "heads": ", ".join(map(part_name, circuit))}
    data.attrs |= {"found": int(verdict == VERDICTS[0]), "verdict": verdict, "better_than_random": int(better)}
    data.attrs |= {"least": float(least), "why": why}
    return data


def _shares(
    experiment: Experiment, every: Sequence[Part], circuits: Sequence[Sequence[Part]], upto: int | None
) -> dict[str, np.ndarray]:
    """Faithfulness and completeness of circuits, each with mean, low and high [circuit, 3]."""
    sets = [set(heads) for heads in circuits]
    values = run(experiment, [every, *(set(every) - heads for heads in sets), *sets], upto, "circuits")
    values = values * experiment.weights[None, : values.shape[1]]
    clean, empty = values[:1], values[1:2]
    alone, without = values[2:].split(len(sets))
    return {
        "faithfulness": interval(alone - empty, over=clean - empty),
        "completeness": interval(clean - without, over=clean - empty),
    }


def _compared(
    experiment: Experiment,
    every: Sequence[Part],
    circuit: Sequence[Part],
    others: Sequence[Sequence[Part]],
    race: bool,
) -> dict[str, np.ndarray]:
    """The shares of the circuit, in the first row, and of random ones, all on the same sequences."""
    if not race:
        return _shares(experiment, every, [circuit, *others], None)
    upto = min(PLAIN_SEQUENCES, len(experiment.tokens))
    few = _shares(experiment, every, [circuit, *others[:PLAIN_CIRCUITS]], upto)
    if len(others) <= PLAIN_CIRCUITS or all(_plain(rows[:, 0]) for rows in few.values()):
        return few
    return _shares(experiment, every, [circuit, *others], upto)


def _plain(shares: np.ndarray) -> bool:
    """Whether a few random circuits tell how the first compares with many."""
    own, others = shares[0], shares[1:]
    return bool(others.max() < own / 2) or float((others >= own).mean()) > PLAIN_SHARE


def _with_ends(name: str, values: Sequence[float]) -> dict[str, float]:
    """A share and the ends of its interval as three variables."""
    return {name + end: value for end, value in zip(_ENDS, values, strict=True)}


def nothing_to_explain(experiment: Experiment, total: Float[Tensor, " sequence"], whole: str = "all heads") -> str:
    """Why there can be no circuit, given what taking out all heads does to the metric of each sequence; or ""."""
    mean, low, high = interval(total[None])[0]
    name = experiment.metric.name
    if not (low > 0 or high < 0):
        return f"Taking out {whole} changes {name} by no more than chance, so there is nothing to explain."
    if mean * {"lower": 1, "higher": -1, "": mean}[experiment.metric.better] < 0:
        return f"Taking out {whole} makes {name} better, so there is nothing to explain."
    return ""


def _verdict(
    data: xr.Dataset, own: dict[str, float], brought: str, kind: str, is_all: bool, least: float
) -> tuple[str, bool, str]:
    """One of `VERDICTS`, whether the circuit beats random ones, and why, in a sentence; `own` are its shares on the
    sequences on which those were measured."""
    found, part, missing = VERDICTS
    clauses = [f"{_percent(data, 'faithfulness')} of {brought} is there with the circuit alone"]
    clauses.append(f"{_percent(data, 'completeness')} is lost without it")
    count, low = data.sizes["random"], min(float(data["faithfulness_low"]), float(data["completeness_low"]))
    if count == 0:
        why = "every head is in it" if is_all else "no random circuit was asked for"
        why = f"{'; '.join(clauses)}; {why}, so that it is compared with no other."
        return found if low > least else part if low > 0 else missing, False, why
    as_faithful, as_complete = (int((data[f"random_{name}"] >= share).sum()) for name, share in own.items())
    as_well = f"{as_faithful} bring as much alone and {as_complete} lose as much"
    clauses.append(f"of {count} random circuits {kind}, {as_well}")
    beats = as_faithful <= LEVEL * count and (as_complete <= LEVEL * count or kind == KINDS[-1])
    enough = min(float(data["faithfulness"]), float(data["completeness"])) >= least
    verdict = missing if low <= 0 or not beats else found if enough else part
    if low <= 0:
        clauses.append("not found, since one of both shares may be 0")
    elif not beats:
        clauses.append("not found, since random circuits do as well")
    elif not enough:
        clauses.append(f"part of a circuit, since one of both shares is below {100 * least:g} %")
    return verdict, beats, f"{'; '.join(clauses)}."


def _percent(data: xr.Dataset, name: str) -> str:
    low, middle, high = (round(100 * float(data[name + suffix])) for suffix in ("_low", "", "_high"))
    return f"{middle} % ({low} to {high} %)"
