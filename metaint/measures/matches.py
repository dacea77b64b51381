"""Head measures that are not read unless asked for: longer matches, tokens that are alike, and retrieval.

In: what a kind or a statistic gets. Out: as of `attention.py`, to be given to `HeadProbe` by name or as they are.
"""

import math
from functools import partial

from jaxtyping import Float
from torch import Tensor

from metaint.errors import InputError
from metaint.measures.measure import Measure, Pairs, statistic
from metaint.measures.tile import Context, Tile


def prefix_match_of(order: int = 1, alike: Tensor | None = None) -> Measure:
    """`prefix_match` of the last `order` tokens in place of one: what followed them the times before.

    - `order`: how many tokens must stand alike; 1 is `prefix_match`, and more leave fewer and surer matches.
    - `alike`: a class for each token id, such as `metaint.tasks.alike_tokens(model)` makes, so that " The" matches
      "the"; None asks for the same tokens.

    Ideal 1, uniform mean of matches/n; defined where the last tokens occurred before. The measure is called
    `prefix_match_2`, `prefix_match_2_alike`, and so on. Raises InputError for an order below 1 and an `alike` that is
    no vector of integers.

    >>> import metaint
    >>> from metaint.measures.matches import prefix_match_of
    >>> metaint.HeadProbe([prefix_match_of(2), "induction"]).measures[0].name
    'prefix_match_2'
    """
    if order < 1:
        raise InputError(f"order is {order}: give the number of tokens that must match, 1 or more.")
    if alike is not None and (alike.ndim != 1 or alike.is_floating_point()):
        raise InputError(f"alike is {alike.dtype} {list(alike.shape)}: give one whole number for each token id.")
    name = f"prefix_match_{order}" + ("" if alike is None else "_alike")
    measure = Measure(name, "kind", partial(_matches_of_order, order=order, alike=alike))
    measure.__doc__ = f"Tokens that followed an earlier occurrence of the last {order}."
    return measure


def _matches_of_order(context: Context, order: int, alike: Tensor | None) -> Pairs:
    tokens = context.known_tokens
    if alike is not None and context.tokens is not None:
        tokens = alike.to(tokens.device)[tokens.long()]
    batch, query, key = Context(context.queries, context.mask, tokens, context.causal, context.window).matches
    for back in range(1, order):
        here, there = context.queries[query] - back, key - back
        same = (there >= 0) & context.mask[batch, there.clamp(min=0)] & context.mask[batch, here.clamp(min=0)]
        same &= tokens[batch, here.clamp(min=0)] == tokens[batch, there.clamp(min=0)]
        batch, query, key = batch[same], query[same], key[same]
    return batch, query, key + 1


@statistic
def retrieval(tile: Tile) -> Float[Tensor, "batch head query"]:
    """Whether the key looked at most holds the token that comes next, in [0, 1]; uniform the share of such keys.

    The retrieval score of Wu et al. (2404.15574), read where the next token stands among the visible keys, but
    position 0, and on tokens as they are in place of tokens that the model writes. Keys that share the largest weight
    share the point, and each query counts once, so that 1 is the most (the published script counts a token that is
    copied twice two times, and reaches 1.003). Not defined for the last query of a pass.
    """
    context = tile.context
    tokens, length = context.known_tokens, context.mask.shape[1]
    after = context.queries + 1
    upcoming = tokens[:, after.clamp(max=length - 1)]
    real = (after < length) & context.mask[:, after.clamp(max=length - 1)]
    holds = (tokens[:, None, :] == upcoming[..., None]) & context.visible & (context.rank > 0)[:, None]
    top = tile.pattern >= tile.pattern.amax(-1, keepdim=True)
    top = top & context.visible[:, None]
    score = (top & holds[:, None]).sum(-1) / top.sum(-1).clamp(min=1)
    return score.float().masked_fill(~(real & holds.any(-1))[:, None], math.nan)


OPTIONAL_MEASURES: tuple[Measure, ...] = (retrieval,)
