"""What an attention measure sees: a tile of rows of the pattern, and what is known of its queries and keys.

Comes in: `pattern[batch, head, query, key]`, the token ids of the keys, which keys are padding, and where the
tile's queries stand among the keys. Goes out: `Tile`, whose properties are the statistics of each row that need
the weights themselves, all computed in one walk over the pattern. A whole pattern, a block of its rows and the
single row of a generation step are all tiles.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TAUS = (0.0, 0.1, 0.5, 1.0, 2.0)
# Smallest normal float32: keeps log finite on masked keys, and weighs nothing.
TINY = torch.finfo(torch.float32).tiny
# Rows are walked in blocks this large (elements), so that on a CPU a block stays in the cache for every statistic.
BLOCK_CPU, BLOCK_DEVICE = 1 << 20, 1 << 25


@dataclass(frozen=True)
class Context:
    """The queries and keys of a tile: everything but the attention weights, so one serves every layer and head.

    `queries[query]` are the positions of the queries among the keys (rising); `mask` is False where a key is
    padding. "Position 0" is the first real token of a sequence, wherever left padding put it.
    """

    queries: Int[Tensor, " query"]
    mask: Bool[Tensor, "batch key"]
    tokens: Int[Tensor, "batch key"] | None = None
    causal: bool = True

    @staticmethod
    def whole(
        tokens: Int[Tensor, "batch key"],
        mask: Bool[Tensor, "batch key"] | None = None,
        causal: bool = True,
    ) -> "Context":
        """The context of a complete pattern: every key is also a query."""
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        return Context(torch.arange(tokens.shape[1], device=tokens.device), real, tokens, causal)

    @cached_property
    def rank(self) -> Int[Tensor, "batch key"]:
        """Number of real tokens before each key: its position, padding not counted."""
        return self.mask.long().cumsum(-1) - self.mask.long()

    @cached_property
    def first(self) -> Int[Tensor, " batch"]:
        """Index of each sequence's position 0 among the keys."""
        return self.mask.long().argmax(-1)

    @cached_property
    def counted(self) -> Bool[Tensor, "batch query"]:
        """Queries that means run over: real tokens after position 0 (which, if causal, can see only itself)."""
        return self.mask[:, self.queries] & (self.rank[:, self.queries] > 0)

    @cached_property
    def visible(self) -> Bool[Tensor, "batch query key"]:
        """Keys a query may see: the real ones, up to the query itself if the model is causal."""
        seen = self.mask[:, None, :].expand(-1, len(self.queries), -1)
        if self.causal:
            keys = torch.arange(self.mask.shape[1], device=self.mask.device)
            seen = seen & (keys <= self.queries[:, None])
        return seen

    @cached_property
    def n_visible(self) -> Float[Tensor, "batch query"]:
        """Number of visible keys of each query (at least 1, so that padding divides by nothing)."""
        if self.causal:
            return (self.rank + self.mask.long())[:, self.queries].clamp(min=1).float()
        return self.mask.sum(-1, keepdim=True).clamp(min=1).expand(-1, len(self.queries)).float()

    @cached_property
    def known_tokens(self) -> Int[Tensor, "batch key"]:
        """The token ids. Where nobody said what they are (a model fed with embeddings), no two are alike."""
        if self.tokens is not None:
            return self.tokens
        return torch.arange(self.mask.shape[1], device=self.mask.device).expand_as(self.mask)

    @cached_property
    def matches(self) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], Int[Tensor, " pair"]]:
        """Indices (batch, query, key) of the earlier real keys that hold the query's own token, rising."""
        tokens = self.known_tokens.int()
        batch, query, key = (tokens[:, self.queries, None] == tokens[:, None, :]).nonzero(as_tuple=True)
        earlier = (key < self.queries[query]) & self.mask[batch, key]
        return batch[earlier], query[earlier], key[earlier]

    def rows(self, block: slice) -> "Context":
        """The same keys, fewer queries."""
        return replace(self, queries=self.queries[block])

    def keys(self, count: int) -> "Context":
        """The last `count` keys alone, as a sliding-window cache presents them."""
        cut = self.mask.shape[1] - count
        tokens = None if self.tokens is None else self.tokens[:, cut:]
        return replace(self, queries=self.queries - cut, mask=self.mask[:, cut:], tokens=tokens)


@dataclass(frozen=True)
class Tile:
    """Rows of attention patterns with their context; rows are probability distributions over the visible keys."""

    pattern: Float[Tensor, "batch head query key"]
    context: Context

    @property
    def n_visible(self) -> Float[Tensor, "batch 1 query"]:
        """Visible keys of each query, shaped to go with a row statistic."""
        return self.context.n_visible[:, None]

    @cached_property
    def on_first(self) -> Float[Tensor, "batch head query"]:
        """Weight on position 0, the attention sink."""
        rows = torch.arange(len(self.pattern), device=self.pattern.device)
        return self.pattern[rows, :, :, self.context.first].float()

    @cached_property
    def sum_squares(self) -> Float[Tensor, "batch head query"]:
        """Sum over keys of the squared weights, in [1/n, 1]."""
        if "walked" in self.__dict__:
            return self.walked["sum_squares"]
        return torch.linalg.vector_norm(self.pattern, dim=-1, dtype=torch.float32).square()

    @cached_property
    def walked(self) -> dict[str, Float[Tensor, "*tau batch head query"]]:
        """Everything that needs each weight: entropy, maximum, ties, ..., in one walk over the pattern."""
        return walk(self.pattern, self.context)

    @property
    def entropy(self) -> Float[Tensor, "batch head query"]:
        """Shannon entropy of each row in nats, in [0, log n]."""
        return self.walked["entropy"]

    @property
    def maximum(self) -> Float[Tensor, "batch head query"]:
        """Largest weight of each row, in [1/n, 1]."""
        return self.walked["maximum"]

    @property
    def overlap(self) -> Float[Tensor, "batch head query"]:
        """Sum over visible keys of min(A, 1/n): 1 minus the total variation distance to uniform, in [1/n, 1]."""
        return self.walked["overlap"]

    @property
    def ties(self) -> Float[Tensor, "tau batch head query"]:
        """Keys within tau of the largest log weight, for each of `TAUS`, in [1, n]."""
        return self.walked["ties"]

    @cached_property
    def distance(self) -> tuple[Float[Tensor, "batch head query"], Float[Tensor, "batch head query"]]:
        """Mean and standard deviation, in tokens, of query position minus key position (positive looks back)."""
        mean_key, mean_square = self.walked["key"], self.walked["key_square"]
        deviation = (mean_square - mean_key.square()).clamp(min=0).sqrt()
        return -mean_key, deviation


def walk(
    pattern: Float[Tensor, "batch head query key"], context: Context
) -> dict[str, Float[Tensor, "*tau batch head query"]]:
    """Statistics of each row that need every weight, block by block so that memory is touched once.

    Under a causal mask a block is cut at its diagonal, which halves the work. Key positions are taken relative to
    the query, which keeps their squares exact in float32 at any context length.
    """
    batch, heads, queries, keys = pattern.shape
    out = {
        name: torch.empty(batch, heads, queries, device=pattern.device)
        for name in ("entropy", "maximum", "sum_squares", "overlap", "key", "key_square")
    }
    out["ties"] = torch.empty(len(TAUS), batch, heads, queries, device=pattern.device)
    budget = BLOCK_CPU if pattern.device.type == "cpu" else BLOCK_DEVICE
    step = max(1, min(queries, max(64, budget // max(1, heads * keys))))
    weights, scratch = (torch.empty(heads * step * keys, device=pattern.device) for _ in range(2))
    ends = context.queries.tolist()
    positions = torch.arange(keys, device=pattern.device, dtype=torch.float32)
    for start in range(0, queries, step):
        rows = slice(start, min(start + step, queries))
        stop = ends[rows.stop - 1] + 1 if context.causal else keys
        middle = float(ends[rows.stop - 1])
        offsets = positions[:stop] - middle
        moments = torch.stack([offsets, offsets.square()], dim=-1)
        shift = context.queries[rows].float() - middle
        for b in range(batch):
            block = pattern[b, :, rows, :stop]
            uniform = context.n_visible[b, rows].reciprocal()[:, None]
            found = _walk_block(block, uniform, moments, weights, scratch)
            out["entropy"][b, :, rows] = found[0]
            out["maximum"][b, :, rows] = found[1]
            out["sum_squares"][b, :, rows] = found[2]
            out["overlap"][b, :, rows] = found[3]
            out["key"][b, :, rows] = found[4] - shift
            out["key_square"][b, :, rows] = found[5] - 2 * shift * found[4] + shift.square()
            for i, count in enumerate(found[6:]):
                out["ties"][i, b, :, rows] = count
    return out


def _walk_block(
    block: Float[Tensor, "head row key"],
    uniform: Float[Tensor, "row 1"],
    moments: Float[Tensor, "key 2"],
    weights: Float[Tensor, " space"],
    scratch: Float[Tensor, " space"],
) -> list[Float[Tensor, "head row"]]:
    """Entropy, maximum, sum of squares, overlap with uniform, two key moments, then a tie count for each tau."""
    a = weights[: block.numel()].view(block.shape)
    b = scratch[: block.numel()].view(block.shape)
    if block.dtype == a.dtype:
        torch.clamp(block, min=TINY, out=a)
    else:
        a.copy_(block).clamp_(min=TINY)
    maximum = a.amax(-1)
    moment = a.flatten(0, 1) @ moments
    first, second = moment.view(*block.shape[:2], 2).unbind(-1)
    sum_squares = torch.linalg.vector_norm(a, dim=-1).square_()
    entropy = torch.log(a, out=b).mul_(a).sum(-1).neg_()
    overlap = torch.minimum(a, uniform, out=b).sum(-1)
    # Comparing into a float buffer and summing it is several times faster than counting booleans.
    ties = [
        torch.ge(a, (maximum * torch.exp(torch.tensor(-tau)))[..., None], out=b).sum(-1) for tau in TAUS
    ]
    return [entropy, maximum, sum_squares, overlap, first, second, *ties]
