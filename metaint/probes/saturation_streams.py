"""The stream after each block in every copy of a batch, beside that in the first: what `SaturationProbe` compares.

In: streams and the sums of their directions. Out: unit vectors, and what a mean cosine is to be read beside.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metaint.errors import ActivationError
from metaint.measures import saturation


def directions(
    layer: int, stream: Float[Tensor, "batch position d_model"], real: Bool[Tensor, "batch position"]
) -> Float[Tensor, "batch position d_model"]:
    """The stream divided by its length; ActivationError where a real token's is not finite."""
    stream = stream.to(torch.promote_types(stream.dtype, torch.float32))
    length = torch.linalg.vector_norm(stream, dim=-1, keepdim=True)
    if not bool(length[real].isfinite().all()):
        raise ActivationError(
            f"blocks.{layer}.hook_resid_post holds NaN or infinity: the weights or the activations before it "
            "overflow (try a wider dtype)."
        )
    return stream / length.clamp(min=torch.finfo(stream.dtype).tiny)


def similarity_beside(
    similarity: Float[Tensor, "sequence scale layer"],
    positions: Float[Tensor, " sequence"],
    totals: Float[Tensor, "scale layer d_model"],
    within: Float[Tensor, "scale layer"],
    first: Float[Tensor, "1 layer d_model"],
) -> dict[str, Float[Tensor, "scale layer"]]:
    """What the similarity is to be read beside: that of other tokens, and that without the mean directions.

    `similarity` sums over a sequence's `positions`, `totals` are the summed directions at each scale and `first` those
    of the model itself, `within` sums over sequences the product of a sequence's two totals.
    """
    n = positions.sum()
    pairs = n.square() - positions.square().sum()
    if len(positions) == 1:  # no other sequence: other positions of the same one
        within, pairs = similarity.sum(0), n.square() - n
    first = first.expand_as(totals)
    return {
        "similarity_null": saturation.mismatched_cosine(first, totals, within, pairs),
        "similarity_centred": saturation.centred_similarity(similarity.sum(0) / n, first / n, totals / n),
    }
