"""Linear decodability, against normal equations and known cases."""

import pytest
import torch

from metaint.errors import InputError
from metaint.measures import autoregression
from metaint.measures.decodability import decodability
from metaint.tasks import autoregressive


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_targets_that_are_linear_in_features_are_read_whatever_the_scale():
    features, map_, shift = draw(200, 6), draw(6, 3, seed=1), draw(3, seed=2)
    targets = features @ map_ + 5 * shift
    found = decodability(features, targets)
    assert found.r2 > 1 - 1e-9
    noisy = targets + 0.5 * draw(200, 3, seed=3)
    usual = decodability(features, noisy)
    expected = 1 - 0.25 / (map_.square().sum(0) + 0.25)
    torch.testing.assert_close(usual.per_target, expected, rtol=0, atol=0.06)
    scaled = decodability(1000 * features - 30, 0.01 * noisy)
    assert scaled.penalty == usual.penalty
    torch.testing.assert_close(scaled.per_target, usual.per_target)


def test_features_that_know_nothing_tell_nothing():
    found = decodability(draw(300, 20), draw(300, 4, seed=1))
    assert -0.1 < found.r2 < 0.05
    assert found.penalty == 100


def plain_ridge(x, y, penalty, at):
    """By normal equations, with a free intercept."""
    centred, mean = x - x.mean(0), y.mean(0)
    strength = penalty * centred.square().sum() / x.shape[1]
    gram = centred.mT @ centred + strength * torch.eye(x.shape[1], dtype=x.dtype)
    return (at - x.mean(0)) @ torch.linalg.solve(gram, centred.mT @ (y - mean)) + mean


def plain_r2(guess, y):
    return 1 - (y - guess).square().sum(0) / (y - y.mean(0)).square().sum(0)


def test_ridge_is_the_solution_of_its_normal_equations():
    x, y = draw(50, 70), draw(50, 2, seed=1)
    found = decodability(x, y, penalty=0.3, seed=4)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(4))
    fit, test = order[:40], order[40:]
    plain = plain_r2(plain_ridge(x[fit], y[fit], 0.3, x[test]), y[test])
    torch.testing.assert_close(found.per_target, plain)
    assert found.r2 == pytest.approx(float(plain.mean()))
    assert found.penalty == 0.3


def test_the_penalty_is_the_one_that_a_fifth_left_out_prefers():
    x = draw(120, 70)
    y = x[:, :2] + draw(120, 2, seed=1)
    found = decodability(x, y, seed=4)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(4))
    fit, validation, test = order[:72], order[72:96], order[96:]
    penalties = [10.0**power for power in range(-8, 3)]
    errors = [
        (plain_ridge(x[fit], y[fit], penalty, x[validation]) - y[validation]).square().sum() for penalty in penalties
    ]
    best = penalties[int(torch.stack(errors).argmin())]
    assert found.penalty == best
    assert 1e-3 < best < 100
    torch.testing.assert_close(found.per_target, plain_r2(plain_ridge(x[fit], y[fit], best, x[test]), y[test]))
    assert found.r2 > decodability(x, y, penalty=1e-8, seed=4).r2


def test_targets_that_do_not_vary_are_left_out():
    features = draw(50, 3)
    targets = torch.cat([features[:, :1], torch.full((50, 1), 0.1), torch.zeros(50, 1)], 1)
    found = decodability(features, targets)
    assert found.per_target.isnan().tolist() == [False, True, True]
    assert found.r2 == pytest.approx(1, abs=1e-9)


def test_an_estimate_of_w_is_read_better_than_the_raw_context():
    vectors, matrices = autoregressive("haar", 3, 4, 600, dtype=torch.float64)
    targets = matrices.flatten(1)
    raw = decodability(vectors.flatten(1), targets)
    step = decodability(autoregression.moments(vectors).cross[:, -1].flatten(1), targets)
    exact = decodability(autoregression.least_squares(vectors)[:, -1].flatten(1), targets)
    assert 0 < raw.r2 < step.r2 < exact.r2
    assert exact.r2 > 1 - 1e-6


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((draw(9, 2), draw(9, 2)), "features has 9 sequences and targets 9: give 10 or more of each."),
        (
            (draw(20, 2), draw(20, 2), 0),
            "penalty is 0: give a positive number, or None to choose one.",
        ),
        (
            (draw(20, 2) / 0, draw(20, 2)),
            "features or targets hold NaN or infinity, to which nothing can be fitted: give finite ones.",
        ),
    ],
)
def test_what_cannot_be_decoded_gets_one_sentence(arguments, sentence):
    with pytest.raises(InputError) as caught:
        decodability(*arguments)
    assert str(caught.value) == sentence
