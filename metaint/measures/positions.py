"""Which positions a reading runs over: buckets along the sequence, and a sample that any batching draws alike.

A position counts real tokens from 0, wherever padding stands.
"""

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

BUCKETS = ("0", "1-3", "4-15", "16-63", "64+")
_STARTS = (1, 4, 16, 64)


def position_bucket(positions: Int[Tensor, "*rest"]) -> Int[Tensor, "*rest"]:
    """The index in `BUCKETS` of each position: {0, 1-3, 4-15, 16-63, 64+}, position 0 being the usual sink."""
    return torch.bucketize(positions, torch.tensor(_STARTS, device=positions.device), right=True)


def sample_positions(
    positions: Int[Tensor, "batch query"], eligible: Bool[Tensor, "batch query"], count: int, seed: int = 0
) -> tuple[Int[Tensor, "batch sample"], Bool[Tensor, "batch sample"]]:
    """Up to `count` of the eligible queries of each sequence (their indices, rising), and which of them are there.

    A position is preferred to another by a random order that depends on `seed` alone, so a sequence gets the same
    sample in whatever batch it comes and however it is padded.
    """
    queries = positions.shape[1]
    longest = int(positions.max()) + 1 if positions.numel() else 0
    order = torch.from_numpy(np.random.default_rng(seed).random(max(longest, 1))).to(torch.float32)
    preference = order.to(positions.device)[positions].masked_fill(~eligible, 2.0)
    best = preference.sort(dim=-1, stable=True)
    index, drawn = best.indices[:, :count], best.values[:, :count] < 2.0
    rising = index.masked_fill(~drawn, queries).sort(-1)
    return rising.values.clamp(max=queries - 1), rising.values < queries
