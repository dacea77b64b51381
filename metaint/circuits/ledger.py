"""What was measured so far, in memory and if wanted in a file that grows: a killed run goes on from there.

In: the name of what was taken out, and the metric of sequences. Out: the same, for sequences from the first on. The
file is JSON, written aside and renamed, with what the numbers are of; they come back to the last bit.
"""

import json
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metaint.errors import StoreError
from metaint.models.protocol import Model
from metaint.scans.whole import write_text

# Seconds between two writes: less than a batch of any model that is worth resuming takes.
EVERY = 2.0


class Ledger:
    """By name, the metric of the first sequences; `about` is what a file's numbers must be of to be used."""

    def __init__(self, path: str | Path | None = None, about: dict[str, Any] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.about = json.loads(json.dumps(about or {}))
        self.values: dict[str, list[float]] = {}
        self._written = time.monotonic()
        if self.path is not None and self.path.exists():
            self.values = self._read(self.path)

    def count(self, name: str) -> int:
        """How many sequences were measured."""
        return len(self.values.get(name, ()))

    def add(self, name: str, start: int, values: Float[Tensor, " sequence"]) -> None:
        """What follows on the first `start` sequences; twice the same is once."""
        known = self.values.setdefault(name, [])
        if len(known) == start:
            known += values.tolist()
        if time.monotonic() - self._written > EVERY:
            self.write()

    def table(self, names: Sequence[str], sequences: int) -> Float[Tensor, "name sequence"]:
        """The values of these names on so many sequences, NaN where they were not measured."""
        table = torch.full((len(names), sequences), torch.nan, dtype=torch.float64)
        for row, name in zip(table, names, strict=True):
            known = self.values.get(name, [])[:sequences]
            row[: len(known)] = torch.tensor(known, dtype=torch.float64)
        return table

    def write(self) -> None:
        """Put what is known into the file, where there is one."""
        self._written = time.monotonic()
        if self.path is not None:
            write_text(self.path, json.dumps({"about": self.about, "values": self.values}))

    def _read(self, path: Path) -> dict[str, list[float]]:
        try:
            content = json.loads(path.read_text("utf-8"))
            about, values = content["about"], content["values"]
            values = {str(name): [float(value) for value in row] for name, row in values.items()}
            others = [name for name in self.about if about.get(name) != self.about[name]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{path} holds no unfinished trace ({type(error).__name__}): delete it, or choose another name."
            ) from error
        if others:
            raise StoreError(
                f"{path} holds an unfinished trace with other {', '.join(others)}: delete it, or choose another name."
            )
        return values


def checksum(tensors: Sequence[Tensor]) -> int:
    """A number that tells whether weights or tokens are the same."""
    total = 0
    for tensor in tensors:
        content = tensor.detach().cpu().contiguous().view(torch.uint8) if tensor.numel() else torch.empty(0)
        total = zlib.crc32(content.numpy().data, total)
    return total


def weights_checksum(model: Model) -> int:
    """The same of all parameters."""
    return checksum(list(model.parameters()))
