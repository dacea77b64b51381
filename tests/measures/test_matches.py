"""Longer matches, tokens that are alike, and retrieval, against plain loops and closed forms."""

import pickle

import pytest
import torch

import metaint
from metaint.errors import InputError
from metaint.measures.attention import prefix_match, targets
from metaint.measures.matches import prefix_match_of, retrieval
from metaint.measures.tile import Context, Tile
from metaint.tasks import alike_tokens

LENGTH = 30


def context_of(seed=0, padding=0, classes=4, causal=True):
    tokens = torch.randint(0, classes, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, :padding] = False
    return Context(torch.arange(LENGTH), mask, tokens, causal)


def pairs(measure, context):
    return set(zip(*(index.tolist() for index in targets(measure, context)), strict=True))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 4])
def test_an_order_asks_for_that_many_tokens(order, padding):
    context = context_of(padding=padding)
    expected = set()
    for b, (tokens, mask) in enumerate(zip(context.tokens.tolist(), context.mask.tolist(), strict=True)):
        first = mask.index(True)
        for q in range(first + 1, LENGTH):
            for k in range(first + order, q + 1):
                before = [tokens[k - 1 - i] for i in range(order) if k - 1 - i >= first]
                here = [tokens[q - i] for i in range(order) if q - i >= first]
                if len(before) == len(here) == order and before == here:
                    expected.add((b, q, k))
    assert expected
    assert pairs(prefix_match_of(order), context) == expected


def test_order_one_is_prefix_match():
    context = context_of()
    assert pairs(prefix_match_of(1), context) == pairs(prefix_match, context)


def test_tokens_that_are_alike_match():
    context = context_of(classes=8)
    alike = torch.arange(8) // 2
    halved = Context(context.queries, context.mask, alike[context.tokens], True)
    assert pairs(prefix_match_of(2, alike), context) == pairs(prefix_match_of(2), halved)
    assert pairs(prefix_match_of(2, alike), context) > pairs(prefix_match_of(2), context)


def test_a_match_of_an_order_can_be_pickled_and_scanned(gpt2, repeated):
    measure = prefix_match_of(2, torch.arange(gpt2.cfg.d_vocab) // 2)
    again = pickle.loads(pickle.dumps(measure))
    found = metaint.scan(gpt2, repeated, [metaint.HeadProbe([again, prefix_match_of(2), retrieval])])["heads"]
    assert {"prefix_match_2_alike", "prefix_match_2", "prefix_match_2_null_mean", "retrieval"} <= set(found)


def test_what_is_no_order_or_class_is_refused():
    with pytest.raises(InputError, match="order is 0: give the number of tokens"):
        prefix_match_of(0)
    with pytest.raises(InputError, match=r"alike is torch\.float32"):
        prefix_match_of(2, torch.ones(3))


@pytest.mark.real
def test_smollm2s_words_are_alike_whatever_their_case(smollm2):
    alike = alike_tokens(smollm2)
    the = {int(smollm2.to_tokens(word, prepend_bos=False)[0, 0]) for word in ("the", " the", "The", " The")}
    assert len(the) == 4
    assert len({int(alike[token]) for token in the}) == 1
    assert len(alike.unique()) < len(alike)


# ---- retrieval ---------------------------------------------------------------------------------------------------


def test_a_head_that_looks_at_the_next_token_scores_one_and_none_more():
    """Also where the token stands twice in the context, which the published script counts two times."""
    tokens = torch.tensor([[9, 1, 2, 1, 3, 1, 4]])
    context = Context.whole(tokens)
    pattern = torch.zeros(1, 2, 7, 7)
    pattern[..., 0] = 1
    for q, k in ((2, 1), (4, 3)):  # the next token is 1 at both, and stands at 1 and 3
        pattern[0, 0, q] = 0
        pattern[0, 0, q, k] = 1
    score = retrieval(Tile(pattern, context))[0]
    assert score[0, [2, 4]].tolist() == [1, 1]
    assert score[1, [2, 4]].tolist() == [0, 0]
    assert score[0].isnan().tolist() == [True, True, False, True, False, True, True]


def test_uniform_attention_scores_the_share_of_keys():
    context = context_of()
    score = retrieval(Tile(context.uniform, context))[:, 0]
    tokens = context.tokens.tolist()
    for b in range(2):
        for q in range(LENGTH - 1):
            share = sum(tokens[b][k] == tokens[b][q + 1] for k in range(1, q + 1)) / (q + 1)
            if share:
                assert float(score[b, q]) == pytest.approx(share)
            else:
                assert bool(score[b, q].isnan())
