"""What stands in for parts that are taken out: nothing, their mean, or what they give in another sequence.

In: the clean pass of a batch, that of its donors, means over all sequences. Out: `Variant`s.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from metaint.circuits.clean import Clean, clean_pass
from metaint.circuits.parts import Part
from metaint.circuits.subject import Subject
from metaint.circuits.variants import Variant


@dataclass
class Stand:
    """What stands in for the parts of one batch."""

    how: str
    clean: Clean
    donor: Clean | None
    means: dict[str, dict[int, Tensor]]
    at: Bool[Tensor, " position"] | None = None

    def of(self, part: Part) -> Tensor:
        """What takes the place of a head's z, or of what an MLP writes; broadcasts to it."""
        layer, head = part
        if head is None:
            return self._of_mlp(layer)
        if self.how == "mean":
            return self.means["z"][layer][head]
        if self.donor is not None:
            return self.donor.z[layer][:, :, head]
        return self.clean.z[layer].new_zeros(())

    def _of_mlp(self, layer: int) -> Tensor:
        if self.how == "mean":
            return self.means["mlp"][layer]
        if self.donor is not None:
            return self.donor.mlp[layer]
        return self.clean.mlp[layer].new_zeros(())

    def of_embedding(self) -> Tensor:
        """What takes the place of the stream that block 0 reads."""
        if self.how == "mean":
            return self.means["embedding"][0]
        if self.donor is not None:
            return self.donor.streams[0]
        return torch.zeros_like(self.clean.streams[0][:1, :1])

    def without(self, parts: Iterable[Part]) -> Variant:
        """The pass in which all these parts are replaced, at the experiment's positions."""
        z: dict[int, dict[int, Tensor]] = {}
        mlp: dict[int, Tensor] = {}
        for layer, head in sorted(parts, key=str):
            if head is None:
                mlp[layer] = self.of((layer, None))
            else:
                z.setdefault(layer, {})[head] = self.of((layer, head))
        return Variant(z, mlp, None if self.at is None else self.at.to(self.clean.tokens.device))


def means_of(
    subject: Subject, tokens: Int[Tensor, "batch position"], batch_size: int, mlps: bool
) -> dict[str, dict[int, Tensor]]:
    """By layer, the means of "z", of what MLPs write ("mlp", where asked for) and of the "embedding", over all
    sequences and positions, in one pass over the tokens."""
    sums: dict[str, dict[int, Tensor]] = {"z": {}, "mlp": {}, "embedding": {}}
    for batch in tokens.split(batch_size):
        clean = clean_pass(subject, batch, torch.zeros_like(batch, dtype=torch.bool), mlps=mlps)
        for kind, values in (("z", clean.z), ("mlp", clean.mlp), ("embedding", {0: clean.streams[0]})):
            for layer, value in values.items():
                precise = torch.float64 if value.device.type != "mps" else torch.float32
                sums[kind][layer] = sums[kind].get(layer, 0) + value.sum((0, 1), dtype=precise)
    dtype = next(subject.model.parameters()).dtype
    return {
        kind: {layer: (total / tokens.numel()).to(dtype) for layer, total in by_layer.items()}
        for kind, by_layer in sums.items()
    }
