"""`SaturationProbe`: what the scaling of every score by kappa does, in one pass over stacked copies: `/saturation`.

The first copy of the batch runs as it is. In each other copy the attention of every layer is replaced, at `hook_z`, by
that of its own scores times one kappa; the copies are compared with the first inside hooks, and nothing is kept.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import xarray as xr
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from metaint.errors import ActivationError, InputError
from metaint.measures import norms, saturation
from metaint.measures.sharpening import blocks, mix
from metaint.measures.tile import TAUS, Context
from metaint.models.audit import holds, require
from metaint.models.describe import Shape, by_layer
from metaint.models.heads import OUT_OF_HEADS, by_head, repeat_heads
from metaint.models.inputs import InputWatch
from metaint.models.invariants import pattern_of, score_hooks, value_hook, values_of
from metaint.models.protocol import Model
from metaint.models.reading import first_tensor, quietly
from metaint.probes.means import Means, as_dataset
from metaint.probes.probe import Probe
from metaint.probes.saturation_rows import HeadRows, compare_logits
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
        # What waits for the rest of its layer's attention, and what the copies get in place of what was read last.
        self._held: dict[str, Tensor] = {}
        self._changed: Tensor | None = None
        self._patterns: Callable[..., Tensor] | None = None
        self._value_hook = "hook_v"
        self._values: Callable[[Tensor], Tensor] | None = None
        # Where the pattern is told after it was used: W_O by layer, and what is added to attention's output instead.
        self._outputs: dict[int, Tensor] | None = None
        self._added: Tensor | None = None

    def stacked(self, tokens: Tensor) -> Tensor:
        """A batch (or its mask) as this probe needs it: all sequences, then all again for each kappa but 1."""
        return tokens.repeat(self.copies, *[1] * (tokens.ndim - 1))

    def prepare(self, model: Model) -> None:
        self._patterns = self._outputs = None
        if not holds(model, "pattern_order"):
            # The bridge tells of the pattern once z is made. It is made here from what makes the scores, where hooks
            # carry that; else what z would have been is added to the attention's output.
            if holds(model, "pattern_from_scores"):
                self._patterns = partial(pattern_of, model)
                self._score_hooks = score_hooks(model)
            else:
                require(model, ["output_sum"])
                self._outputs = {layer: weight.detach() for layer, weight in by_layer(model, "W_O").items()}
        self._value_hook, self._values = value_hook(model), partial(values_of, model)
        super().prepare(model)

    def hook_names(self, shape: Shape) -> list[str]:
        pattern = ["hook_pattern"] if self._patterns is None else self._score_hooks
        parts = (self._value_hook, *pattern, "hook_z")
        names = [f"blocks.{layer}.attn.{part}" for layer in shape.attending for part in parts]
        return [*names, *(f"blocks.{layer}.hook_resid_post" for layer in range(shape.n_layers))]

    def module_hooks(self, model: Model) -> list[tuple[Any, Callable[..., Any]]]:
        layers = self._outputs or ()
        return [(model.blocks[layer].attn, self._add) for layer in layers]

    def _add(self, module: Any, args: tuple, output: Any) -> Any:
        """The attention's output with what its copies get added."""
        added, self._added = self._added, None
        if added is None:
            return None
        first = output[0] if isinstance(output, tuple) else output
        new = torch.cat([first[: len(first) - len(added)], first[-len(added) :] + added.to(first.dtype)])
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
            if changed is None:
                return None
            return torch.cat([activation[: len(activation) // self.copies], changed.to(activation.dtype)])

        return hook

    def update(self, name: str, activation: Tensor, watch: InputWatch) -> None:
        """Fold in one activation of all copies; at `hook_z`, make what the copies but the first get instead."""
        if not watch.readers:  # a cache: no logits come, and nothing can be changed
            raise InputError(
                "SaturationProbe changes what it compares, so it can't read a cache: use metaint.scan, or "
                "metaint.attach around model(probe.stacked(tokens))."
            )
        _, layer, *part = name.split(".")
        if name.endswith(self._value_hook) and self._values is not None:
            part, activation = ["hook_v"], self._values(activation)
        if self.opens_pass(name, watch):
            self._begin(activation, watch)
        if self._outputs is not None and part[-1] == "hook_pattern":
            value, z = self._held.pop("hook_v"), self._held.pop("hook_z")
            changed = self._read_attention(int(layer), activation, value, z)
            if changed is not None:
                change = (changed - z[-len(changed) :]).to(changed.dtype)
                self._added = einsum(change, self._outputs[int(layer)].to(change.dtype), OUT_OF_HEADS)
        elif self._outputs is None and part[-1] == "hook_z":
            value = self._held.pop("hook_v")
            if self._patterns is None:
                pattern = self._held.pop("hook_pattern")
            else:
                query, key = (self._held.pop(name) for name in self._score_hooks)
                pattern = self._patterns(int(layer), query, key, self._context.mask.repeat(self.copies, 1))
            self._changed = self._read_attention(int(layer), pattern, value, activation)
        elif part[-1] == "hook_resid_post":
            self._read_stream(int(layer), activation)
        else:
            self._held[part[-1]] = activation

    def _begin(self, activation: Tensor, watch: InputWatch) -> None:
        """A forward pass starts: learn where its rows stand, and make room for its sequences."""
        first = activation[: len(activation) // self.copies]
        rows = Rows.of(first.flatten(2), watch, self.positions, self.seed, need_next=self.shape.causal)
        if rows.past:
            raise InputError(
                f"this forward pass continues {rows.past} cached positions: a SaturationProbe compares whole sequences."
            )
        self._rows, self._held = rows, {}
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
        return {
            **super().__getstate__(),
            "_patterns": None,
            "_outputs": None,
            "_values": None,
            "_held": {},
            "_changed": None,
            "_added": None,
        }

    # ---- attention ----------------------------------------------------------------------------------------------

    def _read_attention(self, layer: int, pattern: Tensor, value: Tensor, z: Tensor) -> Tensor | None:
        """Fold the first copy's pattern; the output of the other copies' attention at their kappas."""
        batch = len(z) // self.copies
        dtype = torch.promote_types(pattern.dtype, torch.float32)
        value = repeat_heads(value, pattern.shape[1], 2).to(dtype)
        value = rearrange(value, "sequence key head d_head -> sequence head key d_head")
        if self.shape.learnt_sinks:  # a key before all others, which holds nothing
            pattern = torch.cat([(1 - pattern.sum(-1, keepdim=True)).clamp(min=0), pattern], -1)
            value = torch.nn.functional.pad(value, (0, 0, 1, 0))
        heads = by_head(z, self.shape.n_heads)
        for b in range(batch):
            own = heads[b].to(dtype)
            rows = HeadRows.read(pattern[b], value[b], own, self.kappas, self._context.causal, self.tau)
            self._fold_heads(layer, b, rows.at(self._context.counted[b]))
        if not self.edited:
            return None
        mixed = torch.empty_like(heads[batch:], dtype=dtype)
        for i in range(len(mixed)):
            kappas = (self.edited[i // batch],)
            for block in blocks(pattern[batch + i], self._context.causal, self.tau):
                (weights,) = saturation.powers(block.relative, kappas)
                mixed[i, block.rows] = mix(weights, value[batch + i, :, : block.stop])[0].transpose(0, 1)
        return mixed.view_as(z[batch:])

    def _fold_heads(self, layer: int, b: int, rows: HeadRows) -> None:
        """Add what was read of one sequence's rows, once all of it is known to be finite."""
        if not rows.is_finite():
            raise ActivationError(
                f"blocks.{layer}.attn.hook_pattern holds NaN or infinity: the weights or the activations before it "
                "overflow (try a wider dtype), or a sequence has no visible key."
            )
        full, one = self.gaps.dtype, torch.ones_like(rows.total)
        odds = (rows.total - rows.ties) / rows.ties
        bins = saturation.gap_bin(rows.gap)
        for slot, of_row in enumerate((one, odds, 1 / rows.ties)):
            self.gaps[slot, layer].scatter_add_(-1, bins, of_row.to(full))
        has_gap = rows.gap.isfinite()
        added = {
            "total_variation": rows.variation,
            "output_change": rows.change,
            "off_maximum": 1 - 1 / rows.total,
            "tied_keys": rows.tied,
            "gap": rows.gap.where(has_gap, 0),
            "gaps": has_gap,
            "length": rows.length,
            "queries": one,
        }
        for name, values in added.items():
            sums = values.sum(-1, dtype=full)
            self.heads[-1][b, self._heads.places[name], layer] = sums if values.ndim == 3 else sums[None]

    # ---- the stream and the logits ------------------------------------------------------------------------------

    def _read_stream(self, layer: int, stream: Float[Tensor, "stack position d_model"]) -> None:
        """Compare the stream after one block between the first copy and each other."""
        rows, state = self._rows, self.streams[-1]
        full, counted = state.dtype, self._context.counted
        units = [self._directions(layer, part) for part in stream.split(len(rows.real))]
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

    def _directions(self, layer: int, stream: Tensor) -> Tensor:
        stream = stream.to(torch.promote_types(stream.dtype, torch.float32))
        length = torch.linalg.vector_norm(stream, dim=-1, keepdim=True)
        if not bool(length[self._rows.real].isfinite().all()):
            raise ActivationError(
                f"blocks.{layer}.hook_resid_post holds NaN or infinity: the weights or the activations before it "
                "overflow (try a wider dtype)."
            )
        return stream / length.clamp(min=torch.finfo(stream.dtype).tiny)

    def _read_logits(self, logits: Tensor, watch: InputWatch) -> None:
        """Compare predictions at the sampled positions, one sequence at a time."""
        if not self.logits:  # a pass that reached no hook of this probe
            return
        rows = self._rows
        if len(logits) != self.copies * len(rows.real):
            return
        if logits.shape[1] != (rows.index if watch.gathered else rows.real).shape[1]:
            return
        with quietly(logits.device.type):
            for b in range(len(rows.real)):
                places = rows.index[b, rows.sampled[b]]
                if len(places) == 0:
                    continue
                at = rows.sampled[b].nonzero().squeeze(-1) if watch.gathered else places
                copies = logits.detach()[b :: len(rows.real), at]
                target = None
                if rows.tokens is not None and self.shape.causal:
                    target = rows.tokens[b, places + 1]
                for name, sums in compare_logits(copies, target, self.logits[-1].dtype).items():
                    _LOGITS.of(self.logits[-1], name)[b] = sums

    # ---- results ------------------------------------------------------------------------------------------------

    def compute(self) -> dict[str, Tensor]:
        """Every variable of `/saturation` by name."""
        if len(self.heads) == 0:
            return {}
        heads, streams, uniform, logits = (dim_zero_cat(getattr(self, name)).cpu() for name in _LISTS)
        nulls = _LOGITS.compute(logits[:, :, 0])  # which are kept with the first copy
        streams, logits = streams[:, :, self._order], logits[:, :, self._order]
        return {
            **self._heads.compute(heads, "scale", *HEAD),
            **self._heads.compute(heads, *HEAD),
            **self._heads.compute(heads, "tau", *HEAD),
            **_UNIFORM.compute(uniform),
            **dict(zip(("gap_count", "gap_odds", "gap_tied_share"), self.gaps.cpu(), strict=True)),
            **_STREAMS.compute(streams, *STREAM),
            **self._similarity_beside(streams),
            **_LOGITS.compute(logits, *SCALE),
            **nulls,
        }

    def _similarity_beside(self, streams: Float[Tensor, "sequence slot scale layer"]) -> dict[str, Tensor]:
        """What the similarity is to be read beside: that of other tokens, and that without the mean directions."""
        count = _STREAMS.of(streams, "positions")[:, 0, 0]
        sums, n = _STREAMS.of(streams, "similarity"), count.sum()
        totals, within = self.totals.cpu(), self.within.cpu()[self._order]
        pairs = n.square() - count.square().sum()
        if len(streams) == 1:  # no other sequence: other positions of the same one
            within, pairs = sums.sum(0), n.square() - n
        others = totals[self._order]
        first = totals[:1].expand_as(others)
        return {
            "similarity_null": saturation.mismatched_cosine(first, others, within, pairs),
            "similarity_centred": saturation.centred_similarity(sums.sum(0) / n, first / n, others / n),
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
