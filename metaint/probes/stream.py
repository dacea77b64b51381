"""What `ResidualProbe` and `InnerProbe` share: where the rows of a pass stand, and sums kept for each sequence."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaint.measures.positions import sample_positions
from metaint.models.inputs import InputWatch


@dataclass(frozen=True)
class Rows:
    """The rows of one forward pass: their positions (real tokens counted from 0), and a sample of them.

    Position 0 and padding are never sampled.
    """

    position: Int[Tensor, "batch query"]
    real: Bool[Tensor, "batch query"]
    tokens: Int[Tensor, "batch query"] | None
    past: int
    index: Int[Tensor, "batch sample"]
    sampled: Bool[Tensor, "batch sample"]

    @staticmethod
    def of(activation: Tensor, watch: InputWatch, count: int, seed: int, need_next: bool = False) -> "Rows":
        """The rows of a stream [batch, query, d_model]; with `need_next`, only rows with a next token are sampled."""
        batch, queries, _ = activation.shape
        inputs = watch.resolve(batch, queries, None, activation.device)
        real = inputs.mask[:, inputs.past :]
        position = (inputs.mask.long().cumsum(-1) - inputs.mask.long())[:, inputs.past :]
        tokens = None if inputs.tokens is None else inputs.tokens.to(activation.device)[:, inputs.past :]
        eligible = real & (position > 0)
        if need_next:
            eligible = eligible & torch.nn.functional.pad(real[:, 1:], (0, 1))
        index, sampled = sample_positions(position, eligible, count, seed)
        return Rows(position, real, tokens, inputs.past, index, sampled)

    def pick(self, values: Tensor) -> Tensor:
        """The sampled rows of [batch, query, *rest]: [batch, sample, *rest]."""
        return values[torch.arange(len(values), device=values.device)[:, None], self.index]


def widened_copy(activation: Tensor) -> Float[Tensor, "*rest"]:
    """The activation in float32 or better, as it is now: a model may add to its stream in place later."""
    dtype = torch.float64 if activation.dtype == torch.float64 else torch.float32
    return activation.to(dtype, copy=True)


def precise(device: torch.device) -> torch.dtype:
    """What sums are kept in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
