"""Attention a block of rows at a time: the weights of a block, and what it mixes of the values.

In: queries, keys and values as they meet, heads second. Out: rows of the pattern, thrown away once they were read.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor


def weights_of_rows(
    query: Float[Tensor, "batch head row d_head"],
    key: Float[Tensor, "batch key_head key d_head"],
    hidden: Sequence[tuple[slice, Bool[Tensor, "#batch 1 row _"]]] = (),
    *,
    scale: float = 1.0,
    cap: float = 0.0,
    sink: Float[Tensor, " head"] | None = None,
) -> Float[Tensor, "batch head row key"]:
    """softmax(scale q·k) of some queries over keys; `hidden` are columns, and where in them a key is not seen.

    Queries of several heads may share a head of the keys (grouped queries). `cap` bounds scores by cap tanh(s / cap);
    `sink` is a learnt score of each head that stands for no key. A query that sees no key at all gets equal weights.
    The softmax is taken in float32 at least and the result is in the dtype of the queries.

    >>> import torch
    >>> query, key = torch.zeros(1, 2, 1, 4), torch.ones(1, 1, 3, 4)
    >>> weights_of_rows(query, key, [(slice(2, 3), torch.ones(1, 1, 1, 1, dtype=torch.bool))])[0, :, 0].tolist()
    [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]
    """
    heads = query.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    early = query.dtype == wide  # in half precision the scale would round twice
    scores = _together(query * scale if early else query, key.shape[1]) @ key.mT
    scores = scores.view(len(query), heads, query.shape[2], -1)
    scores = scores if early else scores.mul_(scale)
    if cap > 0:
        scores = scores.div_(cap).tanh_().mul_(cap)
    lowest = torch.finfo(scores.dtype).min
    for columns, where in hidden:
        scores[..., columns].masked_fill_(where, lowest)
    if sink is not None:
        column = rearrange(sink.to(scores), "head -> 1 head 1 1").expand(*scores.shape[:-1], 1)
        return torch.cat([scores, column], -1).softmax(-1, dtype=wide).to(query.dtype)[..., :-1]
    return scores.softmax(-1, dtype=wide).to(query.dtype)


def mixed_rows(
    pattern: Float[Tensor, "batch head row key"], value: Float[Tensor, "batch value_head key d_head"]
) -> Float[Tensor, "batch row head d_head"]:
    """What rows of a pattern mix of the values, whose heads several of the pattern's may share."""
    mixed = _together(pattern, value.shape[1]) @ value
    return mixed.view(*pattern.shape[:3], -1).transpose(1, 2)


def _together(rows: Float[Tensor, "batch head row n"], groups: int) -> Float[Tensor, "batch group rows n"]:
    """The rows of all heads that share a head of the keys or values, as rows of one product."""
    return rearrange(rows, "batch (group head) row n -> batch group (head row) n", group=groups)
