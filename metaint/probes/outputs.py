"""`OutputProbe`: what each head writes, in the same pass that tells where it looks, folded into `/outputs`."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from metaint.errors import ActivationError, InputError, door
from metaint.measures import outputs
from metaint.measures.attention import HEAD_MEASURES, Measure, resolve
from metaint.measures.tile import Context
from metaint.models.describe import Shape
from metaint.models.heads import by_head, repeat_heads
from metaint.models.inputs import InputWatch
from metaint.models.invariants import value_hook, values_of
from metaint.models.protocol import Model
from metaint.models.reading import widen
from metaint.models.streamed import RowReader
from metaint.models.writing import Layer, Writing, stamp, writing_of
from metaint.probes.bundles import add_bundles, fingerprints
from metaint.probes.means import Means, as_dataset
from metaint.probes.output_rows import OutputRows
from metaint.probes.outputs_variables import variables_of, written
from metaint.probes.plan import Plan, plans_of
from metaint.probes.probe import Probe
from metaint.probes.stream import Rows, precise, widened_copy
from metaint.probes.value_weights import WeighedRows

_KINDS = tuple(measure for measure in HEAD_MEASURES if measure.form == "kind")
# What of `outputs.Said` is added under each name; all but weights are over the final norm's length.
_SAID = {"copying": "looked_at", "copying_null": "looked_at_null", "weight": "weight", "copying_spread": "spread"}
_SAID |= {f"following{end}": f"following{end}" for end in ("", "_null", "_weight", "_spread")}


class OutputProbe(Probe):
    """Reads what every head writes: how much, from where, along the stream or across it, and what it says.

    `kinds` are those of `/heads` to weigh by values (names, decorated functions, or None for all): each weight times
    the length of its value through W_O, over the row's sum (Kobayashi et al. 2020, 2004.10102). Biases of W_O are no
    head's and left out, and lengths are those before a norm that follows attention (Gemma-2) or a factor (Granite).

    At `positions` of each sequence, sampled by `seed` and never position 0, it reads what a write does to the stream
    and to the logits of the tokens that the head looks at: direct logit attribution, with the length that the final
    norm divides by frozen as it was at that position, before any soft cap. That is NaN where writes don't reach the
    unembedding as they are (post-norm). 0 positions leave it out, with its cost: two products of [positions, d_model]
    for each head, with W_O and with the unembedding of the context's tokens. Position 0 does not count, as a query
    or as what a head says. Passes that continue a cache are left out.

    State: about fifty numbers for each sequence, layer and head. Raises InputError for measures that are no kinds and
    a negative number of positions, HookAuditError where hooks or W_O aren't what their names say, ActivationError for
    NaN or infinity.

    >>> import metaint
    >>> from metaint.toys.small import small_transformer
    >>> sizes = {"n_layers": 2, "n_heads": 2, "d_model": 8, "d_mlp": 16, "d_vocab": 30, "n_ctx": 20}
    >>> model = small_transformer(norm="pre", **sizes)
    >>> scan = metaint.scan(model, probes=[metaint.HeadProbe(), metaint.OutputProbe()])
    >>> scan["outputs"]["output_share"].mean("head").round(3).values.tolist()
    [1.0, 1.0]
    """

    group = "outputs"
    audits = ("pattern_fires", "pattern_rows", "direction", "value_mix", "output_sum")

    heads: list[Float[Tensor, "sequence slot layer head"]]
    prints: list[Int[Tensor, " sequence"]]
    tokens_seen: Tensor
    # Of the pass that is being read.
    _rows: Rows
    _plans: list[Plan]
    _context: Context
    _columns: Float[Tensor, "batch key d_model"] | None

    @door
    def __init__(self, kinds: Iterable[str | Measure] | None = None, *, positions: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.kinds = list(resolve(_KINDS if kinds is None else kinds))
        shapes = [measure.name for measure in self.kinds if measure.form != "kind"]
        if shapes:
            raise InputError(f"kinds has {shapes[0]!r}, a statistic, which no value weighs: give kinds of heads alone.")
        if positions < 0:
            raise InputError(f"positions is {positions}: give 0, which leaves out what heads say, or more.")
        self.positions, self.seed = positions, seed
        self._variables = variables_of(self.kinds)
        self._means = Means(self._variables)
        for name in ("heads", "prints"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self.add_state("tokens_seen", torch.zeros(()), dist_reduce_fx="sum")
        # The model behind functions of it: as an attribute it would be moved and kept with the probe.
        self._stamp_now: Callable[[], list[tuple[int, int]]] | None = None
        self._read_writing: Callable[[], Writing] | None = None
        self._values: Callable[[Tensor], Tensor] | None = None
        self._stamp: list[tuple[int, int]] = []
        self._weights: Writing | None = None
        self._value_hook = "hook_v"
        # Of the layer that is being read, by name, and of the sampled rows of all layers.
        self._held: dict[str, Tensor] = {}
        self._said: list[tuple[int, int, outputs.Said]] = []

    def prepare(self, model: Model) -> None:
        self._value_hook = value_hook(model)
        super().prepare(model)
        self._stamp_now, self._values = partial(stamp, model), partial(values_of, model)
        self._read_writing = partial(writing_of, model, self.positions > 0)
        self._read_changed()  # now, since the audit runs passes of its own

    def hook_names(self, shape: Shape) -> list[str]:
        stream = ["hook_resid_pre"] if self.positions else []
        parts = [*stream, f"attn.{self._value_hook}", "attn.hook_pattern", "attn.hook_z"]
        names = [f"blocks.{layer}.{part}" for layer in shape.attending for part in parts]
        return [*names, f"blocks.{shape.n_layers - 1}.hook_resid_post"] if self.positions else names

    def update(self, name: str, activation: Tensor, watch: InputWatch) -> None:
        """Fold in one activation; what needs several of a layer waits for the last of them."""
        if self.opens_pass(name, watch):
            self.begin_pass(activation, watch)
        if self._rows.past:
            return
        _, number, *_, part = name.split(".")
        layer = int(number)
        if part == "hook_resid_post":
            self._fold_said(activation)
            return
        if part == "hook_resid_pre":
            self._held = {"stream": widened_copy(self._rows.pick(activation))}
        elif name.endswith(self._value_hook):
            assert self._values is not None
            self.hold_values(layer, self._values(activation))
        elif part == "hook_pattern":
            rows = self.weighed_rows(layer)
            rows.read(slice(0, activation.shape[2]), activation)
            self.fold_rows(layer, rows)
        else:
            self._held["z"] = by_head(activation, self.shape.n_heads)
        if {"z", "on_first"} <= set(self._held):  # in either order: BERT's bridge tells of the pattern last
            self.fold_writes(layer, self._held["z"])

    def row_reader(self, watch: InputWatch) -> RowReader:
        return OutputRows(self, watch)

    @property
    def _writing(self) -> Writing:
        assert self._weights is not None
        return self._weights

    def _read_changed(self) -> None:
        """Read the weights, unless they are those that were read last; an optimiser may step between two passes."""
        assert self._stamp_now is not None
        assert self._read_writing is not None
        now = self._stamp_now()
        if self._weights is None or now != self._stamp:
            self._stamp, self._weights = now, self._read_writing()

    def begin_pass(self, activation: Tensor, watch: InputWatch) -> None:
        """A forward pass starts: learn its inputs, make room for its sequences, read weights that have changed."""
        rows = Rows.of(activation.flatten(2), watch, self.positions, self.seed)
        self._rows, self._held, self._said, self._columns = rows, {}, [], None
        if rows.past:
            return
        self._read_changed()
        batch, queries = rows.real.shape
        device = activation.device
        self._context = Context(torch.arange(queries, device=device), rows.real, rows.tokens, self.shape.causal)
        self._plans = plans_of(self.kinds, self._context, self.shape)
        vocabulary = self._writing.vocabulary
        if vocabulary is not None and rows.tokens is not None:
            self._columns = vocabulary.columns(rows.tokens)
        size = (batch, self.shape.n_layers, self.shape.n_heads)
        self.heads.append(self._means.room(*size, dtype=precise(device), device=device))
        self.prints.append(fingerprints(rows.tokens, rows.real, 0))
        self.tokens_seen = self.tokens_seen + rows.real.sum()

    def _add(self, layer: int, **sums: Float[Tensor, "batch head"]) -> None:
        state = self.heads[-1]
        for name, value in sums.items():
            self._means.of(state, name)[:, layer] += value.to(state.dtype)

    # ---- each layer ----

    def hold_values(self, layer: int, value: Float[Tensor, "batch key value_head d_head"]) -> None:
        """Keep how long values are through W_O and what that of position 0 is, and add how they differ."""
        weights = self._writing.layers[layer]
        value = repeat_heads(widen(value), self.shape.n_heads, 2)
        self._held["lengths"] = torch.linalg.vector_norm(outputs.through(value, weights.factor), dim=-1).mT
        first = value[torch.arange(len(value), device=value.device), self._context.first]
        self._held["first"] = outputs.through(first[:, None], weights.factor)
        drain = outputs.drain_at_first(self._held["lengths"], self._context.first, self._context.mask)
        if not bool(drain.others.isfinite().all() & drain.missing.isfinite().all()):
            raise ActivationError(
                f"blocks.{layer}.attn.hook_v holds NaN or infinity: the weights or the activations before it overflow "
                "(try a wider dtype)."
            )
        self._add(layer, missing=drain.missing, values=drain.others)

    def weighed_rows(self, layer: int) -> WeighedRows:
        """What is to read the rows of a layer whose values are held."""
        index = None if self._columns is None else self._rows.index
        return WeighedRows(self._plans[layer], self._held["lengths"], index, self.heads[-1].dtype)

    def fold_rows(self, layer: int, rows: WeighedRows) -> None:
        """Add what all rows say of each kind, and keep what is wanted later: position 0 and the sample."""
        self._held["on_first"] = rows.on_first
        if rows.sample is not None:
            self._held["pattern"] = rows.sample
        for kind, shares, counts in zip(self.kinds, *rows.shares(), strict=True):
            self._add(layer, **{written(kind): shares, f"{written(kind)} queries": counts})

    def fold_writes(self, layer: int, z: Float[Tensor, "batch query head d_head"]) -> None:
        """How long writes are and what of them comes from position 0, over all queries; the rest at the sample."""
        self._held["z"] = widen(z)
        held, counted, weights = self._held, self._context.counted[..., None], self._writing.layers[layer]
        output = outputs.through(held["z"], weights.factor)
        length = torch.linalg.vector_norm(output, dim=-1) * counted
        z = torch.linalg.vector_norm(held["z"], dim=-1) * counted
        from_first = (held["first"] * output).sum(-1) * held["on_first"].mT * counted
        full = precise(output.device)
        sums = {"output_norm": length, "z": z, "from_first": from_first, "energy": length.square()}
        summed = {name: value.sum(1, dtype=full) for name, value in sums.items()}
        summed["queries"] = counted.sum(1, dtype=full).expand_as(summed["z"])
        for name, of in (("output_of_layer", "output_norm"), ("z_of_layer", "z")):
            summed[name] = summed[of].mean(-1, keepdim=True).expand_as(summed[of])
        self._add(layer, **summed)
        if self.positions:
            self._fold_sample(layer, weights)
        self._held = {}

    def _fold_sample(self, layer: int, weights: Layer) -> None:
        """The sampled writes beside the stream, and what they say, one sequence at a time."""
        z = self._rows.pick(self._held["z"])
        for b, sampled in enumerate(self._rows.sampled):
            writes = weights.writes(z[b, sampled])
            stream = self._held["stream"][b, sampled]
            stream = stream / torch.linalg.vector_norm(stream, dim=-1, keepdim=True).clamp(min=1e-30)
            along = (writes * stream[:, None]).sum(-1)
            across = torch.linalg.vector_norm(writes - along[..., None] * stream[:, None], dim=-1)
            added = {"along_stream": along, "across_stream": across, "samples": torch.ones_like(along)}
            for name, values in added.items():
                self._means.of(self.heads[-1], name)[b, layer] += values.sum(0)
            if self._columns is not None:
                self._said.append((layer, b, self._say(layer, b, writes)))

    def _say(self, layer: int, b: int, writes: Float[Tensor, "sample head d_model"]) -> outputs.Said:
        vocabulary, columns = self._writing.vocabulary, self._columns
        assert vocabulary is not None
        assert columns is not None
        sampled = self._rows.sampled[b]
        visible = self._visible(layer, b)
        followed = visible & visible.roll(-1, -1)
        followed[:, -1] = False
        pattern = self._held["pattern"][b][:, sampled]
        spread = vocabulary.spread(writes)
        return outputs.said(writes, pattern, columns[b], spread, visible, followed)

    def _visible(self, layer: int, b: int) -> Bool[Tensor, "sample key"]:
        """The keys that a sequence's sampled queries see, but position 0."""
        context = self._plans[layer].context
        places = self._rows.index[b, self._rows.sampled[b]]
        keys = torch.arange(context.mask.shape[1], device=places.device)
        visible = context.mask[b] & context.within(places[:, None], keys)
        visible[:, context.first[b]] = False
        return visible

    def _fold_said(self, stream: Float[Tensor, "batch query d_model"]) -> None:
        """The last stream tells what the final norm divides by, and with it what the writes of the pass say."""
        if self._columns is None:
            return
        assert self._writing.vocabulary is not None
        norm = self._writing.vocabulary.readout.norm
        sample = widened_copy(self._rows.pick(stream))
        scale = torch.ones_like(sample[..., 0]) if norm is None else norm.scale(sample)[..., 0]
        for layer, b, said in self._said:
            per = 1 / scale[b, self._rows.sampled[b]]
            sums = {
                name: getattr(said, field) if field.endswith("weight") else getattr(said, field) * per
                for name, field in _SAID.items()
            }
            for name, values in sums.items():
                self._means.of(self.heads[-1], name)[b, layer] += values.sum(-1)
        self._said = []

    # ---- results ----

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to one pass or one model, which `prepare` and the next pass bring again."""
        nothing = dict.fromkeys(("_stamp_now", "_read_writing", "_values", "_weights"))
        return {**super().__getstate__(), **nothing, "_stamp": [], "_held": {}, "_said": []}

    def compute(self) -> dict[str, Float[Tensor, "layer head"]]:
        """Every variable of `/outputs` by name; what was not read is NaN."""
        if len(self.heads) == 0:
            return {}
        return self._means.compute(dim_zero_cat(self.heads).cpu(), "layer", "head")

    def to_dataset(self) -> xr.Dataset:
        if not (values := self.compute()):
            return xr.Dataset(attrs={"tokens_seen": 0, "sequences": 0})
        coords = {"layer": range(self.shape.n_layers), "head": range(self.shape.n_heads)}
        data = as_dataset(values, self._variables, coords)
        sequences = sum(len(block) for block in self.heads)
        data.attrs.update(tokens_seen=int(self.tokens_seen), sequences=sequences, positions=self.positions)
        return add_bundles(data, self._means.ratios(dim_zero_cat(self.heads).cpu(), "layer", "head"), self.prints)
