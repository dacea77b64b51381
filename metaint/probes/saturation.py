"""`SaturationProbe`: what the scaling of every score by kappa does, in one pass over stacked copies: `/saturation`.

The first copy of the batch runs as it is. In each other copy the attention of every layer is replaced, at `hook_z`, by
that of its own scores times one kappa; the copies are compared with the first inside hooks, and nothing is kept.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from metaint.errors import InputError, door
from metaint.measures import norms, saturation
from metaint.measures.tile import TAUS, Context
from metaint.models.describe import Shape
from metaint.models.inputs import InputWatch
from metaint.models.protocol import Model
from metaint.models.reading import first_tensor, quietly
from metaint.probes.means import Means, as_dataset
from metaint.probes.probe import Probe
from metaint.probes.saturation_attention import Attention, AttentionParts, sharpened, with_last
from metaint.probes.saturation_rows import HeadRows, compare_logits
from metaint.probes.saturation_streams import directions, similarity_beside
from metaint.probes.saturation_variables import HEAD, LOGITS, SCALE, STREAM, STREAMS, UNIFORM, of_heads, variables_of
from metaint.probes.stream import Rows, precise

# States that hold a row for each sequence.
_LISTS = ("heads", "streams", "uniform", "logits")
_UNIFORM, _STREAMS, _LOGITS = Means(UNIFORM), Means(STREAMS), Means(LOGITS)


class SaturationProbe(Probe):
    """Compares a model with itself at scores times each of `kappas` (infinity: attention to the largest scores alone).

    In `metaint.scan`, or in your own passes on `probe.stacked(tokens)`: the batch as often as there are kappas other
    than 1, and once more. Scores within `tau` of a row's largest count as equal to it. Logits are compared at
    `positions` sampled positions of a sequence (position 0 never), under `metaint.attach` and `metaint.scan`.

    Unlike the scaling of all parameters that Merrill et al. 2021 (2010.09697) use (`metaint.saturate`), this changes
    attention alone and means the same in every architecture. Where scores have a soft cap or a bias, both are within
    the scores that are scaled; so is a learnt sink (gpt-oss), which counts as a key whose value is zero. With
    `gap_count`, `gap_odds` and `gap_tied_share`, `measures.saturation.predicted_variation` bounds the distance to
    saturated at any other kappa.

    Raises InputError for passes that are not stacked or continue a cache, HookAuditError for a model whose attention
    can't be changed at `hook_z`, ActivationError for NaN or infinity.

    >>> import metaint
    >>> from metaint.toys.small import small_transformer
    >>> sizes = {"n_layers": 2, "n_heads": 2, "d_model": 8, "d_mlp": 16, "d_vocab": 30, "n_ctx": 20}
    >>> model = small_transformer(norm="pre", **sizes)
    >>> scan = metaint.scan(model, probes=[metaint.SaturationProbe([1, 4])])
    >>> scan["saturation"]["total_variation"].dims
    ('scale', 'layer', 'head')
    """

    group = "saturation"
    audits = ("pattern_fires", "pattern_rows", "direction", "value_mix", "edit_z", "stream")
    reads_logits = True

    heads: list[Float[Tensor, "sequence slot layer head"]]
    streams: list[Float[Tensor, "sequence slot scale layer"]]
    uniform: list[Float[Tensor, "sequence slot"]]
    logits: list[Float[Tensor, "sequence slot scale"]]
    # Of the pass that is being read.
    _rows: Rows

    @door
    def __init__(
        self,
        kappas: Sequence[float] = saturation.KAPPAS,
        tau: float = saturation.TIE,
        positions: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.kappas = saturation.check_kappas(kappas)
        if not 0 <= tau < math.inf:
            raise InputError(f"tau is {tau}: it must be 0 or a small positive difference of scores.")
        if positions < 1:
            raise InputError(f"positions is {positions}: it must be at least 1.")
        self.tau, self.positions, self.seed = tau, positions, seed
        self.edited = tuple(kappa for kappa in self.kappas if kappa != 1)
        self.copies = 1 + len(self.edited)
        for name in _LISTS:
            self.add_state(name, [], dist_reduce_fx="cat")
        for name in ("gaps", "totals", "within", "tokens_seen"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")
        self._heads = Means(of_heads(self.kappas))
        self._parts = AttentionParts()
        # What the copies get in place of what was read last, or have added to their attention's output.
        self._changed: Tensor | None = None
        self._added: Tensor | None = None

    def stacked(self, tokens: Tensor) -> Tensor:
        """A batch (or its mask) as this probe needs it: all sequences, then all again for each kappa but 1."""
        return tokens.repeat(self.copies, *[1] * (tokens.ndim - 1))

    def prepare(self, model: Model) -> None:
        self._parts = AttentionParts.of(model)
        super().prepare(model)

    def hook_names(self, shape: Shape) -> list[str]:
        names = [f"blocks.{layer}.attn.{part}" for layer in shape.attending for part in self._parts.hooks]
        return [*names, *(f"blocks.{layer}.hook_resid_post" for layer in range(shape.n_layers))]

    def module_hooks(self, model: Model) -> list[tuple[Any, Callable[..., Any]]]:
        return [(model.blocks[layer].attn, self._add) for layer in self._parts.outputs]

    def _add(self, module: Any, args: tuple, output: Any) -> Any:
        """The attention's output with what its copies get added."""
        added, self._added = self._added, None
        if added is None:
            return None
        first = output[0] if isinstance(output, tuple) else output
        new = with_last(first, first[-len(added) :] + added.to(first.dtype))
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def hooks(self, model: Model, watch: InputWatch) -> list[tuple[str, Callable[..., Any]]]:
        watch.stack(self.copies)
        watch.readers.append(lambda logits: self._read_logits(logits, watch))
        return super().hooks(model, watch)

    def _reader(self, name: str, watch: InputWatch) -> Callable[..., Any]:
        def hook(activation: Any, hook: Any) -> Tensor | None:
            activation = first_tensor(activation)
            with quietly(activation.device.type):
                self.update(name, activation.detach(), watch)
            changed, self._changed = self._changed, None
            return None if changed is None else with_last(activation, changed)

        return hook

    def update(self, name: str, activation: Tensor, watch: InputWatch) -> None:
        """Fold in one activation of all copies; at `hook_z`, make what the copies but the first get instead."""
        if not watch.readers:  # a cache: no logits come, and nothing can be changed
            raise InputError(
                "SaturationProbe changes what it compares, so it can't read a cache: use metaint.scan, or "
                "metaint.attach around model(probe.stacked(tokens))."
            )
        layer = int(name.split(".")[1])
        part, activation = self._parts.named(name, activation)
        if self.opens_pass(name, watch):
            self._begin(activation, watch)
        if part == "hook_resid_post":
            self._read_stream(layer, activation)
        elif attention := self._parts.take(layer, part, activation, self._context.mask):
            self._read_attention(layer, attention)
            if self.edited:
                self._change_attention(layer, attention, activation)

    def _begin(self, activation: Tensor, watch: InputWatch) -> None:
        """A forward pass starts: learn where its rows stand, and make room for its sequences."""
        first = activation[: len(activation) // self.copies]
        rows = Rows.of(first.flatten(2), watch, self.positions, self.seed, need_next=self.shape.causal)
        if rows.past:
            raise InputError(
                f"this forward pass continues {rows.past} cached positions: a SaturationProbe compares whole sequences."
            )
        self._rows, self._parts.held = rows, {}
        if watch.private:
            watch.logits_at = rows.index.repeat(self.copies, 1)
        batch, queries = rows.real.shape
        keys = torch.arange(queries, device=activation.device)
        tokens = keys.expand(batch, -1) if rows.tokens is None else rows.tokens
        self._context = Context(keys, rows.real, tokens, self.shape.causal)
        new: dict[str, Any] = {"dtype": precise(activation.device), "device": activation.device}
        layers, n_heads = self.shape.n_layers, self.shape.n_heads
        self.heads.append(self._heads.room(batch, layers, n_heads, **new))
        self.streams.append(_STREAMS.room(batch, self.copies, layers, **new))
        self.logits.append(_LOGITS.room(batch, self.copies, **new))
        self.uniform.append(_UNIFORM.room(batch, **new))
        counted, visible = self._context.counted, self._context.n_visible
        _UNIFORM.of(self.uniform[-1], "queries")[:] = counted.sum(-1)
        _UNIFORM.of(self.uniform[-1], "largest_weight")[:] = (counted / visible).sum(-1)
        _UNIFORM.of(self.uniform[-1], "tied_keys_uniform")[:] = (counted * visible).sum(-1)
        if self.gaps.ndim == 0:
            self.gaps = torch.zeros(3, layers, n_heads, saturation.GAP_BINS, **new)
        self.tokens_seen = self.tokens_seen + rows.real.sum()

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to one pass or one model, which `prepare` and the next pass bring again."""
        return {**super().__getstate__(), "_parts": AttentionParts(), "_changed": None, "_added": None}

    # ---- attention ----------------------------------------------------------------------------------------------

    def _read_attention(self, layer: int, attention: Attention) -> None:
        """Fold the first copy's pattern, one sequence at a time."""
        causal, full = self._context.causal, self.gaps.dtype
        for b, counted in enumerate(self._context.counted):
            pattern, value, z = (part[b] for part in attention)
            rows = HeadRows.read(pattern, value, z.to(value.dtype), self.kappas, causal, self.tau).at(counted)
            rows.check(layer)
            rows.add_by_gap(self.gaps[:, layer])
            for name, values in rows.of_queries().items():
                sums = values.sum(-1, dtype=full)
                self.heads[-1][b, self._heads.places[name], layer] = sums if values.ndim == 3 else sums[None]

    def _change_attention(self, layer: int, attention: Attention, activation: Tensor) -> None:
        """The output of the other copies' attention at their kappas, in place of `activation` or beside it."""
        kappas = [kappa for kappa in self.edited for _ in self._rows.real]
        mixed = sharpened(attention, kappas, self._context.causal, self.tau)
        if self._parts.outputs:
            self._added = self._parts.written(layer, mixed - attention.z[-len(mixed) :])
        else:
            self._changed = mixed.view_as(activation[-len(mixed) :])

    # ---- the stream and the logits ------------------------------------------------------------------------------

    def _read_stream(self, layer: int, stream: Float[Tensor, "stack position d_model"]) -> None:
        """Compare the stream after one block between the first copy and each other."""
        rows, state = self._rows, self.streams[-1]
        full, counted = state.dtype, self._context.counted
        units = [directions(layer, part, rows.real) for part in stream.split(len(rows.real))]
        first = rows.real & (rows.position == 0)
        sums = [(unit * counted[..., None]).sum(1, dtype=full) for unit in units]
        if self.totals.ndim == 0:
            size, new = (self.copies, self.shape.n_layers), {"dtype": full, "device": stream.device}
            self.totals = torch.zeros(*size, stream.shape[-1], **new)
            self.within = torch.zeros(*size, **new)
        for i, (unit, total) in enumerate(zip(units, sums, strict=True)):
            cosine = norms.dot(units[0], unit)
            added = {"similarity": cosine * counted, "similarity_first": cosine * first}
            for name, values in {**added, "positions": counted, "firsts": first}.items():
                _STREAMS.of(state, name)[:, i, layer] = values.sum(-1, dtype=full)
            self.totals[i, layer] += total.sum(0)
            self.within[i, layer] += (sums[0] * total).sum()

    def _read_logits(self, logits: Tensor, watch: InputWatch) -> None:
        """Compare predictions at the sampled positions, one sequence at a time."""
        if not self.logits:  # a pass that reached no hook of this probe
            return
        rows, batch = self._rows, len(self._rows.real)
        seen = rows.index if watch.gathered else rows.real
        if logits.shape[:2] != (self.copies * batch, seen.shape[1]):
            return
        with quietly(logits.device.type):
            for b in range(batch):
                places = rows.index[b, rows.sampled[b]]
                if len(places) == 0:
                    continue
                at = rows.sampled[b].nonzero().squeeze(-1) if watch.gathered else places
                target = None
                if rows.tokens is not None and self.shape.causal:
                    target = rows.tokens[b, places + 1]
                sums = compare_logits(logits.detach()[b::batch, at], target, self.logits[-1].dtype)
                for name, values in sums.items():
                    _LOGITS.of(self.logits[-1], name)[b] = values

    # ---- results ------------------------------------------------------------------------------------------------

    def compute(self) -> dict[str, Tensor]:
        """Every variable of `/saturation` by name."""
        if len(self.heads) == 0:
            return {}
        heads, streams, uniform, logits = (dim_zero_cat(getattr(self, name)).cpu() for name in _LISTS)
        nulls = _LOGITS.compute(logits[:, :, 0])  # which are kept with the first copy
        streams, logits = streams[:, :, self._order], logits[:, :, self._order]
        similarity, positions = (_STREAMS.of(streams, name) for name in ("similarity", "positions"))
        totals, within = self.totals.cpu(), self.within.cpu()[self._order]
        beside = similarity_beside(similarity, positions[:, 0, 0], totals[self._order], within, totals[:1])
        return {
            **self._heads.compute(heads, "scale", *HEAD),
            **self._heads.compute(heads, *HEAD),
            **self._heads.compute(heads, "tau", *HEAD),
            **_UNIFORM.compute(uniform),
            **dict(zip(("gap_count", "gap_odds", "gap_tied_share"), self.gaps.cpu(), strict=True)),
            **_STREAMS.compute(streams, *STREAM),
            **beside,
            **_LOGITS.compute(logits, *SCALE),
            **nulls,
        }

    @property
    def _order(self) -> list[int]:
        """Which copy stands for each kappa: the first for 1."""
        return [0 if kappa == 1 else 1 + self.edited.index(kappa) for kappa in self.kappas]

    def to_dataset(self) -> xr.Dataset:
        values = self.compute()
        if not values:
            return xr.Dataset(attrs={"tokens_seen": 0, "sequences": 0})
        coords = {
            "scale": list(self.kappas),
            "layer": range(self.shape.n_layers),
            "head": range(self.shape.n_heads),
            "tau": list(TAUS),
            "gap_bin": saturation.gap_edges()[:-1].numpy(),
        }
        data = as_dataset(values, variables_of(self.kappas), coords)
        sequences = sum(len(block) for block in self.heads)
        data.attrs.update(tokens_seen=int(self.tokens_seen), sequences=sequences, scaled="scores", tie=self.tau)
        return data
