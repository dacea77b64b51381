"""What `SaturationProbe` reads of one sequence: the rows of its attention, and its predictions in every copy.

In: a pattern with its values and output, or logits. Out: statistics of rows, and sums over samples. No state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaint.errors import ActivationError
from metaint.measures import saturation
from metaint.measures.sharpening import blocks, mix, row_statistics
from metaint.measures.tile import TAUS


@dataclass(frozen=True)
class HeadRows:
    """How far each row of each head is from saturated, and what each kappa does to the head's output there."""

    variation: Float[Tensor, "scale head query"]
    change: Float[Tensor, "scale head query"]
    statistics: Float[Tensor, "slot head query"]
    """Those of `sharpening.row_statistics`."""
    length: Float[Tensor, "head query"]

    @property
    def ties(self) -> Float[Tensor, "head query"]:
        """How many keys are tied with the largest."""
        return self.statistics[0]

    @property
    def total(self) -> Float[Tensor, "head query"]:
        """The sum of the weights beside the largest."""
        return self.statistics[1]

    @property
    def gap(self) -> Float[Tensor, "head query"]:
        """The gap below the largest score; infinity where no other key has weight."""
        return self.statistics[2]

    @property
    def tied(self) -> Float[Tensor, "tau head query"]:
        """How many keys lie within each of `TAUS` of the largest."""
        return self.statistics[3:]

    @classmethod
    def read(
        cls,
        pattern: Float[Tensor, "head query key"],
        value: Float[Tensor, "head key d_head"],
        z: Float[Tensor, "query head d_head"],
        kappas: Sequence[float],
        causal: bool,
        tau: float,
    ) -> Self:
        """The rows of one sequence at one layer; `z` is the heads' own output."""
        heads, queries, _ = pattern.shape
        new = z.new_zeros
        rows = cls(
            variation=new(len(kappas), heads, queries),
            change=new(len(kappas), heads, queries),
            statistics=new(3 + len(TAUS), heads, queries),
            length=torch.linalg.vector_norm(z, dim=-1).mT,
        )
        for block in blocks(pattern, causal, tau):
            here = block.rows
            rows.statistics[:, :, here] = row_statistics(block.relative)
            for i, weights in enumerate(saturation.powers(block.relative, kappas)):
                output, total = mix(weights, value[:, : block.stop])
                rows.variation[i, :, here] = 1 - rows.ties[:, here] / total
                change = output - z[here].transpose(0, 1)
                rows.change[i, :, here] = torch.linalg.vector_norm(change, dim=-1)
        if 1.0 in kappas:
            rows.change[kappas.index(1.0)] = 0  # its own attention, up to rounding
        return rows

    def at(self, counted: Bool[Tensor, " query"]) -> "HeadRows":
        """Some of the queries."""
        return HeadRows(
            self.variation[..., counted],
            self.change[..., counted],
            self.statistics[..., counted],
            self.length[..., counted],
        )

    def of_queries(self) -> dict[str, Float[Tensor, "*slot head query"]]:
        """What is summed over queries, by the slots of `of_heads`."""
        has_gap = self.gap.isfinite()
        return {
            "total_variation": self.variation,
            "output_change": self.change,
            "off_maximum": 1 - 1 / self.total,
            "tied_keys": self.tied,
            "gap": self.gap.where(has_gap, 0),
            "gaps": has_gap,
            "length": self.length,
            "queries": torch.ones_like(self.total),
        }

    def add_by_gap(self, state: Float[Tensor, "3 head bin"]) -> None:
        """Add to each log bin of the gap its queries, their odds of the largest, and one over how many are tied."""
        odds = (self.total - self.ties) / self.ties
        bins = saturation.gap_bin(self.gap)
        for slot, values in zip(state, (torch.ones_like(self.total), odds, 1 / self.ties), strict=True):
            slot.scatter_add_(-1, bins, values.to(state.dtype))

    def check(self, layer: int) -> None:
        """ActivationError unless every row is one of numbers: NaN in a pattern is a total that isn't above 0."""
        if not bool((self.total > 0).all() & self.variation.isfinite().all()):
            raise ActivationError(
                f"blocks.{layer}.attn.hook_pattern holds NaN or infinity: the weights or the activations before it "
                "overflow (try a wider dtype), or a sequence has no visible key."
            )


def compare_logits(
    logits: Float[Tensor, "copy sample vocab"], target: Int[Tensor, " sample"] | None, dtype: torch.dtype
) -> dict[str, Float[Tensor, " copy"]]:
    """Sums over one sequence's samples, by the slots of `LOGITS`; "null" is another position's prediction."""
    kind = torch.promote_types(logits.dtype, torch.float32)
    mine = logits[0].to(kind).log_softmax(-1)
    weights, best = mine.exp(), mine.argmax(-1)
    names = ("kl", "top1_agreement", "loss_change", "samples", "losses", "kl_null", "top1_agreement_null", "others")
    sums = {name: torch.zeros(len(logits), dtype=dtype, device=logits.device) for name in names}
    for i, copy in enumerate(logits):
        log_p = copy.to(kind).log_softmax(-1)
        if i:
            sums["kl"][i] = (weights * (mine - log_p)).sum()
        sums["top1_agreement"][i] = (log_p.argmax(-1) == best).sum()
        if target is not None:
            sums["loss_change"][i] = -log_p.gather(1, target[:, None]).sum()
            sums["losses"][i] = len(target)
    sums["loss_change"] -= sums["loss_change"][0].clone()
    sums["samples"][:] = len(best)
    if len(best) > 1:
        sums["kl_null"][0] = (weights * (mine - mine.roll(1, 0))).sum()
        sums["top1_agreement_null"][0] = (best == best.roll(1, 0)).sum()
        sums["others"][0] = len(best)
    return sums
