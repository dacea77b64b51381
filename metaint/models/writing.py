"""What a model's heads write with: W_O of each layer, the norm that follows attention, and the unembedding.

In: a model. Out: `Writing`, read when asked; `stamp` tells whether weights have changed since.
"""

from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from metaint.measures.inner import Norm
from metaint.measures.outputs import Vocabulary, length_factor
from metaint.models.audit import holds
from metaint.models.describe import by_layer
from metaint.models.folded import norm_after
from metaint.models.invariants import bias_of, write_factor_of
from metaint.models.protocol import Model
from metaint.models.reading import Unavailable, widen
from metaint.models.readout import readout_of

# What must hold for a write to reach the logits as it is, but for the final norm's length.
_DIRECT = ("residual", "stream", "unembedding")


@dataclass(frozen=True)
class Layer:
    """One layer's way from heads to the stream, at least float32."""

    out: Float[Tensor, "head d_head d_model"]
    factor: Float[Tensor, "head d_head rank"]
    """Keeps the lengths that W_O gives, before what a model multiplies sublayers by (Granite)."""
    bias: Float[Tensor, " d_model"]
    after: Norm | None
    """A norm between attention and the stream (Gemma-2, OLMo-2)."""

    def writes(self, z: Float[Tensor, "sample head d_head"]) -> Float[Tensor, "sample head d_model"]:
        """What each head adds to the stream; a norm that follows divides by the length it had in the pass."""
        written = einsum(z, self.out, "sample head d_head, head d_head d_model -> sample head d_model")
        if self.after is None:
            return written
        scale = self.after.scale(written.sum(1, keepdim=True) + self.bias)
        if self.after.kind == "layer":
            written = written - written.mean(-1, keepdim=True)
        gained = written if self.after.gain is None else written * self.after.gain.to(written.dtype)
        return gained / scale


@dataclass(frozen=True)
class Writing:
    """The layers, and what the stream's end makes of what they write; None where that can't be told."""

    layers: dict[int, Layer]
    """Of the layers that attend, by their numbers."""
    vocabulary: Vocabulary | None


@torch.no_grad()
def writing_of(model: Model, says: bool) -> Writing:
    """Read the weights; with `says` the unembedding too, as far as the audit finds that writes reach it."""
    layers: dict[int, Layer] = {}
    direct = True
    for layer, out in by_layer(model, "W_O").items():
        weight = widen(out.detach())
        try:
            after = norm_after(model, layer)
        except Unavailable:
            after, direct = None, False
        bias = bias_of(model, "b_O", layer, weight[:1, 0][None])
        layers[layer] = Layer(weight * write_factor_of(model), length_factor(weight), bias, after)
    reaches = says and direct and all(holds(model, check) for check in _DIRECT)
    vocabulary = Vocabulary.of(readout_of(model), weight.dtype) if reaches else None
    return Writing(layers, vocabulary)


def stamp(model: Model) -> list[tuple[int, int]]:
    """What differs after a change of the model's parameters, in place or to other memory (`metaint.scaled`)."""
    known = (parameter for parameter in model.parameters() if not parameter.is_inference())
    return [(parameter.data_ptr(), parameter._version) for parameter in known]
