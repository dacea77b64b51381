"""`ResidualProbe`: norms, steps and directions of the residual stream in one forward pass, folded into `/residual`."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics.utilities import dim_zero_cat

from metaint.errors import ActivationError, InputError
from metaint.measures import norms
from metaint.measures.positions import BUCKETS, position_bucket
from metaint.measures.resampling import bootstrap_interval
from metaint.models.audit import holds
from metaint.models.describe import Shape
from metaint.models.inputs import InputWatch
from metaint.models.readout import final_norm_of
from metaint.probes.probe import Probe
from metaint.probes.stream import Rows, precise, widened_copy
from metaint.scans.assemble import shaped

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Means over tokens that are kept for each sequence, layer and position bucket, with what counts them.
_LAYER = {"norm": "tokens", "log_norm": "tokens", "norm_final": "final_tokens", "log_norm_final": "final_tokens"}
_SAMPLED = {"cos_to_final": "samples"}
_STEP = dict.fromkeys(
    (
        "growth",
        "growth_orthogonal",
        "radial",
        "tangential",
        "norm_squared_change",
        "norm_squared_cross",
        "norm_squared_step",
    ),
    "steps",
)
_WRITES = {
    "attn_write_norm": "attn_writes",
    "cos_stream_attn": "attn_writes",
    "mlp_write_norm": "mlp_writes",
    "cos_stream_mlp": "mlp_writes",
}
_MEANS = {**_LAYER, **_SAMPLED, **_STEP, **_WRITES}
_SLOTS = list(dict.fromkeys([*_MEANS, *_MEANS.values()]))


class ResidualProbe(Probe):
    """Reads the residual stream at every layer, what attention and MLP write to it, and how it grows.

    `positions` of each sequence (a seeded sample, never position 0) give the directions: cosine to the final
    stream, effective rank, median magnitude; norms, steps and massive activations are read at all. `growth_layers`
    are the first and last layer of the exponential fit (default: layer 1 to the last but one, or all of fewer than
    four). Where a norm follows each addition (BERT), writes don't add up and are NaN. Pass by pass with a cache,
    use `metaint.attach`: hooks alone can't tell how long the cache is. About 15 kB a sequence at 12 layers.

    State: for each sequence, layer and position bucket the sums of every mean, its `top` largest magnitudes; a
    histogram of norms; second moments of the sampled stream through a fixed projection to 128 dimensions.
    """

    group = "residual"
    audits = ("stream",)

    sums: list[Float[Tensor, "sequence slot layer position"]]
    massive: list[Float[Tensor, "sequence layer rank field"]]
    medians: list[Float[Tensor, "sequence layer"]]

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
        self._rows: Rows | None = None

    def prepare(self, model: Any) -> None:
        self._writes = holds(model, "residual")
        self._final_norm = final_norm_of(model) if holds(model, "final_norm") else None
        super().prepare(model)
        assert self.shape is not None
        first, last = self.growth_layers or (0, 0)
        if not 0 <= first <= last <= self.shape.n_layers:
            raise InputError(f"growth_layers is {self.growth_layers}: the layers are 0 to {self.shape.n_layers}.")

    def hook_names(self, shape: Shape) -> list[str]:
        parts = ["hook_resid_pre"]
        if self._writes:
            parts += ["hook_attn_out"] if shape.sublayers == "attention" else ["hook_attn_out", "hook_mlp_out"]
        names = [f"blocks.{layer}.{part}" for layer in range(shape.n_layers) for part in parts]
        return [*names, f"blocks.{shape.n_layers - 1}.hook_resid_post"]

    def read(self, name: str, activation: Tensor, watch: InputWatch) -> None:
        if self.opens_pass(name, watch):
            self._begin(activation, watch)
        self.update(name, activation)

    def update(self, name: str, activation: Float[Tensor, "batch row d_model"]) -> None:
        """Fold one activation of the pass begun last."""
        _, number, part = name.split(".")
        if part == "hook_resid_pre":
            self._read_stream(int(number), name, activation)
        elif part == "hook_resid_post":
            self._read_stream(int(number) + 1, name, activation)
            self._finish()
        else:
            self._read_write(part, activation)

    def _begin(self, activation: Tensor, watch: InputWatch) -> None:
        """A forward pass starts: learn where its rows stand, and make room for its sequences unless they go on."""
        rows = self._rows = Rows.of(activation, watch, self.positions, self.seed)
        self._start: tuple[int, Tensor, Tensor] | None = None
        self._samples: dict[int, Tensor] = {}
        self._pending: dict[str, Tensor] = {}
        full = precise(activation.device)
        buckets = one_hot(position_bucket(rows.position), len(BUCKETS)) * rows.real[..., None]
        self._buckets = buckets.to(full)
        assert self.shape is not None
        layers, batch, d_model = self.shape.n_layers + 1, len(activation), activation.shape[-1]
        new = {"dtype": full, "device": activation.device}
        if rows.past == 0 or not self.sums:
            self.sums.append(torch.zeros(batch, len(_SLOTS), layers, len(BUCKETS), **new))
            self.massive.append(torch.full((batch, layers, self.top, 4), -1.0, **new))
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
        rows = self._rows
        assert rows is not None
        x = widened_copy(activation)
        length = norms.norm(x)
        if not bool(length[rows.real].isfinite().all()):  # before anything of this layer is added
            raise ActivationError(
                f"{name} holds NaN or infinity: the weights or the activations before it overflow (try a wider dtype)."
            )
        if self._start is not None and self._start[0] == layer - 1:
            self._fold_step(*self._start, x, length)
        logs = length.clamp(min=torch.finfo(torch.float32).tiny).log()
        self._fold(layer, {"norm": length, "log_norm": logs}, "tokens")
        self._count_norms(layer, length)
        self._read_largest(layer, x)
        self._read_directions(layer, x)
        self._start, self._pending = (layer, x, length), {}

    def _read_write(self, part: str, activation: Tensor) -> None:
        """What a sublayer adds, beside the stream it adds to."""
        if self._start is None or self.shape is None:
            return
        _, x, _ = self._start
        write = widened_copy(activation)
        which = "attn" if part == "hook_attn_out" else "mlp"
        into = self._pending.get("middle", x)
        self._pending[f"{which}_write_norm"] = norms.norm(write)
        self._pending[f"cos_stream_{which}"] = norms.cosine(into, write)
        if which == "attn" and self.shape.sublayers == "sequential":
            self._pending["middle"] = x + write

    def _fold_step(self, layer: int, x: Tensor, length: Tensor, after: Tensor, length_after: Tensor) -> None:
        """The step of one block, from the stream before it to the stream after it."""
        split = norms.split_step(x, after - x)
        tiny = torch.finfo(torch.float32).tiny
        values = {
            "growth": length_after / length.clamp(min=tiny),
            "growth_orthogonal": (1 + split.square / length.square().clamp(min=tiny)).sqrt(),
            "radial": split.radial,
            "tangential": split.tangential,
            "norm_squared_change": length_after.double() ** 2 - length.double() ** 2,
            "norm_squared_cross": split.cross,
            "norm_squared_step": split.square,
        }
        self._fold(layer, values, "steps")
        for which in ("attn", "mlp"):
            write = {name: v for name, v in self._pending.items() if _WRITES.get(name) == f"{which}_writes"}
            if write:
                self._fold(layer, write, f"{which}_writes")

    def _fold(self, layer: int, values: Mapping[str, Tensor], count: str, buckets: Tensor | None = None) -> None:
        """Add values [batch, row] to the sums of their sequences and buckets, and count them."""
        buckets = self._buckets if buckets is None else buckets
        real = buckets.any(-1)
        columns = [torch.where(real, v.to(buckets.dtype), 0.0) for v in values.values()]
        stacked = torch.stack([*columns, torch.ones_like(columns[0])], 1)
        slots = [_SLOTS.index(name) for name in [*values, count]]
        self.sums[-1][:, slots, layer] += torch.einsum("bsq,bqp->bsp", stacked, buckets)

    def _count_norms(self, layer: int, length: Tensor) -> None:
        place = norms.histogram_bin(length) + norms.BINS * self._buckets.argmax(-1)
        weights = self._buckets.sum(-1).flatten()
        self.histogram[layer].view(-1).index_add_(0, place.flatten(), weights.to(self.histogram.dtype))

    def _read_largest(self, layer: int, x: Tensor) -> None:
        """The `top` largest magnitudes of each sequence: value, dimension, position, token."""
        rows = self._rows
        assert rows is not None
        magnitude = x.abs()
        per_row = magnitude.amax(-1).masked_fill(~rows.real, -1.0)
        chosen = per_row.topk(min(self.top, per_row.shape[1])).indices  # the largest values lie in these rows
        batch = torch.arange(len(x), device=x.device)[:, None]
        values = magnitude[batch, chosen].masked_fill(~rows.real[batch, chosen][..., None], -1.0)
        best = values.flatten(1).topk(min(self.top, values[0].numel()))
        row = chosen.gather(1, best.indices // x.shape[-1])
        token = torch.full_like(row, -1) if rows.tokens is None else rows.tokens.gather(1, row)
        fields = [best.values, best.indices % x.shape[-1], rows.position.gather(1, row), token]
        found = torch.stack([field.to(self.massive[-1].dtype) for field in fields], -1)
        both = torch.cat([self.massive[-1][:, layer], found], 1)  # those of earlier passes of the same sequences
        order = both[..., 0].topk(self.top).indices
        self.massive[-1][:, layer] = both[batch, order]

    def _read_directions(self, layer: int, x: Tensor) -> None:
        """What the sampled rows tell: second moments, the median magnitude, and (kept) the cosine to the final."""
        rows = self._rows
        assert rows is not None
        sample = self._samples[layer] = rows.pick(x)
        y = (sample @ self._sketch.to(x.dtype))[rows.sampled].to(self.moment.dtype)
        self.moment[layer] += y.mT @ y
        self.moment_sum[layer] += y.sum(0)
        self.moment_count[layer] += len(y)
        if rows.past == 0 and sample.shape[1]:
            hidden = sample.abs().masked_fill(~rows.sampled[..., None], math.nan).flatten(1)
            self.medians[-1][:, layer] = hidden.nanmedian(-1).values.to(self.medians[-1].dtype)

    def _finish(self) -> None:
        """The last stream is there: directions towards it, and its norm after the final norm."""
        rows = self._rows
        assert rows is not None
        assert self._start is not None
        last, x, _ = self._start
        buckets = rows.pick(self._buckets) * rows.sampled[..., None]
        for layer, sample in self._samples.items():
            self._fold(layer, {"cos_to_final": norms.cosine(sample, self._samples[last])}, "samples", buckets)
        if self._final_norm is not None:
            length = norms.norm(self._final_norm(x))
            self._fold(last, {"norm_final": length, "log_norm_final": length.log()}, "final_tokens")
        self._start, self._samples = None, {}

    def compute(self) -> dict[str, Tensor]:
        """Every variable of `/residual` by name."""
        if len(self.sums) == 0:
            return {}
        sums = dim_zero_cat(self.sums).cpu()
        found: dict[str, Tensor] = {}
        for name in ("norm", "log_norm"):
            found.update(_mean(sums, name, f"{name}_mean"))
        for end in ("", "_low", "_high"):
            found[f"norm_geometric{end}"] = found.pop(f"log_norm_mean{end}").exp()
        final = {**_mean(sums, "norm_final", "norm_final_mean"), **_mean(sums, "log_norm_final", "log")}
        found["norm_final_mean"] = final["norm_final_mean"][-1]
        found["norm_final_geometric"] = final["log"][-1].exp()
        later = torch.cat([sums[..., :1] * 0, sums[..., 1:].sum(-1, keepdim=True)], -1)  # all but position 0
        for name in [*_SAMPLED, *_STEP, *_WRITES]:
            for key, value in _mean(later, name, name).items():
                found[key] = value[:, 1] if name in _SAMPLED else value[:-1, 1]
        log_norms = _mean(later, "log_norm", "log")["log"][:, 1]
        found["growth_geometric"] = log_norms.diff().exp()
        layers = torch.arange(self._fit_layers()[0], self._fit_layers()[1] + 1)
        found["growth_rate"], found["growth_r2"] = norms.exponential_fit(layers, log_norms[layers])
        histogram = self.histogram.cpu()
        found["norm_histogram"] = histogram
        found["norm_quantile"] = norms.histogram_quantile(histogram, torch.tensor(QUANTILES))
        found["norm_count"] = sums[:, _SLOTS.index("tokens")].sum(0)
        found["effective_rank"] = self._effective_rank()
        return found

    def _fit_layers(self) -> tuple[int, int]:
        assert self.shape is not None
        n_layers = self.shape.n_layers
        return self.growth_layers or ((1, n_layers - 1) if n_layers >= 4 else (0, n_layers))

    def _effective_rank(self) -> Float[Tensor, " layer"]:
        assert self.shape is not None
        count = self.moment_count.cpu()
        mean = self.moment_sum.cpu() / count[:, None]
        covariance = self.moment.cpu() / count[:, None, None] - mean[:, :, None] * mean[:, None, :]
        rank = norms.participation_ratio(covariance, self.shape.d_model)
        return rank.masked_fill(count < 2, math.nan)

    def _largest(self) -> dict[str, Float[Tensor, "layer rank"]]:
        """The largest magnitudes of all sequences, one for each (dimension, position), and the mean over sequences."""
        every = dim_zero_cat(self.massive).cpu()
        seen = every[..., 0].masked_fill(every[..., 0] < 0, math.nan)
        found = {"massive_mean": seen.nanmean(0)}
        medians = dim_zero_cat(self.medians).cpu()
        found["median_magnitude"] = medians.nanmean(0)
        layers = torch.full((every.shape[1], self.top, 4), math.nan, dtype=torch.float64)
        for layer in range(every.shape[1]):
            candidates = every[:, layer].reshape(-1, 4).double()
            candidates = candidates[candidates[:, 0].argsort(descending=True, stable=True)]
            _, first = np.unique(candidates[:, 1:3].numpy(), axis=0, return_index=True)
            best = candidates[torch.from_numpy(np.sort(first)[: self.top])]
            layers[layer, : len(best)] = best.masked_fill(best[:, :1] < 0, math.nan)
        for i, name in enumerate(("value", "dimension", "position", "token")):
            found[f"massive_{name}"] = layers[..., i]
        value = found["massive_value"]
        found["massive"] = norms.is_massive(value, found["median_magnitude"][:, None].expand_as(value))
        return found

    def to_dataset(self) -> xr.Dataset:
        variables = self.compute()
        if not variables or self.shape is None:
            return xr.Dataset(attrs={"tokens_seen": 0, "sequences": 0})
        n_layers = self.shape.n_layers
        largest = self._largest()
        coords: dict[str, Any] = {
            "layer": range(n_layers + 1),
            "block": range(n_layers),
            "position": list(BUCKETS),
            "quantile": list(QUANTILES),
            "bin": norms.bin_edges()[:-1].numpy(),
            "rank": range(1, self.top + 1),
        }
        for name in ("dimension", "position", "token"):
            coords[f"massive_{name}"] = (("layer", "rank"), largest.pop(f"massive_{name}").nan_to_num(-1).int().numpy())
        data = xr.Dataset({k: shaped(_dims(k), v, coords) for k, v in {**variables, **largest}.items()}, coords)
        data["cos_null_std"] = self.shape.d_model**-0.5
        for name, words in DESCRIPTIONS.items():
            data[name].attrs["description"] = words
        data.attrs.update(
            tokens_seen=int(self.tokens_seen),
            sequences=sum(len(block) for block in self.sums),
            growth_layers=list(self._fit_layers()),
        )
        return data


def _mean(sums: Float[Tensor, "sequence slot layer position"], slot: str, name: str) -> dict[str, Tensor]:
    """A mean over tokens with its interval over sequences, each (layer, position)."""
    value, count = sums[:, _SLOTS.index(slot)], sums[:, _SLOTS.index(_MEANS[slot])]
    low, high = bootstrap_interval(value, count)
    return {name: value.sum(0) / count.sum(0), f"{name}_low": low, f"{name}_high": high}


def _dims(name: str) -> tuple[str, ...]:
    base = name.removesuffix("_low").removesuffix("_high")
    if base in _STEP or base in _WRITES or base == "growth_geometric":
        return ("block",)
    if base.startswith("norm_final"):
        return ("position",)
    if base.startswith("massive"):
        return ("layer", "rank")
    special = {
        "growth_rate": (),
        "growth_r2": (),
        "norm_quantile": ("quantile", "layer", "position"),
        "norm_histogram": ("layer", "position", "bin"),
    }
    if base in special:
        return special[base]
    return ("layer", "position") if base.startswith("norm") else ("layer",)


DESCRIPTIONS = {
    "norm_mean": "mean length of the stream before any norm; layer 0 is the embedding, the last before the final norm",
    "norm_geometric": "geometric mean length of the stream before any norm",
    "norm_quantile": "quantiles of the length, from the histogram (true to 9 %)",
    "norm_histogram": "tokens in each log bin of the length; the coordinate is the bin's lower edge",
    "norm_final_mean": "mean length of the last stream after the final norm and its gain (NaN without such a norm)",
    "norm_final_geometric": "geometric mean length after the final norm and its gain",
    "growth": "mean over tokens of ||x after the block|| / ||x before||, position 0 left out",
    "growth_orthogonal": "what growth would be if each step were orthogonal to the stream: its baseline",
    "growth_geometric": "ratio of the geometric means of the length after and before the block",
    "growth_rate": "factor per layer of a line through the mean log length over the layers in growth_layers",
    "growth_r2": "R² of that line; high for any smooth curve, the more so over few layers",
    "attn_write_norm": "mean length of what attention adds to the stream",
    "mlp_write_norm": "mean length of what the MLP adds to the stream",
    "cos_stream_attn": "mean cosine of what attention adds with the stream it reads",
    "cos_stream_mlp": "mean cosine of what the MLP adds with the stream it is added to",
    "cos_null_std": "standard deviation of the cosine of unrelated directions, 1 / sqrt(d_model); their mean is 0",
    "radial": "mean length of the step along the stream (negative: against it)",
    "tangential": "mean length of the step across the stream",
    "norm_squared_change": "mean of ||x after||² - ||x before||² = norm_squared_cross + norm_squared_step",
    "norm_squared_cross": "mean of 2 <x, D>, what the direction of the step adds to ||x||²",
    "norm_squared_step": "mean of ||D||², what any step of this length adds to ||x||²",
    "cos_to_final": "mean cosine of the stream with the last one at the same position",
    "effective_rank": "participation ratio of the covariance over tokens, 1 to d_model (through 128 random directions)",
    "massive_value": "largest |x| of all sequences, one for each dimension and position",
    "massive_mean": "the largest, second ... |x| of a sequence, averaged over sequences",
    "massive": "whether it is above 100 and 1000 times the median |x| (Sun et al. 2024)",
    "median_magnitude": "median |x| over the sampled positions",
}
