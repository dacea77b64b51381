"""What kind of head is this? Scores of attention patterns, read from tiles of rows.

Two forms. A **kind** names the keys a query should look at; its score is the weight that lands there. A
**statistic** describes the shape of each row. Both are pure functions, and a new one is a decorated function: as a
kind it returns a mask `[batch, query, key]` from the tile's context, as a statistic values `[batch, head, query]`
from the tile. `metaint.HeadProbe` folds them over a model.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaint.errors import InputError
from metaint.measures.detector import detector_scores
from metaint.measures.matches import OPTIONAL_MEASURES
from metaint.measures.measure import Measure, Pairs, kind, statistic
from metaint.measures.tile import Context, Tile

__all__ = ["HEAD_MEASURES", "Measure", "detector_scores", "kind", "resolve", "shuffled", "statistic", "targets"]

LOCAL_WINDOW = 8
SINK_THRESHOLD, SINK_POSITIONS = 0.3, 64
_OVER_QUERIES = "kind batch query, batch head query -> kind batch head"


# ---- kinds: where should this query look? -----------------------------------------------------------------------


def at_lags(context: Context, lags: Iterable[int]) -> Pairs:
    """Every query with the keys that stand so many tokens before it (negative: after it)."""
    device = context.mask.device
    steps = torch.tensor(list(lags), device=device)
    batch, query, step = torch.meshgrid(
        torch.arange(len(context.mask), device=device),
        torch.arange(len(context.queries), device=device),
        steps,
        indexing="ij",
    )
    key = context.queries[query] - step
    inside = (key >= 0) & (key < context.mask.shape[1])
    return batch[inside], query[inside], key[inside]


def _past_first(context: Context, pairs: Pairs) -> Pairs:
    """The pairs whose key is not position 0, which as an attention sink is scored by `first_token` alone."""
    return _keep(pairs, context.rank[pairs[0], pairs[2]] > 0)


def _keep(pairs: Pairs, which: Bool[Tensor, " _"]) -> Pairs:
    return pairs[0][which], pairs[1][which], pairs[2][which]


@kind
def previous_token(context: Context) -> Pairs:
    """The token before. Ideal 1, uniform mean of 1/n. Queries from position 2 on, so that it is not position 0."""
    return _past_first(context, at_lags(context, [1]))


@kind
def current_token(context: Context) -> Pairs:
    """The query's own position. Ideal 1, uniform mean of 1/n."""
    return at_lags(context, [0])


@kind
def first_token(context: Context) -> Pairs:
    """Position 0, the attention sink (Gu et al., ICLR 2025). Ideal 1, uniform mean of 1/n."""
    batch, query, _ = at_lags(context, [0])
    return batch, query, context.first[batch]


@kind
def local_mass(context: Context) -> Pairs:
    """The last `LOCAL_WINDOW` tokens, the query's own included (on both sides if the model is bidirectional).

    Ideal 1, uniform mean of window/n. Queries at least a window away from position 0, so that there is an outside.
    """
    pairs = at_lags(context, range(0 if context.causal else 1 - LOCAL_WINDOW, LOCAL_WINDOW))
    return _keep(pairs, context.rank[pairs[0], context.queries[pairs[1]]] >= LOCAL_WINDOW)


@kind
def duplicate_token(context: Context) -> Pairs:
    """Earlier occurrences of the query's own token. Ideal 1, uniform mean of matches/n."""
    return _past_first(context, context.matches)


@kind
def prefix_match(context: Context) -> Pairs:
    """Tokens that followed any earlier occurrence of the query's token.

    The prefix-matching score of Olsson et al. (2022), with its 2022-09-20 erratum (followed, not preceded), on any
    text: ideal 1, uniform mean of matches/n.
    """
    batch, query, key = context.matches
    return batch, query, key + 1


@kind
def prefix_match_recent(context: Context) -> Pairs:
    """The token that followed the most recent earlier occurrence alone. Ideal 1, uniform mean of 1/n."""
    batch, query, key = prefix_match(context)
    last = torch.ones_like(query, dtype=torch.bool)
    last[:-1] = (batch[1:] != batch[:-1]) | (query[1:] != query[:-1])
    return _keep((batch, query, key), last)


@kind
def prefix_match_correct(context: Context) -> Pairs:
    """The matches of `prefix_match` where looking pays: the token that followed then follows now, too.

    Most tokens of a text come again with another one behind them, and a head that looks there anyway predicts wrongly.
    Ideal 1, uniform mean of matches/n. On repeated random tokens these are the queries of `induction`, but the last.
    In generation with a cache, the last query of each pass is left out, since its next token is not known yet.
    """
    batch, query, key = prefix_match(context)
    tokens = context.known_tokens
    after = context.queries[query] + 1
    inside = after < tokens.shape[1]
    batch, query, key, after = batch[inside], query[inside], key[inside], after[inside]
    follows = (tokens[batch, key] == tokens[batch, after]) & context.mask[batch, after]
    return _keep((batch, query, key), follows)


@kind
def induction(context: Context) -> Pairs:
    """The induction stripe: on a sequence that repeats itself, the token after this one in every earlier copy.

    Ideal 1, uniform mean of copies/n. Defined on sequences whose real tokens are a block repeated at least twice
    (a token in front of it, such as a BOS, is allowed), and there for the queries of the later copies only: the
    diagonal of the TransformerLens demo also counts pairs that are not induction. Elsewhere use `prefix_match`.
    """
    period, start = find_period(context.known_tokens, context.mask)
    longest = context.mask.sum(-1) - 1
    copies = int((longest // period.clamp(min=1))[period > 0].max()) if period.any() else 0
    batch, query, key = at_lags(context, [0])
    found = []
    for copy in range(1, copies + 1):
        ahead = key - copy * period[batch] + 1
        later = (period[batch] > 0) & (key - start[batch] >= copy * period[batch])
        found.append(_keep((batch, query, ahead), later))
    none = _keep((batch, query, key), torch.zeros_like(key, dtype=torch.bool))
    parts = [none, *found]
    joined = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])
    return _past_first(context, joined)


def find_period(
    tokens: Int[Tensor, "batch key"], mask: Bool[Tensor, "batch key"]
) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """The period of sequences made of one block repeated, and the index where the block first starts.

    The block may start at position 0 or, after a token such as a BOS, at position 1. Period 0 where there is none.
    """
    periods, starts = [], []
    for row, real in zip(tokens.tolist(), mask.tolist(), strict=True):
        inside = [i for i, keep in enumerate(real) if keep]
        found = (0, 0)
        if inside and inside[-1] - inside[0] + 1 == len(inside):
            found = _period(row, inside[0], inside[-1] + 1)
        periods.append(found[0])
        starts.append(found[1])
    return torch.tensor(periods, device=tokens.device), torch.tensor(starts, device=tokens.device)


def _period(row: list[int], begin: int, end: int) -> tuple[int, int]:
    for start in (begin, begin + 1):
        length = end - start
        for period in range(2, length // 2 + 1):
            if row[start + period] == row[start] and row[start + period : end] == row[start : end - period]:
                return period, start
    return 0, 0


# ---- statistics: what shape has this row? -----------------------------------------------------------------------


@statistic
def entropy(tile: Tile) -> Float[Tensor, "batch head query"]:
    """Entropy divided by log of the visible keys, in [0, 1]; uniform 1 (Zhai et al. 2023, normalised here)."""
    return tile.entropy / tile.n_visible.clamp(min=2).log()


@statistic
def effective_keys(tile: Tile) -> Float[Tensor, "batch head query"]:
    """exp(entropy): the number of keys attended to, in [1, n]; uniform n."""
    return tile.entropy.exp()


@statistic
def effective_keys_l2(tile: Tile) -> Float[Tensor, "batch head query"]:
    """1 / sum of squared weights (participation ratio), in [1, n]; uniform n."""
    return tile.sum_squares.reciprocal()


@statistic
def averaging(tile: Tile) -> Float[Tensor, "batch head query"]:
    """1 minus the total variation distance to uniform over the visible keys, in [1/n, 1]; uniform 1."""
    return tile.overlap


@statistic
def max_weight(tile: Tile) -> Float[Tensor, "batch head query"]:
    """The largest weight of the row, in [1/n, 1]; uniform 1/n."""
    return tile.maximum


@statistic
def distance_mean(tile: Tile) -> Float[Tensor, "batch head query"]:
    """Mean distance looked back, in tokens (negative: ahead, in bidirectional models)."""
    return tile.distance_mean


@statistic
def distance_std(tile: Tile) -> Float[Tensor, "batch head query"]:
    """Standard deviation, in tokens, of the distance looked back by one query."""
    return tile.distance_std


@statistic
def tied_keys(tile: Tile) -> Float[Tensor, "tau batch head query"]:
    """n_tau, the keys within tau of the top score (so of log weight), for each of `TAUS`, in [1, n]; uniform n.

    Read from the pattern at its own scale, after Merrill et al. (2010.09697): their published count, at weights
    scaled by 1000, is mostly an artefact of a multiplicative mask and is not this.
    """
    return tile.ties


@statistic
def tied_keys_normalised(tile: Tile) -> Float[Tensor, "tau batch head query"]:
    """(n_tau - 1) / (n - 1), in [0, 1]: 0 is one winner, 1 is every visible key; uniform 1."""
    return (tile.ties - 1) / (tile.n_visible - 1).clamp(min=1)


@statistic
def tied_keys_log(tile: Tile) -> Float[Tensor, "tau batch head query"]:
    """log n_tau / log n, in [0, 1]: 0 is one winner, 1 is every visible key; uniform 1."""
    return tile.ties.log() / tile.n_visible.clamp(min=2).log()


def is_sink(total: Float[Tensor, "*sequence"], count: Float[Tensor, "*sequence"]) -> Float[Tensor, "*sequence"]:
    """1 where position 0 gets a mean weight above 0.3 from the first 64 positions, its own weight of 1 included."""
    full = count == SINK_POSITIONS - 1
    return torch.where(full, ((total + 1) / SINK_POSITIONS > SINK_THRESHOLD).to(total.dtype), math.nan)


@statistic
def sink_rate(tile: Tile) -> Float[Tensor, "batch head query"]:
    """Fraction of sequences whose position 0 gets a mean weight above 0.3 from the first 64 positions, in [0, 1].

    The published definition (Gu et al., ICLR 2025; sail-sg/Attention-Sink), in which position 0 is a query too.
    This returns the weights of the other 63; `is_sink` makes a sequence of them. Not a number for bidirectional
    models and where a sequence is shorter than 64 positions.
    """
    early = (tile.context.rank[:, tile.context.queries] < SINK_POSITIONS) & tile.context.sees_first
    return tile.on_first.masked_fill(~(early & tile.context.causal)[:, None], math.nan)


@statistic
def sink_mass(tile: Tile) -> Float[Tensor, "batch head query"]:
    """Weight on no key at all, in [0, 1]: what a learnt sink (gpt-oss) takes of the row; uniform 0."""
    return (1 - tile.total).clamp(min=0)


sink_rate.per_sequence = is_sink
for tied in (tied_keys, tied_keys_normalised, tied_keys_log):
    tied.per_tau = True

HEAD_MEASURES: tuple[Measure, ...] = (
    previous_token,
    current_token,
    first_token,
    duplicate_token,
    induction,
    prefix_match,
    prefix_match_recent,
    prefix_match_correct,
    local_mass,
    entropy,
    effective_keys,
    effective_keys_l2,
    averaging,
    max_weight,
    distance_mean,
    distance_std,
    tied_keys,
    tied_keys_normalised,
    tied_keys_log,
    sink_rate,
)
# Statistics of how much weight there is, and not of how it is spread.
OF_WEIGHTS = (sink_mass, sink_rate)
# Statistics that tell a row by its weight on position 0, its sum and its sum of squares, and walk over no weights.
WALKLESS = (*OF_WEIGHTS, effective_keys_l2)


def resolve(measures: Iterable[Any] | None) -> tuple[Measure, ...]:
    """Measures by name or as they are (None: all of this file); InputError for anything else or a name twice.

    `retrieval` and others of `matches.py` are read by name alone.
    """
    known = {measure.name: measure for measure in (*HEAD_MEASURES, *OPTIONAL_MEASURES)}
    chosen = []
    for item in HEAD_MEASURES if measures is None else measures:
        if isinstance(item, Measure):
            chosen.append(item)
        elif isinstance(item, str) and item in known:
            chosen.append(known[item])
        elif isinstance(item, str):
            raise InputError(f"measures has {item!r}, which is no head measure: choose from {', '.join(known)}.")
        else:
            raise InputError(
                f"measures has {item!r}: decorate a function of one's own with @metaint.statistic or @metaint.kind."
            )
    names = [measure.name for measure in chosen]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"measures has {twice[0]!r} twice: give each measure a name of its own.")
    return tuple(chosen)


# ---- scores of a kind, and what chance would give ---------------------------------------------------------------


def targets(measure: Measure, context: Context) -> Pairs:
    """The keys a kind names, restricted to visible keys and counted queries."""
    found = measure(context)
    batch, query, key = found.nonzero(as_tuple=True) if isinstance(found, Tensor) else found
    seen = context.mask[batch, key] & context.counted[batch, query] & context.within(context.queries[query], key)
    return _keep((batch, query, key), seen)


def shuffled(
    tile: Tile, matches: Float[Tensor, "kind batch query"], total: Float[Tensor, "batch head query"] | float = 1.0
) -> tuple[Float[Tensor, "kind batch head"], Float[Tensor, "kind batch head"]]:
    """Mean and variance of what each kind would score on shuffled rows, summed over queries, exactly.

    The null of a kind: each row's own weights, shuffled among its visible keys other than position 0 (so that a sink
    neither helps nor hides), are read at as many places as the kind has targets there (`matches`). Sampling m of N
    weights without replacement has mean m mean(A) and variance m (1 - m/N) S^2, so no shuffle is ever drawn. Rows are
    taken as independent, so the variance is a lower bound where patterns repeat along a diagonal. `total` is what the
    rows sum to, less than one where a learnt sink takes the rest.
    """
    counted = tile.context.counted[:, None]
    pool = (tile.n_visible - tile.context.sees_first[:, None].float()).clamp(min=1)
    mean = ((total - tile.on_first) / pool).masked_fill(~counted, 0)
    spread = (tile.sum_squares - tile.on_first.square()).masked_fill(~counted, 0) / pool - mean.square()
    variance = spread.clamp(min=0) * pool / (pool - 1).clamp(min=1)
    m = torch.minimum(matches, pool[:, 0])
    return (
        einsum(m, mean, _OVER_QUERIES),
        einsum(m * (1 - m / pool[:, 0]), variance, _OVER_QUERIES),
    )
