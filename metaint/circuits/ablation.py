"""Taking parts out and looking at what becomes of a metric: `ablate`, for heads, MLPs, whole layers and sets of them.

In: a model, tokens, parts and what stands in for them. Out: effects, the metric after minus before, with bootstrap
intervals over sequences, beside those of random heads of the same layers. Source of "pattern_preserving": Olsson et al.
2022, "In-context Learning and Induction Heads".
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from metaint.circuits.beside import PartSet, check_random, heads_beside, sets_beside
from metaint.circuits.experiment import interval, run, set_up
from metaint.circuits.metrics import MetricFunction
from metaint.circuits.parts import Head, Named, chosen_parts, named_sets
from metaint.circuits.race import THRESHOLD, Rules
from metaint.circuits.raced import raced
from metaint.circuits.scan_metrics import ScanMetric
from metaint.circuits.subject import subject_of
from metaint.errors import door
from metaint.models.audit import require
from metaint.models.describe import Shape
from metaint.models.protocol import Model

# By set of parts, mean, low and high of its effect.
Effects = Mapping[PartSet, np.ndarray]
# A mean and the interval around it.
_ENDS = ("", "_low", "_high")
# By kind of part, the variable that holds its effects, and what it is.
_VARIABLES = {
    "head": ("effect", "the head"),
    "mlp": ("mlp_effect", "the MLP"),
    "attn": ("attn_effect", "all heads of the layer"),
}


@door
def ablate(
    model: Model,
    tokens: Int[Tensor, "batch position"] | str | None = None,
    parts: Sequence[str] | str | None = None,
    how: str = "mean",
    metric: str | MetricFunction | ScanMetric = "in_context_loss",
    *,
    positions: Iterable[int] | None = None,
    sets: Mapping[str, Sequence[str]] | Sequence[Sequence[str]] | None = None,
    random: int = 8,
    batch_size: int | None = None,
    race: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """What becomes of `metric` when parts are ablated: each of `parts` alone, and each of `sets` together.

    - `tokens`: as in `metaint.scan`; None for repeated random tokens.
    - `parts`: names of heads ("5.1"), MLPs ("mlp 3") and of all heads of a layer together ("attn 3"); "heads", "mlps"
      or "attns" for all of a kind, in the list or in its place. None is every head, or nothing where `sets` are given.
    - `how`: what stands in a part's place, at hook_z of heads (so that the bias b_O of their layer stays, which is no
      head's) and at hook_mlp_out of MLPs (biases and all):
      "mean", its mean over all sequences and positions of `tokens`; "zero", which later layers may never have seen and
      which misleads most in early layers; "resample", what it gives in another of the sequences at the same position
      (each is given once, by `seed`); "pattern_preserving", zero, with all later layers attending as they did before
      (Olsson et al. 2022), so that what is lost is what parts wrote and not where later heads look.
    - `metric`: "in_context_loss", "induction_accuracy", "next_token_loss" (`circuits.metrics`); a function
      (logits [batch, position, vocab], tokens) -> values [batch]; or a variable of a scan, averaged over heads
      (`metaint.scan_metric`), which needs no logits: none are made, and no layer above the last that is read is run.
    - `positions`: ablate there alone, counted from 0 in each sequence, a BOS too; None is everywhere.
    - `sets`: lists of such names, or a mapping with a name for each.
    - `random`: how many random heads, or sets of heads, of the same layers stand beside each, drawn by `seed`; 0 for
      none. Where all heads of a layer are asked for, all the others stand beside each, at no cost.
    - `batch_size`: sequences run at once, copies counted (None: as many as have 4096 tokens).
    - `race`: run on fewer sequences what plainly brings less than 2 % of what all heads do (`circuits/race.py`), with
      an effect of those sequences; `attrs["race"]` says how many of these may bring more.
    - `progress`: show how far it is, and while it races the largest effects so far.

    Gives means over sequences of the metric after minus before, in its own units, with 95 % bootstrap intervals over
    sequences in `_low` and `_high`:

    - `effect` (layer, head), NaN for heads not asked for;
    - `mlp_effect` (layer) and `attn_effect` (layer), where there are such parts, NaN for layers not asked for;
    - `set_effect` (set), where there are sets;
    - `clean`, the metric before;
    - `effect_same_layer_mean`, `effect_same_layer_std` (layer, head): mean and standard deviation of the effects of
      other heads of the layer, one at a time; `set_effect_same_layer` (set, draw): the effect of random sets with as
      many heads in each layer (MLPs of the set stay in it), drawn from heads outside it where enough remain, and their
      `_mean` and `_std` (set). NaN where nothing else can be drawn.

    `attrs["ablated_positions"]` are the positions, or "all"; `attrs["passes"]` tells whether layers below an ablated
    part were run once for all, or why not: hooks that are on the model stay on, and see whole passes.

    Raises InputError for tokens, parts, positions, draws or a metric that cannot be used, a bidirectional model with a
    metric of next tokens among them; HookAuditError where edits at hook_z or hook_mlp_out have no effect, or patterns
    and values do not make z.

    >>> import metaint, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> sink = metaint.scan_metric("first_token", layers=[1])
    >>> tokens = torch.arange(20).view(2, 10)
    >>> effects = metaint.ablate(model, tokens, ["mlp 0", "0.1"], metric=sink, positions=[0])
    >>> effects["mlp_effect"].dims, effects["effect"].dims, effects.attrs["ablated_positions"]
    (('layer',), ('layer', 'head'), [0])
    """
    check_random(random)
    subject = subject_of(model)
    shape = subject.shape
    chosen, named = chosen_parts(shape, parts, sets), named_sets(shape, sets)
    options = {"batch_size": batch_size, "seed": seed, "progress": progress}
    experiment = set_up(subject, tokens, how, metric, positions=positions, **options)
    heads = heads_beside(shape, [(layer, head) for _, layer, head in chosen if head is not None], random, seed)
    draws = sets_beside(shape, named, random, seed)
    asked = [frozenset(parts) for parts in (*(part.parts(shape) for part in chosen), *named.values())]
    beside = [frozenset([head]) for others in heads.values() for head in others]
    beside += [draw for drawn in draws.values() for draw in drawn if draw is not None]
    together = list(dict.fromkeys([*asked, *beside]))
    if any(head is None for parts_of_one in together for _, head in parts_of_one):
        require(model, ["edit_mlp"])
    if race:
        values, outcome = raced(experiment, together, Rules(THRESHOLD, seed=seed))
        experiment.facts["race"] = outcome.sentence("parts")
    else:
        values = run(experiment, together)
    changes = torch.cat([values[:1], values[1:] - values[:1]])
    clean, *rows = interval(changes * experiment.weights, over=experiment.weights[None])
    effects = dict(zip(together, rows, strict=True))
    variables = {**_with_ends("clean", (), clean), **_by_part(shape, chosen, effects)}
    variables |= _beside_heads(shape, heads, effects)
    coords: dict[str, Any] = {"layer": subject.layers, "head": range(shape.n_heads)}
    if named:
        coords["set"] = list(named)
        of_sets = np.transpose([effects[frozenset(parts)] for parts in named.values()])
        variables |= {**_with_ends("set_effect", ("set",), of_sets), **_beside_sets(draws, effects)}
    data = xr.Dataset(variables, coords, {**subject.facts, **experiment.facts, "random": random})
    data.attrs["ablated_positions"] = "all"
    if experiment.at is not None:
        data.attrs["ablated_positions"] = experiment.at.nonzero().flatten().tolist()
    _describe(data, experiment.metric.name, how)
    return data


def _describe(data: xr.Dataset, metric: str, how: str) -> None:
    """What each effect is of, as attributes."""
    for name, part in (*_VARIABLES.values(), ("set_effect", "all parts of the set")):
        if name in data:
            data[name].attrs["description"] = f"{metric} with {part} ablated ({how}), minus without"
    for name, what in (
        ("effect", "other heads of the layer"),
        ("set_effect", "random sets of heads of the same layers"),
    ):
        for end, word in (("_mean", "mean"), ("_std", "standard deviation")):
            if f"{name}_same_layer{end}" in data:
                data[f"{name}_same_layer{end}"].attrs["description"] = f"{word} of the effects of {what}"
    data["clean"].attrs["description"] = f"{metric} of the model as it is"


def _with_ends(name: str, dims: tuple[str, ...], values: np.ndarray) -> dict[str, Any]:
    """A mean and the ends of its interval as three variables."""
    return {f"{name}{end}": (dims, value) for end, value in zip(_ENDS, values, strict=True)}


def _beside_heads(shape: Shape, heads: Mapping[Head, Sequence[Head]], effects: Effects) -> dict[str, Any]:
    """Mean and spread of the heads beside each, as variables."""
    mean, std = np.full((2, shape.n_layers, shape.n_heads), np.nan)
    for head, others in heads.items():
        values = np.array([effects[frozenset([other])][0] for other in others])
        mean[head], std[head] = _mean_and_std(values)
    dims = ("layer", "head")
    return {"effect_same_layer_mean": (dims, mean), "effect_same_layer_std": (dims, std)}


def _beside_sets(draws: Mapping[str, Sequence[PartSet | None]], effects: Effects) -> dict[str, Any]:
    """The draws beside each set, their mean and spread, as variables."""
    rows = [[np.nan if draw is None else effects[draw][0] for draw in drawn] for drawn in draws.values()]
    values = np.array(rows, dtype=float).reshape(len(draws), -1)
    mean, std = np.transpose([_mean_and_std(row) for row in values])
    name = "set_effect_same_layer"
    return {name: (("set", "draw"), values), f"{name}_mean": (("set",), mean), f"{name}_std": (("set",), std)}


def _mean_and_std(values: np.ndarray) -> tuple[float, float]:
    """Of those that are known; NaN for none, and the deviation for fewer than two."""
    known = values[~np.isnan(values)]
    mean = float(known.mean()) if len(known) else np.nan
    return mean, float(known.std(ddof=1)) if len(known) > 1 else np.nan


def _by_part(shape: Shape, chosen: Sequence[Named], effects: Effects) -> dict[str, Any]:
    """The effects of single parts as variables, NaN for those not asked for: of heads always, else where there are."""
    dims = {"head": ("layer", "head"), "mlp": ("layer",), "attn": ("layer",)}
    sizes = {"layer": shape.n_layers, "head": shape.n_heads}
    values: dict[str, np.ndarray] = {}
    for kind, names in dims.items():
        values[kind] = np.full((len(_ENDS), *(sizes[name] for name in names)), np.nan)
    for part in chosen:
        place = (part.layer,) if part.head is None else (part.layer, part.head)
        values[part.kind][(slice(None), *place)] = effects[frozenset(part.parts(shape))]
    asked = {"head", *(part.kind for part in chosen)}
    variables: dict[str, Any] = {}
    for kind, (name, _) in _VARIABLES.items():
        if kind in asked:
            variables |= _with_ends(name, dims[kind], values[kind])
    return variables
