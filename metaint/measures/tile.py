"""What an attention measure sees: a tile of rows of the pattern, and what is known of its queries and keys.

Comes in: `pattern[batch, head, query, key]`, the token ids of the keys, which keys are padding, and where the
tile's queries stand among the keys. Goes out: `Tile`, whose properties are the statistics of each row that need
the weights themselves, all computed in one walk over the pattern. A whole pattern, a block of its rows and the
single row of a generation step are all tiles.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TAUS = (0.0, 0.1, 0.5, 1.0, 2.0)
# Smallest normal float32: keeps log finite on masked keys, and weighs nothing.
TINY = torch.finfo(torch.float32).tiny
# Pairs of tokens that are compared at once.
MATCHED = 1 << 23
# Rows are walked in blocks this large (elements), so that on a CPU a block stays in the cache for every statistic.
BLOCK_CPU, BLOCK_DEVICE = 1 << 19, 1 << 25
_WALKED = "walked "


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
    # Keys that a query of a causal model sees at most, itself included (a sliding window); 0 is all before it.
    window: int = 0

    @staticmethod
    def whole(
        tokens: Int[Tensor, "batch key"],
        mask: Bool[Tensor, "batch key"] | None = None,
        causal: bool = True,
    ) -> "Context":
        """The context of a complete pattern: every key is also a query."""
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        return Context(torch.arange(tokens.shape[1], device=tokens.device), real, tokens, causal)

    def rows(self, rows: slice, keys: int) -> "Context":
        """Some of the queries, with the first keys alone, of which they see no later one."""
        known = None if self.tokens is None else self.tokens[:, :keys]
        return replace(self, queries=self.queries[rows], mask=self.mask[:, :keys], tokens=known)

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
            seen = seen & self.within(self.queries[:, None], keys)
        return seen

    def within(self, query: Int[Tensor, "..."], key: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Whether the query at one index reaches the key at the other, padding aside."""
        if not self.causal:
            return torch.ones_like(query - key, dtype=torch.bool)
        seen = key <= query
        return seen & (key > query - self.window) if self.window else seen

    @cached_property
    def sees_first(self) -> Bool[Tensor, "batch query"]:
        """Queries that reach position 0: under a sliding window the early ones alone."""
        return self.within(self.queries, self.first[:, None])

    @cached_property
    def n_visible(self) -> Float[Tensor, "batch query"]:
        """Number of visible keys of each query (at least 1, so that padding divides by nothing)."""
        if self.causal:
            upto = torch.nn.functional.pad(self.rank + self.mask.long(), (1, 0))
            beyond = (self.queries + 1 - self.window).clamp(min=0) if self.window else torch.zeros_like(self.queries)
            return (upto[:, self.queries + 1] - upto[:, beyond]).clamp(min=1).float()
        return self.mask.sum(-1, keepdim=True).clamp(min=1).expand(-1, len(self.queries)).float()

    @property
    def uniform(self) -> Float[Tensor, "batch 1 query key"]:
        """The pattern of one head that attends evenly."""
        return (self.visible / self.n_visible[..., None])[:, None]

    @cached_property
    def known_tokens(self) -> Int[Tensor, "batch key"]:
        """The token ids. Where nobody said what they are (a model fed with embeddings), no two are alike."""
        if self.tokens is not None:
            return self.tokens
        return torch.arange(self.mask.shape[1], device=self.mask.device).expand_as(self.mask)

    @cached_property
    def matches(self) -> tuple[Int[Tensor, " _"], Int[Tensor, " _"], Int[Tensor, " _"]]:
        """Indices (batch, query, key) of the earlier real keys that hold the query's own token, rising."""
        tokens = self.known_tokens.int()
        step = max(1, MATCHED // tokens.numel())
        parts = []
        for queries in self.queries.split(step) if len(self.queries) else (self.queries,):
            batch, query, key = (tokens[:, queries, None] == tokens[:, None, :]).nonzero(as_tuple=True)
            earlier = (key < queries[query]) & self.mask[batch, key]
            parts.append((batch[earlier], query[earlier] + len(parts) * step, key[earlier]))
        if len(parts) == 1:
            return parts[0]
        batch, query, key = (torch.cat(each) for each in zip(*parts, strict=True))
        order = batch.argsort(stable=True)
        return batch[order], query[order], key[order]


@dataclass(frozen=True)
class Tile:
    """Rows of attention patterns with their context; rows are probability distributions over the visible keys."""

    pattern: Float[Tensor, "batch head query key"]
    context: Context

    @staticmethod
    def of_rows(parts: Sequence[Mapping[str, Tensor]], context: Context) -> "Tile":
        """A tile of rows whose weights are gone: what `row_statistics` read of its blocks, in order, is left of it."""
        names = parts[0].keys()
        whole = {name: torch.cat([part[name] for part in parts], -1) for name in names}
        batch, heads, queries = whole["on_first"].shape
        gone = torch.full((), math.nan, device=context.mask.device)
        tile = Tile(gone.expand(batch, heads, queries, context.mask.shape[1]), context)
        walked = {name.removeprefix(_WALKED): whole.pop(name) for name in names if name.startswith(_WALKED)}
        tile.__dict__.update(whole, **({"walked": walked} if walked else {}))
        return tile

    def row_statistics(self, walking: bool, total: bool) -> dict[str, Float[Tensor, "*tau batch head query"]]:
        """What `of_rows` needs of a block: with `walking` all statistics of its rows, else those without a walk;
        `total` is for rows that do not sum to one."""
        walked = {_WALKED + name: value for name, value in self.walked.items()} if walking else {}
        totals = {"total": self.total} if total else {}
        return {"on_first": self.on_first, "sum_squares": self.sum_squares, **totals, **walked}

    @cached_property
    def total(self) -> Float[Tensor, "batch head query"]:
        """Sum over keys of the weights: 1, but for what a learnt sink takes."""
        return self.pattern.sum(-1).float()

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
        wide = torch.float64 if self.pattern.dtype == torch.float64 else torch.float32  # which can't be narrowed
        return torch.linalg.vector_norm(self.pattern, dim=-1, dtype=wide).float().square()

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

    @property
    def distance_mean(self) -> Float[Tensor, "batch head query"]:
        """Mean of query position minus key position, in tokens (positive looks back)."""
        return self.context.queries.float() - self.walked["mean_key"]

    @property
    def distance_std(self) -> Float[Tensor, "batch head query"]:
        """Standard deviation of query position minus key position, in tokens."""
        return self.walked["std_key"]


def walk(
    pattern: Float[Tensor, "batch head query key"], context: Context
) -> dict[str, Float[Tensor, "*tau batch head query"]]:
    """Statistics of each row that need every weight, block by block so that memory is touched once.

    Under a causal mask a block is cut at its diagonal, which halves the work, and where its window begins.
    """
    batch, heads, queries, keys = pattern.shape
    device = pattern.device
    names = ("entropy", "maximum", "sum_squares", "overlap", "mean_key", "std_key")
    out = {name: torch.empty(batch, heads, queries, device=device) for name in names}
    out["ties"] = torch.empty(len(TAUS), batch, heads, queries, device=device)
    budget = BLOCK_CPU if device.type == "cpu" else BLOCK_DEVICE
    step = min(queries, max(64, budget // max(1, heads * keys)))
    space = torch.empty(2, heads * step * keys, device=device)
    ends = context.queries.tolist()
    positions = torch.arange(keys, device=device, dtype=torch.float32)
    falls = [math.exp(-tau) for tau in TAUS]
    for start in range(0, queries, step):
        rows = slice(start, min(start + step, queries))
        stop = ends[rows.stop - 1] + 1 if context.causal else keys
        begin = max(0, ends[start] - context.window + 1) if context.window else 0
        for b in range(batch):
            block = pattern[b, :, rows, begin:stop]
            uniform = context.n_visible[b, rows].reciprocal()[:, None]
            found = _walk_block(block, uniform, positions[begin:stop], falls, space)
            for name, value in zip(names, found, strict=False):
                out[name][b, :, rows] = value
            for i, count in enumerate(found[len(names) :]):
                out["ties"][i, b, :, rows] = count
    return out


def _walk_block(
    block: Float[Tensor, "head row key"],
    uniform: Float[Tensor, "row 1"],
    positions: Float[Tensor, " key"],
    falls: list[float],
    space: Float[Tensor, "2 space"],
) -> list[Float[Tensor, "head row"]]:
    """Entropy, maximum, sum of squares, overlap with uniform, mean and deviation of the key, and the tie counts."""
    a, b = (part[: block.numel()].view(block.shape) for part in space)
    if block.dtype == a.dtype:
        torch.clamp(block, min=TINY, out=a)
    else:
        a.copy_(block).clamp_(min=TINY)
    maximum = a.amax(-1)
    sum_squares = torch.linalg.vector_norm(a, dim=-1).square_()
    entropy = torch.log(a, out=b).mul_(a).sum(-1).neg_()
    overlap = torch.minimum(a, uniform, out=b).sum(-1)
    mean = (a.flatten(0, 1) @ positions).view(a.shape[:2])
    # Around each row's own mean: the difference of two large moments would lose the deviation of a narrow head.
    deviation = torch.sub(positions, mean[..., None], out=b).square_().mul_(a).sum(-1).sqrt_()
    # Comparing into a float buffer and summing it is several times faster than counting booleans.
    ties = [torch.ge(a, (maximum * fall)[..., None], out=b).sum(-1) for fall in falls]
    return [entropy, maximum, sum_squares, overlap, mean, deviation, *ties]
