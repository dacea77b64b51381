"""Taking heads out and looking at what becomes of a metric: `ablate`, for single heads and for sets of them.

In: a model, tokens, heads and what stands in for them. Out: effects, the metric after minus before, with bootstrap
intervals over sequences. Source of "pattern-preserving": Olsson et al. 2022, "In-context Learning and Induction Heads".
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from metaint.circuits.experiment import all_heads, interval, run, set_up
from metaint.circuits.metrics import MetricFunction
from metaint.errors import InputError
from metaint.models.describe import facts_of
from metaint.models.memory import head_of

# A mean and the interval around it.
_ENDS = ("", "_low", "_high")


def ablate(
    model: Any,
    tokens: Int[Tensor, "batch position"] | str | None = None,
    heads: Sequence[str] | None = None,
    how: str = "zero",
    metric: str | MetricFunction = "in_context_loss",
    *,
    sets: Mapping[str, Sequence[str]] | Sequence[Sequence[str]] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """What becomes of `metric` when heads are ablated: each of `heads` alone, and each of `sets` together.

    `heads` are names such as "5.1"; None for every head, or for none where `sets` are given. `sets` are lists of
    names, or a mapping with a name for each. `how` says what stands at hook_z in a head's place: "zero"; "mean", its
    mean over all sequences and positions of `tokens`; "resample", what it gives in another of the sequences at the
    same position (each is given once, by `seed`); "pattern-preserving", zero, with all later layers attending as
    they did before (Olsson et al. 2022), so that what is lost is what heads moved and not where later ones look.
    `metric` is "in_context_loss", "induction_accuracy", "next_token_loss" (`circuits.metrics`), or a function
    (logits [batch, position, vocab], tokens) -> values [batch]. `tokens` are as in `metaint.scan`; None for repeated
    random tokens. `batch_size` sequences are run at once, copies counted (None: as many as have 4096 tokens).

    `effect` (layer, head), NaN for heads not asked for, and `set_effect` (set) are means over sequences of the metric
    after minus before, in its own units, with 95 % bootstrap intervals over sequences in `_low` and `_high`; so is
    `clean`, the metric before. `attrs["passes"]` tells whether layers below an ablated head were run once for all, or
    why not: hooks that are on the model stay on, and see whole passes.

    Raises InputError for tokens, heads, or a metric that can't be used, a bidirectional model without a metric of its
    own among them; HookAuditError where edits at hook_z have no effect, or patterns and values don't make z.
    """
    experiment = set_up(model, tokens, how, metric, batch_size=batch_size, seed=seed, progress=progress)
    chosen, named = _heads(model, heads, sets), _sets(model, sets)
    values = run(experiment, [*([part] for part in chosen), *named.values()])
    clean, *effects = interval(torch.cat([values[:1], values[1:] - values[:1]]))
    single = np.full((3, int(model.cfg.n_layers), int(model.cfg.n_heads)), np.nan)
    for (layer, head), effect in zip(chosen, effects, strict=False):
        single[:, layer, head] = effect
    variables: dict[str, Any] = {f"clean{end}": value for end, value in zip(_ENDS, clean, strict=True)}
    variables |= {f"effect{end}": (("layer", "head"), value) for end, value in zip(_ENDS, single, strict=True)}
    coords: dict[str, Any] = {"layer": range(single.shape[1]), "head": range(single.shape[2])}
    if named:
        coords["set"] = list(named)
        together = np.transpose(effects[len(chosen) :])
        variables |= {f"set_effect{end}": (("set",), value) for end, value in zip(_ENDS, together, strict=True)}
    data = xr.Dataset(variables, coords, {**facts_of(model), **experiment.facts})
    data["effect"].attrs["description"] = f"{experiment.metric.name} with the head ablated ({how}), minus without"
    data["clean"].attrs["description"] = f"{experiment.metric.name} of the model as it is"
    return data


# ---- names -------------------------------------------------------------------------------------------------------


def _heads(model: Any, heads: Sequence[str] | None, sets: Any) -> list[tuple[int, int]]:
    if heads is None:
        return all_heads(model) if sets is None else []
    if isinstance(heads, str) or (not heads and not sets):
        raise InputError(f'heads is {heads!r}: give a list of names such as ["5.1", "5.5"], or None for every head.')
    return list(dict.fromkeys(head_of(model, name) for name in heads))


def _sets(model: Any, sets: Any) -> dict[str, frozenset[tuple[int, int]]]:
    if sets is None:
        return {}
    named = sets if isinstance(sets, Mapping) else {"+".join(map(str, names)): names for names in sets}
    for name, names in named.items():
        if isinstance(names, str) or not names:
            raise InputError(f'sets has {names!r} for {name!r}: give each as a list of heads, such as ["0.1", "5.1"].')
    return {str(name): frozenset(head_of(model, head) for head in names) for name, names in named.items()}
