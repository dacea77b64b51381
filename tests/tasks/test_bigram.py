"""`BigramTask`: its chain from texts, tokens and counts, its entropies, and what it refuses."""

import math
from itertools import pairwise

import pytest
import torch

from metaint.errors import InputError
from metaint.tasks import BigramTask, bigram
from tests.tasks.chains import STORED, TEXT, shakespeare


def test_distribution_of_the_text():
    task = bigram("abacab", trigger_count=1)
    assert task.vocabulary == ("a", "b", "c")
    assert task.unigram.tolist() == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    assert torch.allclose(task.bigram, torch.tensor([[0, 2 / 3, 1 / 3], [1, 0, 0], [1, 0, 0]]).double())


def test_a_character_without_follower_goes_on_by_frequency():
    task = bigram("aab", trigger_count=1)
    assert torch.allclose(task.bigram[1], task.unigram)


def test_fixed_triggers_are_the_most_frequent_ascending():
    task = bigram("aaaabbbccd" * 3, triggers="fixed", trigger_count=2)
    assert task.sample(2, 5).triggers.tolist() == [[1, 0]] * 2
    task = bigram("aaaabbbccd" * 3, triggers="fixed", trigger_count=2, offset=1)
    assert task.sample(1, 5).triggers.tolist() == [[2, 1]]


def test_default_text_has_a_small_vocabulary():
    task = bigram()
    assert 60 <= task.vocab <= 70
    assert set("abcdefghijklmnopqrstuvwxyz \n") <= set(task.vocabulary)


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        ("aaa", {}, "text is a text of 3 characters: give a string with at least two different characters."),
        (7, {}, "text is a int: give a string with at least two different characters."),
        ("abc", {}, "trigger_count is 5: give 1 to 3, the number of different characters."),
        ("abc" * 5, {"trigger_count": 1, "triggers": "some"}, "triggers is 'some': give 'fixed' or 'random'."),
        ("abc", {"trigger_count": 1, "outputs": "x"}, "outputs is 'x': give 'all', 'train' or 'test'."),
        (
            "abc",
            {"trigger_count": 2, "offset": 2, "triggers": "fixed"},
            "offset is 2: give 0 to 1, so that 2 triggers remain below it in the ranking.",
        ),
        (
            "abc",
            {"trigger_count": 2, "offset": 1},
            "offset is 1, which moves fixed triggers only: give 0 with triggers='random'.",
        ),
        (
            "abc",
            {"trigger_count": 1, "outputs": "test", "bigram_outputs": True},
            "outputs is 'test' together with bigram_outputs: give outputs='all' or bigram_outputs=False.",
        ),
        (
            "abc",
            {"trigger_count": 1, "outputs": "test", "no_repeat": True},
            "outputs is 'test', which leaves 1 of 3 characters as outputs: give a text with more different characters.",
        ),
    ],
)
def test_bad_input_gets_one_sentence(text, options, sentence):
    with pytest.raises(InputError) as caught:
        BigramTask.from_text(text, **options)
    assert str(caught.value) == sentence


def test_tiny_shakespeare():
    assert sum(STORED["unigram"]) == 1_115_394
    assert sum(count for _, _, count in STORED["bigram"]) == 1_115_393
    task = shakespeare(triggers="fixed")
    assert task.vocab == 65
    assert task.vocabulary[:3] == ("\n", " ", "!")
    assert task.vocabulary[-1] == "z"
    assert task.pairs.shape[1] == int((task.bigram > 0).sum()) == 1403
    share = dict(zip(task.vocabulary, task.unigram.tolist(), strict=True))
    assert [share[c] for c in " etoa"] == pytest.approx([0.1523, 0.0848, 0.0601, 0.0590, 0.0498], abs=5e-5)
    assert task.unigram_entropy == pytest.approx(3.3128, abs=5e-5)
    assert task.bigram_entropy == pytest.approx(2.4526, abs=5e-5)
    assert task.fixed_triggers.tolist() == [39, 53, 58, 43, 1]


def test_tokens_by_hand():
    task = BigramTask.from_tokens(torch.tensor([3, 1, 3, 7, 3]), vocab=10, triggers="fixed", trigger_count=2)
    assert task.vocab == 10
    assert task.vocabulary[7] == "<7>"
    assert task.unigram.tolist() == pytest.approx([0, 0.2, 0, 0.6, 0, 0, 0, 0.2, 0, 0])
    assert task.pairs.tolist() == [[1, 3, 3, 7], [3, 1, 7, 3]]
    assert task.weights.tolist() == [1, 0.5, 0.5, 1]
    assert task.bigram[3].tolist() == [0, 0.5, 0, 0, 0, 0, 0, 0.5, 0, 0]
    assert torch.equal(task.bigram[0], task.unigram)
    assert task.fixed_triggers.tolist() == [7, 3]
    assert task.bigram_entropy == pytest.approx(0.6 * math.log(2))
    assert task.sample(30, 5).tokens.unique().tolist() == [1, 3, 7]


def test_parts_of_the_ids_that_occur():
    ids = [3, 1, 3, 7, 3]
    for part, expected in (("all", [1, 3, 7]), ("train", [1, 3]), ("test", [7])):
        sample = BigramTask.from_tokens(ids, vocab=10, trigger_count=2, outputs=part).sample(50, 1)
        assert sample.outputs.unique().tolist() == expected
        assert set(sample.triggers.unique().tolist()) <= {1, 3, 7}


def test_texts_tokens_and_counts_make_one_task():
    task = bigram(TEXT, triggers="fixed")
    rank = {character: index for index, character in enumerate(task.vocabulary)}
    counts = torch.zeros(task.vocab, task.vocab).long()
    for first, second in pairwise(TEXT):
        counts[rank[first], rank[second]] += 1
    unigram = torch.tensor([TEXT.count(character) for character in task.vocabulary])
    others = [
        BigramTask.from_tokens([rank[character] for character in TEXT], triggers="fixed"),
        BigramTask.from_counts(unigram, counts, triggers="fixed"),
        BigramTask.from_counts(unigram / 7, counts.to_sparse(), triggers="fixed"),
    ]
    for other in others:
        torch.testing.assert_close(other.bigram, task.bigram, rtol=0, atol=1e-15)
        assert torch.equal(other.sample(20, 50).tokens, task.sample(20, 50).tokens)


def test_any_character():
    task = bigram("a\U0001f600\ud800é" * 3 + "a", trigger_count=1)
    assert task.vocabulary == ("a", "é", "\ud800", "\U0001f600")
    assert task.pairs.tolist() == [[0, 1, 2, 3], [3, 0, 1, 2]]


def test_entropy_of_independent_tokens():
    shares = torch.tensor([0.5, 0.25, 0.125, 0.125])
    task = BigramTask.from_counts(shares, shares.outer(shares), trigger_count=1)
    assert task.unigram_entropy == pytest.approx(1.75 * math.log(2))
    assert task.bigram_entropy == pytest.approx(1.75 * math.log(2))


def test_fixed_triggers_are_those_of_every_sequence():
    task = bigram("aaaabbbccd" * 3, triggers="fixed", trigger_count=2, offset=1)
    assert task.fixed_triggers.tolist() == [2, 1]
    assert bigram(TEXT).fixed_triggers.tolist() == []


@pytest.mark.parametrize(
    ("ids", "options", "sentence"),
    [
        ([[1, 2]], {}, "ids is int64 of shape (1, 2): give one row of whole numbers, [position]."),
        ([1.0, 2.0], {}, "ids is float32 of shape (2,): give one row of whole numbers, [position]."),
        ([1, 5, 2], {"vocab": 5}, "ids holds 5, outside the vocabulary 0..4: give ids inside it."),
        ([1, -1, 2], {}, "ids holds -1, outside the vocabulary 0..2: give ids inside it."),
        ([1, 1, 1], {}, "1 of 2 ids occur: give at least two different ones."),
        ([1, 0], {"vocab": 3, "vocabulary": "ab"}, "vocabulary has 2 entries: give 3, one for each id."),
        ([1, 0, 1], {}, "trigger_count is 5: give 1 to 2, the number of different tokens."),
    ],
)
def test_bad_tokens_get_one_sentence(ids, options, sentence):
    with pytest.raises(InputError) as caught:
        BigramTask.from_tokens(ids, **options)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("unigram", "chain", "sentence"),
    [
        ([1, 1, 1], [[1, 1]], "unigram and bigram have shapes (3,) and (1, 2): give [vocab] and [vocab, vocab]."),
        ([1, -1], [[1, 1], [1, 1]], "unigram holds -1: give finite counts of at least 0."),
        ([1, 1], [[1, math.nan], [1, 1]], "bigram holds nan: give finite counts of at least 0."),
        ([1, 0], [[1, 0], [0, 0]], "1 of 2 ids occur: give at least two different ones."),
        ([1, 1, 0], [[1, 1, 1]] * 3, "bigram has a pair with id 2, whose unigram count is 0: give it one above 0."),
    ],
)
def test_bad_counts_get_one_sentence(unigram, chain, sentence):
    with pytest.raises(InputError) as caught:
        BigramTask.from_counts(torch.tensor(unigram), torch.tensor(chain))
    assert str(caught.value) == sentence


def test_too_many_ids():
    many = torch.ones(1 << 23)
    nothing = torch.sparse_coo_tensor(torch.empty(2, 0).long(), [], 2 * many.shape, check_invariants=True)
    with pytest.raises(InputError, match=r"^unigram has 8388608 ids: give at most 8388606\.$"):
        BigramTask.from_counts(many, nothing)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0)])
def test_sizes_below_one(sizes):
    with pytest.raises(InputError, match=r"^(batch|length) is 0: give at least 1\.$"):
        bigram(TEXT).sample(*sizes)
