"""What `BigramTask.sample` draws: against a plain generator, by its statistics, and by its rules on any chain."""

import random
import tracemalloc
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st

from metaint.errors import InputError
from metaint.tasks import BigramTask, bigram, bigram_draws
from tests.tasks.chains import TEXT, shakespeare


def plain_sequence(task: BigramTask, length: int, rng: random.Random) -> list[list[int]]:
    """Tokens, outs, triggers and outputs of one sequence, drawn token by token from the definition."""
    shares, rows = task.unigram.tolist(), task.bigram.tolist()
    ids = [i for i, share in enumerate(shares) if share > 0]
    triggers = sorted(ids, key=lambda i: shares[i])[len(ids) - task.offset - task.trigger_count :][: task.trigger_count]
    if task.triggers == "random":
        triggers, left = [], list(ids)
        for _ in range(task.trigger_count):
            triggers += rng.choices(left, [shares[i] for i in left])
            left.remove(triggers[-1])
    border = int(0.75 * len(ids))
    pool = {"all": ids, "train": ids[:border], "test": ids[border:]}[task.outputs]
    rule = {}
    for trigger in triggers:
        allowed = [o for o in pool if not (task.no_repeat and o == trigger)]
        weights = [rows[trigger][o] if task.bigram_outputs else 1.0 for o in allowed]
        rule[trigger] = rng.choices(allowed, weights if sum(weights) else None)[0]
    tokens = rng.choices(range(task.vocab), shares)
    outs, seen = [], dict.fromkeys(triggers, 0)
    for _ in range(length):
        last = tokens[-1]
        if last in rule:
            seen[last] += 1
        outs.append(seen.get(last, 0))
        tokens.append(rule[last] if last in rule else rng.choices(range(task.vocab), rows[last])[0])
    return [tokens, outs, triggers, [rule[trigger] for trigger in triggers]]


def statistics(task: BigramTask, tokens, outs, triggers, outputs) -> torch.Tensor:
    """Per sequence: shares of each id among tokens, triggers and outputs, of outs 0, 1, 2+, and of a token or an
    output equal to what comes before it."""
    shares = [torch.nn.functional.one_hot(x, task.vocab).double().mean(1) for x in (tokens, triggers, outputs)]
    kinds = torch.stack([outs == 0, outs == 1, outs >= 2, tokens[:, 1:] == tokens[:, :-1]], -1).double().mean(1)
    return torch.cat([*shares, kinds, (triggers == outputs).double().mean(1, keepdim=True)], dim=1)


def assert_like_plain(task: BigramTask, batch: int = 700, length: int = 30) -> None:
    """The statistics of `sample` are those of the plain generator, up to 4.5 standard errors."""
    rng = random.Random(2)
    pairs = [plain_sequence(task, length, rng) for _ in range(batch)]
    plain = statistics(task, *(torch.tensor([pair[i] for pair in pairs]) for i in range(4)))
    here = statistics(task, *task.sample(10 * batch, length, seed=1))
    error = ((here.var(0) / 10 + plain.var(0)) / batch).sqrt()
    assert ((here.mean(0) - plain.mean(0)).abs() <= 4.5 * error + 1e-9).all()


@pytest.mark.parametrize(
    "options",
    [
        {"triggers": "fixed"},
        {"triggers": "fixed", "offset": 2, "no_repeat": True},
        {"triggers": "fixed", "bigram_outputs": True},
        {},
        {"no_repeat": True},
        {"bigram_outputs": True, "no_repeat": True},
        {"outputs": "train"},
        {"outputs": "test", "no_repeat": True},
    ],
    ids=str,
)
def test_every_option_equals_a_plain_generator(options):
    assert_like_plain(bigram(TEXT, trigger_count=3, **options))


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


def chain_statistics(task: BigramTask, batch: int) -> list[float]:
    """Shares of `outs` 0, 1 and 2+ in 256 positions, the cross entropy of the chain itself where `outs` is 0, sequences
    that end in one token for ever, and copies of the current token where `outs` is 2+."""
    sample = task.sample(batch, 256)
    inputs, targets = sample.tokens[:, :-1], sample.tokens[:, 1:]
    free, known = sample.outs == 0, sample.outs >= 2
    shares = [float(part.double().mean()) for part in (free, sample.outs == 1, known)]
    loss = float(-task.bigram[inputs[free], targets[free]].log().mean())
    constant = (sample.triggers == sample.outputs) & (sample.triggers == sample.tokens[:, -1:])
    return [*shares, loss, float(constant.any(1).double().mean()), float((inputs == targets)[known].double().mean())]


@pytest.mark.parametrize(
    ("count", "triggers", "expected"),
    [
        (1, "fixed", [0.844, 0.004, 0.153, 2.265, 0.016, 0.104]),
        (1, "random", [0.933, 0.004, 0.063, 2.403, 0.015, 0.208]),
        (3, "fixed", [0.760, 0.011, 0.229, 2.217, 0.044, 0.179]),
        (3, "random", [0.831, 0.011, 0.159, 2.325, 0.042, 0.232]),
        (5, "fixed", [0.685, 0.019, 0.296, 2.136, 0.078, 0.237]),
        (5, "random", [0.748, 0.018, 0.234, 2.252, 0.071, 0.267]),
    ],
)
def test_statistics_of_tiny_shakespeare(count, triggers, expected):
    """Against another generator's 4000 sequences. Of their copies most lie in the few constant sequences, which leaves
    a standard error of 0.01 to 0.02 on either side."""
    found = chain_statistics(shakespeare(trigger_count=count, triggers=triggers), 4000)
    assert found[:5] == pytest.approx(expected[:5], abs=0.01)
    assert found[5] == pytest.approx(expected[5], abs=0.04)


def test_statistics_of_one_fixed_trigger_exactly():
    """By the distribution of every position, for each of the 65 outputs in turn."""
    task = shakespeare(triggers="fixed", trigger_count=1)
    trigger, rows = int(task.fixed_triggers), task.bigram
    ruled = rows.repeat(65, 1, 1)
    ruled[:, trigger] = torch.eye(65)
    at = never = task.unigram.repeat(65, 1)
    visits, losses, missed = torch.zeros(65).double(), torch.zeros(65).double(), torch.zeros(65).double()
    elsewhere = torch.arange(65) != trigger
    entropies = -torch.xlogy(rows, rows).sum(1) * elsewhere
    for _ in range(256):
        visits, losses = visits + at[:, trigger], losses + at @ entropies
        at, never = (at[:, None] @ ruled)[:, 0], never * elsewhere
        missed, never = never.sum(1), never @ rows
    met = 1 - missed
    expected = [1 - visits.mean() / 256, met.mean() / 256, (visits - met).mean() / 256]
    expected += [losses.sum() / (256 - visits).sum(), at[trigger, trigger] / 65]
    expected += [(visits - met)[trigger] / (visits - met).sum()]
    # 4.5 standard errors at 20,000 sequences.
    errors = [0.004, 0.0001, 0.004, 0.007, 0.004, 0.024]
    for found, exact, error in zip(chain_statistics(task, 20_000), expected, errors, strict=True):
        assert abs(found - exact) < error


def test_ids_without_followers():
    """They go on by the unigram distribution, also as triggers that draw their output from their own row."""
    unigram = torch.tensor([4.0, 0.0, 3.0, 2.0, 1.0])
    chain = torch.zeros(5, 5)
    chain[0, 2], chain[0, 3], chain[3, 3], chain[3, 4] = 0.2, 0.6, 0.5, 1.5
    task = BigramTask.from_counts(unigram, chain, trigger_count=2, bigram_outputs=True, no_repeat=True)
    for row in (1, 2, 4):
        assert torch.equal(task.bigram[row], task.unigram)
    entropies = -torch.xlogy(task.bigram, task.bigram).sum(1)
    assert task.bigram_entropy == pytest.approx(float(task.unigram @ entropies))
    assert_like_plain(task)


CHAINS = st.integers(2, 7).flatmap(
    lambda vocab: st.tuples(
        st.lists(st.integers(0, vocab - 1), min_size=2, max_size=30).filter(lambda ids: len(set(ids)) > 1),
        st.integers(vocab, vocab + 3),
        st.integers(1, 7),
    )
)


@settings(deadline=None, max_examples=60)
@given(CHAINS, st.sampled_from(["fixed", "random"]), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_any_chain_keeps_its_rules(chain, triggers, bigram_outputs, no_repeat, seed):
    ids, vocab, count = chain
    options = {"triggers": triggers, "bigram_outputs": bigram_outputs, "no_repeat": no_repeat}
    task = BigramTask.from_tokens(ids, vocab, trigger_count=min(count, len(set(ids))), **options)
    assert torch.allclose(task.bigram.sum(1), torch.ones(vocab).double())
    sample = task.sample(8, 12, seed)
    assert set(sample.tokens.flatten().tolist()) <= set(ids)
    assert set(sample.outputs.flatten().tolist()) <= set(ids)
    if no_repeat:
        assert (sample.triggers != sample.outputs).all()
    for tokens, outs, keys, values in zip(*(part.tolist() for part in sample), strict=True):
        rule = dict(zip(keys, values, strict=True))
        assert len(rule) == task.trigger_count
        assert set(keys) <= set(ids)
        for time, (token, following) in enumerate(pairwise(tokens)):
            assert outs[time] == (tokens[: time + 1].count(token) if token in rule else 0)
            assert following == rule[token] if token in rule else task.bigram[token, following] > 0


def test_the_rarest_id_can_be_drawn():
    unigram = torch.tensor([1.0, 1e-30, 1.0, 1e-300], dtype=torch.float64)
    task = BigramTask.from_counts(unigram, torch.ones(4, 4), trigger_count=4)
    assert (task.sample(50, 1).triggers.sort(1).values == torch.arange(4)).all()


def test_large_vocabulary():
    """40,000 ids, of which about 21,000 occur: little memory, and no other id comes."""
    shares = 1 / torch.arange(1, 40_001).double()
    shares[::2] = 0
    ids = torch.multinomial(shares, 300_000, True, generator=torch.Generator().manual_seed(0))
    occurring = ids.unique()
    task = BigramTask.from_tokens(ids, vocab=40_000, bigram_outputs=True, no_repeat=True)
    tracemalloc.start()
    try:
        sample = task.sample(256, 64)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 256 * 40_000 * 8
    assert torch.isin(sample.tokens, occurring).all()
    assert torch.isin(sample.triggers, occurring).all()
    assert (sample.triggers != sample.outputs).all()
    first, second = (part[sample.outs == 0] for part in (sample.tokens[:, :-1], sample.tokens[:, 1:]))
    assert torch.isin(first * task.vocab + second, task.pairs[0] * task.vocab + task.pairs[1]).all()
    with pytest.raises(InputError, match=r"^vocab is 40000, too large for a matrix \[vocab, vocab\]: read pairs"):
        _ = task.bigram


@pytest.mark.parametrize("task", [shakespeare(), BigramTask.from_tokens(torch.arange(20_000).repeat(2) % 17_001)])
def test_cells_have_the_size_of_their_probability(task):
    cells, rows = task._draws.cells, task.vocab
    share = torch.from_numpy(cells.end - cells.low) / bigram_draws.UNITS
    expected = torch.cat([task.weights, task.unigram[task.unigram > 0], torch.full((rows,), 1 / rows).double()])
    torch.testing.assert_close(share.double(), expected, rtol=1e-6, atol=1e-9)
    assert (cells.end[1:] > cells.end[:-1]).all()
    assert (cells.at(cells.low) == cells.id).all()
    assert (cells.at(cells.end - 1) == cells.id).all()


@pytest.mark.parametrize(("name", "value"), [("_BUDGET", 8), ("_GUIDE", 1)])
def test_samples_do_not_depend_on_the_way(monkeypatch, name, value):
    """In slices of the batch, or with every token searched for."""
    expected = bigram(TEXT).sample(30, 40, seed=5)
    monkeypatch.setattr(bigram_draws, name, value)
    for found, part in zip(bigram(TEXT).sample(30, 40, seed=5), expected, strict=True):
        assert torch.equal(found, part)
