"""Weight by lag: how far from a query, or from where its token stood last, a head looks.

In: tiles of rows. Out: what lands at each lag, with what uniform attention and the shuffled row put there.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaint.measures.tile import Context, Tile

# Keys before and after the origin.
LAGS = range(-64, 65)
# What a lag is counted from, by the variable that holds it.
ORIGINS = {
    "by_lag": "weight on the key so many tokens after the query (before it: negative); its peak at -1 is a "
    "previous-token head, one at 1 a next-token head of a model that sees both ways",
    "by_match_lag": "weight on the key so many tokens after the last earlier occurrence of the query's token; its peak "
    "at 1 is induction, at 0 duplicate tokens",
}


class ByLag(NamedTuple):
    """Sums over the queries of a tile that have a key at a lag; position 0 is none."""

    weight: Float[Tensor, "origin lag head"]
    null: Float[Tensor, "origin lag head"]
    uniform: Float[Tensor, "origin lag"]
    count: Float[Tensor, "origin lag"]


@dataclass(frozen=True)
class Lagged:
    """The key at each lag of each query, and whether there is one that it sees, for each of `ORIGINS`."""

    context: Context
    key: Int[Tensor, "origin batch query lag"]
    inside: Bool[Tensor, "origin batch query lag"]

    @staticmethod
    def of(context: Context) -> "Lagged":
        """Look the keys up; they depend on the tokens alone."""
        device, (batch, length) = context.mask.device, context.mask.shape
        lags = torch.tensor(list(LAGS), device=device)
        here = context.queries.expand(batch, -1)
        row, query, match = context.matches
        never = torch.full_like(here, -1).flatten()
        last = never.scatter_reduce(0, row * len(context.queries) + query, match, "amax").view_as(here)
        origin = torch.stack([here, last])
        key = rearrange(origin, "origin batch query -> origin batch query 1") + lags
        known = rearrange(origin >= 0, "origin batch query -> origin batch query 1")
        inside = known & (key >= 0) & (key < length)
        key = key.clamp(0, length - 1)
        rows = torch.arange(batch, device=device)[:, None, None]
        inside &= context.mask[rows, key] & (context.rank[rows, key] > 0)
        inside &= context.within(context.queries[:, None], key) & context.counted[..., None]
        return Lagged(context, key, inside)

    def read(self, tile: Tile, total: Float[Tensor, "batch head query"] | float, dtype: torch.dtype) -> ByLag:
        """What the rows of a tile put at each lag; `total` is what they sum to."""
        pool = (tile.n_visible - self.context.sees_first[:, None].float()).clamp(min=1)
        even = ((total - tile.on_first) / pool).to(dtype)
        weights, nulls = [], []
        for key, inside in zip(self.key, self.inside, strict=True):
            index = rearrange(key, "batch query lag -> batch 1 query lag").expand(-1, tile.pattern.shape[1], -1, -1)
            at_lag = tile.pattern.gather(-1, index).to(dtype)
            defined = inside.to(dtype)
            weights.append(einsum(at_lag, defined, "batch head query lag, batch query lag -> lag head"))
            nulls.append(einsum(even, defined, "batch head query, batch query lag -> lag head"))
        defined = self.inside.to(dtype)
        uniform = einsum(
            defined, self.context.n_visible.reciprocal().to(dtype), "origin batch query lag, batch query -> origin lag"
        )
        return ByLag(torch.stack(weights), torch.stack(nulls), uniform, defined.sum((1, 2)))
