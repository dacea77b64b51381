"""Kinds of heads with each weight times the length of its value: what `OutputProbe` makes of a `Plan` of targets."""

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from metaint.probes.plan import Plan


def share_on_targets(
    plan: Plan,
    pattern: Float[Tensor, "batch head query key"],
    lengths: Float[Tensor, "batch head key"],
    total: Float[Tensor, "batch head query"],
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "kind batch head"], Float[Tensor, "kind batch head"]]:
    """Weight times `lengths` of each kind's targets, over the row's `total`, summed over queries; and the queries.

    A head whose row has no length at all is not counted there.
    """
    batch, query, key = plan.pairs
    whole = total[batch, :, query]
    weights = pattern[batch, :, query, key].to(whole.dtype) * lengths[batch, :, key]
    shares = torch.where(whole > 0, weights / whole, 0.0).to(dtype)
    kinds, sequences, heads = len(plan.matches), *pattern.shape[:2]
    summed = torch.zeros(kinds * sequences, heads, dtype=dtype, device=pattern.device)
    summed.index_add_(0, plan.slot, shares)
    queries = einsum(
        (plan.matches > 0).to(dtype), (total > 0).to(dtype), "kind batch query, batch head query -> kind batch head"
    )
    return summed.view(kinds, sequences, heads), queries
