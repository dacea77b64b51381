"""The forward pass as an inner optimisation: losses at points of the stream, gradients there, steps between them.

In: representations z, targets, and the `Readout` that turns a representation into logits. Out: numbers per position.

An operational definition of our own, inspired by the meta-learning view of Wu & Varshney (2310.05884); it is no
theorem of theirs. The inner parameter is the stream at one position, the inner model is the model's own final norm
and unembedding, the inner loss the cross-entropy of the next token, a layer is a step. What is derived holds for any
model; whether steps follow the gradient is what one measures. Norm growth alone says nothing: through a final norm
<z, g> = 0, so every exact gradient step lengthens z, and so does adding anything that doesn't oppose it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaint.measures.norms import dot

# Bytes that the products with the vocabulary hold at once: half for blocks of logits, half for what is as wide as the
# stream.
BUDGET = 64 << 20
_BLOCKS, _STREAMS = 3, 4
# Bytes of the unembedding that are widened at once.
_CAST_BYTES = 32 << 20


@dataclass(frozen=True)
class Norm:
    """LayerNorm or RMSNorm and its Jacobian; `gain` is what multiplies (Gemma's 1 + w), None if it was folded."""

    kind: Literal["layer", "rms"]
    eps: float
    gain: Float[Tensor, " d_model"] | None = None
    bias: Float[Tensor, " d_model"] | None = None

    def scale(self, z: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest 1"]:
        """What z (LayerNorm: z minus its mean) is divided by: `hook_scale`."""
        return (self._centred(z).square().mean(-1, keepdim=True) + self.eps).sqrt()

    def __call__(self, z: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest d_model"]:
        """The normalised representation with gain and bias."""
        out = self._centred(z) / self.scale(z)
        out = out if self.gain is None else out * self.gain.to(z.dtype)
        return out if self.bias is None else out + self.bias.to(z.dtype)

    def pull_back(self, z: Float[Tensor, "n d_model"], v: Float[Tensor, "n k d_model"]) -> Float[Tensor, "n k d_model"]:
        """The transposed Jacobian at z times gradients v of what comes out: (v - [mean v] - zh mean(zh v)) / scale."""
        v = v if self.gain is None else v * self.gain.to(v.dtype)
        scale = self.scale(z)
        zh = (self._centred(z) / scale)[:, None]
        return (self._centred(v) - zh * (zh * v).mean(-1, keepdim=True)) / scale[:, None]

    def _centred(self, z: Tensor) -> Tensor:
        return z - z.mean(-1, keepdim=True) if self.kind == "layer" else z


@dataclass(frozen=True)
class Readout:
    """The inner model: logits = cap(scale (norm(z) W_U + b_U)), with cap(x) = c tanh(x / c) where there is a cap."""

    weight: Float[Tensor, "d_model vocab"]
    bias: Float[Tensor, " vocab"] | None = None
    norm: Norm | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def logits(self, z: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
        """What the model would predict if z were the last layer's stream (the logit lens)."""
        inner = z if self.norm is None else self.norm(z)
        if self.weight.dtype == z.dtype:
            out = inner @ self.weight
        else:
            out = torch.cat([inner @ weight for _, weight in self._widened(z.dtype)], -1)
        return self.finish(out, slice(None))

    def finish(self, out: Float[Tensor, "*rest some"], columns: slice | Tensor) -> Float[Tensor, "*rest some"]:
        """The logits of these columns of the vocabulary from norm(z) W_U, which is overwritten."""
        if self.bias is not None:
            out += self.bias[columns].to(out.dtype)
        if self.scale != 1:
            out *= self.scale
        return out if self.soft_cap is None else out.div_(self.soft_cap).tanh_().mul_(self.soft_cap)

    def slope(self, logits: Float[Tensor, "*rest"]) -> Float[Tensor, "*rest"] | None:
        """The derivative of the cap, 1 - (f / c)², where there is one."""
        return None if self.soft_cap is None else (logits / self.soft_cap).square_().neg_().add_(1)

    def pull_back(
        self,
        z: Float[Tensor, "n d_model"],
        expected: Float[Tensor, "n d_model"],
        at_targets: Float[Tensor, "n k"],
        targets: Int[Tensor, "n k"],
    ) -> Float[Tensor, "n k d_model"]:
        """Gradients at z of the cross-entropy with each target, given W_U C p and the targets' logits.

        scale J_N(z)' W_U C (p - e_y), where C is the cap's slope. Targets share the product W_U C p.
        """
        at_target = self.weight.mT[targets].to(z.dtype)
        slope = self.slope(at_targets)
        at_target = at_target if slope is None else at_target * slope[..., None]
        gradient = (expected[:, None] - at_target) * self.scale
        return gradient if self.norm is None else self.norm.pull_back(z, gradient)

    def _widened(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The unembedding in a wider dtype, a block of columns at a time."""
        width = max(1, _CAST_BYTES // (len(self.weight) * dtype.itemsize))
        for start in range(0, self.weight.shape[1], width):
            columns = slice(start, start + width)
            yield columns, self.weight[:, columns].to(dtype)


class Translator(NamedTuple):
    """A tuned lens at one layer (Belrose et al. 2023, 2303.08112): z matrix + bias is read instead of z."""

    matrix: Float[Tensor, "d_model d_model"]
    bias: Float[Tensor, " d_model"]


class PathReadings(NamedTuple):
    """What was read along a path; `k` runs over the targets given. Losses, entropies and divergences are in nats."""

    loss: Float[Tensor, "point n k"]
    rank: Float[Tensor, "point n"]  # of the first target, 1 is the most likely token
    entropy: Float[Tensor, "point n"]
    kl: Float[Tensor, "point n"]  # KL(prediction at the last point || prediction here)
    gradient_norm: Float[Tensor, "point n"]  # NaN at points that no step starts from, but for the last
    descent: Float[Tensor, "step n k"]  # -<D, g>: what the loss would fall by if it were linear
    agreement: Float[Tensor, "step n k"]  # cos(D, -g)
    rate: Float[Tensor, "step n k"]  # -<D, g> / ||g||², the learning rate of a gradient step of that size


class _Predictions(NamedTuple):
    """What one way through the vocabulary tells of predictions at points of the stream."""

    log_sum: Float[Tensor, "point n"]
    entropy: Float[Tensor, "point n"]
    kl: Float[Tensor, "point n"]  # of the last start's prediction from that at each point
    rank: Float[Tensor, "point n"]
    at_targets: Float[Tensor, "point n k"]
    expected: Float[Tensor, "start n d_model"]  # W_U C p


def inner_gradient(
    readout: Readout, z: Float[Tensor, "n d_model"], targets: Int[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n d_model"]]:
    """Cross-entropy of each target at z, in nats, and its gradient, in closed form."""
    predicted = _predict(readout, z[None], targets[:, None], starts=1)
    gradient = readout.pull_back(z, predicted.expected[0], predicted.at_targets[0], targets[:, None])
    return (predicted.log_sum - predicted.at_targets[..., 0])[0], gradient[:, 0]


def read_path(
    readout: Readout,
    points: Sequence[Float[Tensor, "n d_model"]],
    steps: Sequence[tuple[int, int]],
    targets: Int[Tensor, "n k"],
    translators: Sequence[Translator | None] | None = None,
    budget: int = BUDGET,
) -> PathReadings:
    """Losses at every point, and how each step (start, stop) between points agrees with the gradient at its start.

    The last point is the model's final stream. `targets[:, 0]` are the true next tokens, further columns other
    tokens to compare with. Rows are read in pieces, at all points at once, that hold at most `budget` bytes.
    """
    n, k = targets.shape
    like = points[-1]
    at_points, at_steps = (len(points), n), (len(steps), n, k)
    readings = PathReadings(
        like.new_empty(*at_points, k),
        *(like.new_full(at_points, torch.nan) for _ in range(4)),
        *(like.new_empty(at_steps) for _ in range(3)),
    )
    room = max(1, budget // (2 * _STREAMS * like.shape[1] * like.dtype.itemsize * len(points)))
    size = math.ceil(n / max(1, math.ceil(n / room)))  # pieces all alike
    for start in range(0, n, max(1, size)):
        rows = slice(start, start + size)
        _read_rows(readout, [z[rows] for z in points], steps, targets[rows], translators, readings, rows, budget)
    return readings


def _read_rows(
    readout: Readout,
    points: list[Tensor],
    steps: Sequence[tuple[int, int]],
    targets: Tensor,
    translators: Sequence[Translator | None] | None,
    readings: PathReadings,
    rows: slice,
    budget: int,
) -> None:
    # Points that gradients are wanted at come first, of them the final one last.
    starts = sorted({start for start, _ in steps} | {len(points) - 1})
    order = [*starts, *(i for i in range(len(points)) if i not in starts)]
    read = list(points)
    for i, translator in enumerate(translators or ()):
        read[i] = points[i] if translator is None else points[i] @ translator.matrix + translator.bias
    predicted = _predict(readout, torch.stack([read[i] for i in order]), targets, len(starts), budget)
    readings.loss[order, rows] = predicted.log_sum[..., None] - predicted.at_targets
    readings.rank[order, rows] = predicted.rank
    readings.entropy[order, rows] = predicted.entropy
    readings.kl[order, rows] = predicted.kl
    for i, expected, at_targets in zip(starts, predicted.expected, predicted.at_targets, strict=False):
        gradient = readout.pull_back(read[i], expected, at_targets, targets)
        if translators is not None and (translator := translators[i]) is not None:
            gradient = gradient @ translator.matrix.mT
        square = dot(gradient, gradient)
        readings.gradient_norm[i, rows] = square[:, 0].sqrt()
        for s in [s for s, (start, _) in enumerate(steps) if start == i]:
            step = points[steps[s][1]] - points[i]
            descent = -dot(gradient, step[:, None].expand_as(gradient))
            length = (square * dot(step, step)[:, None]).sqrt()
            readings.descent[s, rows] = descent
            readings.agreement[s, rows] = torch.where(length > 0, descent / length, 0.0)
            readings.rate[s, rows] = torch.where(square > 0, descent / square, 0.0)


@torch.no_grad()
def _predict(
    readout: Readout,
    z: Float[Tensor, "point n d_model"],
    targets: Int[Tensor, "n k"],
    starts: int,
    budget: int = BUDGET,
) -> _Predictions:
    """One way through the vocabulary for all points at once, in blocks of columns that stay in the cache.

    Sums over the vocabulary are kept beside the largest logit so far, and shrink when a larger one comes.
    """
    points, n, d_model = z.shape
    rows, last = points * n, starts - 1
    normed = z if readout.norm is None else readout.norm(z)
    bar = _at_targets(readout, normed, targets[:, 0]).reshape(rows, 1)
    inner, targets = normed.flatten(0, 1), targets.repeat(points, 1)
    at_targets = inner.new_empty(targets.shape)
    largest = inner.new_full((rows, 1), -math.inf)
    total, weighted, apart, above = inner.new_zeros(4, rows, 1)
    expected = inner.new_zeros(starts * n, d_model)
    width = _width(readout, rows, inner.dtype, budget)
    buffers = inner.new_empty(_BLOCKS, rows * width)
    for start in range(0, readout.weight.shape[1], width):
        columns = slice(start, start + width)
        weight = readout.weight[:, columns].to(inner.dtype)
        logits, p, space = (buffer[: rows * weight.shape[1]].view(rows, -1) for buffer in buffers)
        readout.finish(torch.mm(inner, weight, out=logits), columns)
        here, place = _within(targets - start, logits.shape[1])
        at_targets = torch.where(here, logits.gather(1, place), at_targets)
        # Comparing into numbers and adding these up is several times faster than counting Booleans. The target is not
        # above itself, however the two products round.
        hits = torch.gt(logits, bar, out=space)
        above += hits.sum(-1, keepdim=True) - (hits.gather(1, place) * here)[:, :1]
        before, largest = largest, torch.maximum(largest, logits.amax(-1, keepdim=True))
        shrink = (before - largest).exp_()
        torch.sub(logits, largest, out=p).exp_()
        total.mul_(shrink).add_(p.sum(-1, keepdim=True))
        weighted.mul_(shrink).add_(torch.mul(p, logits, out=space).sum(-1, keepdim=True))
        at, of, difference = (block.view(points, n, -1) for block in (logits, p, space))
        torch.sub(at[last], at, out=difference).mul_(of[last])
        apart.view(points, n, 1).mul_(shrink.view(points, n, 1)[last]).add_(difference.sum(-1, keepdim=True))
        slope = readout.slope(logits[: starts * n])
        p = p[: starts * n] if slope is None else p[: starts * n] * slope
        expected.mul_(shrink[: starts * n]).addmm_(p, weight.mT)
    total, weighted, apart, above, largest = (x.view(points, n) for x in (total, weighted, apart, above, largest))
    log_sum = total.log() + largest
    return _Predictions(
        log_sum,
        log_sum - weighted / total,
        (apart / total[last] + (log_sum - log_sum[last])).clamp(min=0),
        above + 1,
        at_targets.view(points, n, -1),
        expected.view(starts, n, d_model) / total[:starts, :, None],
    )


def _width(readout: Readout, rows: int, dtype: torch.dtype, budget: int) -> int:
    """How many columns of the vocabulary are read at a time."""
    width = min(readout.weight.shape[1], budget // (2 * _BLOCKS * dtype.itemsize * rows))
    if readout.weight.dtype != dtype:
        width = min(width, _CAST_BYTES // (len(readout.weight) * dtype.itemsize))
    return max(1, width)


def _at_targets(
    readout: Readout, normed: Float[Tensor, "point n d_model"], targets: Int[Tensor, " n"]
) -> Float[Tensor, "point n"]:
    """The logits of targets alone, which the others can be compared with as they come."""
    # As a matrix product, since rounded as those are: a sum by itself is not.
    products = normed @ readout.weight[:, targets].to(normed.dtype)
    return readout.finish(products, targets).diagonal(0, 1, 2)


def _within(targets: Int[Tensor, "row k"], width: int) -> tuple[Bool[Tensor, "row k"], Int[Tensor, "row k"]]:
    """Which of these columns lie in a block of this width, and where; the others anywhere in it."""
    return (targets >= 0) & (targets < width), targets.clamp(0, width - 1)
