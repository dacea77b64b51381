"""`WeightProbe`: how long the parameters are, how the last step changed them, what each head's weights can do, and
how much a head reads of what earlier ones write, in `/weights`. It hooks nothing, and no pass need follow.
"""

from collections.abc import Iterator
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from metaint.errors import InputError, door
from metaint.measures import growth
from metaint.measures.composition import composition, composition_chance, read_factor, write_factor
from metaint.models.audit import holds
from metaint.models.describe import Shape, by_layer, weight_processing
from metaint.models.folded import folded_layers
from metaint.models.heads import repeat_heads
from metaint.models.parameters import own_parameters, place_of, quantised
from metaint.models.protocol import Model
from metaint.models.reading import quietly
from metaint.probes.probe import Probe
from metaint.probes.weights_variables import DESCRIPTIONS
from metaint.scans.assemble import shaped

PARTS = ("attention", "mlp", "norm")
# Places of parameters outside the blocks, after one for each part of each layer.
_OUTSIDE = ("embedding", "unembedding", "final_norm")
# What is kept for each place; the last three add up to what `growth` makes of a step.
_COUNT, _SQUARE, _CHANGE = 0, 1, slice(2, 5)
_HEADS = ("qk_norm", "ov_norm", "ov_copying", "full_ov_copying")
_NULLS = tuple(f"{name}_null_{end}" for name in ("ov_copying", "full_ov_copying") for end in ("mean", "std"))
_SCORES = (*_HEADS, *_NULLS)
_PAIRS = tuple(f"{kind}_composition{end}" for end in ("", "_z") for kind in "qkv")
_PAIR_DIMS = ("layer", "head", "layer_to", "head_to")
# Of a model with more heads pairs are left out: a thousand heads have a million, at 24 bytes and minutes on a CPU.
MOST_HEADS = 1000
_AUDITS = {
    "qk": ("weights_query", "weights_key"),
    "ov": ("weights_value", "value_mix", "output_sum"),
    "full": ("weights_value", "value_mix", "output_sum", "unembedding"),
    "pairs": ("attention_input", "value_mix", "output_sum"),
}
_STEP = {"step_norm": growth.step_norm, "alignment": growth.alignment, "direction_cosine": growth.direction_cosine}

Variables = dict[str, tuple[tuple[str, ...], Tensor]]


class WeightProbe(Probe):
    """Reads the parameters of a model with raw weights, each time it is attached to; the last reading counts.

    So `metaint.attach` and `metaint.scan` read them as they are at that moment, `metaint.read_cache` not at all. With
    `compare` each reading also tells how the parameters changed since the one before, which is kept on the CPU (a
    copy of the model, which `reset` does not drop): NaN the first time, and to be read with the number of optimiser
    steps in between. Parameters are those the model computes with, biases and gains included, tied ones once; a
    `HookedTransformer` has an unembedding of its own, tied or not. Where the audit doesn't find per-head weights to be
    what their names say, what is told of heads is NaN. Pairs of heads are left out for a model with more than
    `MOST_HEADS`. Merge probes that read the same model.

    Raises InputError for folded and for quantised weights, and with `compare` for a model with other parameters than
    the one before. State: four sums a part of a layer and eight numbers a head in float64, six a pair of heads in
    float32.

    >>> import metaint
    >>> from metaint.toys.small import small_transformer
    >>> sizes = {"n_layers": 2, "n_heads": 2, "d_model": 8, "d_mlp": 16, "d_vocab": 30, "n_ctx": 20}
    >>> model = small_transformer(norm="pre", **sizes)
    >>> scan = metaint.scan(model, probes=[metaint.WeightProbe()])
    >>> scan["weights"]["parameter_norm"].dims
    ('layer', 'part')
    """

    group = "weights"

    places: list[Float[Tensor, "reading slot place"]]
    scores: list[Float[Tensor, "reading score layer head"]]
    pairs: list[Float[Tensor, "reading pair layer head layer_to head_to"]]

    @door
    def __init__(self, compare: bool = False) -> None:
        super().__init__()
        self.compare = compare
        for name in ("places", "scores", "pairs"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self._previous: dict[str, Tensor] = {}
        self._trusted: dict[str, bool] = {}

    def hook_names(self, shape: Shape) -> list[str]:
        return []

    def prepare(self, model: Model) -> None:
        parameters = own_parameters(model)
        _require_raw(model, parameters)
        super().prepare(model)
        if self._previous:
            _require_same(self._previous, parameters)
        self._trusted = {name: all(holds(model, check) for check in checks) for name, checks in _AUDITS.items()}

    def read_weights(self, model: Model) -> None:
        """Read the parameters, in place of what was read of them before."""
        parameters = own_parameters(model)
        with quietly(next(iter(parameters.values())).device.type):
            scores = self._read_heads(model)
            pairs = self._read_pairs(model)
            places = self._read_places(parameters)
        # The last reading takes the place of earlier ones: a model read twice is still one model.
        self.scores, self.places = [scores[None].to(self.device)], [places[None].to(self.device)]
        self.pairs = [] if pairs is None else [pairs[None].to(self.device)]
        self._read_something()

    def _read_places(self, parameters: dict[str, Tensor]) -> Float[Tensor, "slot place"]:
        found = torch.zeros(5, len(PARTS) * self.shape.n_layers + len(_OUTSIDE), dtype=torch.float64)
        for name, parameter in parameters.items():
            place = _place_of(name, self.shape.n_layers)
            # TransformerLens 3 gives a bridge a zero bias here where the model has none, also beside tied weights.
            stand_in = name.endswith("unembed.bias") and not parameter.any()
            found[_COUNT, place] += 0 if stand_in else parameter.numel()
            found[_SQUARE, place] += growth.squared_norm(parameter).cpu()
            if name in self._previous:
                found[_CHANGE, place] += growth.change(self._previous[name], parameter).cpu()
            else:
                found[_CHANGE, place] = torch.nan
        if self.compare:
            for name, parameter in parameters.items():
                self._previous[name] = parameter.detach().to("cpu", copy=True)
        return found

    def _read_heads(self, model: Model) -> Float[Tensor, "score layer head"]:
        n_layers, n_heads = self.shape.n_layers, self.shape.n_heads
        found = torch.full((len(_SCORES), n_layers, n_heads), torch.nan, dtype=torch.float64)
        slots = dict(zip(_SCORES, found, strict=True))
        if self._trusted["qk"]:
            for layer, query, key in _by_layer(model, "W_Q", "W_K", n_heads):
                slots["qk_norm"][layer] = growth.product_norm(query, key.mT)
        if self._trusted["ov"]:
            loop = _loop(model) if self._trusted["full"] else None
            for layer, value, output in _by_layer(model, "W_V", "W_O", n_heads):
                slots["ov_norm"][layer] = growth.product_norm(value, output)
                slots["ov_copying"][layer] = growth.copying_score(value, output)
                if loop is not None:
                    slots["full_ov_copying"][layer] = growth.copying_score(value, output, loop)
                if layer == self.shape.attending[0]:
                    _fill_nulls(slots, value.shape[-2], value.shape[-1], loop)
        return found

    def _read_pairs(self, model: Model) -> Float[Tensor, "pair layer head layer_to head_to"] | None:
        n_layers, n_heads = self.shape.n_layers, self.shape.n_heads
        if n_layers * n_heads > MOST_HEADS:
            return None
        found = torch.full((len(_PAIRS), n_layers, n_heads, n_layers, n_heads), torch.nan)
        writes = torch.empty(0)
        for layer_to, (query, key, value, output) in enumerate(folded_layers(model) if self._trusted["pairs"] else ()):
            if layer_to not in self.shape.attending:
                continue
            write = write_factor(value, output)
            if len(writes) == 0:  # room for what all layers write, of which each later layer then reads a view
                writes = write.new_full((n_layers, *write.shape), torch.nan)
            else:
                reads = [read_factor(query, key.mT), read_factor(key, query.mT), read_factor(value, output)]
                both = torch.stack(composition(writes[:layer_to].flatten(0, 1), torch.cat(reads)))
                both = both.unflatten(-1, (len(reads), n_heads)).unflatten(1, (layer_to, n_heads))
                found[:, :layer_to, :, layer_to] = both.permute(0, 3, 1, 2, 4).flatten(0, 1).to(found)
            writes[layer_to] = write
        return found

    def compute(self) -> Variables:
        """Every variable of `/weights` by name, with its dimensions."""
        if len(self.places) == 0:
            return {}
        places, scores = _latest(self.places), _latest(self.scores)
        missing = places[_COUNT] == 0
        square, change = places[_SQUARE], places[_CHANGE].mT
        inside = len(square) - len(_OUTSIDE)
        norms = square.sqrt().masked_fill(missing, torch.nan)
        found: Variables = {"parameter_norm": (("layer", "part"), norms[:inside].reshape(-1, len(PARTS)))}
        for name, value in zip(_OUTSIDE, norms[inside:], strict=True):
            found[f"{name}_norm"] = ((), value)
        found["total_norm"] = ((), square.sum().sqrt())
        found["total_norm_without_embeddings"] = ((), (square[:inside].sum() + square[-1]).sqrt())
        found.update({name: (("layer", "head"), value) for name, value in zip(_SCORES, scores, strict=True)})
        if len(self.pairs):
            found.update({name: (_PAIR_DIMS, value) for name, value in zip(_PAIRS, _latest(self.pairs), strict=True)})
            found["composition_chance"] = ((), places.new_tensor(composition_chance(self.shape.d_model)))
        if self.compare:
            for name, measure in _STEP.items():
                value = measure(change).masked_fill(missing, torch.nan)
                found[name] = (("layer", "part"), value[:inside].reshape(-1, len(PARTS)))
                found[f"total_{name}"] = ((), measure(change.sum(0)))
        return found

    def to_dataset(self) -> xr.Dataset:
        variables = self.compute()
        if not variables:
            return xr.Dataset(attrs={"tokens_seen": 0, "sequences": 0})
        coords: dict[str, Any] = {
            "layer": range(self.shape.n_layers),
            "part": list(PARTS),
            "head": range(self.shape.n_heads),
        }
        coords |= {f"{dim}_to": coords[dim] for dim in ("layer", "head") if _PAIRS[0] in variables}
        data = xr.Dataset({name: shaped(dims, value, coords) for name, (dims, value) in variables.items()}, coords)
        for name in data.data_vars:
            data[name].attrs["description"] = DESCRIPTIONS[str(name)]
        data.attrs.update(tokens_seen=0, sequences=0, parameters=int(_latest(self.places)[_COUNT].sum()))
        if _PAIRS[0] not in variables:
            heads = self.shape.n_layers * self.shape.n_heads
            data.attrs["composition"] = f"left out: {heads} heads, and pairs are read of at most {MOST_HEADS}"
        return data


def _require_raw(model: Model, parameters: dict[str, Tensor]) -> None:
    if weight_processing(model) == "folded":
        raise InputError(
            "model has its norms folded into its weights, so that their norms are not those it was trained with: open "
            "it with raw weights (a bridge before enable_compatibility_mode, or from_pretrained_no_processing)."
        )
    if why := quantised(model, parameters):
        raise InputError(
            f"model has quantised weights ({why}), whose numbers are not the weights: open it in float32, bfloat16 or "
            "float16."
        )


def _require_same(previous: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
    for name in [*parameters, *previous]:
        shapes = [list(named[name].shape) if name in named else "missing" for named in (previous, parameters)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"this WeightProbe compares with what it read before, where {name} is {shapes[0]}, and in this model "
                f"it is {shapes[1]}: use a new probe."
            )


def _place_of(name: str, n_layers: int) -> int:
    """Where a parameter is summed: the part of its layer, or one of the places outside the blocks."""
    layer, kind = place_of(name)
    if layer is not None:
        return len(PARTS) * layer + PARTS.index(kind)
    if kind == "norm":  # BERT and BLOOM have one on their embeddings
        kind = "embedding" if any("embed" in piece for piece in name.split(".")) else "final_norm"
    return len(PARTS) * n_layers + _OUTSIDE.index(kind)


def _by_layer(model: Model, first: str, second: str, n_heads: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The layers that attend, each with two weights [head, ...]; grouped heads once for each query head."""
    one, other = by_layer(model, first), by_layer(model, second)  # a bridge makes these anew at each call
    for layer, weight in one.items():
        yield layer, repeat_heads(weight.detach(), n_heads, 0), repeat_heads(other[layer].detach(), n_heads, 0)


def _loop(model: Model) -> Tensor | None:
    """W_U W_E, or None where they don't fit together (embeddings narrower than the stream)."""
    unembedding, embedding = model.W_U, getattr(model, "W_E", None)
    if not isinstance(embedding, Tensor) or embedding.shape != unembedding.mT.shape:
        return None
    return growth.vocabulary_loop(unembedding.detach(), embedding.detach())


def _fill_nulls(slots: dict[str, Tensor], d_model: int, d_head: int, loop: Tensor | None) -> None:
    """The nulls of the copying scores, which are the same for all heads: they rest on sizes, and on W_U W_E."""
    for name, between in (("ov_copying", None), ("full_ov_copying", loop)):
        if name == "ov_copying" or between is not None:
            mean, std = growth.copying_null(d_model, d_head, between)
            slots[f"{name}_null_mean"][:], slots[f"{name}_null_std"][:] = mean, std


def _latest(readings: list[Tensor] | Tensor) -> Tensor:
    """The last reading; of merged ones, what it lacks (a step, if it was a first one) from the one before."""
    rows = dim_zero_cat(readings).cpu()
    found = rows[0]
    for row in rows[1:]:
        found = torch.where(row.isnan(), found, row)
    return found
