"""Reference algorithms against plain loops and autograd."""

import math

import pytest
import torch

from metaint.errors import InputError
from metaint.measures import autoregression
from metaint.tasks import autoregressive, regression

EXACT = {"rtol": 0, "atol": 1e-12}
PROCESSES = [("haar", torch.float64), ("orthogonal", torch.float64), ("unitary", torch.complex128)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def standard_error(values):
    return float(values.std() / math.sqrt(len(values)))


def transitions_of(sequence, context):
    """The pairs (s_{t-1}, s_t), t = 2..T, where s_t is `sequence[t - 1]`."""
    return [(sequence[t - 2], sequence[t - 1]) for t in range(2, context + 1)]


def plain_descent(sequence, context, eta, steps):
    """Gradient descent on L by autograd, whose gradient of a complex W is dL/dRe + i dL/dIm."""
    d = sequence.shape[-1]
    W = torch.zeros(d, d, dtype=sequence.dtype)
    for _ in range(steps):
        W = W.detach().requires_grad_()
        losses = [(now - W @ before).abs().square().sum() / 2 for before, now in transitions_of(sequence, context)]
        if losses:
            W = W - eta * torch.autograd.grad(torch.stack(losses).sum(), W)[0]
    return W.detach()


@pytest.mark.parametrize(("kind", "dtype"), PROCESSES)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_descent_is_autograd_s_for_every_context(kind, dtype, steps):
    vectors = autoregressive(kind, 4, 7, 2, dtype=dtype, noise=0.1).vectors
    eta = autoregression.step_sizes(0.3, 7)
    found = autoregression.gradient_descent(vectors, eta, steps)
    same = autoregression.gradient_descent(vectors, 0.05, steps)
    for row in range(2):
        for context in range(1, 8):
            scale = 0.3 / (context - 1) if context > 1 else 0.0
            torch.testing.assert_close(
                found[row, context - 1], plain_descent(vectors[row], context, scale, steps), **EXACT
            )
            torch.testing.assert_close(
                same[row, context - 1], plain_descent(vectors[row], context, 0.05, steps), **EXACT
            )


def test_descent_has_a_derivative_in_its_step_sizes():
    vectors = autoregressive("haar", 3, 6, 2, dtype=torch.float64).vectors
    eta = autoregression.step_sizes(0.3, 6).requires_grad_()

    def total(eta):
        found = autoregression.gradient_descent(vectors, eta, 2)
        return autoregression.squared_error(autoregression.predictions(found, vectors), vectors).sum()

    assert torch.autograd.gradcheck(total, eta)


@pytest.mark.parametrize(("kind", "dtype"), PROCESSES)
def test_least_squares_is_lstsq_s_for_every_context(kind, dtype):
    vectors = autoregressive(kind, 4, 9, 3, dtype=dtype, noise=0.1).vectors
    found = autoregression.least_squares(vectors)
    assert not found[:, 0].abs().any()
    for row in range(3):
        for context in range(2, 10):
            past, later = (torch.stack(side) for side in zip(*transitions_of(vectors[row], context), strict=True))
            plain = torch.linalg.lstsq(past, later, driver="gelsd").solution.mT
            torch.testing.assert_close(found[row, context - 1], plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "dtype"), PROCESSES)
def test_least_squares_is_exact_once_the_context_spans_the_space(kind, dtype):
    vectors, matrices = autoregressive(kind, 4, 9, 3, dtype=dtype)
    found = autoregression.least_squares(vectors)
    torch.testing.assert_close(found[:, 4:], matrices[:, None].expand(-1, 5, -1, -1), rtol=0, atol=1e-8)


def test_least_squares_sends_what_was_not_seen_to_zero_and_is_what_descent_goes_to():
    vectors = autoregressive("haar", 5, 4, 2, dtype=torch.float64).vectors
    found = autoregression.least_squares(vectors)[:, -1]
    unseen = torch.linalg.qr(vectors[:, :3].mT, mode="complete").Q[..., 3:]
    torch.testing.assert_close(found @ unseen, torch.zeros_like(unseen), **EXACT)
    descended = autoregression.gradient_descent(vectors, 0.06, 20000)[:, -1]
    torch.testing.assert_close(descended, found, rtol=0, atol=1e-6)


def test_repeated_vectors_do_not_blow_up_least_squares():
    vectors = torch.ones(1, 5, 3, dtype=torch.float64)
    found = autoregression.least_squares(vectors)
    torch.testing.assert_close(found[:, 1:], torch.full_like(found[:, 1:], 1 / 3), **EXACT)
    vectors[0, 2, 1] = torch.nan
    with pytest.raises(InputError, match=r"^vectors hold NaN or infinity, to which nothing can be fitted"):
        autoregression.least_squares(vectors)


@pytest.mark.parametrize(("kind", "dtype"), PROCESSES)
def test_predictions_and_errors_have_their_place(kind, dtype):
    vectors, matrices = autoregressive(kind, 4, 6, 2, dtype=dtype)
    perfect = matrices[:, None].expand(-1, 6, -1, -1)
    predicted = autoregression.predictions(perfect, vectors)
    torch.testing.assert_close(predicted[:, :-1], vectors[:, 1:], **EXACT)
    error = autoregression.squared_error(predicted, vectors)
    torch.testing.assert_close(error, torch.zeros(2, 5, dtype=torch.float64), **EXACT)
    for name, scale in (("zero", 0), ("persistence", 1)):
        error = autoregression.squared_error(autoregression.baselines(vectors)[name], vectors)
        plain = [
            [sum(abs(then[i] - scale * now[i]) ** 2 for i in range(4)) / 4 for now, then in transitions_of(row, 6)]
            for row in vectors
        ]
        torch.testing.assert_close(error, torch.tensor(plain, dtype=torch.float64))


def test_extrapolation_is_exact_on_a_line_from_zero():
    line = torch.arange(1, 6, dtype=torch.float64)[None, :, None] * draw(1, 1, 3)
    guess = autoregression.baselines(line)["extrapolation"]
    torch.testing.assert_close(guess[:, :-1], line[:, 1:], **EXACT)


def test_regression_descent_is_autograd_s_and_least_squares_lstsq_s():
    sample = regression(3, 5, 2, dtype=torch.float64)
    for eta, steps in ((4.0, 1), (2.5, 3)):
        found = autoregression.regression_descent(sample.inputs, sample.outputs, eta, steps)
        for x, y, w_found in zip(sample.inputs, sample.outputs, found, strict=True):
            w = torch.zeros(3, dtype=torch.float64)
            for _ in range(steps):
                w = w.detach().requires_grad_()
                w = w - eta * torch.autograd.grad(((x @ w - y) ** 2).mean() / 2, w)[0]
            torch.testing.assert_close(w_found, w.detach(), **EXACT)
    exact = autoregression.regression_least_squares(sample.inputs, sample.outputs)
    torch.testing.assert_close(exact, sample.weights, rtol=0, atol=1e-9)
    x, y = sample.inputs[:, :2], sample.outputs[:, :2] + 1
    fewer = autoregression.regression_least_squares(x, y)
    torch.testing.assert_close(fewer, torch.linalg.lstsq(x, y, driver="gelsd").solution, rtol=0, atol=1e-10)


def test_rollout_error_is_that_of_the_fit_rolled_out():
    windows = draw(6, 5, 3)
    windows[0, 3] = windows[0, 0]
    found = autoregression.rollout_error(windows)
    for window, error in zip(windows, found, strict=True):
        past, later = window[:-1], window[1:]
        W = torch.linalg.lstsq(past, later, driver="gelsd").solution.mT
        rolled = [torch.linalg.matrix_power(W, power) @ window[0] for power in range(5)]
        torch.testing.assert_close(error, (torch.stack(rolled) - window).square().mean())


def test_windows_roll_out_exactly_unless_a_token_comes_twice():
    windows = draw(2, 5, 40)
    windows[1, 3] = windows[1, 1]  # followed by two different vectors
    exact, off = autoregression.rollout_error(windows).tolist()
    assert exact < 1e-12
    assert off > 1e-3


def test_baselines_of_haar_sequences_have_the_losses_of_the_released_setting():
    """d = 5, 50 positions, length 1, averaged over positions, coordinates and sequences: known exactly, or from notes.

    1/d, 2/d, and per position (6 + 2/d)/d after (5)/d; least squares (1 - (T-1)/d)/d until T > d.
    """
    vectors = autoregressive("haar", 5, 51, 4000, first="unit", dtype=torch.float64).vectors
    expected = {"zero": 0.2, "persistence": 0.4, "extrapolation": (1.0 + 49 * 1.28) / 50}
    for name, predicted in autoregression.baselines(vectors).items():
        error = autoregression.squared_error(predicted, vectors).mean(1)
        assert error.mean() == pytest.approx(expected[name], abs=4 * standard_error(error) + 1e-12)
    short = vectors[:, :9]
    error = autoregression.squared_error(autoregression.predictions(autoregression.least_squares(short), short), short)
    for place, exact in enumerate([0.2, 0.16, 0.12, 0.08, 0.04]):
        assert error[:, place].mean() == pytest.approx(exact, abs=4 * standard_error(error[:, place]) + 1e-12)
    assert error[:, 5:].max() < 1e-9
    assert error.mean(0).sum() / 50 == pytest.approx(0.0120, abs=2e-4)


@pytest.mark.parametrize(
    ("steps", "scale", "loss", "sequences"),
    [(1, 2.34, 0.0627, 4000), (2, 1.9, 0.0407, 1000), (3, 1.9, 0.0299, 1000), (5, 1.9, 0.0213, 500)],
)
def test_descent_on_haar_sequences_has_the_losses_of_the_released_setting(steps, scale, loss, sequences):
    vectors = autoregressive("haar", 5, 51, sequences, first="unit", dtype=torch.float64, seed=1).vectors
    etas = autoregression.step_sizes(scale, 51)
    predicted = autoregression.predictions(autoregression.gradient_descent(vectors, etas, steps), vectors)
    error = autoregression.squared_error(predicted, vectors).mean(1)
    assert standard_error(error) < 6e-4
    assert error.mean() == pytest.approx(loss, abs=3 * standard_error(error) + 5e-5)


def test_the_tuned_scale_is_the_best_of_those_given():
    vectors = autoregressive("haar", 5, 51, 200, first="unit", dtype=torch.float64).vectors
    assert autoregression.tuned_scale(vectors, 1, [1.8, 2.34, 3.0]) == 2.34
    assert autoregression.tuned_scale(vectors, 2, [1.5, 2.1, 2.6, 1e200]) == 2.1  # the last overflows


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: autoregression.gradient_descent(draw(1, 3, 2), 0.1, 0), "steps is 0: give at least 1."),
        (
            lambda: autoregression.regression_descent(draw(1, 3, 2), draw(1, 3), 0.1, -1),
            "steps is -1: give at least 1.",
        ),
        (lambda: autoregression.tuned_scale(draw(1, 3, 2), 1, []), "scales is empty: give at least one number."),
    ],
)
def test_bad_input_gets_one_sentence(call, sentence):
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value) == sentence
