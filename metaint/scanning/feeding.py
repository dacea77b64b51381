"""A model as a function from vectors to predictions of the next one, for `recur`.

In: a model that takes vectors, or any causal TransformerLens model, whose embeddings are replaced at `hook_embed`. Out:
what predicts, by the model's output, by a readout of its owner's, or by one that is fitted here.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from metaint.errors import InputError
from metaint.measures import recurrence
from metaint.models.protocol import Model
from metaint.models.reading import random_tokens

Predict = Callable[[Tensor], Tensor]


def takes_vectors(model: Model) -> bool:
    """Whether the model reads vectors, and not token ids."""
    return getattr(model.cfg, "d_in", None) is not None


def predictor(
    model: Model, vectors: Tensor, embedding: Tensor | None, readout: Predict | None, batch_size: int, seed: int
) -> tuple[Predict, int]:
    """What predicts, and how many sequences it was fitted on, the first ones."""
    if takes_vectors(model):
        return model, 0
    fed = _fed(model, vectors, embedding, seed)
    if readout is not None:
        return lambda x: readout(fed(x)).to(x.dtype), 0
    half = len(vectors) // 2
    fitted = _fitted_readout(fed, vectors[:half], batch_size)
    return lambda x: fitted(fed(x)).to(x.dtype), half


def _fed(model: Model, vectors: Tensor, embedding: Tensor | None, seed: int) -> Predict:
    """A model as a function from vectors to its last stream, which is the only trace of a pass."""
    d, width = vectors.shape[2], int(model.cfg.d_model)
    if embedding is not None and embedding.shape != (d, width):
        raise InputError(f"embedding is {list(embedding.shape)}: give a map [d, d_model], {[d, width]}.")
    if embedding is None:
        embedding = _orthonormal(d, width, seed)
    map_ = embedding.detach().to(vectors)
    # Ids that stand for no padding; what they embed to is replaced.
    ids = random_tokens(model, 1, vectors.shape[1] - 1)
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"

    def stream(x: Tensor) -> Tensor:
        carried: dict[str, Tensor] = {}

        def replace(tokens: Tensor, hook: Any) -> Tensor:
            return (x @ map_).to(tokens.dtype)

        def keep(value: Tensor, hook: Any) -> None:
            carried["stream"] = value

        with model.hooks(fwd_hooks=[("hook_embed", replace), (last, keep)]):
            model(ids[:, : x.shape[1]].expand(len(x), -1), return_type=None)
        return carried["stream"]

    sample = vectors[:1, :-1]
    if torch.equal(stream(sample), stream(sample + 1)):
        raise InputError("model doesn't go by what stands at hook_embed, so no vectors can be fed: give another model.")
    return stream


def _orthonormal(d: int, width: int, seed: int) -> Float[Tensor, "d d_model"]:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, d, generator=generator, dtype=torch.float64)).Q.mT


def _fitted_readout(fed: Predict, vectors: Tensor, batch_size: int) -> Predict:
    """The affine map from the last stream, divided by its root mean square, that ridge regression finds for s_{T+1}."""
    if len(vectors) < recurrence.FEWEST:
        raise InputError(
            f"vectors has too few sequences to fit a readout on half: give {2 * recurrence.FEWEST}, or a readout."
        )
    fit = len(vectors) - round(recurrence.VALIDATION * len(vectors))
    seen, unseen = (_second_moments(fed, part, batch_size) for part in (vectors[:fit], vectors[fit:]))
    d = vectors.shape[2]
    guesses = _ridge_maps(seen, d)
    errors = [float((guess * (unseen @ guess)).sum()) for guess in guesses]
    # Residuals are (1, x, y) times the guess: minus the map above, the identity below.
    best = -_ridge_maps(seen + unseen, d)[int(np.argmin(errors))][:-d].to(vectors)
    return lambda stream: _scaled(stream).to(best.dtype) @ best[1:] + best[0]


def _scaled(stream: Tensor) -> Tensor:
    stream = stream.to(torch.promote_types(stream.dtype, torch.float32))
    return stream / stream.square().mean(-1, keepdim=True).clamp(min=torch.finfo(stream.dtype).tiny).sqrt()


def _second_moments(fed: Predict, vectors: Tensor, batch_size: int) -> Float[Tensor, "feature feature"]:
    """Sums of products of (1, x, y) over contexts, x being features of s_1..s_T, and y s_{T+1}; float64, on the CPU."""
    total: Any = 0
    for part in vectors.split(batch_size):
        features = _scaled(fed(part[:, :-1]))
        x, y = (rearrange(rows, "batch position d -> (batch position) d") for rows in (features, part[:, 1:]))
        x, y = x.cpu().double(), y.cpu().double()
        rows = torch.cat([torch.ones_like(y[:, :1]), x, y], 1)
        total = total + rows.mT @ rows
    return total


def _ridge_maps(total: Float[Tensor, "feature feature"], d: int) -> list[Float[Tensor, "feature d"]]:
    """For each penalty, the map from (1, x, y) to the residuals y - x B - c of ridge regression."""
    mean = total[0, 1:] / total[0, 0]
    covariance = total[1:, 1:] / total[0, 0] - torch.outer(mean, mean)
    variances, axes = torch.linalg.eigh(covariance[:-d, :-d])
    variances, along = variances.clamp(min=0), axes.mT @ covariance[:-d, -d:]
    maps = []
    for penalty in recurrence.PENALTIES:
        B = axes @ (along / (variances + penalty * variances.mean())[:, None])
        offset = mean[-d:] - mean[:-d] @ B
        maps.append(torch.cat([-offset[None], -B, torch.eye(d, dtype=B.dtype)]))
    return maps
