"""`HeadProbe`: every head measure in one forward pass, read at `hook_pattern` and folded into `/heads`."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from metaint.errors import door
from metaint.measures.attention import OF_WEIGHTS, Measure, resolve, shuffled, sink_mass
from metaint.measures.tile import TAUS, Context, Tile
from metaint.models.describe import Shape
from metaint.models.inputs import InputWatch
from metaint.models.protocol import Model
from metaint.models.streamed import RowReader
from metaint.probes.bundles import add_bundles, fingerprints
from metaint.probes.head_rows import HeadRows, check_rows
from metaint.probes.head_scores import each_sequence, off_sink, summarise
from metaint.probes.lag_curves import add_states, fold_lags, lag_coordinate, lag_curves
from metaint.probes.largest_logits import NAMES as LOGITS, ScoreReader, fold_logits, logit_variables
from metaint.probes.plan import Plan, plans_of
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
    sequence; without a cache each pass reads its rows again. With `max_logit`, also the largest attention logit before
    the softmax, from queries and keys or else `hook_attn_scores`, whichever is found to make the pattern (NaN where
    neither does).

    Where a learnt sink takes part of each row (gpt-oss), scores of kinds and `sink_rate` are of the weights as they
    are, so that a head which mostly looks at its sink scores little; `sink_mass` is the rest; all other statistics are
    of the row divided by its sum.

    >>> import metaint
    >>> from metaint.toys.small import small_transformer
    >>> sizes = {"n_layers": 2, "n_heads": 2, "d_model": 8, "d_mlp": 16, "d_vocab": 30, "n_ctx": 20}
    >>> model = small_transformer(norm="pre", **sizes)
    >>> scan = metaint.scan(model, probes=[metaint.HeadProbe(["induction", "entropy"])])
    >>> scan["heads"]["induction"].dims, scan["heads"]["entropy"].shape
    (('layer', 'head'), (2, 2))
    """

    group = "heads"
    audits = ("pattern_fires", "pattern_rows", "direction")

    sums: list[Float[Tensor, "sequence slot layer head"]]
    counts: list[Float[Tensor, "sequence slot layer"]]
    uniform: list[Float[Tensor, "sequence slot layer"]]
    beside_first: list[Float[Tensor, "sequence kind layer head"]]
    prints: list[Int[Tensor, " sequence"]]
    null_mean: Float[Tensor, "slot layer head"]
    null_variance: Float[Tensor, "slot layer head"]
    largest_logit: Float[Tensor, "layer head"]
    logit_histogram: Float[Tensor, "layer head bin"]
    # Of the pass that is being read.
    _plans: list[Plan]

    @door
    def __init__(
        self, measures: Iterable[str | Measure] | None = None, *, max_logit: bool = False, by_lag: bool = False
    ) -> None:
        super().__init__()
        self.max_logit, self.by_lag = max_logit, by_lag
        self._scores: ScoreReader | None = None
        # What was read of a layer before its pattern, and whether a pass was opened by it.
        self.held: dict[str, Tensor] = {}
        self._opened = False
        self._chosen = resolve(measures)
        self._all = measures is None
        self.kinds = [m for m in self._chosen if m.form == "kind"]
        for name in (*_LISTS, "prints"):
            self.add_state(name, [], dist_reduce_fx="cat")
        for name in ("null_mean", "null_variance", "tokens_seen"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")
        if max_logit:
            self.add_state("largest_logit", torch.tensor(-torch.inf), dist_reduce_fx="max")
            self.add_state("logit_histogram", torch.zeros(()), dist_reduce_fx="sum")
        if by_lag:
            add_states(self)

    def prepare(self, model: Model) -> None:
        self._scores = ScoreReader.of(model) if self.max_logit else None
        super().prepare(model)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What is read; where heads have learnt sinks and no measures were chosen, `sink_mass` too."""
        return (*self._chosen, sink_mass) if self._all and self.learnt_sinks else self._chosen

    @property
    def statistics(self) -> list[Measure]:
        return [m for m in self.measures if m.form == "statistic"]

    @property
    def slots(self) -> dict[str, slice]:
        """Where each measure's numbers lie along the slot dimension: kinds, then statistics."""
        places, start = {}, 0
        for measure in [*self.kinds, *self.statistics]:
            stop = start + (len(TAUS) if measure.per_tau else 1)
            places[measure.name], start = slice(start, stop), stop
        return places

    @property
    def context(self) -> Context:
        """The queries and keys of the pass that is being read."""
        return self._plans[0].context

    @property
    def n_slots(self) -> int:
        return max((place.stop for place in self.slots.values()), default=0)

    def hook_names(self, shape: Shape) -> list[str]:
        parts = [*(self._scores.hooks if self._scores else ()), "hook_pattern"]
        return [f"blocks.{layer}.attn.{part}" for layer in shape.attending for part in parts]

    def update(self, name: str, activation: Float[Tensor, "batch head query key"], watch: InputWatch) -> None:
        """Fold the rows of one layer's pattern into the sums of the sequences they belong to."""
        self._opened |= self.opens_pass(name, watch)
        _, layer, _, part = name.split(".")
        if part != "hook_pattern":  # queries, keys or scores, which come before it
            self.held[part] = activation
            return
        if self._opened:
            batch, _, queries, keys = activation.shape
            self.begin_pass(watch, batch, queries, keys, activation.device)
        if self._scores is not None:
            fold_logits(self, self._scores, int(layer), activation)
        plan = self._plans[int(layer)]
        # A sliding-window cache holds the last keys alone; the others get no weight.
        missing = plan.context.mask.shape[1] - activation.shape[-1]
        if missing:
            activation = torch.nn.functional.pad(activation, (missing, 0))
        self._fold(int(layer), Tile(activation, plan.context), plan)

    def row_reader(self, watch: InputWatch) -> RowReader | None:
        return None if self.max_logit or self.by_lag else HeadRows(self, watch)

    def begin_pass(self, watch: InputWatch, batch: int, queries: int, keys: int, device: torch.device) -> None:
        """A forward pass starts: learn its inputs, and make room for its sequences unless they go on."""
        self._opened = False
        inputs = watch.resolve(batch, queries, keys, device)
        positions = torch.arange(inputs.past, inputs.past + queries, device=device)
        tokens = None if inputs.tokens is None else inputs.tokens.to(device)
        self._plans = plans_of(self.kinds, Context(positions, inputs.mask, tokens, self.shape.causal), self.shape)
        if inputs.past == 0 or not self.sums:
            self._make_room(batch, device)
        self.prints[-1] += fingerprints(tokens, inputs.mask, inputs.past)
        self.tokens_seen = self.tokens_seen + inputs.mask[:, inputs.past :].sum()

    def _make_room(self, batch: int, device: torch.device) -> None:
        full = torch.float32 if device.type == "mps" else torch.float64
        size = (self.n_slots, self.shape.n_layers)
        self.sums.append(torch.zeros(batch, *size, self.shape.n_heads, dtype=full, device=device))
        self.counts.append(torch.zeros(batch, *size, dtype=full, device=device))
        self.uniform.append(torch.zeros(batch, *size, dtype=full, device=device))
        kinds = (len(self.kinds), self.shape.n_layers, self.shape.n_heads)
        self.beside_first.append(torch.zeros(batch, *kinds, dtype=full, device=device))
        self.prints.append(torch.zeros(batch, dtype=torch.long, device=device))
        if self.null_mean.ndim == 0:
            self.null_mean = torch.zeros(kinds, dtype=full, device=device)
            self.null_variance = torch.zeros(kinds, dtype=full, device=device)

    def _fold(self, layer: int, tile: Tile, plan: Plan) -> None:
        added = self.row_sums(plan, tile, self.sums[-1].dtype)
        check_rows(tile, layer)
        self.add(layer, tile, *added)

    def add(
        self,
        layer: int,
        tile: Tile,
        added: Float[Tensor, "batch slot head"],
        defined: Float[Tensor, "batch slot"],
    ) -> None:
        """Add a layer's sums over queries, and what its rows are compared with."""
        sums, counts, uniform, plan = self.sums[-1], self.counts[-1], self.uniform[-1], self.plan(layer)
        n_kinds, full = len(self.kinds), sums.dtype
        sums[:, :, layer] += added
        counts[:, :, layer] += defined
        if self.statistics:
            uniform[:, n_kinds:, layer] += plan.uniform_statistics(self.statistics_of, full)
        total = tile.total if self.learnt_sinks else 1.0
        if self.by_lag:
            fold_lags(self, layer, plan.lagged.read(tile, total, full))
        if self.kinds:
            uniform[:, :n_kinds, layer] += plan.uniform_kinds.to(full)
            self.beside_first[-1][:, :, layer] += plan.beside_first(tile, total).to(full)
            mean, variance = shuffled(tile, plan.matches, total)
            self.null_mean[:, layer] += mean.sum(1, dtype=full)
            self.null_variance[:, layer] += variance.sum(1, dtype=full)

    def row_sums(
        self, plan: Plan, tile: Tile, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "batch slot head"], Float[Tensor, "batch slot"]]:
        """What each measure sums to over the queries of each sequence, and for how many of them it is defined."""
        return self.sums_of(plan, plan.weight_on_targets(tile.pattern, dtype), self.statistics_of(tile), dtype)

    def sums_of(
        self, plan: Plan, kinds: Float[Tensor, "batch kind head"], rows: tuple[Tensor, Tensor], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "batch slot head"], Float[Tensor, "batch slot"]]:
        """`row_sums` of the weight on the targets of kinds, and of the statistics of each row and where they are
        defined."""
        values, defined = rows
        sums = [kinds, values.sum(-1, dtype=dtype).transpose(0, 1)]
        return torch.cat(sums, 1), torch.cat([plan.defined.to(dtype), defined.sum(-1).mT.to(dtype)], 1)

    def statistics_of(
        self, tile: Tile, shape: Tile | None = None, known: Mapping[str, Tensor] | None = None
    ) -> tuple[Float[Tensor, "slot b head q"], Bool[Tensor, "slot b q"]]:
        """Every statistic of every row, 0 where it is not defined, and where it is.

        `shape` is the tile with rows that sum to one, and `known` what was read of some measures before.
        """
        batch, heads, queries, _ = tile.pattern.shape
        rows = [torch.empty(0, batch, heads, queries, device=tile.pattern.device)]
        known = known or {}
        if shape is None and len(self.statistics) > len(known):
            shape = self.whole_rows(tile)
        for measure in self.statistics:
            values = known.get(measure.name)
            if values is None:
                values = measure(tile if measure in OF_WEIGHTS else shape)
            rows.append(values if measure.per_tau else values[None])
        values = torch.cat(rows)
        defined = ~values.isnan().any(2) & tile.context.counted
        return values.masked_fill_(~defined[:, :, None], 0), defined

    def whole_rows(self, tile: Tile) -> Tile:
        """The tile with each row divided by its sum, where a learnt sink takes part of it."""
        if not self.learnt_sinks:
            return tile
        total = tile.pattern.sum(-1, keepdim=True)
        return Tile(tile.pattern / total.clamp(min=torch.finfo(total.dtype).tiny), tile.context)

    @property
    def learnt_sinks(self) -> bool:
        return self._shape is not None and self._shape.learnt_sinks

    def plan(self, layer: int) -> Plan:
        """What is asked of a layer in the pass that is being read."""
        return self._plans[layer]

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
        return found | logit_variables(self) if self.max_logit else found

    def to_dataset(self) -> xr.Dataset:
        variables = self.compute()
        shape = self._shape or Shape(0, 0, True)
        coords: dict[str, Any] = {"layer": range(shape.n_layers), "head": range(shape.n_heads)}
        coords["window"] = ("layer", list(shape.windows) or [0] * shape.n_layers)
        coords["layer_kind"] = ("layer", list(shape.layer_kinds) or ["attention"] * shape.n_layers)
        if any(value.ndim == 3 for value in variables.values()):
            coords["tau"] = list(TAUS)
        each = ("layer", "head")
        data = xr.Dataset(
            {k: shaped(("tau", *each) if v.ndim == 3 else each, v, coords) for k, v in variables.items()}, coords
        )
        words = LOGITS | {each.name: (each.__doc__ or "").strip().split("\n")[0] for each in self.measures}
        for name in words.keys() & data.keys():
            data[name].attrs["description"] = words[name]
        if self.by_lag:
            data = data.assign_coords(lag=lag_coordinate()).assign(lag_curves(self))
        sequences = sum(len(block) for block in self.sums)
        data.attrs.update(tokens_seen=int(self.tokens_seen), sequences=sequences)
        return add_bundles(data, self._ratios(), self.prints)

    def _ratios(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Every score by name, with what it sums to in each sequence and for how many queries, as they broadcast."""
        if len(self.sums) == 0:
            return
        sums, counts, _, beside_first = (dim_zero_cat(getattr(self, name)).cpu() for name in _LISTS)
        for i, measure in enumerate([*self.kinds, *self.statistics]):
            place = self.slots[measure.name]
            names = [f"{measure.name}_tau_{tau:g}" for tau in TAUS] if measure.per_tau else [measure.name]
            added, counted = each_sequence(measure, sums[:, place], counts[:, place, :, None])
            for slot, name in enumerate(names):
                yield name, added[:, slot], counted[:, slot]
            if measure.form == "kind" and measure.name != "first_token":
                yield f"{measure.name}_off_sink", sums[:, place.start], beside_first[:, i]
