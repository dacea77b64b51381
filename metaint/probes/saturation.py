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
from jaxtyping import Float
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from metaint.errors import ActivationError, InputError
from metaint.measures import norms, saturation
from metaint.measures.resampling import bootstrap_interval
from metaint.measures.sharpening import blocks, mix, row_statistics
from metaint.measures.tile import TAUS, Context
from metaint.models.audit import holds, require
from metaint.models.describe import Shape
from metaint.models.heads import repeat_heads
from metaint.models.inputs import InputWatch
from metaint.models.invariants import pattern_of, score_hooks
from metaint.probes.probe import Probe, quietly
from metaint.probes.stream import Rows, precise
from metaint.scans.assemble import shaped

Variables = dict[str, tuple[tuple[str, ...], Tensor]]

_LISTS = ("heads", "streams", "counts", "logits")
_LOGIT_SLOTS = ("kl", "agrees", "loss", "count", "loss_count", "kl_other", "agrees_other", "other_count")
# Statistics of a row, after the distances and output changes at every kappa.
_TIES, _TOTAL, _GAP, _TAUS = 0, 1, 2, 3
_GAP_COUNT, _LENGTH, _N_ROWS = _TAUS + len(TAUS), _TAUS + len(TAUS) + 1, _TAUS + len(TAUS) + 2


class SaturationProbe(Probe):
    """Compares a model with itself at scores times each of `kappas` (infinity: attention to the largest scores alone).

    In `metaint.scan`, or in your own passes on `probe.stacked(tokens)`: the batch as often as there are kappas other
    than 1, and once more. Scores within `tau` of a row's largest count as equal to it. Logits are compared at
    `positions` sampled positions of a sequence (position 0 never), under `metaint.attach` and `metaint.scan`.

    Unlike the scaling of all parameters that Merrill et al. 2021 (2010.09697) use (`metaint.saturate`), this changes
    attention alone and means the same in every architecture. Where scores have a soft cap or a bias, both are within
    the scores that are scaled. With `gap_count`, `gap_odds` and `gap_tied_share`,
    `measures.saturation.predicted_variation` bounds the distance to saturated at any other kappa.

    Raises InputError for passes that are not stacked or continue a cache, HookAuditError for a model whose attention
    can't be changed at `hook_z`, ActivationError for NaN or infinity.
    """

    group = "saturation"
    audits = ("pattern_fires", "pattern_rows", "value_mix", "edit_z")
    reads_logits = True

    heads: list[Float[Tensor, "sequence slot layer head"]]
    streams: list[Float[Tensor, "sequence slot scale layer"]]
    counts: list[Float[Tensor, "sequence slot"]]
    logits: list[Float[Tensor, "sequence slot scale"]]

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
        self._rows: Rows | None = None
        self._held: dict[str, Tensor] = {}
        self._patterns: Callable[..., Tensor] | None = None

    def stacked(self, tokens: Tensor) -> Tensor:
        """A batch (or its mask) as this probe needs it: all sequences, then all again for each kappa but 1."""
        return tokens.repeat(self.copies, *[1] * (tokens.ndim - 1))

    def prepare(self, model: Any) -> None:
        self._patterns = None
        if not holds(model, "pattern_order"):
            # BERT's bridge tells of the pattern once z is made: it is made here from what makes the scores.
            require(model, ["pattern_from_scores"])
            self._patterns = partial(pattern_of, model)
            self._score_hooks = score_hooks(model)
        super().prepare(model)

    def hook_names(self, shape: Shape) -> list[str]:
        pattern = ["hook_pattern"] if self._patterns is None else self._score_hooks
        parts = [*(f"attn.{name}" for name in ("hook_v", *pattern, "hook_z")), "hook_resid_post"]
        return [f"blocks.{layer}.{part}" for layer in range(shape.n_layers) for part in parts]

    def hooks(self, model: Any, watch: InputWatch) -> list[tuple[str, Callable[..., Any]]]:
        watch.stack(self.copies)
        watch.readers.append(lambda logits: self._read_logits(logits, watch))
        return super().hooks(model, watch)

    def _reader(self, name: str, watch: InputWatch) -> Callable[..., Any]:
        def hook(activation: Tensor, hook: Any) -> Tensor | None:
            with quietly(activation.device.type):
                changed = self._take(name, activation.detach(), watch)
            if changed is None or self.copies == 1:
                return None
            return torch.cat([activation[: len(activation) // self.copies], changed.to(activation.dtype)])

        return hook

    def read(self, name: str, activation: Tensor, watch: InputWatch) -> None:
        raise InputError(
            "SaturationProbe changes what it compares, so it can't read a cache: use metaint.scan, or metaint.attach "
            "around model(probe.stacked(tokens))."
        )

    def _take(self, name: str, activation: Tensor, watch: InputWatch) -> Tensor | None:
        """Fold one activation of all copies; at `hook_z`, what the copies but the first get instead."""
        if self.opens_pass(name, watch):
            self._begin(activation, watch)
        _, layer, *part = name.split(".")
        if part[-1] == "hook_z":
            value = self._held.pop("hook_v")
            if self._patterns is None:
                pattern = self._held.pop("hook_pattern")
            else:
                query, key = (self._held.pop(name) for name in self._score_hooks)
                pattern = self._patterns(int(layer), query, key, self._context.mask.repeat(self.copies, 1))
            return self._read_attention(int(layer), pattern, value, activation)
        if part[-1] == "hook_resid_post":
            self.update(int(layer), activation)
        else:
            self._held[part[-1]] = activation
        return None

    def _begin(self, activation: Tensor, watch: InputWatch) -> None:
        """A forward pass starts: learn where its rows stand, and make room for its sequences."""
        first = activation[: len(activation) // self.copies]
        assert self.shape is not None
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
        new = {"dtype": precise(activation.device), "device": activation.device}
        layers, n_heads, n_scales = self.shape.n_layers, self.shape.n_heads, len(self.kappas)
        self.heads.append(torch.zeros(batch, 2 * n_scales + _N_ROWS, layers, n_heads, **new))
        self.streams.append(torch.zeros(batch, 2, self.copies, layers, **new))
        self.logits.append(torch.zeros(batch, len(_LOGIT_SLOTS), self.copies, **new))
        counted, visible = self._context.counted, self._context.n_visible
        known = [counted.sum(-1), (counted / visible).sum(-1), (counted * visible).sum(-1)]
        self.counts.append(torch.stack([value.to(new["dtype"]) for value in known], 1))
        if self.gaps.ndim == 0:
            self.gaps = torch.zeros(3, layers, n_heads, saturation.GAP_BINS, **new)
        self.tokens_seen = self.tokens_seen + rows.real.sum()

    # ---- attention ----------------------------------------------------------------------------------------------

    def _read_attention(self, layer: int, pattern: Tensor, value: Tensor, z: Tensor) -> Tensor | None:
        """Fold the first copy's pattern; the output of the other copies' attention at their kappas."""
        batch = len(z) // self.copies
        dtype = torch.promote_types(pattern.dtype, torch.float32)
        value = repeat_heads(value, pattern.shape[1], 2).to(dtype).transpose(1, 2)  # [copy batch, head, key, d_head]
        shaped = z.unflatten(-1, (pattern.shape[1], -1)) if z.ndim == 3 else z
        self._read_heads(layer, pattern[:batch], value[:batch], shaped[:batch].to(dtype))
        if not self.edited:
            return None
        mixed = torch.empty_like(shaped[batch:], dtype=dtype)
        for i in range(len(mixed)):
            kappas = (self.edited[i // batch],)
            for block in blocks(pattern[batch + i], self._context.causal, self.tau):
                (weights,) = saturation.powers(block.relative, kappas)
                mixed[i, block.rows] = mix(weights, value[batch + i, :, : block.stop])[0].transpose(0, 1)
        return mixed.view_as(z[batch:])

    def _read_heads(self, layer: int, pattern: Tensor, value: Tensor, z: Tensor) -> None:
        """How far each head is from saturated, row by row, and what each kappa does to its output there."""
        n_scales = len(self.kappas)
        lengths = torch.linalg.vector_norm(z, dim=-1).transpose(1, 2)  # [batch, head, query]
        for b, head_rows in enumerate(pattern):
            found = torch.zeros(2 * n_scales + _N_ROWS, *head_rows.shape[:2], dtype=z.dtype, device=z.device)
            rest = found[2 * n_scales :]
            rest[_LENGTH] = lengths[b]
            for block in blocks(head_rows, self._context.causal, self.tau):
                row = block.rows
                rest[: _TAUS + len(TAUS), :, row] = row_statistics(block.relative)
                for i, weights in enumerate(saturation.powers(block.relative, self.kappas)):
                    output, total = mix(weights, value[b, :, : block.stop])
                    found[i, :, row] = 1 - rest[_TIES, :, row] / total
                    change = output - z[b, row].transpose(0, 1)
                    found[n_scales + i, :, row] = torch.linalg.vector_norm(change, dim=-1)
            self._fold_heads(layer, b, found)

    def _fold_heads(self, layer: int, b: int, found: Float[Tensor, "slot head query"]) -> None:
        """Add what was found of one sequence's rows, once all of it is known to be finite."""
        n_scales = len(self.kappas)
        if 1.0 in self.kappas:
            found[n_scales + self.kappas.index(1.0)] = 0  # its own attention, up to rounding
        found = found[:, :, self._context.counted[b]]
        rest = found[2 * n_scales :]
        if not bool((rest[_TOTAL] > 0).all() & found[:n_scales].isfinite().all()):
            raise ActivationError(
                f"blocks.{layer}.attn.hook_pattern holds NaN or infinity: the weights or the activations before it "
                "overflow (try a wider dtype), or a sequence has no visible key."
            )
        odds = (rest[_TOTAL] - rest[_TIES]) / rest[_TIES]
        bins = saturation.gap_bin(rest[_GAP])
        for slot, of_row in enumerate((torch.ones_like(odds), odds, 1 / rest[_TIES])):
            self.gaps[slot, layer].scatter_add_(-1, bins, of_row.to(self.gaps.dtype))
        finite = rest[_GAP].isfinite()
        rest[_GAP].masked_fill_(~finite, 0)
        rest[_GAP_COUNT] = finite.to(found.dtype)
        rest[_TOTAL] = 1 - 1 / rest[_TOTAL]
        self.heads[-1][b, :, layer] = found.sum(-1, dtype=self.gaps.dtype)

    # ---- the stream and the logits ------------------------------------------------------------------------------

    def update(self, layer: int, stream: Float[Tensor, "stack position d_model"]) -> None:
        """Compare the stream after one block between the first copy and each other."""
        rows, full = self._rows, self.streams[-1].dtype
        assert rows is not None
        assert self.shape is not None
        batch, counted = len(rows.real), self._context.counted
        units = [self._directions(layer, part) for part in stream.split(batch)]
        first = rows.real & (rows.position == 0)
        sums = [(unit * counted[..., None]).sum(1, dtype=full) for unit in units]
        if self.totals.ndim == 0:
            size, new = (self.copies, self.shape.n_layers), {"dtype": full, "device": stream.device}
            self.totals = torch.zeros(*size, stream.shape[-1], **new)
            self.within = torch.zeros(*size, **new)
        for i, (unit, total) in enumerate(zip(units, sums, strict=True)):
            cosine = norms.dot(units[0], unit)
            self.streams[-1][:, 0, i, layer] = (cosine * counted).sum(-1, dtype=full)
            self.streams[-1][:, 1, i, layer] = (cosine * first).sum(-1, dtype=full)
            self.totals[i, layer] += total.sum(0)
            self.within[i, layer] += (sums[0] * total).sum()

    def _directions(self, layer: int, stream: Tensor) -> Tensor:
        stream = stream.to(torch.promote_types(stream.dtype, torch.float32))
        length = torch.linalg.vector_norm(stream, dim=-1, keepdim=True)
        assert self._rows is not None
        if not bool(length[self._rows.real].isfinite().all()):
            raise ActivationError(
                f"blocks.{layer}.hook_resid_post holds NaN or infinity: the weights or the activations before it "
                "overflow (try a wider dtype)."
            )
        return stream / length.clamp(min=torch.finfo(stream.dtype).tiny)

    def _read_logits(self, logits: Tensor, watch: InputWatch) -> None:
        """Compare predictions at the sampled positions, one sequence at a time."""
        rows = self._rows
        if rows is None or len(logits) != self.copies * len(rows.real):
            return
        if logits.shape[1] != (rows.index if watch.gathered else rows.real).shape[1]:
            return
        with quietly(logits.device.type):
            for b in range(len(rows.real)):
                places = rows.index[b, rows.sampled[b]]
                if len(places):
                    at = rows.sampled[b].nonzero().squeeze(-1) if watch.gathered else places
                    copies = logits.detach()[b :: len(rows.real), at]
                    target = None
                    if rows.tokens is not None and self.shape is not None and self.shape.causal:
                        target = rows.tokens[b, places + 1]
                    self.logits[-1][b] = _compare_logits(copies, target, self.logits[-1])

    # ---- results ------------------------------------------------------------------------------------------------

    def compute(self) -> dict[str, tuple[tuple[str, ...], Tensor]]:
        """Every variable of `/saturation` by name, with its dimensions."""
        if len(self.heads) == 0:
            return {}
        heads, streams, counts, logits = (dim_zero_cat(getattr(self, name)).cpu() for name in _LISTS)
        return {**self._of_heads(heads, counts), **self._of_streams(streams, counts), **self._of_logits(logits)}

    def _of_heads(self, heads: Tensor, counts: Tensor) -> Variables:
        variation, change, rest = heads.split([len(self.kappas), len(self.kappas), _N_ROWS], 1)
        low, high = bootstrap_interval(variation, counts[:, :1, None, None].expand_as(variation))
        total, uniform = counts[:, 0].sum(), counts.sum(0) / counts[:, 0].sum()
        each, grid, bins = ("layer", "head"), ("scale", "layer", "head"), ("layer", "head", "gap_bin")
        histogram = self.gaps.cpu()
        return {
            "total_variation": (grid, variation.sum(0) / total),
            "total_variation_low": (grid, low),
            "total_variation_high": (grid, high),
            "output_change": (grid, change.sum(0) / rest[:, _LENGTH].sum(0)),
            "off_maximum": (each, rest[:, _TOTAL].sum(0) / total),
            "off_maximum_uniform": ((), 1 - uniform[1]),
            "tied_keys": (("tau", *each), rest[:, _TAUS : _TAUS + len(TAUS)].sum(0) / total),
            "tied_keys_uniform": ((), uniform[2]),
            "gap_mean": (each, rest[:, _GAP].sum(0) / rest[:, _GAP_COUNT].sum(0)),
            "gap_count": (bins, histogram[0]),
            "gap_odds": (bins, histogram[1]),
            "gap_tied_share": (bins, histogram[2]),
        }

    def _of_streams(self, streams: Tensor, counts: Tensor) -> Variables:
        streams = streams[:, :, self._order]
        count = counts[:, 0]
        low, high = bootstrap_interval(streams[:, 0], count[:, None, None].expand_as(streams[:, 0]))
        cosine, n = streams[:, 0].sum(0) / count.sum(), count.sum()
        totals, within = self.totals.cpu(), self.within.cpu()[self._order]
        pairs = n.square() - count.square().sum()
        if len(streams) == 1:  # no other sequence: other positions of the same one
            within, pairs = streams[:, 0].sum(0), n.square() - n
        first, others = totals[:1].expand(len(self.kappas), -1, -1), totals[self._order]
        found = {
            "": cosine,
            "_low": low,
            "_high": high,
            "_null": saturation.mismatched_cosine(first, others, within, pairs),
            "_centred": saturation.centred_similarity(cosine, first / n, others / n),
            "_first": streams[:, 1].sum(0) / len(streams),
        }
        return {f"similarity{name}": (("scale", "layer"), value) for name, value in found.items()}

    def _of_logits(self, logits: Tensor) -> Variables:
        read = {name: logits[:, i] for i, name in enumerate(_LOGIT_SLOTS)}
        change = read["loss"] - read["loss"][:, :1]
        found: Variables = {}
        for name, sums, counts in (
            ("kl", read["kl"], read["count"]),
            ("top1_agreement", read["agrees"], read["count"]),
            ("loss_change", change, read["loss_count"]),
        ):
            sums, counts = sums[:, self._order], counts[:, self._order]
            low, high = bootstrap_interval(sums, counts)
            found[name] = (("scale",), sums.sum(0) / counts.sum(0))
            found[f"{name}_low"], found[f"{name}_high"] = (("scale",), low), (("scale",), high)
        others = read["other_count"][:, 0].sum()
        found["kl_null"] = ((), read["kl_other"][:, 0].sum() / others)
        found["top1_agreement_null"] = ((), read["agrees_other"][:, 0].sum() / others)
        return found

    @property
    def _order(self) -> list[int]:
        """Which copy stands for each kappa: the first for 1."""
        return [0 if kappa == 1 else 1 + self.edited.index(kappa) for kappa in self.kappas]

    def to_dataset(self) -> xr.Dataset:
        variables = self.compute()
        if not variables or self.shape is None:
            return xr.Dataset(attrs={"tokens_seen": 0, "sequences": 0})
        coords = {
            "scale": list(self.kappas),
            "layer": range(self.shape.n_layers),
            "head": range(self.shape.n_heads),
            "tau": list(TAUS),
            "gap_bin": saturation.gap_edges()[:-1].numpy(),
        }
        data = xr.Dataset({name: shaped(dims, value, coords) for name, (dims, value) in variables.items()}, coords)
        for name, words in DESCRIPTIONS.items():
            data[name].attrs["description"] = words
        sequences = sum(len(block) for block in self.heads)
        data.attrs.update(tokens_seen=int(self.tokens_seen), sequences=sequences, scaled="scores", tie=self.tau)
        return data


def _compare_logits(
    logits: Float[Tensor, "copy sample vocab"], target: Tensor | None, like: Tensor
) -> Float[Tensor, "slot copy"]:
    """Sums over one sequence's samples of every slot of `_LOGIT_SLOTS`; "other" is another position's prediction."""
    found = torch.zeros(len(_LOGIT_SLOTS), len(logits), dtype=like.dtype, device=like.device)
    slots = {name: found[i] for i, name in enumerate(_LOGIT_SLOTS)}
    kind = torch.promote_types(logits.dtype, torch.float32)
    mine = logits[0].to(kind).log_softmax(-1)
    weights, best = mine.exp(), mine.argmax(-1)
    for i, copy in enumerate(logits):
        log_p = copy.to(kind).log_softmax(-1)
        slots["kl"][i] = (weights * (mine - log_p)).sum() if i else 0.0
        slots["agrees"][i] = (log_p.argmax(-1) == best).sum()
        if target is not None:
            slots["loss"][i] = -log_p.gather(1, target[:, None]).sum()
            slots["loss_count"][i] = len(target)
    slots["count"][:] = len(best)
    if len(best) > 1:
        slots["kl_other"][0] = (weights * (mine - mine.roll(1, 0))).sum()
        slots["agrees_other"][0] = (best == best.roll(1, 0)).sum()
        slots["other_count"][0] = len(best)
    return found


DESCRIPTIONS = {
    "similarity": "mean cosine of the stream after each block with that at scores times scale, position 0 left out",
    "similarity_null": "the same for a token of another sequence: what a collapsed stream scores anyway",
    "similarity_centred": "correlation of the two streams' unit vectors: their mean directions taken out",
    "similarity_first": "mean cosine at position 0, which in a causal model attends to itself at every scale",
    "total_variation": "mean distance of attention at scores times scale to saturated attention, 0 to 1; of unscaled "
    "inputs, so nothing propagates",
    "output_change": "sum over queries of ||z at scale - z|| over the sum of ||z||, nothing propagated",
    "off_maximum": "mean of 1 - the largest weight of a row",
    "off_maximum_uniform": "what uniform attention scores on these tokens",
    "tied_keys": "mean number of keys whose score is within tau of the largest",
    "tied_keys_uniform": "what uniform attention has: every visible key",
    "gap_mean": "mean gap between the largest score and the next, where another key has weight (at most 87)",
    "gap_count": "queries in each log bin of the gap; the coordinate is the bin's lower edge",
    "gap_odds": "sum over the same queries of (1 - m) / m, with m the weight on the tied largest scores",
    "gap_tied_share": "sum over the same queries of 1 / (number of tied largest scores)",
    "kl": "mean KL divergence of the predictions at scale from the model's own, in nats, at sampled positions",
    "kl_null": "the same between predictions at two positions of a sequence",
    "top1_agreement": "share of sampled positions where the most likely token stays the same",
    "top1_agreement_null": "the same between two positions of a sequence",
    "loss_change": "mean change of the next token's loss, in nats (NaN for a bidirectional model)",
}
