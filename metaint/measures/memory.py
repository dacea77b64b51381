"""Weight matrices as associative memories: what they recall, and how a gradient writes into them.

In: embeddings and matrices in TransformerLens's row convention, x W v^T for an input x and an output v (the transpose
of v^T W x in the paper). Out: for each input, the rank of the output it should recall; recall is the share with rank 0.
Source: Bietti et al. 2023 (2306.00802), whose four probes are coded in transformer-birth `ihead_basic_main.py`: they
isolate one matrix, without scale, positions or norms. A recall of 1 does not mean that the circuit works: the probes
don't see the cross-talk of whatever else is in the stream, so read behaviour beside them.
"""

import math
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from metaint.errors import InputError

# Scores that are held at once, twice: 8 MB in float32, which stay in the cache.
_CHUNK = 2**21


class Recall(NamedTuple):
    """What a memory recalls, for each of its inputs.

    >>> import torch
    >>> from metaint import Recall
    >>> recall = Recall(rank=torch.tensor([0, 3, 0, 1]), chance=0.1)
    >>> recall.share(), recall.share(top=2)
    (0.5, 0.75)
    """

    rank: Int[Tensor, " query"]
    """How many candidates score higher than the right one, or as high and come before it: 0 is a recall."""
    chance: float
    """The share of recalls where the best candidate is any of them, all alike."""

    def share(self, top: int = 1) -> float:
        """The share of inputs whose right output is among the `top` best, 0 to 1; NaN without inputs."""
        return (self.rank < top).double().mean().item()


def recall(
    queries: Float[Tensor, "query width"],
    candidates: Float[Tensor, "candidate width"],
    targets: Int[Tensor, " query"] | None = None,
    reach: Int[Tensor, " query"] | None = None,
) -> Recall:
    """Where the scores queries @ candidates^T rank each query's target, by default the candidate of its own number.

    `reach` is the last candidate that each query may choose (all, by default). Ties go to the first candidate, as
    argmax has it, so that a matrix of zeros recalls candidate 0 alone; a score that isn't finite is no recall. Scores
    are made in chunks of at most 8 MB. A sum of several memories is one of wider queries and candidates: concatenate
    both along width. Raises InputError for targets out of range.
    """
    count, device = len(candidates), queries.device
    targets = torch.arange(len(queries), device=device) if targets is None else targets.to(device)
    last = targets.new_full(targets.shape, count - 1) if reach is None else reach.to(device)
    if len(targets) != len(queries) or bool(((targets < 0) | (targets > last) | (last >= count)).any()):
        raise InputError(
            f"targets and reach must hold, for each of {len(queries)} queries, a candidate from 0 to {count - 1}, and "
            "no target beyond the reach."
        )
    ranks = [torch.zeros(0, dtype=torch.int64, device=device)]
    number = torch.arange(count, device=device)
    rows = max(1, _CHUNK // max(1, count))
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        target, scores = targets[part, None], queries[part] @ candidates.mT
        if reach is not None:
            scores.masked_fill_(number > last[part, None], -math.inf)
        right, space = scores.gather(1, target), torch.empty_like(scores, dtype=torch.float32)
        # By what is not lower, so that NaN counts against the target; which of equals come later is asked where there
        # are any. Comparing into numbers and adding these up is several times faster than counting Booleans.
        above = count - 1 - torch.lt(scores, right, out=space).sum(1).long()
        tied = (above != torch.gt(scores, right, out=space).sum(1)).nonzero()[:, 0]
        above[tied] -= ((scores[tied] == right[tied]) & (number > target[tied])).sum(1)
        ranks.append(above.masked_fill(~right[:, 0].isfinite(), count))
    return Recall(torch.cat(ranks), (1 / (last + 1).double()).mean().item())


def previous_position_recall(
    positions: Float[Tensor, "position d_model"],
    W_Q: Float[Tensor, "d_model d_head"],
    W_K: Float[Tensor, "d_model d_head"],
    causal: bool = False,
) -> Recall:
    """W_K^1 as a memory of p_t -> p_{t-1}: does position t, from 1 on, find the position before it among all?

    Candidates are the positions 0 to T-2 (`wk0_acc`; its `wk0_64_acc` is that of the first 64 positions), later ones
    too, or with `causal` those up to t - 1.
    """
    queries, keys = positions[1:] @ W_Q, positions[:-1] @ W_K
    return recall(queries, keys, reach=torch.arange(len(keys), device=keys.device) if causal else None)


def previous_position_mass(
    positions: Float[Tensor, "position d_model"],
    W_Q: Float[Tensor, "d_model d_head"],
    W_K: Float[Tensor, "d_model d_head"],
    scale: float | int,
) -> tuple[float, float]:
    """Mean weight that positions alone would put on the one before, 0 to 1, and what uniform attention puts there.

    The softmax over the positions 0 to t of p_t W_Q W_K^T p_s^T / scale, at s = t - 1, over t from 1 on.
    """
    scores = (positions @ W_Q) @ (positions @ W_K).mT / scale
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    pattern = scores.masked_fill(later, -math.inf).softmax(-1)
    uniform = 1 / torch.arange(2, len(positions) + 1, dtype=torch.float64)
    return pattern.diagonal(-1).double().mean().item(), uniform.mean().item()


def relative_recall(
    queries: Float[Tensor, "query d_head"],
    key: Float[Tensor, "d_head"],
    rotations: Float[Tensor, "lag d_head d_head"],
) -> Recall:
    """Does lag 1 score highest where positions enter by rotation? For queries alike in everything but content.

    `rotations[D]` is R_D R_0^T, so that queries @ rotations[D] @ key scores a key that lies D back. A form of our own
    of what `previous_position_recall` asks of learned positions.
    """
    return recall(queries, rotations @ key, torch.ones(len(queries), dtype=torch.int64, device=queries.device))


# ---- gradients as memories --------------------------------------------------------------------------------------


def output_gradient(
    inputs: Float[Tensor, "example d_in"],
    outputs: Float[Tensor, "candidate d_out"],
    targets: Int[Tensor, " example"],
    W: Float[Tensor, "d_in d_out"],
) -> Float[Tensor, "d_in d_out"]:
    """The gradient by W of the mean cross entropy of softmax_k(x W v_k^T): E[x^T (p(k|x) - 1{k = y}) v_k].

    Minus this, at W = 0 and with balanced classes, is the memory sum_k (mu_k - mu)^T v_k / V of the mean input of each
    class. Derived for our notes, and checked against autograd in the tests.
    """
    error = (inputs @ W @ outputs.mT).softmax(-1)
    error[torch.arange(len(targets), device=error.device), targets] -= 1
    return inputs.mT @ (error @ outputs) / len(inputs)


def key_query_gradient(
    queries: Float[Tensor, "example d_model"],
    keys: Float[Tensor, "example key d_model"],
    values: Float[Tensor, "example key candidate"],
    targets: Int[Tensor, " example"],
    scale: float | int,
) -> Float[Tensor, "d_model d_model"]:
    """The gradient of the mean cross entropy by W_QK at W_QK = 0, where attention is uniform over the keys.

    The score of a key x_s is x_q W_QK x_s^T / scale, and `values[n, s, k]` is what attending to s adds to the logit of
    candidate k, x_s W_OV v_k^T: E[sum_k (p_k - 1{k = y}) mean_s (u_ks - mean u_k) x_q^T x_s] / scale. Derived for our
    notes, and checked against autograd in the tests.
    """
    mean = values.mean(1, keepdim=True)
    error = mean[:, 0].softmax(-1)
    error[torch.arange(len(targets), device=error.device), targets] -= 1
    pull = einsum(error, values - mean, "sample d, sample source d -> sample source") / values.shape[1]
    return einsum(queries, pull, keys, "sample query, sample source, sample source d -> query d") / (
        scale * len(queries)
    )


# ---- global bigrams ---------------------------------------------------------------------------------------------


def bigram_divergence(
    logits: Float[Tensor, "token vocab"], bigram: Float[Tensor, "token vocab"]
) -> Float[Tensor, " token"]:
    """KL(pi(.|token) || softmax(logits)) in nats, 0 or more, for each row; `ff1_loss` is its mean over tokens.

    The rows of `bigram` sum to one. With logits = E W_F W_U it asks what W_F alone knows of the bigrams; the direct
    path from embedding to unembedding is left out, as in the reference.
    """
    log_p = logits.double().log_softmax(-1)
    return (torch.special.xlogy(bigram, bigram) - bigram * log_p).sum(-1)
