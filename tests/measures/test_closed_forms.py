"""Closed forms of expected losses and their minima, against exact quadrature and simulation."""

import math

import pytest
import torch

from metaint.errors import InputError
from metaint.measures import autoregression, closed_forms
from metaint.tasks import autoregressive, regression

EXACT = {"rtol": 0, "atol": 1e-12}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def standard_error(values):
    return float(values.std() / math.sqrt(len(values)))


# ---- one step of gradient descent ---------------------------------------------------------------------------------


def every_phase(free, nodes):
    """A grid over all phases: its mean is the exact expectation of any trigonometric polynomial of degree < nodes."""
    angle = torch.arange(nodes, dtype=torch.float64) * (2 * math.pi / nodes)
    return torch.stack(torch.meshgrid(*[angle] * free, indexing="ij"), -1).view(-1, free)


def every_process(kind, d, length):
    """s_1, ..., s_length for eigenvalues of every phase on the grid."""
    nodes = 4 * length
    theta = every_phase(d if kind == "unitary" else d // 2, nodes)
    if kind == "orthogonal":
        theta = torch.stack([theta, -theta], -1).flatten(1)
    return torch.exp(1j * theta[:, None] * torch.arange(length)[:, None])


def plain_diagonal_error(vectors, C, p):
    """Per coordinate, of sum_t p_t s_{t,i} sum_j C_ij conj(s_{T-1,j}) s_{t,j} as a prediction of s_{T+1}."""
    T = len(p)
    predicted = torch.zeros_like(vectors[:, 0])
    for t in range(1, T + 1):
        now, query = vectors[:, t - 1], vectors[:, T - 2]
        predicted += p[t - 1] * now * ((query.conj() * now) @ C.mT.to(now))
    return (predicted - vectors[:, T]).abs().square()


@pytest.mark.parametrize(("kind", "d"), [("unitary", 1), ("unitary", 2), ("unitary", 3), ("orthogonal", 4)])
@pytest.mark.parametrize("context", [1, 2, 4])
def test_the_augmented_loss_is_the_exact_expectation(kind, d, context):
    vectors = every_process(kind, d, context + 1)
    for eta in (0.0, 0.2, 0.7):
        predicted = torch.zeros_like(vectors[:, 0])
        for t in range(2, context + 1):
            score = (vectors[:, t - 2].conj() * vectors[:, context - 1]).sum(-1, keepdim=True)
            predicted += eta * vectors[:, t - 1] * score
        exact = (predicted - vectors[:, context]).abs().square().mean()
        torch.testing.assert_close(closed_forms.augmented_loss(eta, context, d), exact, **EXACT)


@pytest.mark.parametrize(
    ("kind", "d", "dtype", "loss", "given"),
    [
        ("unitary", 5, torch.complex64, 4 / 11, 0.36364),
        ("orthogonal", 6, torch.float32, 5 / 12, 0.41667),
    ],
)
def test_the_augmented_loss_is_what_sequences_give(kind, d, dtype, loss, given):
    optimum = closed_forms.augmented_optimum(8, d)
    assert optimum.eta == 1 / (8 + d - 2)
    assert optimum.loss == pytest.approx(loss)
    assert optimum.loss == pytest.approx(given, abs=5e-6)
    vectors = autoregressive(kind, d, 9, 240000, dtype=dtype).vectors
    for eta, expected in ((optimum.eta, optimum.loss), (1.1 * optimum.eta, None)):
        step = eta * torch.einsum("bti,btj->bij", vectors[:, 1:8], vectors[:, :7].conj())
        predicted = torch.einsum("bij,bj->bi", step, vectors[:, 7])
        error = (predicted - vectors[:, 8]).abs().square().mean(1)
        expected = expected or float(closed_forms.augmented_loss(eta, 8, d))
        assert standard_error(error) < 6e-4
        assert error.mean() == pytest.approx(expected, abs=3.5 * standard_error(error))


def test_a_tenth_away_from_the_best_step_costs_what_the_notes_say():
    eta = closed_forms.augmented_optimum(8, 5).eta * torch.tensor([0.9, 1.1], dtype=torch.float64)
    assert closed_forms.augmented_loss(eta, 8, 5).tolist() == pytest.approx([0.3700, 0.3700], abs=5e-5)


def test_vectors_of_length_one_want_d_times_the_step():
    ones, unit = (autoregressive("orthogonal", 6, 9, 4, first=first, dtype=torch.float64) for first in ("ones", "unit"))
    errors = [
        autoregression.squared_error(
            autoregression.predictions(autoregression.gradient_descent(vectors, eta), vectors), vectors
        )
        for vectors, eta in ((ones.vectors, 0.05), (unit.vectors, 6 * 0.05))
    ]
    torch.testing.assert_close(errors[0], 6 * errors[1], **EXACT)


def test_both_forms_of_a_process_have_one_error():
    real, diagonal = (
        autoregressive("orthogonal", 6, 9, 4, dtype=dtype).vectors for dtype in (torch.float64, torch.complex128)
    )
    errors = [
        autoregression.squared_error(
            autoregression.predictions(autoregression.gradient_descent(vectors, 0.05, 2), vectors), vectors
        )
        for vectors in (real, diagonal)
    ]
    torch.testing.assert_close(*errors, **EXACT)


@pytest.mark.parametrize("d", [1, 5, 16])
def test_the_optima_are_where_the_losses_are_least(d):
    contexts = torch.arange(2, 21)
    alone = [closed_forms.augmented_optimum(context, d) for context in contexts.tolist()]
    shared = closed_forms.augmented_shared_optimum(20, d)
    for optimum, chosen in [*zip(alone, contexts[:, None], strict=True), (shared, contexts)]:
        eta = torch.tensor(optimum.eta, dtype=torch.float64, requires_grad=True)
        loss = closed_forms.augmented_loss(eta, chosen, d).mean()
        assert loss.item() == pytest.approx(optimum.loss, abs=1e-14)
        assert torch.autograd.grad(loss, eta)[0].abs() < 1e-12


def test_the_regression_loss_is_the_exact_expectation_in_one_dimension():
    """For d = 1 and N = 1 it is 1/2 w² E x_q² E (1 - eta x²)²; the uniform x by Gauss-Legendre nodes."""
    x, weight = torch.tensor([-1, 0, 1]) * math.sqrt(0.6), torch.tensor([5, 8, 5]) / 18  # exact to degree 5
    x = x * 1.5
    for eta in (0.0, 0.3, 2.0):
        expected = 0.5 * 4 * 0.75 * (weight * (1 - eta * x**2) ** 2).sum()
        found = closed_forms.regression_loss(eta, 1, 1, input_range=3, weight_scale=2)
        assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_the_regression_optimum_is_the_published_setting_s():
    optimum = closed_forms.regression_optimum(10, 10)
    assert optimum.eta == pytest.approx(6.0606, abs=5e-5)
    assert optimum.loss == pytest.approx(0.20623, abs=5e-6)
    assert float(closed_forms.regression_loss(0, 10, 10)) == pytest.approx(5 / 12)
    eta = torch.tensor([0.99, 1.01], dtype=torch.float64) * optimum.eta
    assert (closed_forms.regression_loss(eta, 10, 10) > optimum.loss).all()
    assert closed_forms.regression_optimum(10, 10, 2, 3).eta == pytest.approx(optimum.eta / 4)
    assert closed_forms.regression_optimum(10, 10, 2, 3).loss == pytest.approx(36 * optimum.loss)


@pytest.mark.parametrize(
    ("steps", "eta", "loss"), [(1, 6.0606, 0.2062), (2, 6.0, 0.155), (5, 5.25, 0.111), (10, 4.5, 0.087)]
)
def test_descent_on_the_regression_task_has_the_known_losses(steps, eta, loss):
    sample = regression(10, 10, 40000, dtype=torch.float64, seed=2)
    w = autoregression.regression_descent(sample.inputs, sample.outputs, eta, steps)
    error = 0.5 * ((w * sample.queries).sum(1) - sample.answers).square()
    assert standard_error(error) < 0.002
    assert error.mean() == pytest.approx(loss, abs=0.005)
    if steps == 1:
        known = float(closed_forms.regression_loss(eta, 10, 10))
        assert error.mean() == pytest.approx(known, abs=3 * standard_error(error))


# ---- diagonal multi-head attention ------------------------------------------------------------------------------

LOSSES = {"unitary": closed_forms.unitary_loss, "orthogonal": closed_forms.orthogonal_loss}


@pytest.mark.parametrize(("kind", "d"), [("unitary", 1), ("unitary", 3), ("orthogonal", 2), ("orthogonal", 4)])
@pytest.mark.parametrize("length", [2, 3, 4])
def test_diagonal_losses_are_the_exact_expectation(kind, d, length):
    vectors = every_process(kind, d, length + 1)
    for seed in range(3):
        C, p = draw(d, d, seed=seed), draw(length, seed=seed + 10)
        exact = plain_diagonal_error(vectors, C, p).sum(-1).mean()
        torch.testing.assert_close(LOSSES[kind](C, p), exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["unitary", "orthogonal"])
def test_diagonal_losses_are_what_sequences_give(kind):
    C, p = 0.3 * draw(6, 6, seed=1), draw(10, seed=2)
    vectors = autoregressive(kind, 6, 11, 40000, dtype=torch.complex128).vectors
    error = plain_diagonal_error(vectors, C, p).sum(-1)
    expected = float(LOSSES[kind](C, p))
    assert standard_error(error) < 0.01 * expected
    assert error.mean() == pytest.approx(expected, abs=3.5 * standard_error(error))


@pytest.mark.parametrize("kind", ["unitary", "orthogonal"])
def test_rows_of_positions_stand_together_with_zeros_in_front(kind):
    C, rows = draw(4, 4), draw(3, 6, seed=1) * torch.ones(3, 6, dtype=torch.float64).triu(2)
    together = LOSSES[kind](C, rows)
    alone = [LOSSES[kind](C, row[row.ne(0)]) for row in rows]
    torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize(
    ("kind", "expected"), [("unitary", [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0]), ("orthogonal", [8, 6, 4, 2, 0, 0])]
)
def test_the_solutions_reach_the_minima(kind, expected):
    for heads, minimum in enumerate(expected, 1):
        A, B, p = closed_forms.diagonal_solution(kind, 10, heads, 20)
        assert A.shape == B.shape == (heads, 10)
        assert closed_forms.diagonal_minimum(kind, 10, heads) == minimum
        A, B, p = A.requires_grad_(), B.requires_grad_(), p.requires_grad_()
        loss = LOSSES[kind](B.mT @ A, p)
        assert loss.item() == pytest.approx(minimum, abs=1e-12)
        assert all(slope.abs().max() < 1e-12 for slope in torch.autograd.grad(loss, (A, B, p)))


@pytest.mark.parametrize(
    ("kind", "d", "heads"), [("unitary", 4, 1), ("unitary", 4, 3), ("unitary", 3, 4), ("orthogonal", 6, 2)]
)
def test_no_optimiser_goes_below_the_minima_and_one_gets_there(kind, d, heads):
    minimum, found = closed_forms.diagonal_minimum(kind, d, heads), []
    for seed in range(4):
        parameters = [0.5 * draw(*shape, seed=seed + k) for k, shape in enumerate([(heads, d), (heads, d), (5,)])]
        A, B, p = (parameter.requires_grad_() for parameter in parameters)
        optimiser = torch.optim.LBFGS([A, B, p], max_iter=300, line_search_fn="strong_wolfe", tolerance_change=1e-14)

        def closure(A=A, B=B, p=p, optimiser=optimiser):
            optimiser.zero_grad()
            loss = LOSSES[kind](B.mT @ A, p)
            loss.backward()
            return loss

        optimiser.step(closure)
        found.append(LOSSES[kind](B.mT @ A, p).item())
    assert min(found) == pytest.approx(minimum, abs=1e-6)
    assert min(found) > minimum - 1e-9


def test_the_authors_saved_tensors_are_minima():
    """Their constants, to three digits: p_T c = 1 in the unitary case, and -1/2 and 1 in the orthogonal one."""
    p = torch.zeros(20, dtype=torch.float64)
    p[-1] = -0.832
    C = -1.202 * torch.eye(10, dtype=torch.float64)
    assert float(closed_forms.unitary_loss(C, p)) == pytest.approx(0, abs=1e-4)
    p[-2:] = torch.tensor([0.388, -0.776])
    C = -1.289 * closed_forms.ideal_interaction("orthogonal", 10)
    assert float(closed_forms.orthogonal_loss(C, p)) == pytest.approx(0, abs=1e-4)


def test_descent_on_the_closed_form_finds_the_unitary_minimum():
    """The released setting: d = H = 10, contexts of 2 to 20 vectors at once, rate .01, 100 steps from .1 N(0, 1)."""
    A, B, P = (0.1 * draw(*shape, seed=seed) for seed, shape in enumerate([(10, 10), (10, 10), (19, 20)]))
    rows = (torch.arange(20) >= 18 - torch.arange(19)[:, None]).double()
    parameters = [parameter.requires_grad_() for parameter in (A, B, P)]
    losses = []
    for _ in range(100):
        loss = closed_forms.unitary_loss(B.mT @ A, P * rows).sum()
        slopes = torch.autograd.grad(loss, parameters)
        losses.append(loss.item())
        with torch.no_grad():
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter -= 0.01 * slope
    assert losses[0] == pytest.approx(190, abs=3)
    assert losses[-1] < 1e-3
    eye = torch.eye(10, dtype=torch.float64)
    for last in P[:, -1]:
        torch.testing.assert_close(last * (B.mT @ A), eye, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: closed_forms.augmented_loss(0.1, 0, 3),
            "context is 0 and d is 3: give numbers of at least 1.",
        ),
        (lambda: closed_forms.augmented_optimum(1, 3), "context is 1: give at least 2."),
        (lambda: closed_forms.augmented_shared_optimum(1, 3), "longest is 1: give at least 2."),
        (lambda: closed_forms.regression_optimum(0, 3), "points is 0: give at least 1."),
        (
            lambda: closed_forms.unitary_loss(draw(2, 2), draw(1)),
            "p has 1 positions: give at least 2, since the query is the one before the last.",
        ),
        (
            lambda: closed_forms.orthogonal_loss(draw(3, 3), draw(4)),
            "d is 3: give an even number, since eigenvalues come in conjugate pairs.",
        ),
        (
            lambda: closed_forms.diagonal_solution("orthogonal", 5, 2, 4),
            "d is 5: give an even number, since eigenvalues come in conjugate pairs.",
        ),
        (lambda: closed_forms.diagonal_solution("unitary", 4, 0, 4), "heads is 0: give at least 1."),
        (lambda: closed_forms.diagonal_solution("unitary", 4, 2, 1), "length is 1: give at least 2."),
    ],
)
def test_bad_input_gets_one_sentence(call, sentence):
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value) == sentence
