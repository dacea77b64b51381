"""`ResidualProbe`: norms, steps and directions of the residual stream in one forward pass, folded into `/residual`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import xarray as xr
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics.utilities import dim_zero_cat

from metaint.errors import ActivationError, InputError, door
from metaint.measures import norms
from metaint.measures.positions import BUCKETS, position_bucket
from metaint.models.audit import holds
from metaint.models.describe import Shape
from metaint.models.inputs import InputWatch
from metaint.models.protocol import Model
from metaint.models.readout import final_norm_of
from metaint.probes.largest import FIELDS, candidates_of, larger_of, largest_of
from metaint.probes.means import Means, as_dataset
from metaint.probes.probe import Probe
from metaint.probes.residual_variables import BLOCK, LAYER, NORM, VARIABLES
from metaint.probes.stream import Rows, precise, widened_copy

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_MEANS = Means(VARIABLES)


@dataclass
class _Pass:
    """What is known of the pass that is being read."""

    rows: Rows
    buckets: Float[Tensor, "batch row position"]
    """1 where a row's position falls into a bucket; 0 everywhere for padding."""
    stream: "_Stream | None" = None
    """The stream read last, from which the next step starts."""
    writes: dict[str, Tensor] = field(default_factory=dict)
    """Readings of what sublayers have added to that stream."""
    middle: Tensor | None = None
    """The stream between attention and MLP, where they stand one after the other."""
    samples: dict[int, Tensor] = field(default_factory=dict)
    """The sampled rows of each layer."""


@dataclass(frozen=True)
class _Stream:
    layer: int
    x: Float[Tensor, "batch row d_model"]
    length: Float[Tensor, "batch row"]


class ResidualProbe(Probe):
    """Reads the residual stream at every layer, what attention and MLP write to it, and how it grows.

    `positions` of each sequence (a seeded sample, never position 0) give the directions: cosine to the final
    stream, effective rank, median magnitude; norms, steps and massive activations are read at all. `growth_layers`
    are the first and last layer of the exponential fit (default: layer 1 to the last but one, or all of fewer than
    four). Where a norm follows each addition (BERT), writes don't add up and are NaN. Pass by pass with a cache,
    use `metaint.attach`: hooks alone can't tell how long the cache is. About 15 kB a sequence at 12 layers.

    State: for each sequence, layer and position bucket the sums of every mean, its `top` largest magnitudes; a
    histogram of norms; second moments of the sampled stream through a fixed projection to 128 dimensions.

    >>> import metaint
    >>> from metaint.toys.small import small_transformer
    >>> sizes = {"n_layers": 2, "n_heads": 2, "d_model": 8, "d_mlp": 16, "d_vocab": 30, "n_ctx": 20}
    >>> model = small_transformer(norm="pre", **sizes)
    >>> scan = metaint.scan(model, probes=[metaint.ResidualProbe()])
    >>> scan["residual"]["norm_mean"].dims, scan["residual"].sizes["layer"]
    (('layer', 'position'), 3)
    """

    group = "residual"
    audits = ("stream",)

    sums: list[Float[Tensor, "sequence slot layer position"]]
    massive: list[Float[Tensor, "sequence layer rank field"]]
    medians: list[Float[Tensor, "sequence layer"]]
    _current: _Pass

    @door
    def __init__(
        self, positions: int = 64, top: int = 5, growth_layers: tuple[int, int] | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        if positions < 1 or top < 1:
            raise InputError(f"positions is {positions} and top is {top}: both must be at least 1.")
        self.positions, self.top, self.growth_layers, self.seed = positions, top, growth_layers, seed
        for name in ("sums", "massive", "medians"):
            self.add_state(name, [], dist_reduce_fx="cat")
        for name in ("histogram", "moment", "moment_sum", "moment_count", "tokens_seen"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")
        self._writes = False
        self._final_norm: Any = None

    def prepare(self, model: Model) -> None:
        self._writes = holds(model, "residual")
        self._final_norm = final_norm_of(model) if holds(model, "final_norm") else None
        super().prepare(model)
        first, last = self.growth_layers or (0, 0)
        if not 0 <= first <= last <= self.shape.n_layers:
            raise InputError(f"growth_layers is {self.growth_layers}: the layers are 0 to {self.shape.n_layers}.")

    def hook_names(self, shape: Shape) -> list[str]:
        parts = ["hook_resid_pre"]
        if self._writes:
            parts += ["hook_attn_out"] if shape.sublayers == "attention" else ["hook_attn_out", "hook_mlp_out"]
        names = [f"blocks.{layer}.{part}" for layer in range(shape.n_layers) for part in parts]
        return [*names, f"blocks.{shape.n_layers - 1}.hook_resid_post"]

    def update(self, name: str, activation: Float[Tensor, "batch row d_model"], watch: InputWatch) -> None:
        """Fold in a stream, or what a sublayer adds to it."""
        if self.opens_pass(name, watch):
            self._begin(activation, watch)
        _, number, part = name.split(".")
        if part == "hook_resid_pre":
            self._read_stream(int(number), name, activation)
        elif part == "hook_resid_post":
            self._read_stream(int(number) + 1, name, activation)
            self._finish()
        else:
            self._read_write(part.removeprefix("hook_").removesuffix("_out"), activation)

    def _begin(self, activation: Tensor, watch: InputWatch) -> None:
        """A forward pass starts: learn where its rows stand, and make room for its sequences unless they go on."""
        rows = Rows.of(activation, watch, self.positions, self.seed)
        full = precise(activation.device)
        is_real = rearrange(rows.real, "batch row -> batch row 1")
        buckets = one_hot(position_bucket(rows.position), len(BUCKETS)) * is_real
        self._current = _Pass(rows, buckets.to(full))
        layers, batch, d_model = self.shape.n_layers + 1, len(activation), activation.shape[-1]
        new: dict[str, Any] = {"dtype": full, "device": activation.device}
        if rows.past == 0 or not self.sums:
            self.sums.append(_MEANS.room(batch, layers, len(BUCKETS), **new))
            self.massive.append(torch.full((batch, layers, self.top, len(FIELDS)), -1.0, **new))
            self.medians.append(torch.full((batch, layers), math.nan, **new))
        self._sketch = norms.sketch(d_model).to(activation.device)
        if self.histogram.ndim == 0:
            width = self._sketch.shape[1]
            self.histogram = torch.zeros(layers, len(BUCKETS), norms.BINS, **new)
            self.moment = torch.zeros(layers, width, width, **new)
            self.moment_sum = torch.zeros(layers, width, **new)
            self.moment_count = torch.zeros(layers, **new)
        self.tokens_seen = self.tokens_seen + rows.real.sum()

    def _read_stream(self, layer: int, name: str, activation: Tensor) -> None:
        current = self._current
        now = _Stream(layer, x := widened_copy(activation), norms.norm(x))
        if not bool(now.length[current.rows.real].isfinite().all()):  # before anything of this layer is added
            raise ActivationError(
                f"{name} holds NaN or infinity: the weights or the activations before it overflow (try a wider dtype)."
            )
        if current.stream is not None and current.stream.layer == layer - 1:
            self._fold_step(current.stream, now)
        logs = now.length.clamp(min=torch.finfo(torch.float32).tiny).log()
        self._fold(layer, {"norm": now.length, "log_norm": logs}, "tokens")
        self._count_norms(layer, now.length)
        largest = candidates_of(x, current.rows, self.top)
        self.massive[-1][:, layer] = larger_of(self.massive[-1][:, layer], largest)
        self._read_directions(layer, x)
        current.stream, current.writes, current.middle = now, {}, None

    def _read_write(self, part: str, activation: Tensor) -> None:
        """What a sublayer ("attn" or "mlp") adds, beside the stream it adds to."""
        current = self._current
        if current.stream is None:
            return
        x, write = current.stream.x, widened_copy(activation)
        into = x if current.middle is None else current.middle
        current.writes[f"{part}_write_norm"] = norms.norm(write)
        current.writes[f"cos_stream_{part}"] = norms.cosine(into, write)
        if part == "attn" and self.shape.sublayers == "sequential":
            current.middle = x + write

    def _fold_step(self, before: _Stream, after: _Stream) -> None:
        """The step of one block."""
        split = norms.split_step(before.x, after.x - before.x)
        tiny = torch.finfo(torch.float32).tiny
        values = {
            "growth": after.length / before.length.clamp(min=tiny),
            "growth_orthogonal": (1 + split.square / before.length.square().clamp(min=tiny)).sqrt(),
            "radial": split.radial,
            "tangential": split.tangential,
            "norm_squared_change": after.length.double() ** 2 - before.length.double() ** 2,
            "norm_squared_cross": split.cross,
            "norm_squared_step": split.square,
        }
        self._fold(before.layer, values, "steps")
        for part in ("attn", "mlp"):
            writes = {name: value for name, value in self._current.writes.items() if part in name}
            if writes:
                self._fold(before.layer, writes, f"{part}_writes")

    def _fold(self, layer: int, values: Mapping[str, Tensor], count: str, buckets: Tensor | None = None) -> None:
        """Add values [batch, row] to the sums of their sequences and buckets, and count them."""
        buckets = self._current.buckets if buckets is None else buckets
        real = buckets.any(-1)
        columns = [torch.where(real, value.to(buckets.dtype), 0.0) for value in values.values()]
        stacked = torch.stack([*columns, torch.ones_like(columns[0])], 1)
        slots = _MEANS.index([*values, count])
        added = einsum(stacked, buckets, "batch slot row, batch row position -> batch slot position")
        self.sums[-1][:, slots, layer] += added

    def _count_norms(self, layer: int, length: Tensor) -> None:
        buckets = self._current.buckets
        place = norms.histogram_bin(length) + norms.BINS * buckets.argmax(-1)
        weights = buckets.sum(-1).flatten()
        self.histogram[layer].view(-1).index_add_(0, place.flatten(), weights.to(self.histogram.dtype))

    def _read_directions(self, layer: int, x: Tensor) -> None:
        """What the sampled rows tell: second moments, the median magnitude, and later the cosine to the final."""
        rows = self._current.rows
        sample = self._current.samples[layer] = rows.pick(x)
        y = (sample @ self._sketch.to(x.dtype))[rows.sampled].to(self.moment.dtype)
        self.moment[layer] += y.mT @ y
        self.moment_sum[layer] += y.sum(0)
        self.moment_count[layer] += len(y)
        if rows.past == 0 and sample.shape[1]:
            left_out = rearrange(~rows.sampled, "batch sample -> batch sample 1")
            magnitudes = sample.abs().masked_fill(left_out, math.nan).flatten(1)
            self.medians[-1][:, layer] = magnitudes.nanmedian(-1).values.to(self.medians[-1].dtype)

    def _finish(self) -> None:
        """The last stream is there: directions towards it, and its norm after the final norm."""
        rows, samples, last = self._current.rows, self._current.samples, self._current.stream
        assert last is not None
        buckets = rows.pick(self._current.buckets) * rearrange(rows.sampled, "batch sample -> batch sample 1")
        for layer, sample in samples.items():
            self._fold(layer, {"cos_to_final": norms.cosine(sample, samples[last.layer])}, "samples", buckets)
        if self._final_norm is not None:
            length = norms.norm(self._final_norm(last.x))
            self._fold(last.layer, {"norm_final": length, "log_norm_final": length.log()}, "final_tokens")
        self._current.stream, self._current.samples = None, {}

    def compute(self) -> dict[str, Tensor]:
        """Every variable of `/residual` by name."""
        if len(self.sums) == 0:
            return {}
        sums = dim_zero_cat(self.sums).cpu()
        later = sums[..., 1:].sum(-1)  # all positions but 0
        values = _MEANS.compute(sums, *NORM) | _MEANS.compute(sums[:, :, -1], "position")
        values |= _MEANS.compute(later, *LAYER) | _MEANS.compute(later[:, :, :-1], *BLOCK)
        log_norms = _MEANS.of(later, "log_norm").sum(0) / _MEANS.of(later, "tokens").sum(0)
        values["growth_geometric"] = log_norms.diff().exp()
        first, last = self._fit_layers()
        layers = torch.arange(first, last + 1)
        values["growth_rate"], values["growth_r2"] = norms.exponential_fit(layers, log_norms[layers])
        values["norm_histogram"] = self.histogram.cpu()
        values["norm_quantile"] = norms.histogram_quantile(values["norm_histogram"], torch.tensor(QUANTILES))
        values["norm_count"] = _MEANS.of(sums, "tokens").sum(0)
        values["effective_rank"] = self._effective_rank()
        values["cos_null_std"] = torch.tensor(self.shape.d_model**-0.5, dtype=torch.float64)
        return values

    def _fit_layers(self) -> tuple[int, int]:
        n_layers = self.shape.n_layers
        return self.growth_layers or ((1, n_layers - 1) if n_layers >= 4 else (0, n_layers))

    def _effective_rank(self) -> Float[Tensor, " layer"]:
        count = self.moment_count.cpu()
        mean = self.moment_sum.cpu() / rearrange(count, "layer -> layer 1")
        square = self.moment.cpu() / rearrange(count, "layer -> layer 1 1")
        covariance = square - einsum(mean, mean, "layer row, layer column -> layer row column")
        rank = norms.participation_ratio(covariance, self.shape.d_model)
        return rank.masked_fill(count < 2, math.nan)

    def to_dataset(self) -> xr.Dataset:
        values = self.compute()
        if not values:
            return xr.Dataset(attrs={"tokens_seen": 0, "sequences": 0})
        n_layers = self.shape.n_layers
        largest, median = largest_of(dim_zero_cat(self.massive).cpu()), dim_zero_cat(self.medians).cpu().nanmean(0)
        magnitude = largest.ranked["value"]
        of_layer = rearrange(median, "layer -> layer 1").expand_as(magnitude)
        values |= {"massive_mean": largest.mean, "median_magnitude": median, "massive_value": magnitude}
        values["massive"] = norms.is_massive(magnitude, of_layer)
        coords: dict[str, Any] = {
            "layer": range(n_layers + 1),
            "block": range(n_layers),
            "position": list(BUCKETS),
            "quantile": list(QUANTILES),
            "bin": norms.bin_edges()[:-1].numpy(),
            "rank": range(1, self.top + 1),
        }
        for name in ("dimension", "position", "token"):
            coords[f"massive_{name}"] = (("layer", "rank"), largest.ranked[name].nan_to_num(-1).int().numpy())
        data = as_dataset(values, VARIABLES, coords)
        data.attrs.update(
            tokens_seen=int(self.tokens_seen),
            sequences=sum(len(block) for block in self.sums),
            growth_layers=list(self._fit_layers()),
        )
        return data
