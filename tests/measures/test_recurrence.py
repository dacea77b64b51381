"""Comparisons, effective matrices and the structure of heads, against plain versions and known cases."""

import math

import pytest
import torch

from metaint.errors import InputError
from metaint.measures import autoregression, closed_forms, recurrence
from metaint.tasks import autoregressive, regression

EXACT = {"rtol": 0, "atol": 1e-12}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_complex(*shape, seed=0):
    return torch.complex(draw(*shape, seed=seed), draw(*shape, seed=seed + 100))


# ---- comparisons ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [draw, draw_complex])
def test_comparisons_are_plain_means(draws):
    f, g = draws(5, 3, 2), draws(5, 3, 2, seed=1)
    F, G = draws(5, 3, 2, 4), draws(5, 3, 2, 4, seed=1)
    for position in range(3):
        difference, cosine, model = [], [], []
        for row in range(5):
            for out in range(2):
                difference.append(abs(f[row, position, out] - g[row, position, out]))
                a, b = F[row, position, out], G[row, position, out]
                lengths = [sum(abs(x) ** 2 for x in v.tolist()) ** 0.5 + 1e-8 for v in (a, b)]
                inner = sum((x.conjugate() * y).real for x, y in zip(a.tolist(), b.tolist(), strict=True))
                cosine.append(inner / (lengths[0] * lengths[1]))
                model.append(sum(abs(x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)) ** 0.5)
        found = [
            recurrence.prediction_difference(f, g),
            recurrence.sensitivity_cosine(F, G),
            recurrence.model_difference(F, G),
        ]
        plain = [float(sum(values) / 10) for values in (difference, cosine, model)]
        assert [float(value[position]) for value in found] == pytest.approx(plain)


def test_one_step_of_descent_agrees_with_itself_and_its_gradient_is_its_weights():
    sample = regression(4, 6, 3, dtype=torch.float64)
    w = autoregression.regression_descent(sample.inputs, sample.outputs, 5.0)
    queries = sample.queries.clone().requires_grad_()
    slope = torch.autograd.grad((w * queries).sum(), queries)[0]
    torch.testing.assert_close(slope, w)
    other = autoregression.regression_least_squares(sample.inputs, sample.outputs)
    assert recurrence.sensitivity_cosine(w[:, None], 3 * w[:, None]).item() == pytest.approx(1, abs=1e-6)
    assert recurrence.model_difference(w[:, None], w[:, None]).item() == 0
    assert recurrence.sensitivity_cosine(w[:, None], other[:, None]).item() < 1 - 1e-3


def test_sensitivity_cosine_of_a_zero_gradient_is_zero():
    assert recurrence.sensitivity_cosine(torch.zeros(2, 1, 3), torch.ones(2, 1, 3)).item() == 0


@pytest.mark.parametrize("draws", [draw, draw_complex])
def test_matrices_compare_as_long_vectors(draws):
    J, M = draws(6, 3, 4), draws(6, 3, 4, seed=1)
    a, b = (torch.view_as_real(x).flatten(1) if x.is_complex() else x.flatten(1) for x in (J, M))
    torch.testing.assert_close(recurrence.matrix_cosine(J, M), torch.cosine_similarity(a, b))
    torch.testing.assert_close(recurrence.relative_error(J, M), (a - b).norm(dim=1) / b.norm(dim=1))
    scale = recurrence.projection_scale(J, M)
    torch.testing.assert_close(scale, (a * b).sum(1) / (b * b).sum(1))
    best = recurrence.relative_error(scale[:, None, None] * M, J)
    for step in (-0.01, 0.01):
        assert (recurrence.relative_error((scale + step)[:, None, None] * M, J) > best).all()
    torch.testing.assert_close(best, (1 - recurrence.matrix_cosine(J, M).square()).sqrt())


def test_nothing_compares_with_a_zero_matrix():
    J, zero = draw(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.float64)
    assert recurrence.matrix_cosine(J, zero).isnan().all()
    assert recurrence.projection_scale(J, zero).isnan().all()
    assert recurrence.relative_error(zero, zero).isnan().all()


# ---- the matrix that a model applies ----------------------------------------------------------------------------

ETA = 0.07


def linear_attention(vectors, queries=None):
    """eta sum_{t=2}^T s_t <s_{t-1}, q_T> with q_T = s_T, or queries given apart; one causal layer."""
    queries = vectors if queries is None else queries
    before = torch.cat([torch.zeros_like(vectors[:, :1]), vectors[:, :-1]], 1)
    scores = torch.einsum("bqi,bki->bqk", queries, before.conj()).tril()
    return ETA * scores @ vectors


WEIGHTS = [draw(3, 3, seed=seed).requires_grad_() for seed in (1, 2, 3)]


def softmax_attention(vectors):
    """A layer with softmax and a non-linearity, on weights that ask for gradients."""
    Q, K, V = WEIGHTS
    n = vectors.shape[1]
    scores = (vectors @ Q) @ (vectors @ K).mT
    pattern = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(-1)
    return torch.tanh(vectors + pattern @ vectors @ V)


def by_differences(predict, vectors, position, step=1e-5):
    columns = []
    for j in range(vectors.shape[-1]):
        moved = torch.zeros_like(vectors)
        moved[:, position, j] = step
        columns.append((predict(vectors + moved) - predict(vectors - moved))[:, position] / (2 * step))
    return torch.stack(columns, -1)


@pytest.mark.parametrize("predict", [linear_attention, softmax_attention])
def test_the_effective_matrix_is_that_of_finite_differences(predict):
    vectors = autoregressive("haar", 3, 6, 4, dtype=torch.float64).vectors
    found = recurrence.effective_matrix(predict, vectors)
    assert found.shape == (4, 6, 3, 3)
    assert not found.requires_grad
    for position in range(6):
        plain = by_differences(predict, vectors, position).detach()
        torch.testing.assert_close(found[:, position], plain, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("haar", torch.float64), ("orthogonal", torch.complex128), ("unitary", torch.complex128)]
)
def test_linear_attention_applies_one_step_of_descent(kind, dtype):
    """Exactly, through its queries; through all of s_T, which is a value too, eta <s_{T-1}, s_T> I is added."""
    vectors = autoregressive(kind, 4, 7, 3, dtype=dtype).vectors
    step = autoregression.gradient_descent(vectors, ETA)
    applied = recurrence.effective_matrix(lambda queries: linear_attention(vectors, queries), vectors)
    torch.testing.assert_close(applied, step, **EXACT)
    torch.testing.assert_close(autoregression.predictions(step, vectors), linear_attention(vectors), **EXACT)

    whole = recurrence.effective_matrix(linear_attention, vectors)
    befores = torch.cat([torch.zeros_like(vectors[:, :1]), vectors[:, :-1]], 1)
    own = ETA * (befores.conj() * vectors).sum(-1)[..., None, None] * torch.eye(4, dtype=dtype)
    torch.testing.assert_close(whole, step + own, **EXACT)


def test_positions_are_chosen_from_either_end_and_outputs_may_be_fewer():
    vectors = autoregressive("haar", 3, 6, 4, dtype=torch.float64).vectors
    every = recurrence.effective_matrix(softmax_attention, vectors)
    some = recurrence.effective_matrix(softmax_attention, vectors, [-1, 2])
    assert torch.equal(some, every[:, [5, 2]])
    last = recurrence.effective_matrix(lambda v: softmax_attention(v)[..., -1:], vectors, [3])
    torch.testing.assert_close(last, every[:, 3:4, -1:])


def test_a_regression_s_sensitivity_is_a_row_of_its_effective_matrix():
    """One step of descent, as linear attention on the tokens: minus the last coordinate of the query token."""
    sample = regression(3, 5, 2, dtype=torch.float64)

    def predict(tokens):
        scores = tokens[..., :3] @ tokens[:, :-1, :3].mT
        return -(tokens[..., -1:] - 2.0 / 5 * scores @ tokens[:, :-1, -1:])

    found = recurrence.effective_matrix(predict, sample.tokens, [-1])[:, 0, :, :3]
    w = autoregression.regression_descent(sample.inputs, sample.outputs, 2.0)
    torch.testing.assert_close(found[:, 0], w, **EXACT)
    answer = predict(sample.tokens)[:, -1, 0]
    torch.testing.assert_close(answer, (w * sample.queries).sum(1), **EXACT)


def test_a_model_that_conjugates_has_no_matrix():
    vectors = autoregressive("unitary", 2, 4, 2).vectors
    with pytest.raises(InputError, match=r"^predict isn't complex-differentiable in the vector at index 0, so no"):
        recurrence.effective_matrix(lambda v: v.conj(), vectors)
    # Conjugating other vectors, as keys do, is no hindrance.
    found = recurrence.effective_matrix(linear_attention, vectors)
    assert found.dtype == torch.complex64


@pytest.mark.parametrize("wrong", [lambda v: v[:, -1], lambda v: v[:, :-1], lambda v: v.sum(-1)])
def test_a_model_of_another_shape_gets_one_sentence(wrong):
    with pytest.raises(InputError, match=r"^predict returned \[.*\] for vectors of \[2, 4, 3\]: it must return one"):
        recurrence.effective_matrix(wrong, draw(2, 4, 3))


# ---- the structure of heads -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "width", "ratio"), [("unitary", 1, 0.0), ("orthogonal", 2, -0.5)])
@pytest.mark.parametrize("full", [True, False])
def test_known_solutions_have_the_known_structure(kind, width, ratio, full):
    heads = 8 // width if full else 2
    A, B, p = closed_forms.diagonal_solution(kind, 8, heads, 12)
    A, B, p = -3 * A, 0.5 * B, p / -1.5  # the same predictions
    C = recurrence.interaction(A, B)
    torch.testing.assert_close(C, B.mT @ A)
    assert recurrence.off_diagonal_mass(C).item() == pytest.approx(0 if width == 1 else 0.5**0.5)
    missing = 1 - heads * width / 8
    assert recurrence.block_error(C, p[-1], kind).item() == pytest.approx(missing**0.5, abs=1e-12)
    assert recurrence.head_orthogonality(A, B).item() == 0
    assert recurrence.effective_rank(C).item() == pytest.approx(heads)
    assert recurrence.positional_concentration(p).item() == pytest.approx(1)
    assert recurrence.positional_ratio(p).item() == ratio


def test_structure_measures_are_their_formulas():
    A, B, p = draw(3, 4), draw(3, 4, seed=1), draw(2, 5, seed=2)
    C = [[sum(float(B[h, i] * A[h, j]) for h in range(3)) for j in range(4)] for i in range(4)]
    square = sum(x * x for row in C for x in row)
    outside = sum(C[i][j] ** 2 for i in range(4) for j in range(4) if i != j)
    found = recurrence.interaction(A, B)
    torch.testing.assert_close(found, torch.tensor(C, dtype=torch.float64))
    assert recurrence.off_diagonal_mass(found).item() == pytest.approx(math.sqrt(outside / square))
    ones = [[float(i // 2 == j // 2) for j in range(4)] for i in range(4)]
    distance = sum((0.7 * C[i][j] - ones[i][j]) ** 2 for i in range(4) for j in range(4))
    assert recurrence.block_error(found, 0.7, "orthogonal").item() == pytest.approx(math.sqrt(distance / 8))
    products = [[abs(float(a @ b)) for b in B] for a in A]
    crossed = max(products[h][k] for h in range(3) for k in range(3) if h != k)
    expected = crossed / max(products[h][h] for h in range(3))
    assert recurrence.head_orthogonality(A, B).item() == pytest.approx(expected)
    sigma = torch.linalg.svdvals(found)
    torch.testing.assert_close(recurrence.effective_rank(found), sigma.square().sum() ** 2 / (sigma**4).sum())
    torch.testing.assert_close(
        recurrence.positional_concentration(p), (p[:, 4] ** 2 + p[:, 3] ** 2) / p.square().sum(1)
    )
    torch.testing.assert_close(recurrence.positional_ratio(p), p[:, 3] / p[:, 4])


def test_structure_of_several_models_at_once_is_that_of_each():
    C, last = draw(3, 4, 4), draw(3, seed=1)
    together = [
        recurrence.off_diagonal_mass(C),
        recurrence.effective_rank(C),
        recurrence.block_error(C, last, "unitary"),
    ]
    for row in range(3):
        alone = [
            recurrence.off_diagonal_mass(C[row]),
            recurrence.effective_rank(C[row]),
            recurrence.block_error(C[row], last[row], "unitary"),
        ]
        torch.testing.assert_close(torch.stack([value[row] for value in together]), torch.stack(alone))


def test_the_rotation_basis_is_unitary():
    U = recurrence.rotation_basis(6)
    torch.testing.assert_close(U.mH @ U, torch.eye(6, dtype=U.dtype), **EXACT)


def test_diagonals_of_a_real_head_predict_what_the_head_does():
    """Heads that are diagonal in the eigenbasis, with any conjugate pairs of numbers there, made real and run."""
    U, H, T = recurrence.rotation_basis(4), 3, 6
    A, B = (draw_complex(H, 2, seed=seed) for seed in (1, 2))
    A, B = (torch.stack([half, half.conj()], -1).flatten(1) for half in (A, B))
    W_QK, transposed_OV = (U @ torch.diag_embed(diagonal) @ U.mH for diagonal in (A, B))
    assert W_QK.imag.abs().max() < 1e-15
    W_QK, W_OV = W_QK.real, transposed_OV.real.mT
    found = recurrence.diagonals_in(U, W_QK, W_OV)
    torch.testing.assert_close(found.A, A, **EXACT)
    torch.testing.assert_close(found.B, B, **EXACT)
    assert max(found.outside_QK.max(), found.outside_OV.max()) < 1e-12

    s = autoregressive("orthogonal", 4, T, 2, dtype=torch.float64).vectors
    p, query = draw(T, seed=3), s[:, T - 2]
    scores = torch.einsum("bi,hij,btj->bht", query, W_QK, s)
    out = torch.einsum("t,bht,bti,hij->bj", p, scores, s, W_OV)
    z = s.to(U) @ U.conj()
    C = recurrence.interaction(found.A, found.B)
    plain = torch.stack([p[t] * z[:, t] * ((z[:, T - 2].conj() * z[:, t]) @ C.mT) for t in range(T)]).sum(0)
    torch.testing.assert_close(out.to(U) @ U.conj(), plain, **EXACT)


def test_diagonals_in_the_identity_are_plain_and_the_rest_is_reported():
    QK, OV = draw(3, 4, 4), draw(3, 4, 4, seed=1)
    found = recurrence.diagonals_in(torch.eye(4, dtype=torch.float64), QK, OV)
    torch.testing.assert_close(found.A, QK.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(found.B, OV.diagonal(dim1=1, dim2=2))
    for matrices, outside in ((QK, found.outside_QK), (OV, found.outside_OV)):
        torch.testing.assert_close(outside, recurrence.off_diagonal_mass(matrices).square())


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: recurrence.rotation_basis(3), "d is 3: give an even number of at least 2."),
        (lambda: recurrence.positional_ratio(draw(1)), "p has 1 positions: give at least 2."),
        (
            lambda: recurrence.block_error(draw(3, 3), 1.0, "orthogonal"),
            "d is 3: give an even number, since eigenvalues come in conjugate pairs.",
        ),
    ],
)
def test_other_bad_input_gets_one_sentence(call, sentence):
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value) == sentence


def test_rows_of_positional_weights_end_with_p_T():
    P = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0))
    rows = recurrence.positional_rows(P)
    assert rows.shape == (2, 4, 5)
    for start in range(2):
        for T in range(2, 6):
            expected = torch.zeros(5)
            expected[5 - T :] = P[start, T - 2, :T]
            assert torch.equal(rows[start, T - 2], expected)
    assert torch.equal(recurrence.positional_rows(P[0]), rows[0])
