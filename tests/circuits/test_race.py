"""The race: what counts wins, what is dropped is estimated, and little is run on everything."""

import math

import pytest
import torch

import metaint
from metaint.circuits import race as racing
from metaint.circuits.race import Outcome, Rules, race, upper_bound
from metaint.tasks import repeated_tokens
from tests.circuits.planted import circuit_model
from tests.planted import VOCAB


class Field:
    """So many things of known shares, noisy from sequence to sequence; tells what was measured."""

    def __init__(self, shares, sequences=16, noise=0.002, seed=0):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(len(shares), sequences, generator=generator, dtype=torch.float64)
        self.shares = torch.tensor(shares, dtype=torch.float64)
        self.total = torch.full((sequences,), 5.0, dtype=torch.float64)
        self.changes = 5 * (self.shares[:, None] + noise * drawn)
        self.counts = [0] * len(shares)

    def measure(self, numbers, upto):
        for i in numbers:
            self.counts[i] = max(self.counts[i], upto)
        return self.changes[list(numbers), :upto]

    def race(self, always=(), **rules):
        return race(self.measure, len(self.shares), always, self.total, Rules(**{"threshold": 0.02, **rules}))


STRONG = [0.6, 0.2, 0.1, 0.05, 0.03]
FIELD = [*STRONG, *[0.0] * 95]


def test_the_strong_go_to_the_end_and_the_others_do_not():
    field = Field(FIELD)
    outcome = field.race(always=[50])
    assert field.counts[:5] == [16] * 5
    assert field.counts[50] == 16
    assert set(outcome.below) == set(range(5, 100)) - {50}
    assert len(outcome.sampled) == 40
    unseen = set(outcome.below) - set(outcome.sampled)
    assert {field.counts[i] for i in unseen} == {2}
    assert {field.counts[i] for i in outcome.sampled} == {4}
    assert outcome.counted == []
    assert outcome.sentence("parts") == "of 40 parts out of 94 below the line, none counts (at most 7 %)"


def test_everything_on_everything_without_a_race_and_where_there_are_few():
    for field, rules in ((Field(FIELD), {"on": False}), (Field(FIELD[: racing.FEW]), {})):
        outcome = field.race(**rules)
        assert set(field.counts) == {16}
        assert outcome == Outcome()
        assert outcome.sentence("parts") == ""


def test_close_to_the_line_more_sequences_decide():
    field = Field([0.021, 0.019, *[0.0] * 98], noise=0.01)
    field.race(sample=0)
    assert field.counts[:2] == [16, 16]


def test_what_is_precise_enough_is_left_at_that():
    field = Field(FIELD)
    field.race(precision=0.01, sample=0)
    assert field.counts[:5] == [8] * 5
    field = Field([0.6, *[0.0] * 99], noise=0.2)
    field.race(precision=0.01, sample=0)
    assert field.counts[0] == 16


def test_as_many_as_are_wanted():
    field = Field([*[0.5] * 4, *[0.1] * 46, *[0.0] * 50])
    outcome = field.race(most=4, sample=0)
    assert set(outcome.weaker) == set(range(4, 50))
    assert set(outcome.below) == set(range(50, 100))
    assert {field.counts[i] for i in range(4, 50)} == {4}


def test_what_is_not_a_number_goes_on():
    field = Field(FIELD)
    field.changes[7, :3] = math.nan
    field.changes[8] = math.nan
    field.race(sample=0)
    assert field.counts[7] > 2
    assert field.counts[8] == 16


def test_what_the_race_missed_is_estimated():
    """Parts that look like nothing on the first sequences and count on the others: the sample finds its share of
    them."""
    hidden = range(10, 40)
    field = Field([0.0] * 110)
    field.changes[list(hidden), 2:] = 5.0
    outcome = field.race()
    assert set(hidden) <= set(outcome.below)
    assert outcome.counted == sorted(set(outcome.sampled) & set(hidden))
    assert 30 / 110 <= outcome.missed < 1
    assert f"{len(outcome.counted)} count (at most " in outcome.sentence("parts")


def test_the_bound_holds_as_often_as_it_says():
    """Of many samples from a fraction known, the bound lies below it in 5 % at most."""
    draws = torch.distributions.Binomial(40, torch.tensor(0.1)).sample((4000,)).long().tolist()
    bounds = {k: upper_bound(k, 40) for k in set(draws)}
    assert sum(bounds[k] < 0.1 for k in draws) / len(draws) < 0.06


@pytest.mark.parametrize("trials", [1, 20, 40])
def test_the_bound_without_a_success_is_closed(trials):
    assert upper_bound(0, trials) == pytest.approx(1 - 0.05 ** (1 / trials), abs=1e-12)
    assert upper_bound(trials, trials) == 1
    bound = upper_bound(1, 40)
    assert (1 - bound) ** 40 + 40 * bound * (1 - bound) ** 39 == pytest.approx(0.05, abs=1e-12)


def test_a_sample_of_all_leaves_nothing_unknown():
    field = Field(FIELD)
    outcome = field.race(sample=1000)
    assert outcome.missed == 0
    assert outcome.sentence("parts") == "all 95 parts below the line were measured until it was plain, and none counts"


# ---- ablate ------------------------------------------------------------------------------------------------------


def test_ablate_races_to_the_same_effects(monkeypatch, capsys):
    """Those that count are measured on all sequences, as without a race; others on few, and are small."""
    monkeypatch.setattr(racing, "FEW", 1)
    model, tokens = circuit_model(), repeated_tokens(VOCAB, 20, batch=16)
    exact = metaint.ablate(model, tokens, how="mean")
    raced = metaint.ablate(model, tokens, how="mean", race=True, progress=True)
    for head in ((0, 0), (1, 0)):
        for name in ("effect", "effect_low", "effect_high"):
            assert float(raced[name][head]) == pytest.approx(float(exact[name][head]), abs=1e-5)
    small = exact["effect"] < 0.02 * exact["effect"].max()
    assert int(small.sum()) > 8
    assert float(raced["effect"].where(small).max()) < 0.05 * float(exact["effect"].max())
    assert raced.attrs["race"].endswith("none counts")
    assert "race" not in exact.attrs
    assert "most so far: 0.0 " in (told := capsys.readouterr().err) or "most so far: 1.0 " in told
