"""What is trained, and on what: losses against their closed forms, weights, sequences."""

import math
from typing import Any

import pytest
import torch

from metaint.labs.autoregression import training
from metaint.labs.autoregression.training import Starts
from metaint.measures.closed_forms import regression_optimum, unitary_loss
from metaint.measures.recurrence import positional_rows
from metaint.toys.linear_attention import linear_attention, regression_step
from tests.labs.autoregression.small_runs import AUGMENTED, HAAR, HEADS, POSITIONAL, REGRESSION, settings


def test_expected_losses_are_those_of_each_start() -> None:
    s = settings(HEADS)
    starts: Any = Starts(s)
    assert starts.a.shape == (3, 3, 3)
    assert not torch.equal(starts.a[0], starts.a[1])
    found = training.expected_losses(s, starts)
    for i, loss in enumerate(found):
        C = starts.b[i].mT @ starts.a[i]
        rows = [unitary_loss(C, starts.P[i, T - 2, :T]) for T in range(2, 6)]
        torch.testing.assert_close(loss, torch.stack(rows).mean())
    best: Any = training.trained(s, starts)
    assert torch.equal(best.a, starts.a[int(found.argmin())])


@pytest.mark.parametrize("setting", ["unitary", "orthogonal"])
def test_even_sequences_have_the_expected_loss(setting: str) -> None:
    s = settings(HEADS, setting=setting, d=4, length=6)
    starts = Starts(s)
    with torch.no_grad():
        for name in "abP":
            getattr(starts, name).mul_(5)
        model, expected = starts.one(1), training.expected_losses(s, starts)[1]
        sample = training.even_sequences(s, 1024)
        torch.testing.assert_close(sample.vectors[:, 3], (sample.matrices @ sample.vectors[:, 2, :, None])[..., 0])
        assert training.objective(s, model, sample).mean().item() == pytest.approx(expected.item(), rel=5e-3)


def test_the_loss_of_positions_is_that_of_the_model_on_its_sequences() -> None:
    s = settings(POSITIONAL)
    starts = Starts(s)
    assert [name for name, _ in starts.named_parameters()] == ["P"]
    with torch.no_grad():
        starts.P.copy_(torch.randn(starts.P.shape, generator=torch.Generator().manual_seed(1)))
        sample = training.draw(s, s.batch, s.seed)
        assert sample[0].angle().max() <= 2 * math.pi * s.length / s.mu
        own = training.objective(s, starts.one(0), sample).mean()
        torch.testing.assert_close(training.expected_losses(s, starts)[0], own, rtol=1e-4, atol=1e-5)


def test_descent_on_positions_in_closed_form() -> None:
    s = settings(POSITIONAL, length=4)
    lags = torch.arange(4, dtype=torch.float64)
    theta = 2 * math.pi * (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    G = (2 * (lags[:, None] - lags)[..., None] * theta / s.mu).cos().mean(-1)
    P = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    ideal = torch.eye(4, dtype=torch.float64)[-1]
    for _ in range(7):
        gap = positional_rows(P) - ideal
        loss = torch.einsum("ti,ij,tj->t", gap, G, gap).mean()
        (gradient,) = torch.autograd.grad(loss, P)
        P = (P - s.learning_rate * gradient).detach().requires_grad_()
    rows, left = training.positional_descent(s, 7)
    torch.testing.assert_close(rows, positional_rows(P).detach(), rtol=1e-6, atol=1e-8)
    gap = rows - ideal
    assert left == pytest.approx(torch.einsum("ti,ij,tj->t", gap, G, gap).mean().item(), rel=1e-6)
    assert training.positional_descent(s, 0)[1] == pytest.approx(1)


@pytest.mark.parametrize(("model", "free"), [("diagonal", 3), ("signed", 3), ("blocks", 9), ("free", 81)])
def test_only_free_weights_are_drawn_and_descend(model: str, free: int) -> None:
    s = settings(AUGMENTED, model=model)
    built = training.build(s)
    training.objective(s, built, training.draw(s, 8, 0)).mean().backward()
    weights = {name: getattr(built.blocks[0].attn, name) for name in ("W_Q", "W_K", "W_V", "W_O")}
    assert all(weight.count_nonzero() == free for weight in weights.values())
    assert all((weight.grad != 0).logical_and(weight == 0).sum() == 0 for weight in weights.values())
    assert weights["W_K"][0, 6:, :3].diagonal().count_nonzero() == 3
    positive = all((weight >= 0).all() for weight in weights.values())
    assert positive == (model == "diagonal")


def test_objectives() -> None:
    model = linear_attention(3)
    s = settings(AUGMENTED)
    sample = training.draw(s, 4, 0)
    errors = (model(sample[0][:, :-1]) - sample[0][:, 1:]).abs().square()
    assert torch.equal(training.objective(s, model, sample), errors[:, 3].mean(-1))
    shared = settings(AUGMENTED, model="shared")
    torch.testing.assert_close(training.objective(shared, model, sample), errors[:, 1:].mean((1, 2)))
    # Longer sequences than the context change nothing.
    longer = training.draw(s, 4, 0, 8)
    torch.testing.assert_close(training.objective(s, model, longer), errors[:, 3].mean(-1))
    haar = settings(HAAR, d=3)
    real = training.draw(haar, 4, 0)
    torch.testing.assert_close(real[0].norm(dim=-1), torch.ones(4, 5))
    expected = (model(real[0][:, :-1]) - real[0][:, 1:]).square().mean((1, 2))
    torch.testing.assert_close(training.objective(haar, model, real), expected)


def test_regression_beside_one_gradient_step() -> None:
    s = settings(REGRESSION)
    eta = regression_optimum(4, 3).eta
    found = training.regression_scan(s, regression_step(3, 4, eta))
    assert float(found["step_size"]) == pytest.approx(eta, rel=1e-4)
    assert float(found["prediction_difference"]) == pytest.approx(0, abs=1e-5)
    assert float(found["sensitivity_cosine"]) == pytest.approx(1, abs=1e-4)
    assert float(found["model_difference"]) == pytest.approx(0, abs=1e-5)
    assert float(found["loss"]) == pytest.approx(regression_optimum(4, 3).loss, rel=0.05)
    # The best step on these sequences is no worse on them, and more steps do better.
    assert float(found["loss_gradient_steps_1"]) <= float(found["loss"]) * 1.01
    assert float(found["loss_gradient_steps_5"]) < float(found["loss_gradient_steps_2"]) < float(found["loss"])
    double = training.regression_scan(s, regression_step(3, 4, 2 * eta))
    assert float(double["step_size"]) == pytest.approx(2 * eta, rel=1e-4)
