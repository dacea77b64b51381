"""What kinds of heads ask of one forward pass: which keys every query is to look at, looked up once for all layers.

In: kinds and the context of a pass. Out: `Plan`, from which the weight on the targets of every pattern is read.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from metaint.measures.attention import Measure, Pairs, targets
from metaint.measures.lags import Lagged
from metaint.measures.tile import Context, Tile
from metaint.models.describe import Shape

# Weights of uniform attention that are held at once.
_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class Plan:
    """What is asked in one forward pass of the layers with one window; it depends on the tokens alone: made once."""

    context: Context
    pairs: Pairs
    slot: Int[Tensor, " pair"]
    matches: Float[Tensor, "kind batch query"]

    @staticmethod
    def of(kinds: list[Measure], context: Context) -> "Plan":
        """Look up the targets of each kind; pairs of all kinds are read together."""
        batch, queries = context.counted.shape
        device = context.mask.device
        found = [targets(measure, context) for measure in kinds]
        empty = tuple(torch.zeros(0, dtype=torch.long, device=device) for _ in range(3))
        pairs = tuple(torch.cat(parts) for parts in zip(empty, *found, strict=True))
        slot = [empty[0], *(i * batch + p[0] for i, p in enumerate(found))]
        matches = torch.zeros(len(kinds), batch * queries, device=device)
        for i, p in enumerate(found):
            matches[i].index_add_(0, p[0] * queries + p[1], torch.ones(len(p[0]), device=device))
        return Plan(context, pairs, torch.cat(slot), matches.view(-1, batch, queries))  # type: ignore[arg-type]

    @cached_property
    def defined(self) -> Float[Tensor, "batch kind"]:
        """Queries for which each kind is defined."""
        return (self.matches > 0).sum(-1).mT

    @cached_property
    def lagged(self) -> Lagged:
        """The key at each lag of each query."""
        return Lagged.of(self.context)

    def beside_first(self, tile: Tile, total: Tensor | float = 1.0) -> Float[Tensor, "batch kind head"]:
        """The weight that is not on position 0, summed over the queries for which each kind is defined."""
        defined, rest = (self.matches > 0).float(), total - tile.on_first
        return einsum(defined, rest, "kind batch query, batch head query -> batch kind head")

    @cached_property
    def uniform_kinds(self) -> Float[Tensor, "batch kind"]:
        """What uniform attention puts on the targets."""
        return (self.matches / self.context.n_visible).sum(-1).mT

    def uniform_statistics(
        self, read: Callable[[Tile], tuple[Tensor, Tensor]], dtype: torch.dtype
    ) -> Float[Tensor, "batch slot"]:
        """What statistics, as `read` makes them, sum to for uniform attention: on rows of one such head, once."""
        if "_uniform" not in self.__dict__:
            queries, keys = len(self.context.queries), self.context.mask.shape[1]
            step = max(1, _WEIGHTS // self.context.mask.numel())
            total: Any = 0
            for start in range(0, queries, step):
                context = self.context.rows(slice(start, start + step), keys)
                values, _ = read(Tile(context.uniform, context))
                total = total + values[:, :, 0].sum(-1, dtype=dtype).mT
            self.__dict__["_uniform"] = total
        return self.__dict__["_uniform"]

    def weight_on_targets(
        self, pattern: Float[Tensor, "batch head query key"], dtype: torch.dtype
    ) -> Float[Tensor, "batch kind head"]:
        """Weight on the targets of each kind, summed over queries."""
        return self.by_kind(on_targets(self.pairs, self.slot, pattern, self.no_weight(pattern.shape[1], dtype)))

    def no_weight(self, heads: int, dtype: torch.dtype) -> Float[Tensor, "slot head"]:
        """What weights on targets are added to: a slot for each kind and sequence."""
        slots = len(self.matches) * len(self.context.mask)
        return torch.zeros(slots, heads, dtype=dtype, device=self.context.mask.device)

    def by_kind(self, slots: Float[Tensor, "slot head"]) -> Float[Tensor, "batch kind head"]:
        """What was added in each slot, for each sequence and kind."""
        return slots.view(len(self.matches), len(self.context.mask), slots.shape[1]).transpose(0, 1)

    def block(self, rows: slice, keys: int) -> "Block":
        """What is asked of some rows over the first keys; looked up once for all layers."""
        blocks = self.__dict__.setdefault("_blocks", {})
        if (rows.start, rows.stop, keys) not in blocks:
            order, ends = self._by_query
            chosen = order[ends[rows.start] : ends[rows.stop]]
            batch, query, key = (part[chosen] for part in self.pairs)
            pairs = (batch, query - rows.start, key)
            blocks[rows.start, rows.stop, keys] = Block(self.context.rows(rows, keys), pairs, self.slot[chosen])
        return blocks[rows.start, rows.stop, keys]

    @cached_property
    def _by_query(self) -> tuple[Int[Tensor, " pair"], list[int]]:
        """The pairs in the order of their queries, and how many come before those of each query."""
        query = self.pairs[1]
        counts = torch.bincount(query, minlength=len(self.context.queries))
        return query.argsort(stable=True), [0, *counts.cumsum(0).tolist()]


class Block(NamedTuple):
    """What is asked of a block of rows: their context, and pairs whose queries count from the block's first."""

    context: Context
    pairs: Pairs
    slot: Int[Tensor, " pair"]


def on_targets(
    pairs: Pairs,
    slot: Int[Tensor, " pair"],
    pattern: Float[Tensor, "batch head query key"],
    slots: Float[Tensor, "slot head"],
) -> Float[Tensor, "slot head"]:
    """Add the weight on each pair to its slot, in place."""
    batch, query, key = pairs
    return slots.index_add_(0, slot, pattern[batch, :, query, key].to(slots.dtype))


def plans_of(kinds: list[Measure], context: Context, shape: Shape) -> list[Plan]:
    """The plan of each layer of a pass; layers with the same window share one."""
    plans: dict[int, Plan] = {}
    windows = fitting_windows(shape, context.mask.shape[1])
    for window in sorted(set(windows)):
        plans[window] = Plan.of(kinds, replace(context, window=window))
    return [plans[window] for window in windows]


def fitting_windows(shape: Shape, length: int) -> list[int]:
    """The sliding window of each layer, 0 where it hides nothing of a sequence so long.

    That of a bidirectional model reaches both ways, and is not counted.
    """
    if not shape.causal or not shape.windows:
        return [0] * shape.n_layers
    return [window if window < length else 0 for window in shape.windows]
