"""In-context measures against plain loops in the terms of the reference, ideal and uniform heads, and tiny cases."""

import inspect
import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, strategies as st

from metaint.errors import InputError
from metaint.measures import in_context
from metaint.tasks import bigram, repeated_tokens

BATCH, LENGTH = 12, 40
TEXT = "The quick brown fox jumps over the lazy dog, and she sells sea shells by the shore; how vexing a jazz quiz!"
TASK = bigram(TEXT, trigger_count=4)


def heads(batch=BATCH, length=LENGTH, seed=0, scale=3.0, dtype=torch.float64):
    """A random causal pattern."""
    scores = scale * torch.randn(batch, length, length, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf).softmax(-1)


def uniform_head(batch=BATCH, length=LENGTH):
    return heads(batch, length, scale=0.0)


def one_hot(keys):
    """The pattern that looks at keys[b, t] alone."""
    return torch.nn.functional.one_hot(keys, keys.shape[1]).double()


@pytest.fixture(scope="module")
def sample():
    """Inputs, targets, outs, predictions that are often right, and a pattern for each layer, often right too.

    With this seed one trigger is its own output, so that copies are met too.
    """
    drawn = TASK.sample(BATCH, LENGTH, seed=2)
    x, y = drawn.tokens[:, :-1], drawn.tokens[:, 1:]
    generator = torch.Generator().manual_seed(7)
    predictions = torch.where(torch.rand(x.shape, generator=generator) < 0.5, y, x)
    ideal = torch.rand(x.shape, generator=generator)[:, :, None] < 0.5
    before = (torch.arange(LENGTH) - 1).clamp(min=0).expand(BATCH, -1)
    previous = torch.where(ideal, one_hot(before), heads(seed=1))
    induction = torch.where(ideal.flip(1), one_hot(matched(x).clamp(min=0)), heads(seed=2))
    return x, y, drawn.outs, predictions, previous, induction


def matched(x):
    """The key after the most recent earlier occurrence of each token, -1 if there is none."""
    found = torch.full_like(x, -1)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            found[b, t] = max((s + 1 for s in range(t) if x[b, s] == x[b, t]), default=-1)
    return found


def mean(values):
    return float(values.nanmean())


def average(counts):
    return {name: sum(values) / len(values) for name, values in counts.items()}


# ---- what came before -------------------------------------------------------------------------------------------

TOKENS = st.integers(1, 9).flatmap(
    lambda length: st.lists(st.lists(st.integers(-3, 5), min_size=length, max_size=length), min_size=1, max_size=3)
)


@given(TOKENS)
def test_occurrence_and_follower_are_those_of_a_loop(rows):
    tokens = torch.tensor(rows)
    occurrence = [[row[: t + 1].count(row[t]) for t in range(len(row))] for row in rows]
    assert in_context.occurrence(tokens).tolist() == occurrence
    keys = matched(tokens)
    follower = [[row[k] if k >= 0 else -1 for k in after] for row, after in zip(rows, keys.tolist(), strict=True)]
    assert in_context.follower(tokens).tolist() == follower


def test_a_tiny_text():
    tokens = torch.tensor([list(b"abcab"), list(b"aaxaa")])
    assert in_context.occurrence(tokens).tolist() == [[1, 1, 1, 2, 2], [1, 2, 1, 3, 4]]
    a, b, c, x = b"abcx"
    assert in_context.follower(tokens).tolist() == [[-1, -1, -1, b, c], [-1, a, -1, x, a]]


def test_triggers_come_as_often_as_the_task_says_and_their_follower_is_the_target(sample):
    x, y, outs, *_ = sample
    trigger, known = outs > 0, outs >= 2
    assert known.sum() > 20
    assert (in_context.occurrence(x)[trigger] == outs[trigger]).all()
    assert mean(in_context.accuracy(in_context.follower(x), y, known)) == 1
    assert (in_context.follower(x)[outs == 1] == -1).all()


# ---- what the model predicts ------------------------------------------------------------------------------------


def test_accuracies_are_those_of_the_reference(sample):
    x, y, outs, predictions, *_ = sample
    counts = defaultdict(list)
    for b in range(BATCH):
        for t in range(LENGTH):
            right = float(predictions[b, t] == y[b, t])
            if outs[b, t] >= 1:
                counts["acc_tot"].append(right)
                counts["repeat_frac"].append(float(x[b, t] == y[b, t]))
                if t < 10:
                    counts["acc_start"].append(right)
            if outs[b, t] >= 2:
                counts["acc_end"].append(right)
                if x[b, t] != y[b, t]:
                    counts["without copies"].append(right)
    known = in_context.accuracy(predictions, y, outs >= 2)
    everywhere = in_context.accuracy(predictions, y, outs >= 1)
    found = {
        "acc_tot": mean(everywhere),
        "acc_start": mean(everywhere[:, :10]),
        "acc_end": mean(known[:, -500:]),
        "repeat_frac": mean(in_context.accuracy(x, y, outs >= 1)),
        "without copies": mean(in_context.accuracy(predictions, y, (outs >= 2) & (x != y))),
    }
    assert found == pytest.approx(average(counts), abs=1e-6)
    assert len(set(found.values())) == len(found)  # else this told nothing apart
    assert (known.isnan() == (outs < 2)).all()


def test_every_loss_is_in_one_part(sample):
    outs = sample[2]
    losses = torch.rand(outs.shape, generator=torch.Generator().manual_seed(0))
    parts = in_context.loss_parts(losses, outs)
    stacked = torch.stack(parts)
    assert (stacked.isnan().sum(0) == 2).all()
    torch.testing.assert_close(stacked.nansum(0), losses)
    for part, which in zip(parts, (outs == 0, outs == 1, outs >= 2), strict=True):
        assert mean(part) == pytest.approx(float(losses[which].mean()))


# ---- where the two heads look -----------------------------------------------------------------------------------


def reference_scores(x, y, outs, predictions, previous, induction):
    """Averages of the argmax scores, one position at a time."""
    counts = defaultdict(list)
    for b in range(BATCH):
        for t in range(LENGTH):
            best1, best2 = previous[b].argmax(-1), int(induction[b, t].argmax())
            if outs[b, t] >= 1 and t < LENGTH - 1:
                back = float(best1[t + 1] == t)
                counts["score_acc"].append(back)
                if outs[b, t] == 1:
                    counts["score_start_acc"].append(back)
            if outs[b, t] >= 2:
                counts["score2_next_acc"].append(float(x[b, best2] == y[b, t]))
                counts["pred_attended_acc"].append(float(x[b, best2] == predictions[b, t]))
                counts["score2_acc"].append(float(best2 > 0 and x[b, best2 - 1] == x[b, t]))
                if best2 > 0:
                    counts["score_cond_acc"].append(float(best1[best2] == best2 - 1))
                if x[b, t] == y[b, t]:
                    counts["score2_repeat_val_acc"].append(float(x[b, best2] == y[b, t]))
    return average(counts)


def masses(x, y, outs, predictions, previous, induction):
    """The same with weights in the place of the argmax."""
    counts = defaultdict(list)
    for b in range(BATCH):
        for t in range(LENGTH):
            if t < LENGTH - 1:
                counts["previous everywhere"].append(float(previous[b, t + 1, t]))
                if outs[b, t] >= 1:
                    counts["score_acc"].append(float(previous[b, t + 1, t]))
                    if outs[b, t] == 1:
                        counts["score_start_acc"].append(float(previous[b, t + 1, t]))
            if outs[b, t] >= 2:
                row, keys = induction[b, t], range(t + 1)
                counts["score2_next_acc"].append(sum(float(row[s]) for s in keys if x[b, s] == y[b, t]))
                counts["pred_attended_acc"].append(sum(float(row[s]) for s in keys if x[b, s] == predictions[b, t]))
                counts["score2_acc"].append(sum(float(row[s]) for s in keys if s >= 1 and x[b, s - 1] == x[b, t]))
                counts["score_cond_acc"].append(sum(float(row[s] * previous[b, s, s - 1]) for s in keys if s >= 1))
                if x[b, t] == y[b, t]:
                    counts["score2_repeat_val_acc"].append(sum(float(row[s]) for s in keys if x[b, s] == y[b, t]))
    return average(counts)


def scores(x, y, outs, predictions, previous, induction):
    """The functions under test, by the reference's names."""
    known = outs >= 2
    return {
        "score_acc": in_context.next_attends_back(previous, outs >= 1),
        "score_start_acc": in_context.next_attends_back(previous, outs == 1),
        "score2_next_acc": in_context.attended_is(induction, x, y, known),
        "pred_attended_acc": in_context.attended_is(induction, x, predictions, known),
        "score2_acc": in_context.attended_follows_match(induction, x, known),
        "score_cond_acc": in_context.attended_looked_back(previous, induction, known),
        "score2_repeat_val_acc": in_context.attended_is(induction, x, y, known & (x == y)),
    }


@pytest.mark.parametrize("chunk", [1, 7 * LENGTH, 2**20])
def test_attention_scores_are_those_of_the_reference(sample, monkeypatch, chunk):
    monkeypatch.setattr(in_context, "_CHUNK", chunk)
    found = {name: mean(score.hit) for name, score in scores(*sample).items()}
    assert found == pytest.approx(reference_scores(*sample), abs=1e-12)
    assert len(set(found.values())) == len(found)
    assert all(0.02 < value < 0.98 for value in found.values())


def test_masses_are_those_of_a_loop(sample):
    found = {name: mean(score.mass) for name, score in scores(*sample).items()}
    everywhere = in_context.next_attends_back(sample[4], torch.ones_like(sample[2], dtype=torch.bool))
    found["previous everywhere"] = mean(everywhere.mass)
    assert found == pytest.approx(masses(*sample), abs=1e-12)


def test_values_stand_at_their_positions(sample):
    x, _, outs, _, previous, _ = sample
    known = outs >= 2
    for name, score in scores(*sample).items():
        where = {"score_acc": outs >= 1, "score_start_acc": outs == 1}.get(name, known)
        if name == "score2_repeat_val_acc":
            where = known & (x == sample[1])
        if "score_" in name[:6] and name != "score_cond_acc":
            where = where & (torch.arange(LENGTH) < LENGTH - 1)
        assert (score.mass.isnan() == ~where).all(), name
        assert (score.uniform.isnan() == ~where).all(), name
    back = in_context.next_attends_back(previous, outs >= 1)
    torch.testing.assert_close(back.mass[:, :-1].nan_to_num(), previous.diagonal(-1, 1, 2) * (outs[:, :-1] >= 1))


def test_ideal_heads_score_one(sample):
    x, y, outs, *_ = sample
    previous = one_hot((torch.arange(LENGTH) - 1).clamp(min=0).expand(BATCH, -1))
    induction = one_hot(matched(x).clamp(min=0))
    for name, score in scores(x, y, outs, y, previous, induction).items():
        assert mean(score.hit) == mean(score.mass) == 1, name


def test_uniform_heads_have_the_stated_mass(sample):
    x, y, outs, predictions, *_ = sample
    found = scores(x, y, outs, predictions, uniform_head(), uniform_head())
    for name, score in found.items():
        torch.testing.assert_close(score.mass, score.uniform, equal_nan=True, msg=name)
    wanted = masses(x, y, outs, predictions, uniform_head(), uniform_head())
    assert {name: mean(score.uniform) for name, score in found.items()} == pytest.approx(
        {name: wanted[name] for name in found}, abs=1e-12
    )
    # It depends on the tokens alone, so other patterns have the same.
    for name, score in scores(*sample).items():
        torch.testing.assert_close(score.uniform, found[name].uniform, equal_nan=True, msg=name)


def test_a_key_drawn_at_random_counts_with_the_uniform_chance(sample):
    x, y, outs, *_ = sample
    t = LENGTH - 1
    where = torch.zeros_like(outs, dtype=torch.bool)
    where[:, t] = True
    hits = {"is": [], "follows": []}
    for key in range(t + 1):
        pattern = one_hot(torch.arange(LENGTH).clamp(max=key).expand(BATCH, -1))
        hits["is"].append(in_context.attended_is(pattern, x, y, where).hit)
        hits["follows"].append(in_context.attended_follows_match(pattern, x, where).hit)
    uniform = in_context.attended_is(pattern, x, y, where).uniform
    torch.testing.assert_close(torch.stack(hits["is"]).mean(0), uniform, equal_nan=True)
    uniform = in_context.attended_follows_match(pattern, x, where).uniform
    torch.testing.assert_close(torch.stack(hits["follows"]).mean(0), uniform, equal_nan=True)
    assert 0 < mean(uniform) < 1


def test_the_first_key_wins_a_tie():
    where = torch.tensor([[False, False, True]])
    for tokens, hit in (([0, 1, 1], 0), ([1, 0, 1], 1)):  # the wanted token is 1
        x = torch.tensor([tokens])
        score = in_context.attended_is(uniform_head(1, 3), x, torch.ones_like(x), where)
        assert score.hit[0, 2] == hit
        assert score.mass[0, 2] == pytest.approx(2 / 3)


def test_attending_to_the_first_key_is_a_miss_there_and_undefined_here():
    x = torch.tensor([[5, 5, 5]])  # every key but the first follows a 5
    where = torch.tensor([[False, True, True]])
    pattern = one_hot(torch.tensor([[0, 0, 2]]))
    follows = in_context.attended_follows_match(pattern, x, where)
    assert follows.hit[0, 1:].tolist() == follows.mass[0, 1:].tolist() == [0, 1]
    assert follows.uniform[0, 1:].tolist() == pytest.approx([1 / 2, 2 / 3])
    looked = in_context.attended_looked_back(one_hot(torch.tensor([[0, 0, 1]])), pattern, where)
    assert looked.hit[0, 1].isnan()
    assert looked.hit[0, 2] == 1
    assert looked.mass[0, 1:].tolist() == [0, 1]
    assert looked.uniform[0, 1:].tolist() == pytest.approx([1 / 2 / 2, (1 / 2 + 1 / 3) / 3])


def test_a_head_that_attends_anywhere_is_told_from_one_that_follows_the_match():
    x = torch.tensor([[7, 1, 2, 1, 7]])  # 1 follows the 7, and comes once more
    y = torch.tensor([[1, 2, 1, 7, 1]])
    where = torch.tensor([[False, False, False, False, True]])
    pattern = one_hot(torch.tensor([[0, 0, 0, 0, 3]]))
    assert in_context.attended_is(pattern, x, y, where).hit[0, 4] == 1
    assert in_context.attended_follows_match(pattern, x, where).hit[0, 4] == 0


def test_weight_on_the_future_counts_for_nothing():
    x = torch.tensor([[4, 4, 4]])
    where = torch.ones_like(x, dtype=torch.bool)
    ahead = one_hot(torch.tensor([[2, 2, 2]]))
    for score in (
        in_context.attended_is(ahead, x, x, where),
        in_context.attended_follows_match(ahead, x, where),
    ):
        assert score.hit.tolist() == score.mass.tolist() == [[0, 0, 1]]


def test_a_pattern_that_is_not_a_number_has_no_score(sample):
    x, y, outs, predictions, previous, induction = sample
    broken = torch.full_like(previous, math.nan)
    for name, score in scores(x, y, outs, predictions, broken, broken).items():
        assert score.hit.isnan().all(), name
        assert score.mass.isnan().all(), name
    score = in_context.attended_looked_back(broken, induction, outs >= 2)
    assert score.hit.isnan().all()


def test_names_of_tokens_do_not_matter(sample):
    x, y, outs, predictions, previous, induction = sample
    rename = torch.randperm(TASK.vocab, generator=torch.Generator().manual_seed(5))
    renamed = rename[x], rename[y], outs, rename[predictions], previous, induction
    for name, score in scores(*sample).items():
        torch.testing.assert_close(scores(*renamed)[name], score, equal_nan=True, msg=name)
    assert torch.equal(in_context.occurrence(rename[x]), in_context.occurrence(x))
    before = in_context.follower(x)
    assert torch.equal(in_context.follower(rename[x]), torch.where(before < 0, -1, rename[before]))


def test_batches_can_be_concatenated(sample):
    whole = scores(*sample)
    halves = [scores(*(part[rows] for part in sample)) for rows in (slice(0, 2), slice(2, None))]
    for name, score in whole.items():
        for form, values in score._asdict().items():
            joined = torch.cat([getattr(half[name], form) for half in halves])
            torch.testing.assert_close(joined, values, equal_nan=True, msg=f"{name} {form}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_summed_in_full(sample, dtype):
    *rest, previous, induction = sample
    low = [*rest, previous.to(dtype), induction.to(dtype)]
    exact = scores(*[part.double() if part.is_floating_point() else part for part in low])
    for name, score in scores(*low).items():
        assert score.mass.dtype == score.hit.dtype == score.uniform.dtype == torch.float32
        for found, wanted in zip(score, exact[name], strict=True):
            torch.testing.assert_close(found.double(), wanted, equal_nan=True, rtol=1e-5, atol=1e-6, msg=name)


def test_a_pattern_with_a_gradient_is_only_read(sample):
    *rest, previous, induction = sample
    with_gradient = [*rest, previous.clone().requires_grad_(), induction.clone().requires_grad_()]
    for name, score in scores(*with_gradient).items():
        assert not any(part.requires_grad for part in score), name


# ---- how the loss falls along a sequence ------------------------------------------------------------------------


def test_in_context_learning_score_takes_the_50th_and_the_500th_token():
    losses = torch.zeros(3, 511, dtype=torch.float64)
    losses[:, 49] = torch.tensor([5.0, 6.0, 7.0])
    losses[:, 499] = torch.tensor([4.0, 6.0, 7.5])
    assert in_context.in_context_learning_score(losses).tolist() == [-1, 0, 0.5]
    falling = 3 - 0.7 * torch.arange(1, 101, dtype=torch.float64).log().expand(2, -1)
    slope = in_context.in_context_learning_score(falling, 4, 90) / math.log(90 / 4)
    assert slope.tolist() == pytest.approx([-0.7, -0.7])


@pytest.mark.parametrize("bos", [False, True])
def test_repeat_losses_leave_out_the_first_token_of_each_copy(bos):
    block, vocab = 5, 30
    tokens = repeated_tokens(vocab, block, batch=4, bos=0 if bos else None)
    values = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses = values[:, 1:]  # that of token t + 1 at t, so values[:, p] is that of token p
    found = in_context.repeat_losses(losses, block, bos)
    for b in range(4):
        copies = [], []
        for p in range(tokens.shape[1]):
            place = p - bos
            if place >= 0 and place % block > 0:
                copies[place // block].append(float(values[b, p]))
        first, second = (sum(copy) / len(copy) for copy in copies)
        assert float(found.first[b]) == pytest.approx(first)
        assert float(found.second[b]) == pytest.approx(second)
        assert float(found.drop[b]) == pytest.approx(first - second)


def test_an_ideal_induction_head_loses_nothing_in_the_second_copy():
    tokens = repeated_tokens(50, 8, batch=3)
    known = in_context.follower(tokens[:, :-1]) == tokens[:, 1:]
    losses = torch.where(known, 0.0, math.log(50))
    found = in_context.repeat_losses(losses, 8, False)
    assert found.second.tolist() == [0, 0, 0]
    assert found.first.tolist() == pytest.approx([math.log(50)] * 3)
    assert (losses == 0).sum() == 3 * 7


# ---- what bad input gets ----------------------------------------------------------------------------------------

GRID = torch.zeros(2, 4, dtype=torch.long)
MASK = GRID == 0
SQUARE = torch.zeros(2, 4, 4)


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("accuracy", (GRID[:, :3], GRID, MASK), r"predictions is \[2, 3\] beside \[2, 4\]"),
        ("accuracy", (GRID, GRID, GRID), "where holds torch.int64: give one Boolean a position"),
        ("accuracy", (GRID[0], GRID[0], MASK[0]), r"where is \[4\]"),
        ("loss_parts", (SQUARE[0], GRID), r"losses is \[4, 4\] beside \[2, 4\]"),
        ("next_attends_back", (SQUARE[:, None], MASK), r"pattern is \[2, 1, 4, 4\]: give one head's"),
        ("next_attends_back", (SQUARE[:, :3], MASK[:, :3]), r"pattern is \[2, 3, 4\]"),
        ("attended_is", (SQUARE, GRID, GRID[:1], MASK), r"wanted is \[1, 4\] beside \[2, 4\]"),
        ("attended_is", (SQUARE, GRID, GRID, GRID), "where holds torch.int64"),
        ("attended_follows_match", (SQUARE, GRID[:, 1:], MASK), r"tokens is \[2, 3\] beside \[2, 4\]"),
        ("attended_looked_back", (SQUARE[:1], SQUARE, MASK), r"previous is \[1, 4, 4\] and pattern \[2, 4, 4\]"),
        ("in_context_learning_score", (torch.zeros(1, 499),), "give sequences of at least 501 tokens"),
        ("in_context_learning_score", (torch.zeros(1, 9), 0, 5), "early is 0 and late 5"),
        ("in_context_learning_score", (torch.zeros(1, 9), 5, 5), "early is 5 and late 5"),
        (
            "repeat_losses",
            (torch.zeros(1, 9), 5, True),
            "two copies of a block of 5 tokens with a BOS in front have 10",
        ),
        ("repeat_losses", (torch.zeros(1, 10), 5, False), "two copies of a block of 5 tokens without a BOS have 9"),
        ("repeat_losses", (torch.zeros(1, 1), 1, False), "block is 1: give at least 2"),
    ],
)
def test_bad_input_gets_a_sentence(name, arguments, sentence):
    # Unwrapped, since the shapes that tests have checked would speak first.
    with pytest.raises(InputError, match=sentence):
        inspect.unwrap(getattr(in_context, name))(*arguments)
