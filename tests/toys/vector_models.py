"""What the tests of models on vectors share: one of each kind, vectors for it, and what its hooks carry."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaint.toys.linear_attention import linear_attention, regression_attention, vector_transformer
from metaint.toys.vector_model import VectorModel

D, T, CONTEXT = 3, 7, 6
SIZES: dict[str, Any] = {"n_ctx": 9, "n_layers": 2, "n_heads": 2, "d_model": 8, "d_mlp": 12}
MAKERS: dict[str, Callable[..., VectorModel]] = {
    "linear": lambda **s: linear_attention(D, n_layers=2, n_heads=2, **s),
    "released": lambda **s: linear_attention(D, n_layers=2, as_released=True, **s),
    "regression": lambda **s: regression_attention(D, CONTEXT, n_layers=2, n_heads=2, **s),
    "transformer": lambda **s: vector_transformer(d_in=D, d_out=D, **SIZES, **s),
}


def made(name: str) -> VectorModel:
    """A model in float64 whose weights are large enough to tell, the zeros and ones among them too."""
    model = MAKERS[name](dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def vectors(model: VectorModel, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, T, model.cfg.d_in, dtype=dtype, generator=torch.Generator().manual_seed(1))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-10)


def plain_tokens(sequence: Tensor) -> list[Tensor]:
    zero = torch.zeros_like(sequence[0])
    return [torch.cat([zero, sequence[t], sequence[t - 1] if t else zero]) for t in range(len(sequence))]
