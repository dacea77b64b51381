import os
import random

import pytest
import torch

from metaint.errors import InputError
from metaint.tasks import BigramTask, bigram, read_text

_WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "ate",
    "rats",
    "that",
    "had",
    "no",
    "dog",
    "to",
    "nod",
    "all",
    "day",
]
TEXT = " ".join(random.Random(0).choices(_WORDS, k=2000))


def plain_sequence(task: BigramTask, length: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """One sequence and its `outs`, drawn token by token from the definition (fixed triggers)."""
    ids = range(task.vocab)
    triggers = sorted(ids, key=lambda i: float(task.unigram[i]))[-task.trigger_count :]
    rule = {q: rng.choice([o for o in ids if not (task.no_repeat and o == q)]) for q in triggers}
    tokens = rng.choices(ids, task.unigram.tolist())
    outs, seen = [], dict.fromkeys(triggers, 0)
    for _ in range(length):
        last = tokens[-1]
        if last in rule:
            seen[last] += 1
        outs.append(seen.get(last, 0))
        tokens.append(rule[last] if last in rule else rng.choices(ids, task.bigram[last].tolist())[0])
    return tokens, outs


def test_distribution_of_the_text():
    task = bigram("abacab", trigger_count=1)
    assert task.vocabulary == ("a", "b", "c")
    assert task.unigram.tolist() == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    assert torch.allclose(task.bigram, torch.tensor([[0, 2 / 3, 1 / 3], [1, 0, 0], [1, 0, 0]]).double())


def test_a_character_without_follower_goes_on_by_frequency():
    task = bigram("aab", trigger_count=1)
    assert torch.allclose(task.bigram[1], task.unigram)


@pytest.mark.parametrize("no_repeat", [False, True])
def test_statistics_equal_those_of_a_plain_generator(no_repeat):
    task = bigram(TEXT, triggers="fixed", trigger_count=3, no_repeat=no_repeat)
    batch, length = 1500, 40
    sample = task.sample(batch, length, seed=1)
    rng = random.Random(2)
    pairs = [plain_sequence(task, length, rng) for _ in range(batch)]
    tokens, outs = (torch.tensor([pair[i] for pair in pairs]) for i in (0, 1))

    def statistics(tokens, outs):
        """Per sequence: token shares, shares of outs 0, 1, 2+, and of a token equal to the one before."""
        shares = torch.nn.functional.one_hot(tokens, task.vocab).double().mean(1)
        kinds = torch.stack([outs == 0, outs == 1, outs >= 2], -1).double().mean(1)
        same = (tokens[:, 1:] == tokens[:, :-1]).double().mean(1, keepdim=True)
        return torch.cat([shares, kinds, same], dim=1)

    here, plain = statistics(sample.tokens, sample.outs), statistics(tokens, outs)
    error = ((here.var(0) + plain.var(0)) / batch).sqrt()
    assert ((here.mean(0) - plain.mean(0)).abs() <= 4.5 * error + 1e-9).all()


def test_transitions_follow_the_bigram_rows_where_no_trigger_rules():
    task = bigram(TEXT, trigger_count=2)
    sample = task.sample(3000, 40)
    free = sample.outs == 0
    first, second = sample.tokens[:, :-1][free], sample.tokens[:, 1:][free]
    counts = torch.zeros(task.vocab, task.vocab).double()
    counts.index_put_((first, second), torch.ones(len(first)).double(), accumulate=True)
    often = counts.sum(1) > 2000
    assert often.any()
    found = counts[often] / counts[often].sum(1, keepdim=True)
    assert (found - task.bigram[often]).abs().max() < 0.05
    assert (counts[task.bigram == 0] == 0).all()


@pytest.mark.parametrize("triggers", ["fixed", "random"])
def test_outs_and_rules_by_brute_force(triggers):
    sample = bigram(TEXT, triggers=triggers, trigger_count=4).sample(50, 60, seed=4)
    for tokens, outs, keys, values in zip(*(part.tolist() for part in sample), strict=True):
        rule, seen = dict(zip(keys, values, strict=True)), dict.fromkeys(keys, 0)
        assert len(rule) == 4
        for time, token in enumerate(tokens[:-1]):
            if token in rule:
                seen[token] += 1
                assert tokens[time + 1] == rule[token]
            assert outs[time] == seen.get(token, 0)


def test_fixed_triggers_are_the_most_frequent_ascending():
    task = bigram("aaaabbbccd" * 3, triggers="fixed", trigger_count=2)
    assert task.sample(2, 5).triggers.tolist() == [[1, 0]] * 2
    task = bigram("aaaabbbccd" * 3, triggers="fixed", trigger_count=2, offset=1)
    assert task.sample(1, 5).triggers.tolist() == [[2, 1]]


def test_random_triggers_are_drawn_by_frequency_without_replacement():
    task = bigram("aaaabbbccd" * 3, trigger_count=2)
    triggers = task.sample(20_000, 1).triggers
    assert (triggers[:, 0] != triggers[:, 1]).all()
    assert torch.allclose(torch.bincount(triggers[:, 0]) / 20_000, task.unigram.float(), atol=0.015)
    expected = [sum(p * q / (1 - p) for p in task.unigram if p != q) for q in task.unigram]
    found = torch.bincount(triggers[:, 1]) / 20_000
    assert torch.allclose(found, torch.tensor(expected).float(), atol=0.015)


def test_output_options():
    size = 200
    no_repeat = bigram(TEXT, no_repeat=True).sample(size, 1)
    assert (no_repeat.triggers != no_repeat.outputs).all()
    border = int(0.75 * bigram(TEXT).vocab)
    assert (bigram(TEXT, outputs="train").sample(size, 1).outputs < border).all()
    assert (bigram(TEXT, outputs="test").sample(size, 1).outputs >= border).all()
    task = bigram(TEXT, bigram_outputs=True)
    sample = task.sample(size, 1)
    assert (task.bigram[sample.triggers, sample.outputs] > 0).all()


def test_every_other_output_where_a_character_only_follows_itself():
    task = bigram("abcccc", trigger_count=3, bigram_outputs=True, no_repeat=True)
    sample = task.sample(100, 1)
    assert (sample.triggers != sample.outputs).all()


def test_seed_decides_and_global_state_stays():
    task = bigram(TEXT)
    before = torch.random.get_rng_state()
    first, again, other = (task.sample(4, 20, seed=seed).tokens for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(task.sample(4, 20, generator).tokens, first)
    assert not torch.equal(task.sample(4, 20, generator).tokens, first)
    assert torch.equal(before, torch.random.get_rng_state())


def test_default_text_has_a_small_vocabulary():
    task = bigram()
    assert 60 <= task.vocab <= 70
    assert set("abcdefghijklmnopqrstuvwxyz \n") <= set(task.vocabulary)


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        ("aaa", {}, "text is a text of 3 characters; give a string with at least two different characters."),
        (7, {}, "text is a int; give a string with at least two different characters."),
        ("abc", {}, "trigger_count is 5; give 1 to 3, the number of different characters."),
        (
            "abc" * 5,
            {"trigger_count": 1, "triggers": "some"},
            "triggers is 'some'; give 'fixed' or 'random'.",
        ),
        ("abc", {"trigger_count": 1, "outputs": "x"}, "outputs is 'x'; give 'all', 'train' or 'test'."),
        (
            "abc",
            {"trigger_count": 2, "offset": 2, "triggers": "fixed"},
            "offset is 2; give 0 to 1, so that 2 triggers remain below it in the ranking.",
        ),
        (
            "abc",
            {"trigger_count": 2, "offset": 1},
            "offset is 1, which moves fixed triggers only; give 0 with triggers='random'.",
        ),
        (
            "abc",
            {"trigger_count": 1, "outputs": "test", "bigram_outputs": True},
            "outputs is 'test' together with bigram_outputs; give outputs='all' or bigram_outputs=False.",
        ),
        (
            "abc",
            {"trigger_count": 1, "outputs": "test", "no_repeat": True},
            "outputs is 'test', which leaves 1 of 3 characters as outputs; give a text with more different characters.",
        ),
    ],
)
def test_bad_input_gets_one_sentence(text, options, sentence):
    with pytest.raises(InputError) as caught:
        BigramTask.from_text(text, **options)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0)])
def test_sizes_below_one(sizes):
    with pytest.raises(InputError, match=r"^(batch|length) is 0; give at least 1\.$"):
        bigram(TEXT).sample(*sizes)


@pytest.mark.skipif(
    "METAINT_SHAKESPEARE" not in os.environ, reason="METAINT_SHAKESPEARE names no tiny-Shakespeare file"
)
def test_tiny_shakespeare():
    """Entropies and shares computed from the text of char-rnn; they are not the paper's own numbers."""
    task = bigram(read_text(os.environ["METAINT_SHAKESPEARE"]), triggers="fixed")
    assert task.vocab == 65
    assert int((task.bigram > 0).sum()) == 1403
    assert float(-(task.unigram * task.unigram.log()).sum()) == pytest.approx(3.3128, abs=1e-4)
    entropies = -torch.xlogy(task.bigram, task.bigram).sum(1)
    assert float((task.unigram * entropies).sum()) == pytest.approx(2.4526, abs=1e-3)
    sample = task.sample(2000, 256)
    assert sample.triggers[0].tolist() == [39, 53, 58, 43, 1]
    shares = [float((sample.outs == 0).double().mean()), float((sample.outs >= 2).double().mean())]
    assert shares == pytest.approx([0.685, 0.296], abs=0.015)
