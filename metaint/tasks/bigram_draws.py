"""How the in-context bigram task draws: distributions cut into whole numbers, triggers, outputs, and a walk over time.

In: a chain of ids and which of them may be outputs. Out: ids. NumPy throughout: on a few hundred numbers its calls cost
a third of torch's, and never wait for threads.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

UNITS = 1 << 40
"""What a distribution is cut into: whole numbers, so that no draw is rounded onto a token of probability 0."""
LARGEST = (1 << 23) - 2
"""The largest vocabulary: its rows of `UNITS`, and two more, fit into int64."""
_GUIDE = 1 << 20
"""How many parts all rows are cut into at most, to look up ids by."""
_BUDGET = 1 << 23
"""How many sequences times different triggers are walked at once (64 MiB)."""


class Cells(NamedTuple):
    """Distributions over ids, one row after the other: row r covers the whole numbers from r * UNITS on, and each of
    its ids those from `low` to below `end`, at least one."""

    key: Int[np.ndarray, "cell"]
    """The row times vocab, plus the id."""
    id: Int[np.ndarray, "cell"]
    low: Int[np.ndarray, "cell"]
    end: Int[np.ndarray, "cell"]
    guide: Int[np.ndarray, "part"]
    """Each row in equal parts: the id that covers the whole part, or -1."""
    shift: int
    """A part has 2 to this power."""

    def at(self, places: np.ndarray) -> np.ndarray:
        """The ids that cover these places; most by the guide, which is faster than to search."""
        ids = self.guide.take(places >> self.shift)
        shared = (ids < 0).nonzero()
        ids[shared] = self.id.take(self.end.searchsorted(places[shared], "right"))
        return ids


@dataclass(frozen=True, eq=False)
class Draws:
    """The cells of a task: row i for what follows id i, then one for the unigram distribution, and one for the pool of
    outputs. Made by `draws_of`."""

    cells: Cells
    row_of: Int[np.ndarray, "vocab"]
    """For each id the row of `cells` that the next token is drawn from."""
    occurring: Int[np.ndarray, "id"]

    @property
    def vocab(self) -> int:
        """The number of different tokens."""
        return len(self.row_of)

    def triggers(self, batch: int, count: int, generator: torch.Generator) -> Int[np.ndarray, "batch trigger"]:
        """Different ids for each sequence, each drawn by what the shares of those drawn before leave."""
        low, size = self._stretch(np.full_like(self.occurring, self.vocab), self.occurring)
        drawn = np.empty((batch, 0), np.int64)
        for draw in uniform_numbers(batch, count, generator).T:
            before = np.sort(drawn, 1)
            place = _place(draw, low[before], size[before])
            drawn = np.concatenate([drawn, low.searchsorted(place, "right")[:, None] - 1], 1)
        return self.occurring[drawn]

    def outputs(
        self, triggers: Int[np.ndarray, "batch trigger"], uniform: np.ndarray, own_rows: bool, no_repeat: bool
    ) -> Int[np.ndarray, "batch trigger"]:
        """What follows each trigger, from its own row or from the pool, drawn at `uniform` of the same shape."""
        row = self.row_of[triggers] if own_rows else np.full_like(triggers, self.vocab + 1)
        place = (uniform * UNITS).astype(np.int64)
        if no_repeat:
            # A token that is only ever followed by itself has no other bigram output: any will do.
            row = np.where(self._stretch(row, triggers)[1] < UNITS, row, self.vocab + 1)
            low, size = self._stretch(row, triggers)
            place = _place(uniform, low[..., None], size[..., None])
        return self.cells.at(row * UNITS + place)

    def sequences(
        self, triggers: np.ndarray, outputs: np.ndarray, uniform: Float[np.ndarray, "batch length+1"]
    ) -> tuple[Int[Tensor, "batch length+1"], Int[Tensor, "batch length"]]:
        """Tokens, drawn at `uniform` where no trigger rules, and `BigramSample.outs`."""
        batch, length = uniform.shape
        rows = max(1, _BUDGET // len(np.unique(triggers)))
        tokens, outs = (torch.empty(batch, count, dtype=torch.long) for count in (length, length - 1))
        for begin in range(0, batch, rows):
            part = slice(begin, begin + rows)
            tokens[part], outs[part] = self._walk(triggers[part], outputs[part], uniform[part])
        return tokens, outs

    def _walk(self, triggers: np.ndarray, outputs: np.ndarray, uniform: np.ndarray) -> tuple[Tensor, Tensor]:
        batch = len(triggers)
        # Each sequence has a column for each trigger of any of them, with -1 where it is not its own; column 0 is
        # for all other ids.
        distinct, inverse = np.unique(triggers, return_inverse=True)
        column = np.zeros(self.vocab, np.int64)
        column[distinct] = np.arange(1, len(distinct) + 1)
        rules = np.full((batch, len(distinct) + 1), -1, np.int32)
        np.put_along_axis(rules, inverse.reshape(triggers.shape) + 1, outputs.astype(np.int32), 1)
        first, rules, seen = np.arange(batch) * rules.shape[1], rules.ravel(), np.zeros(rules.size, np.int32)
        start, places = self.row_of * UNITS, (uniform * UNITS).astype(np.int64)
        places = torch.from_numpy(places).T.contiguous().numpy()
        tokens, outs = np.empty_like(places), np.empty_like(places[1:])
        tokens[0] = self.cells.at(self.vocab * UNITS + places[0])
        for time, last in enumerate(tokens[:-1]):
            at = first + column.take(last)
            rule = rules.take(at)
            ruled = rule >= 0
            seen[at] = outs[time] = seen.take(at) + ruled
            tokens[time + 1] = np.where(ruled, rule, self.cells.at(start.take(last) + places[time + 1]))
        return torch.from_numpy(tokens).T, torch.from_numpy(outs).T

    def _stretch(self, row: np.ndarray, id: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in a row the cell of an id begins, and its size: 0 where the row has no such cell."""
        cells, key = self.cells, row * self.vocab + id
        cell = np.minimum(cells.key.searchsorted(key), len(cells.key) - 1)
        size = np.where(cells.key[cell] == key, cells.end[cell] - cells.low[cell], 0)
        return cells.low[cell] - row * UNITS, size


def draws_of(
    unigram: Float[Tensor, "vocab"],
    pairs: Int[Tensor, "2 pair"],
    weights: Float[Tensor, "pair"],
    pool: Int[Tensor, "output"],
) -> Draws:
    """The draws of a chain, with these fields of `BigramTask` and the ids that may be outputs."""
    vocab, (first, second), outputs = len(unigram), pairs.numpy(), pool.numpy()
    occurring = unigram.nonzero()[:, 0].numpy()
    row_of = np.full(vocab, vocab)
    row_of[first] = first
    id = np.concatenate([second, occurring, outputs])
    row = np.concatenate([first, np.full_like(occurring, vocab), np.full_like(outputs, vocab + 1)])
    shares = np.concatenate([weights, unigram[occurring], np.full(len(outputs), 1 / len(outputs))])
    return Draws(_cells(row, id, shares, vocab), row_of, occurring)


def uniform_numbers(batch: int, count: int, generator: torch.Generator) -> Float[np.ndarray, "batch count"]:
    """Between 0 and 1, in float64."""
    return torch.rand(batch, count, generator=generator, dtype=torch.float64).numpy()


def _cells(row: np.ndarray, id: np.ndarray, shares: np.ndarray, vocab: int) -> Cells:
    """Cells of ids in rising rows, as large beside their row as their shares."""
    total = np.concatenate([np.zeros(1), shares.cumsum()])
    first, behind = row.searchsorted(row), row.searchsorted(row, "right")
    share = (total[1:] - total[first]) / (total[behind] - total[first])
    # Each cell gets one unit beforehand, so that whatever occurs can be drawn.
    rank = np.arange(1, len(row) + 1) - first
    end = row * UNITS + (share * (UNITS - (behind - first))).astype(np.int64) + rank
    low = np.where(rank == 1, row * UNITS, np.roll(end, 1))
    bits = min(9, max(1, _GUIDE // (vocab + 2)).bit_length() - 1)
    shift = UNITS.bit_length() - 1 - bits
    part = np.arange(vocab + 2 << bits, dtype=np.int64) << shift
    cell = end.searchsorted(part, "right")
    guide = np.where(end[cell] >= part + (1 << shift), id[cell], -1)
    return Cells(row * vocab + id, id, low, end, guide, shift)


def _place(uniform: np.ndarray, low: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Whole numbers below UNITS outside of the stretches that are taken, in ascending order along the last axis."""
    place = (uniform * (UNITS - size.sum(-1))).astype(np.int64)
    free_below = low - (size.cumsum(-1) - size)
    return place + (size * (free_below <= place[..., None])).sum(-1)
