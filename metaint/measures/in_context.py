"""What a model takes from its context: what it predicts, where two heads look for it, and how its loss falls.

In: tokens (a model's inputs), the targets after them, its predictions or losses, and the patterns `[batch, query,
key]` of single heads, causal. Out: one value a position, NaN where the measure isn't defined. So batches can be
concatenated, `nanmean` gives the measure, and that of a slice gives it for those positions. Losses of whole
sequences give one value a sequence.

Where a measure counts is said by `where`. On the in-context bigram task that is `outs >= 2`, and for a first
occurrence `outs == 1`; on other tokens `occurrence(tokens) >= 2`, or `follower(tokens) == targets` for what an
induction head would predict.

An attention score comes in two forms with its baseline, as `Attended`: does the most attended key count, and how much
weight lands on the keys that count. Uniform attention has the mass `uniform` exactly, and a key drawn at random
counts with that same chance. (The most attended key of uniform attention itself is no baseline: all keys are tied,
and the first one stands for them.)

Sources: Bietti et al. 2023 (2306.00802), transformer-birth `ihead_basic_main.py`, whose names are given below; the
masses and baselines are ours. Olsson et al. 2022, "In-context Learning and Induction Heads", for the score named so.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaint.errors import InputError

# Weights that are read at once.
_CHUNK = 2**20


# ---- what came before -------------------------------------------------------------------------------------------


def occurrence(tokens: Int[Tensor, "batch position"]) -> Int[Tensor, "batch position"]:
    """How often the token at each position has come so far, 1 at its first time.

    By sorting: a few integers a position, whatever the vocabulary.
    """
    ordered, order = tokens.sort(dim=1, stable=True)
    nth = torch.arange(tokens.shape[1], device=tokens.device) - torch.searchsorted(ordered, ordered) + 1
    return torch.empty_like(order).scatter_(1, order, nth)


def follower(tokens: Int[Tensor, "batch position"]) -> Int[Tensor, "batch position"]:
    """The token that came after the most recent earlier occurrence of each token; -1 if there was none.

    It is what an ideal induction head predicts. By sorting, as `occurrence`.
    """
    ordered, order = tokens.sort(dim=1, stable=True)
    after = tokens.gather(1, (order[:, :-1] + 1).clamp(max=tokens.shape[1] - 1))
    latest = torch.full_like(tokens, -1)
    return latest.scatter_(1, order[:, 1:], after.where(ordered[:, 1:] == ordered[:, :-1], -1))


# ---- what the model predicts ------------------------------------------------------------------------------------


class LossParts(NamedTuple):
    """Losses of the in-context bigram task, each where it is defined."""

    bigram: Float[Tensor, "batch position"]
    """`loss_bigram`, where the input is no trigger: the floor is the entropy of the chain after such tokens."""
    first: Float[Tensor, "batch position"]
    """At a trigger's first time, of which nothing is known: log(vocab) is the floor for outputs drawn uniformly."""
    later: Float[Tensor, "batch position"]
    """`loss_head`, at its later times, where the target is known from the context: the floor is 0."""


def accuracy(
    predictions: Int[Tensor, "batch position"],
    targets: Int[Tensor, "batch position"],
    where: Bool[Tensor, "batch position"],
) -> Float[Tensor, "batch position"]:
    """1 where the prediction is the target, 0 where not.

    In-context accuracy, `acc_end`, is `where = outs >= 2`; `acc_tot` is `outs >= 1`. Chance is not 1/vocab: with the
    inputs as predictions this is `repeat_frac` (`outs >= 1` there), what copying the current token scores, about 0.25
    on the bigram task with 5 triggers. `where & (targets != inputs)` leaves those copies out. With `follower(inputs)`
    it is what an ideal induction head scores. Raises InputError for tensors of several shapes.
    """
    _check(where=where, predictions=predictions, targets=targets)
    return _defined((predictions == targets).float(), where)


def loss_parts(losses: Float[Tensor, "batch position"], outs: Int[Tensor, "batch position"]) -> LossParts:
    """The losses in nats of plain bigrams (`outs == 0`), of first and of later times of a trigger.

    Raises InputError for tensors of two shapes.
    """
    _check(outs=outs, losses=losses)
    return LossParts(*(_defined(losses, which) for which in (outs == 0, outs == 1, outs >= 2)))


# ---- where the two heads look -----------------------------------------------------------------------------------


class Attended(NamedTuple):
    """One score of a head."""

    hit: Float[Tensor, "batch position"]
    """1 if the most attended key counts, else 0. The first key wins a tie. NaN if a weight is."""
    mass: Float[Tensor, "batch position"]
    """The weight on the keys that count, in [0, 1]."""
    uniform: Float[Tensor, "batch position"]
    """The mass of uniform attention on the same tokens: the share of visible keys that count."""


def next_attends_back(pattern: Float[Tensor, "batch query key"], where: Bool[Tensor, "batch query"]) -> Attended:
    """Does the NEXT token attend to this one: key t at query t + 1, given at position t. Ideal 1, uniform 1/(t + 2).

    What a previous-token head must do at a trigger. `hit` is `score_acc` with `where = outs >= 1`, and at a first
    time `score_start_acc` with `outs == 1`. The last position has no next and is NaN. With `where` True everywhere,
    it is the previous-token score of all queries but the first, and `mass` the previous-token mass (to which key 0
    counts, unlike in `measures.attention`). Raises InputError as `attended_is` does.
    """
    _check(pattern, where=where)
    queries = where.roll(1, dims=1)
    queries[:, :1] = False
    keys = torch.arange(pattern.shape[2], device=pattern.device)
    at_next = _score(pattern, queries, lambda batch, query: keys == query[:, None] - 1)
    return Attended(*(part.roll(-1, dims=1) for part in at_next))


def attended_is(
    pattern: Float[Tensor, "batch query key"],
    tokens: Int[Tensor, "batch key"],
    wanted: Int[Tensor, "batch query"],
    where: Bool[Tensor, "batch query"],
) -> Attended:
    """Is the attended token the wanted one? Ideal 1.

    Of an induction head with `where = outs >= 2`, `hit` is `score2_next_acc` if the targets are wanted and
    `pred_attended_acc` if the model's predictions are. Other positions that carry the same token count too, so
    read it beside `attended_follows_match`. Raises InputError unless the pattern is one head's, with a token and a
    Boolean of `where` for each query.
    """
    _check(pattern, where=where, tokens=tokens, wanted=wanted)
    return _score(pattern, where, lambda batch, query: tokens[batch] == wanted[batch, query, None])


def attended_follows_match(
    pattern: Float[Tensor, "batch query key"],
    tokens: Int[Tensor, "batch key"],
    where: Bool[Tensor, "batch query"],
) -> Attended:
    """Is the token before the attended one the current token, as an induction head needs it? Ideal 1.

    With `where = outs >= 2` of a layer-2 head, `hit` is `score2_acc` and `mass` the induction mass: the kind
    `prefix_match` of `measures.attention`, at chosen positions. Key 0 follows nothing: attending to it is a miss.
    Raises InputError as `attended_is` does.
    """
    _check(pattern, where=where, tokens=tokens)
    before = tokens.roll(1, dims=1)
    beyond_first = torch.arange(tokens.shape[1], device=tokens.device) > 0
    return _score(pattern, where, lambda batch, query: (before[batch] == tokens[batch, query, None]) & beyond_first)


def attended_looked_back(
    previous: Float[Tensor, "batch query key"],
    pattern: Float[Tensor, "batch query key"],
    where: Bool[Tensor, "batch query"],
) -> Attended:
    """Did the previous-token head really look one back at the key that the later head `pattern` attends to? Ideal 1.

    `hit` is `score_cond_acc` with `where = outs >= 2`: are the two heads one circuit? Where key 0 is the most
    attended, which has nothing before it, it is NaN, so it says nothing of how often that is. `mass` is that of the
    way t -> s -> s - 1, summed over s: weight on key 0 is no part of it and isn't renormalised away. `uniform` is for
    both heads uniform, (1/2 + ... + 1/(t + 1)) / (t + 1); a random key s looks one back with chance 1/(s + 1).
    Raises InputError unless the patterns are two heads' on the same tokens, with a Boolean of `where` for each query.
    """
    _check(pattern, where=where)
    if previous.shape != pattern.shape:
        raise InputError(
            f"previous is {list(previous.shape)} and pattern {list(pattern.shape)}: give two heads' on the same tokens."
        )
    dtype = torch.promote_types(pattern.dtype, torch.float32)
    back = torch.zeros(where.shape, dtype=dtype, device=pattern.device)
    back[:, 1:] = previous.detach().diagonal(-1, dim1=1, dim2=2)
    mass = (pattern.detach().to(dtype) @ back[:, :, None])[:, :, 0]

    attended = pattern.argmax(-1)
    hit = previous.argmax(-1).gather(1, attended) == attended - 1
    hit = hit.to(dtype).masked_fill((attended == 0) | mass.isnan(), math.nan)

    n = torch.arange(1, where.shape[1] + 1, dtype=dtype, device=pattern.device)
    uniform = ((n.reciprocal().cumsum(0) - 1) / n).expand(where.shape)
    return Attended(*(_defined(part, where) for part in (hit, mass, uniform)))


# ---- how the loss falls along a sequence ------------------------------------------------------------------------


class RepeatLosses(NamedTuple):
    """Mean losses in nats of tokens that come twice."""

    first: Float[Tensor, " batch"]
    """In the first copy: near log(vocab) or above for random tokens."""
    second: Float[Tensor, " batch"]
    """The same tokens in the second copy, where the context tells them."""
    drop: Float[Tensor, " batch"]
    """first - second; 0 for a model that makes nothing of its context."""


def in_context_learning_score(
    losses: Float[Tensor, "batch position"], early: int = 50, late: int = 500
) -> Float[Tensor, " batch"]:
    """Loss of the `late`-th predicted token minus that of the `early`-th, for each sequence; negative if it learns.

    The score of Olsson et al. (2022) is its mean over sequences, on contexts of 512 tokens; single tokens vary much,
    so take many. `losses[:, 0]` is the first prediction, so we read them as indices 49 and 499. Divided by
    log(late / early) it is the mean slope of the loss in log position. Raises InputError unless 1 <= early < late and
    the sequences reach that far.
    """
    if not 1 <= early < late:
        raise InputError(f"early is {early} and late {late}: they count predicted tokens from 1, early before late.")
    if losses.shape[1] < late:
        raise InputError(
            f"losses has {losses.shape[1]} predicted tokens a sequence, and late is {late}: "
            f"give sequences of at least {late + 1} tokens, or a smaller late."
        )
    return losses[:, late - 1] - losses[:, early - 1]


def repeat_losses(losses: Float[Tensor, "batch position"], block: int, bos: bool) -> RepeatLosses:
    """Mean loss of each copy, on sequences of `block` tokens that come twice (`tasks.repeated_tokens`).

    `bos` says whether one more token stood in front. `losses[:, t]` is that of token t + 1. The block's first token is
    left out of both copies, so that they are means over the same tokens: in the second it can't be predicted, and in
    the first nothing, or the BOS alone, comes before it. Raises InputError for sizes that don't fit together.
    """
    if block < 2:
        raise InputError(f"block is {block}: give at least 2, since the first token of a block can't be predicted.")
    wanted = 2 * block - 1 + bos
    if losses.shape[1] != wanted:
        front = "with a BOS in front" if bos else "without a BOS"
        raise InputError(
            f"losses has {losses.shape[1]} predicted tokens a sequence: "
            f"two copies of a block of {block} tokens {front} have {wanted}."
        )
    start = int(bos)
    first = losses[:, start : start + block - 1].mean(1)
    second = losses[:, start + block : start + 2 * block - 1].mean(1)
    return RepeatLosses(first, second, first - second)


# ---- in pieces --------------------------------------------------------------------------------------------------


def _score(
    pattern: Float[Tensor, "batch query key"],
    where: Bool[Tensor, "batch query"],
    counts: Callable[[Tensor, Tensor], Tensor],
) -> Attended:
    """The score at the queries of `where`; `counts` says, for lists of sequences and queries, which keys count.

    Read some rows at a time, so that nothing else as large as the pattern is ever made.
    """
    dtype = torch.promote_types(pattern.dtype, torch.float32)
    scores = torch.full((3, *where.shape), math.nan, dtype=dtype, device=pattern.device)
    keys = torch.arange(pattern.shape[2], device=pattern.device)
    size = max(1, _CHUNK // max(1, len(keys)))
    sequences, queries = where.nonzero(as_tuple=True)
    for batch, query in zip(sequences.split(size), queries.split(size), strict=True):
        rows = pattern.detach()[batch, query].to(dtype)
        right = counts(batch, query) & (keys <= query[:, None])
        mass = (rows * right).sum(-1)
        hit = right.gather(1, rows.argmax(-1, keepdim=True))[:, 0].to(dtype)
        scores[0, batch, query] = hit.masked_fill(mass.isnan(), math.nan)
        scores[1, batch, query] = mass
        scores[2, batch, query] = right.sum(-1) / (query + 1).to(dtype)
    return Attended(*scores)


def _defined(values: Tensor, where: Tensor) -> Tensor:
    return values.masked_fill(~where, math.nan)


def _check(pattern: Tensor | None = None, **grids: Tensor) -> None:
    """InputError unless the pattern is one head's and the others have one value for each of its positions."""
    if pattern is not None and (pattern.ndim != 3 or pattern.shape[1] != pattern.shape[2]):
        raise InputError(
            f"pattern is {list(pattern.shape)}: give one head's, [batch, query, key] with as many queries as keys."
        )
    shape = next(iter(grids.values())).shape if pattern is None else pattern.shape[:2]
    for name, grid in grids.items():
        if grid.ndim != 2 or grid.shape != shape:
            raise InputError(f"{name} is {list(grid.shape)} beside {list(shape)}: give one value for each position.")
    if "where" in grids and grids["where"].dtype != torch.bool:
        raise InputError(f"where holds {grids['where'].dtype}: give one Boolean a position, such as outs >= 2.")
