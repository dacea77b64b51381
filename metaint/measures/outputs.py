"""What heads write: lengths of values through W_O, and the logits that a write gives to tokens of the context.

In: weights, values, outputs and patterns of one layer. Out: numbers a head, or a row of a head. No model, no hook.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaint.measures.inner import Readout

# Tokens of the vocabulary that the spread of logits is taken over, where there are more.
SPREAD_TOKENS = 4096
_BY_HEAD = "batch position head d_head, head d_head rank -> batch position head rank"


def length_factor(out: Float[Tensor, "head d_head d_model"]) -> Float[Tensor, "head d_head rank"]:
    """R with ||v R|| = ||v W_O|| for every v, and no more columns than d_head: of each head's QR decomposition.

    The Gram matrix W_O W_O^T would do as well but for values that W_O nearly takes to 0, whose length it loses.
    """
    return torch.linalg.qr(out.mT, mode="r").R.mT


def through(
    vectors: Float[Tensor, "batch position head d_head"], weight: Float[Tensor, "head d_head rank"]
) -> Float[Tensor, "batch position head rank"]:
    """Each head's vectors times its own matrix."""
    return einsum(vectors, weight, _BY_HEAD)


def weighted_rows(
    pattern: Float[Tensor, "batch head query key"], lengths: Float[Tensor, "batch head key"]
) -> Float[Tensor, "batch head query"]:
    """Sums over keys of A_ij ||v_j W_O||, what each row's value-weighted attention is divided by (Kobayashi et al.
    2020, 2004.10102)."""
    return (pattern @ lengths[..., None].to(pattern.dtype))[..., 0]


class Drain(NamedTuple):
    """What position 0 holds for each head; one number a sequence."""

    missing: Float[Tensor, "batch head"]
    """Mean length of the other values through W_O, less that of position 0."""
    others: Float[Tensor, "batch head"]
    """Mean length of the others."""


def drain_at_first(
    lengths: Float[Tensor, "batch head key"], first: Int[Tensor, " batch"], real: Bool[Tensor, "batch key"]
) -> Drain:
    """How much shorter the value of position 0 is than the mean of the others (0 where there are none)."""
    rows = torch.arange(len(first), device=first.device)
    at_first = lengths[rows, :, first]
    others = real.clone()
    others[rows, first] = False
    total = (lengths * others[:, None]).sum(-1)
    count = others.sum(-1)[:, None]
    mean = total / count.clamp(min=1)
    return Drain((mean - at_first).where(count > 0, 0.0), mean)


@dataclass(frozen=True)
class Vocabulary:
    """The unembedding as what is written to the stream meets it, with the final norm's length left out.

    A write w at a position where the final norm divides by s gives token t the logit <w, u_t> / s: the gain, the
    centring of a LayerNorm and the scale of logits are in u_t, and so is the mean over the vocabulary, taken out.
    """

    readout: Readout
    mean: Float[Tensor, " d_model"]
    """The mean column of the unembedding."""
    covariance: Float[Tensor, "d_model d_model"]
    """Of u_t over `SPREAD_TOKENS` tokens, so that <w, u_t> has the variance w C w over the vocabulary."""

    @staticmethod
    def of(readout: Readout, dtype: torch.dtype) -> "Vocabulary":
        """Read the unembedding once; a large vocabulary's covariance is that of tokens drawn by a fixed seed."""
        weight = readout.weight
        vocab = weight.shape[1]
        mean = weight.mean(1, dtype=dtype)
        drawn = np.random.default_rng(0).permutation(vocab)[:SPREAD_TOKENS]
        columns = _columns(readout, mean, torch.from_numpy(np.sort(drawn)).to(weight.device))
        return Vocabulary(readout, mean, columns.mT @ columns / len(columns))

    def columns(self, tokens: Int[Tensor, "*rest"]) -> Float[Tensor, "*rest d_model"]:
        """u_t of these tokens."""
        return _columns(self.readout, self.mean, tokens)

    def spread(self, writes: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest"]:
        """The standard deviation over the vocabulary of the logits that writes give, times the final norm's length."""
        return ((writes @ self.covariance) * writes).sum(-1).clamp(min=0).sqrt()


def _columns(readout: Readout, mean: Tensor, tokens: Tensor) -> Tensor:
    columns = readout.weight.mT[tokens].to(mean.dtype) - mean
    norm = readout.norm
    if norm is not None:
        columns = columns if norm.gain is None else columns * norm.gain.to(columns.dtype)
        columns = columns - columns.mean(-1, keepdim=True) if norm.kind == "layer" else columns
    return columns * readout.scale


class Said(NamedTuple):
    """Of one sequence's sampled rows at one layer: logits (times the final norm's length) weighted by attention."""

    looked_at: Float[Tensor, "head sample"]
    """Sum over the keys but position 0 of the weight times the key's token's logit."""
    looked_at_null: Float[Tensor, "head sample"]
    """The same weight, on average over shuffles of it among those keys."""
    weight: Float[Tensor, "head sample"]
    spread: Float[Tensor, "head sample"]
    """The weight times the deviation over the vocabulary."""
    following: Float[Tensor, "head sample"]
    following_null: Float[Tensor, "head sample"]
    following_weight: Float[Tensor, "head sample"]
    """And of the tokens after those keys, as far as the query can see them."""
    following_spread: Float[Tensor, "head sample"]


def said(
    writes: Float[Tensor, "sample head d_model"],
    pattern: Float[Tensor, "head sample key"],
    columns: Float[Tensor, "key d_model"],
    spread: Float[Tensor, "sample head"],
    visible: Bool[Tensor, "sample key"],
    followed: Bool[Tensor, "sample key"],
) -> Said:
    """What writes say of the tokens that their heads look at, and of those after them.

    `columns` are the u_t of the context; `visible` the keys of each query but position 0, `followed` those of them
    whose next token the query sees too. The null is exact: a row's weights, shuffled among its keys, put on each of
    them the mean weight, so its logit is that weight times the mean of the keys' logits.
    """
    logits = einsum(writes, columns, "sample head d_model, key d_model -> head sample key")
    after = logits.roll(-1, -1)
    spread = spread.mT
    sums = []
    for values, where in ((logits, visible), (after, followed)):
        weights = pattern * where
        weight = weights.sum(-1)
        even = (values * where).sum(-1) / where.sum(-1).clamp(min=1)
        sums += [(weights * values).sum(-1), weight * even, weight, weight * spread]
    return Said(*sums)
