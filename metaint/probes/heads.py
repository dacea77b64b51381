"""`HeadProbe`: every head measure in one forward pass, read at `hook_pattern` and folded into `/heads`."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import xarray as xr
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from metaint.errors import ActivationError
from metaint.measures.attention import Measure, Pairs, resolve, shuffled, targets
from metaint.measures.resampling import bootstrap_interval
from metaint.measures.tile import TAUS, Context, Tile
from metaint.models.describe import Shape
from metaint.models.inputs import InputWatch
from metaint.probes.probe import Probe
from metaint.scans.assemble import shaped

# States that hold a row for each sequence.
_LISTS = ("sums", "counts", "uniform", "beside_first")


class HeadProbe(Probe):
    """Scores every head of a model with `measures` (names, decorated functions, or None for all there are).

    State: for each sequence, slot, layer and head the sum over its queries, and how many they were; what uniform
    attention sums to on the same tokens; for each kind what was left of the weight beside position 0; mean and
    variance of the shuffled null. Under a sliding window a query counts for the keys that it sees. About 50 kB a
    sequence at 12 x 12 heads. One sequence fed in several passes (generation with a key-value cache) stays one
    sequence; without a cache each pass reads its rows again.

    >>> import metaint
    >>> from metaint.toys.small import small_transformer
    >>> sizes = {"n_layers": 2, "n_heads": 2, "d_model": 8, "d_mlp": 16, "d_vocab": 30, "n_ctx": 20}
    >>> model = small_transformer(norm="pre", **sizes)
    >>> scan = metaint.scan(model, probes=[metaint.HeadProbe(["induction", "entropy"])])
    >>> scan["heads"]["induction"].dims, scan["heads"]["entropy"].shape
    (('layer', 'head'), (2, 2))
    """

    group = "heads"
    audits = ("pattern_fires", "pattern_rows")

    sums: list[Float[Tensor, "sequence slot layer head"]]
    counts: list[Float[Tensor, "sequence slot layer"]]
    uniform: list[Float[Tensor, "sequence slot layer"]]
    beside_first: list[Float[Tensor, "sequence kind layer head"]]
    null_mean: Float[Tensor, "slot layer head"]
    null_variance: Float[Tensor, "slot layer head"]
    # Of the pass that is being read.
    _plans: "dict[int, Plan]"

    def __init__(self, measures: Iterable[str | Measure] | None = None) -> None:
        super().__init__()
        self.measures = resolve(measures)
        self.kinds = [m for m in self.measures if m.form == "kind"]
        self.statistics = [m for m in self.measures if m.form == "statistic"]
        for name in _LISTS:
            self.add_state(name, [], dist_reduce_fx="cat")
        for name in ("null_mean", "null_variance", "tokens_seen"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    @cached_property
    def slots(self) -> dict[str, slice]:
        """Where each measure's numbers lie along the slot dimension: kinds, then statistics."""
        places, start = {}, 0
        for measure in [*self.kinds, *self.statistics]:
            stop = start + (len(TAUS) if measure.per_tau else 1)
            places[measure.name], start = slice(start, stop), stop
        return places

    @property
    def n_slots(self) -> int:
        return max((place.stop for place in self.slots.values()), default=0)

    def hook_names(self, shape: Shape) -> list[str]:
        return [f"blocks.{layer}.attn.hook_pattern" for layer in range(shape.n_layers)]

    def update(self, name: str, activation: Float[Tensor, "batch head query key"], watch: InputWatch) -> None:
        """Fold the rows of one layer's pattern into the sums of the sequences they belong to."""
        if self.opens_pass(name, watch):
            self._begin(watch, activation)
        layer = int(name.split(".")[1])
        plan = self._plans[self._windows[layer]]
        # A sliding-window cache holds the last keys alone; the others get no weight.
        missing = plan.context.mask.shape[1] - activation.shape[-1]
        if missing:
            activation = torch.nn.functional.pad(activation, (missing, 0))
        self._fold(layer, Tile(activation, plan.context), plan)

    def _begin(self, watch: InputWatch, pattern: Tensor) -> None:
        """A forward pass starts: learn its inputs, and make room for its sequences unless they go on."""
        batch, _, queries, keys = pattern.shape
        inputs = watch.resolve(batch, queries, keys, pattern.device)
        positions = torch.arange(inputs.past, inputs.past + queries, device=pattern.device)
        tokens = None if inputs.tokens is None else inputs.tokens.to(pattern.device)
        length = inputs.mask.shape[1]
        # A window that the sequence does not fill hides nothing.
        self._windows = [window if window < length else 0 for window in self._layer_windows()]
        context = Context(positions, inputs.mask, tokens, self.shape.causal)
        self._plans = {
            window: Plan.of(self.kinds, replace(context, window=window)) for window in sorted(set(self._windows))
        }
        if inputs.past == 0 or not self.sums:
            self._make_room(batch, pattern.device)
        self.tokens_seen = self.tokens_seen + inputs.mask[:, inputs.past :].sum()

    def _layer_windows(self) -> list[int]:
        """The sliding window of each layer; that of a bidirectional model reaches both ways, and is not counted."""
        if not self.shape.causal or not self.shape.windows:
            return [0] * self.shape.n_layers
        return list(self.shape.windows)

    def _make_room(self, batch: int, device: torch.device) -> None:
        full = torch.float32 if device.type == "mps" else torch.float64
        size = (self.n_slots, self.shape.n_layers)
        self.sums.append(torch.zeros(batch, *size, self.shape.n_heads, dtype=full, device=device))
        self.counts.append(torch.zeros(batch, *size, dtype=full, device=device))
        self.uniform.append(torch.zeros(batch, *size, dtype=full, device=device))
        kinds = (len(self.kinds), self.shape.n_layers, self.shape.n_heads)
        self.beside_first.append(torch.zeros(batch, *kinds, dtype=full, device=device))
        if self.null_mean.ndim == 0:
            self.null_mean = torch.zeros(kinds, dtype=full, device=device)
            self.null_variance = torch.zeros(kinds, dtype=full, device=device)

    def _fold(self, layer: int, tile: Tile, plan: "Plan") -> None:
        sums, counts, uniform = self.sums[-1], self.counts[-1], self.uniform[-1]
        n_kinds, full = len(self.kinds), sums.dtype
        added, defined = self.row_sums(plan, tile, full)
        check_rows(tile, layer)  # before anything is added
        sums[:, :, layer] += added
        counts[:, :, layer] += defined
        if self.statistics:
            uniform[:, n_kinds:, layer] += plan.uniform_statistics(self, full)
        if self.kinds:
            uniform[:, :n_kinds, layer] += plan.uniform_kinds.to(full)
            self.beside_first[-1][:, :, layer] += plan.beside_first(tile).to(full)
            mean, variance = shuffled(tile, plan.matches)
            self.null_mean[:, layer] += mean.sum(1, dtype=full)
            self.null_variance[:, layer] += variance.sum(1, dtype=full)

    def row_sums(
        self, plan: "Plan", tile: Tile, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "batch slot head"], Float[Tensor, "batch slot"]]:
        """What each measure sums to over the queries of each sequence, and for how many of them it is defined."""
        sums, counts = [], []
        if self.kinds:
            sums.append(plan.weight_on_targets(tile.pattern, dtype))
            counts.append(plan.defined.to(dtype))
        if self.statistics:
            values, defined = self._statistics(tile)
            sums.append(values.sum(-1, dtype=dtype).transpose(0, 1))
            counts.append(defined.sum(-1).mT.to(dtype))
        return torch.cat(sums, 1), torch.cat(counts, 1)

    def _statistics(self, tile: Tile) -> tuple[Float[Tensor, "slot b head q"], Bool[Tensor, "slot b q"]]:
        """Every statistic of every row, 0 where it is not defined, and where it is."""
        batch, heads, queries, _ = tile.pattern.shape
        rows = [torch.empty(0, batch, heads, queries, device=tile.pattern.device)]
        rows += [measure(tile) if measure.per_tau else measure(tile)[None] for measure in self.statistics]
        values = torch.cat(rows)
        defined = ~values.isnan().any(2) & tile.context.counted
        return values.masked_fill_(~defined[:, :, None], 0), defined

    def compute(self) -> dict[str, Float[Tensor, "*slot layer head"]]:
        """Every variable of `/heads` by name, each (layer, head), or (tau, layer, head) for the tie counts."""
        if len(self.sums) == 0:
            return {}
        sums, counts, uniform, beside_first = (dim_zero_cat(getattr(self, name)).cpu() for name in _LISTS)
        null_mean, null_variance = self.null_mean.cpu(), self.null_variance.cpu()
        found: dict[str, Tensor] = {}
        for i, measure in enumerate([*self.kinds, *self.statistics]):
            place = self.slots[measure.name]
            part = (sums[:, place], counts[:, place, :, None], uniform[:, place, :, None])
            scores = summarise(*part, measure)
            if measure.form == "kind":
                count = part[1].sum(0)
                scores["_null_mean"] = null_mean[i : i + 1] / count
                scores["_null_std"] = null_variance[i : i + 1].sqrt() / count
                if measure.name != "first_token":
                    scores |= off_sink(part[0], beside_first[:, i : i + 1])
            for suffix, value in scores.items():
                full = value.expand(-1, -1, sums.shape[-1])
                found[measure.name + suffix] = full if measure.per_tau else full[0]
        return found

    def to_dataset(self) -> xr.Dataset:
        variables = self.compute()
        shape = self._shape or Shape(0, 0, True)
        coords: dict[str, Any] = {"layer": range(shape.n_layers), "head": range(shape.n_heads)}
        coords["window"] = ("layer", list(shape.windows) or [0] * shape.n_layers)
        if any(value.ndim == 3 for value in variables.values()):
            coords["tau"] = list(TAUS)
        each = ("layer", "head")
        data = xr.Dataset(
            {k: shaped(("tau", *each) if v.ndim == 3 else each, v, coords) for k, v in variables.items()}, coords
        )
        for measure in self.measures:
            if measure.name in data:
                data[measure.name].attrs["description"] = (measure.__doc__ or "").strip().split("\n")[0]
        sequences = sum(len(block) for block in self.sums)
        data.attrs.update(tokens_seen=int(self.tokens_seen), sequences=sequences)
        return data


def check_rows(tile: Tile, layer: int) -> None:
    """Raises ActivationError where a row is no number: not above 0 is NaN, or what HookedTransformer makes of it: 0."""
    if not bool((tile.sum_squares > 0).mT[tile.context.counted].all()):
        raise ActivationError(
            f"blocks.{layer}.attn.hook_pattern holds NaN or infinity: the weights or the activations before it "
            "overflow (try a wider dtype), or a sequence has no visible key."
        )


def summarise(
    sums: Float[Tensor, "sequence slot layer head"],
    counts: Float[Tensor, "sequence slot layer 1"],
    uniform: Float[Tensor, "sequence slot layer 1"],
    measure: Measure,
) -> dict[str, Float[Tensor, "slot layer head"]]:
    """Score, uniform baseline, interval and count of a measure from what its sequences sum to."""
    if measure.per_sequence is not None:
        sums = measure.per_sequence(sums, counts.expand_as(sums))
        uniform = measure.per_sequence(uniform, counts)
        counts = (~sums.isnan()).to(sums.dtype)
        sums, uniform = sums.nan_to_num(), uniform.nan_to_num()
    total = counts.sum(0)
    low, high = bootstrap_interval(sums, counts.expand_as(sums))
    return {
        "": sums.sum(0) / total,
        "_uniform": uniform.sum(0) / total,
        "_low": low,
        "_high": high,
        "_count": total,
    }


def off_sink(
    sums: Float[Tensor, "sequence 1 layer head"], beside: Float[Tensor, "sequence 1 layer head"]
) -> dict[str, Float[Tensor, "1 layer head"]]:
    """The share that a kind's keys have of the weight beside position 0, in [0, 1], with its interval.

    Read on the queries for which the kind is defined. A head of a language model leaves most of its weight on
    position 0 where it has nothing to do; this tells what it does with the rest.
    """
    low, high = bootstrap_interval(sums, beside)
    return {"_off_sink": sums.sum(0) / beside.sum(0), "_off_sink_low": low, "_off_sink_high": high}


@dataclass(frozen=True)
class Plan:
    """What is asked in one forward pass of the layers with one window; it depends on the tokens alone: made once."""

    context: Context
    pairs: Pairs
    slot: Int[Tensor, " pair"]
    matches: Float[Tensor, "kind batch query"]

    @staticmethod
    def of(kinds: list[Measure], context: Context) -> "Plan":
        """Look up the targets of each kind; pairs of all kinds are read together."""
        batch, queries = context.counted.shape
        device = context.mask.device
        found = [targets(measure, context) for measure in kinds]
        empty = tuple(torch.zeros(0, dtype=torch.long, device=device) for _ in range(3))
        pairs = tuple(torch.cat(parts) for parts in zip(empty, *found, strict=True))
        slot = [empty[0], *(i * batch + p[0] for i, p in enumerate(found))]
        matches = torch.zeros(len(kinds), batch * queries, device=device)
        for i, p in enumerate(found):
            matches[i].index_add_(0, p[0] * queries + p[1], torch.ones(len(p[0]), device=device))
        return Plan(context, pairs, torch.cat(slot), matches.view(-1, batch, queries))  # type: ignore[arg-type]

    @cached_property
    def defined(self) -> Float[Tensor, "batch kind"]:
        """Queries for which each kind is defined."""
        return (self.matches > 0).sum(-1).mT

    def beside_first(self, tile: Tile) -> Float[Tensor, "batch kind head"]:
        """The weight that is not on position 0, summed over the queries for which each kind is defined."""
        return einsum(
            (self.matches > 0).float(), 1 - tile.on_first, "kind batch query, batch head query -> batch kind head"
        )

    @cached_property
    def uniform_kinds(self) -> Float[Tensor, "batch kind"]:
        """What uniform attention puts on the targets."""
        return (self.matches / self.context.n_visible).sum(-1).mT

    def uniform_statistics(self, probe: HeadProbe, dtype: torch.dtype) -> Float[Tensor, "batch slot"]:
        """What the statistics of uniform attention sum to: computed on a pattern of one uniform head, once."""
        if "_uniform" not in self.__dict__:
            values, _ = probe._statistics(Tile(self.context.uniform, self.context))
            self.__dict__["_uniform"] = values[:, :, 0].sum(-1, dtype=dtype).mT
        return self.__dict__["_uniform"]

    def weight_on_targets(
        self, pattern: Float[Tensor, "batch head query key"], dtype: torch.dtype
    ) -> Float[Tensor, "batch kind head"]:
        """Weight on the targets of each kind, summed over queries."""
        batch, query, key = self.pairs
        out = torch.zeros(len(self.matches) * len(pattern), pattern.shape[1], dtype=dtype, device=pattern.device)
        out.index_add_(0, self.slot, pattern[batch, :, query, key].to(dtype))
        return out.view(len(self.matches), len(pattern), -1).transpose(0, 1)
