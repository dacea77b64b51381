"""The forward pass as an inner optimisation: losses at points of the stream, gradients there, steps between them.

In: representations z, targets, and the `Readout` that turns a representation into logits. Out: numbers per position.

An operational definition of our own, inspired by the meta-learning view of Wu & Varshney (2310.05884); it is no
theorem of theirs. The inner parameter is the stream at one position, the inner model is the model's own final norm
and unembedding, the inner loss the cross-entropy of the next token, a layer is a step. What is derived holds for any
model; whether steps follow the gradient is what one measures. Norm growth alone says nothing: through a final norm
<z, g> = 0, so every exact gradient step lengthens z, and so does adding anything that doesn't oppose it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaint.measures.norms import dot

# Bytes that the products with the vocabulary hold at once: up to five buffers of [position, vocabulary], and beside
# them a block of the unembedding where it has to be widened.
BUDGET = 128 << 20
_BUFFERS, _CAST_BYTES = 5, 32 << 20


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
        if self.bias is not None:
            out += self.bias.to(out.dtype)
        if self.scale != 1:
            out *= self.scale
        return out if self.soft_cap is None else out.div_(self.soft_cap).tanh_().mul_(self.soft_cap)

    def pull_back(
        self,
        z: Float[Tensor, "n d_model"],
        logits: Float[Tensor, "n vocab"],
        probabilities: Float[Tensor, "n vocab"],
        targets: Int[Tensor, "n k"],
    ) -> Float[Tensor, "n k d_model"]:
        """Gradients at z of the cross-entropy with each target; overwrites `probabilities`.

        scale J_N(z)' W_U C (p - e_y), where C = 1 - (f / c)² is the cap's slope. Targets share the product W_U C p.
        """
        at_target = self.weight.mT[targets].to(z.dtype)
        if self.soft_cap is not None:
            slope = (logits / self.soft_cap).square_().neg_().add_(1)
            at_target = at_target * slope.gather(1, targets)[..., None]
            probabilities.mul_(slope)
        if self.weight.dtype == z.dtype:
            shared = probabilities @ self.weight.mT
        else:
            shared = torch.zeros_like(z)
            for columns, weight in self._widened(z.dtype):
                shared += probabilities[:, columns] @ weight.mT
        gradient = (shared[:, None] - at_target) * self.scale
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


def inner_gradient(
    readout: Readout, z: Float[Tensor, "n d_model"], targets: Int[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n d_model"]]:
    """Cross-entropy of each target at z, in nats, and its gradient, in closed form."""
    logits = readout.logits(z)
    p, log_sum = _softmax(logits)
    loss = log_sum - logits.gather(1, targets[:, None])[:, 0]
    return loss, readout.pull_back(z, logits, p, targets[:, None])[:, 0]


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
    tokens to compare with. Rows go through the vocabulary in chunks that hold at most `budget` bytes.
    """
    n, k = targets.shape
    like = points[-1]
    at_points, at_steps = (len(points), n), (len(steps), n, k)
    found = PathReadings(
        like.new_empty(*at_points, k),
        *(like.new_full(at_points, torch.nan) for _ in range(4)),
        *(like.new_empty(at_steps) for _ in range(3)),
    )
    rows = max(1, budget // (_BUFFERS * readout.weight.shape[1] * like.dtype.itemsize))
    for start in range(0, n, rows):
        chunk = slice(start, start + rows)
        _read_rows(readout, [z[chunk] for z in points], steps, targets[chunk], translators, found, chunk)
    return found


def _read_rows(
    readout: Readout,
    points: list[Tensor],
    steps: Sequence[tuple[int, int]],
    targets: Tensor,
    translators: Sequence[Translator | None] | None,
    found: PathReadings,
    rows: slice,
) -> None:
    final = readout.logits(points[-1])
    final_p, final_sum = _softmax(final)
    final_mean = dot(final_p, final)
    del final
    for i, z in enumerate(points):
        translator = translators[i] if translators is not None else None
        read = z if translator is None else z @ translator.matrix + translator.bias
        logits = readout.logits(read)
        p, log_sum = _softmax(logits)
        at_targets = logits.gather(1, targets)
        found.loss[i, rows] = log_sum[:, None] - at_targets
        found.rank[i, rows] = (logits > at_targets[:, :1]).sum(-1).to(z.dtype) + 1
        found.entropy[i, rows] = log_sum - dot(p, logits)
        found.kl[i, rows] = ((final_mean - dot(final_p, logits)) + (log_sum - final_sum)).clamp(min=0)
        leaving = [s for s, (begin, _) in enumerate(steps) if begin == i]
        if not leaving and i < len(points) - 1:
            continue
        gradient = readout.pull_back(read, logits, p, targets)
        gradient = gradient if translator is None else gradient @ translator.matrix.mT
        square = dot(gradient, gradient)
        found.gradient_norm[i, rows] = square[:, 0].sqrt()
        for s in leaving:
            step = points[steps[s][1]] - z
            descent = -dot(gradient, step[:, None].expand_as(gradient))
            length = (square * dot(step, step)[:, None]).sqrt()
            found.descent[s, rows] = descent
            found.agreement[s, rows] = torch.where(length > 0, descent / length, 0.0)
            found.rate[s, rows] = torch.where(square > 0, descent / square, 0.0)


def _softmax(logits: Float[Tensor, "n vocab"]) -> tuple[Float[Tensor, "n vocab"], Float[Tensor, " n"]]:
    """Probabilities, and the logarithm of what they were divided by; one buffer beside the logits."""
    largest = logits.amax(-1, keepdim=True)
    p = (logits - largest).exp_()
    total = p.sum(-1, keepdim=True)
    return p.div_(total), (total.log() + largest)[:, 0]
