"""What `OutputProbe` reads of one layer's rows: weights by the length of their values, on the targets of a `Plan`.

In: blocks of rows, or the whole pattern as one. Out: sums for each kind, and of the rows what is wanted later.
"""

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from metaint.measures.outputs import weighted_rows
from metaint.models.reading import widen
from metaint.probes.plan import Plan


class WeighedRows:
    """One layer's rows, read block by block.

    `lengths[batch, head, key]` are those of values through W_O; rows at `index[batch, sample]` are kept as they are.
    """

    def __init__(
        self,
        plan: Plan,
        lengths: Float[Tensor, "batch head key"],
        index: Int[Tensor, "batch sample"] | None,
        dtype: torch.dtype,
    ) -> None:
        self._plan, self._lengths, self._index = plan, lengths, index
        batch, heads, keys = lengths.shape
        self._slots = plan.no_weight(heads, dtype)
        self._totals: list[Tensor] = []
        self._on_first: list[Tensor] = []
        self.sample = None if index is None else lengths.new_zeros(batch, heads, index.shape[1], keys)

    def read(self, rows: slice, pattern: Float[Tensor, "batch head row key"]) -> None:
        """Fold in a block of rows over the first keys, which is all that they see."""
        block = self._plan.block(rows, pattern.shape[-1])
        lengths = self._lengths[..., : pattern.shape[-1]]
        total = weighted_rows(pattern, lengths)
        sequences = torch.arange(len(pattern), device=pattern.device)
        self._totals.append(total)
        self._on_first.append(widen(pattern[sequences, :, :, block.context.first]))
        batch, query, key = block.pairs
        whole = total[batch, :, query]
        weights = pattern[batch, :, query, key].to(whole.dtype) * lengths[batch, :, key]
        # A head whose row has no length at all is not counted there.
        shares = torch.where(whole > 0, weights / whole, 0.0)
        self._slots.index_add_(0, block.slot, shares.to(self._slots.dtype))
        if self._index is not None and self.sample is not None:
            inside = (self._index >= rows.start) & (self._index < rows.stop)
            batch, place = inside.nonzero(as_tuple=True)
            row = self._index[batch, place] - rows.start
            self.sample[batch, :, place, : pattern.shape[-1]] = widen(pattern[batch, :, row])

    @property
    def on_first(self) -> Float[Tensor, "batch head query"]:
        """The weight on position 0."""
        return torch.cat(self._on_first, -1)

    def shares(self) -> tuple[Float[Tensor, "kind batch head"], Float[Tensor, "kind batch head"]]:
        """Weight times length on each kind's targets, over the row's total, summed over queries; and the queries."""
        matched = (self._plan.matches > 0).to(self._slots.dtype)
        long = (torch.cat(self._totals, -1) > 0).to(self._slots.dtype)
        queries = einsum(matched, long, "kind batch query, batch head query -> kind batch head")
        return self._plan.by_kind(self._slots).transpose(0, 1), queries
