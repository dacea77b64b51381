"""Processes s_{t+1} = W s_t, regression in context and windows of embeddings, against what defines them."""

import math
from itertools import pairwise

import pytest
import torch

from metaint.errors import InputError
from metaint.measures.recurrence import rotation_basis
from metaint.tasks import augmented, autoregressive, embedding_windows, regression
from metaint.tasks.autoregressive import Kind

FORMS: list[tuple[Kind, torch.dtype]] = [
    ("unitary", torch.complex64),
    ("unitary", torch.complex128),
    ("orthogonal", torch.float32),
    ("orthogonal", torch.float64),
    ("orthogonal", torch.complex128),
    ("haar", torch.float32),
    ("haar", torch.float64),
]


@pytest.mark.parametrize(("kind", "dtype"), FORMS)
@pytest.mark.parametrize("first", ["ones", "unit"])
def test_every_step_is_a_rotation_of_the_one_before(kind, dtype, first):
    vectors, matrices = autoregressive(kind, 4, 12, 6, first=first, dtype=dtype, seed=3)
    assert vectors.shape == (6, 12, 4)
    assert matrices.shape == (6, 4, 4)
    assert vectors.dtype == matrices.dtype == dtype
    assert torch.equal(vectors[:, 0], torch.full_like(vectors[:, 0], 1 if first == "ones" else 0.5))
    near = {"rtol": 0, "atol": 50 * torch.finfo(dtype).eps}
    for sequence, matrix in zip(vectors, matrices, strict=True):
        torch.testing.assert_close(matrix @ matrix.mH, torch.eye(4, dtype=dtype), **near)
        for now, then in pairwise(sequence):
            torch.testing.assert_close(matrix @ now, then, **near)
    assert len({tuple(matrix.flatten().tolist()) for matrix in matrices}) == 6


def test_default_dtypes_are_single_precision():
    dtypes = [autoregressive(kind, 2, 2).vectors.dtype for kind in ("unitary", "orthogonal", "haar")]
    assert dtypes == [torch.complex64, torch.float32, torch.float32]


def test_commuting_kinds_commute_and_haar_does_not():
    for kind, dtype in FORMS:
        a, b = autoregressive(kind, 4, 2, 2, dtype=dtype, seed=1).matrices
        assert ((a @ b - b @ a).abs().max() < 1e-5) == (kind != "haar")


def test_both_forms_of_an_orthogonal_process_are_one_process():
    real = autoregressive("orthogonal", 6, 9, 5, dtype=torch.float64, seed=7)
    diagonal = autoregressive("orthogonal", 6, 9, 5, dtype=torch.complex128, seed=7)
    U = rotation_basis(6)
    torch.testing.assert_close(U.mH @ real.matrices.to(U) @ U, diagonal.matrices, rtol=0, atol=1e-14)
    values = diagonal.matrices.diagonal(dim1=-2, dim2=-1)
    assert torch.equal(values[:, 0::2], values[:, 1::2].conj())
    in_basis = real.vectors.to(U) @ U.conj()  # rows of U* s
    torch.testing.assert_close(in_basis.abs(), torch.ones_like(in_basis.abs()), rtol=0, atol=1e-12)


def test_phases_are_uniform_and_haar_traces_have_their_known_moments():
    values = autoregressive("unitary", 2, 2, 20000).matrices.diagonal(dim1=-2, dim2=-1)
    for power in (1, 2, 3):
        assert (values**power).mean(0).abs().max() < 4 / math.sqrt(20000)
    matrices = autoregressive("haar", 3, 2, 20000).matrices.double()
    trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    # On O(d): E W = 0, E tr(W)² = E tr(W²) = 1, both signs of the determinant alike.
    assert matrices.mean(0).abs().max() < 4 / math.sqrt(3 * 20000)
    assert trace.square().mean() == pytest.approx(1, abs=0.05)
    assert torch.einsum("bij,bji->b", matrices, matrices).mean() == pytest.approx(1, abs=0.05)
    assert torch.linalg.det(matrices).mean().abs() < 4 / math.sqrt(20000)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_noise_is_added_at_every_step(dtype):
    vectors, matrices = autoregressive("orthogonal", 4, 6, 4000, noise=0.1, dtype=dtype)
    added = vectors[:, 1:] - torch.einsum("bij,btj->bti", matrices, vectors[:, :-1])
    assert added.abs().square().mean().sqrt() == pytest.approx(0.1, rel=0.02)
    assert added.mean((0, 1)).abs().max() < 0.004


def test_seed_decides_a_generator_goes_on_and_the_global_state_stays():
    before = torch.random.get_rng_state()
    generator = torch.Generator().manual_seed(4)
    for draw in (
        lambda seed: autoregressive("haar", 3, 4, 2, seed=seed, noise=0.1).vectors,
        lambda seed: regression(3, 4, 2, seed=seed).tokens,
        lambda seed: embedding_windows(torch.eye(30), torch.arange(30), shuffled=True, seed=seed),
    ):
        assert torch.equal(draw(4), draw(4))
        assert not torch.equal(draw(4), draw(5))
        assert not torch.equal(draw(generator), draw(generator))
    assert torch.equal(before, torch.random.get_rng_state())


def test_single_precision_is_double_precision_rounded():
    single, double = (autoregressive("haar", 5, 40, 3, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert torch.equal(single.vectors, double.vectors.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_augmented_tokens_hold_the_vector_and_the_one_before(dtype):
    vectors = autoregressive("orthogonal", 2, 3, 2, dtype=dtype).vectors
    tokens = augmented(vectors)
    nothing = torch.zeros(2, dtype=dtype)
    for sequence, row in zip(vectors, tokens, strict=True):
        befores = [nothing, sequence[0], sequence[1]]
        plain = [torch.cat([nothing, now, before]) for now, before in zip(sequence, befores, strict=True)]
        assert torch.equal(row, torch.stack(plain))
    assert torch.equal(augmented(vectors[0]), tokens[0])


def test_regression_tokens_are_points_and_a_query_without_its_answer():
    sample = regression(3, 5, 4, dtype=torch.float64)
    assert sample.tokens.shape == (4, 6, 4)
    assert torch.equal(sample.tokens[:, -1, -1], torch.zeros(4, dtype=torch.float64))
    assert torch.equal(sample.tokens[:, :-1], torch.cat([sample.inputs, sample.outputs[..., None]], -1))
    assert torch.equal(sample.tokens[:, -1, :-1], sample.queries)
    for row in range(4):
        torch.testing.assert_close(sample.inputs[row] @ sample.weights[row], sample.outputs[row])
        torch.testing.assert_close(sample.queries[row] @ sample.weights[row], sample.answers[row])


def test_regression_has_the_scales_asked_for():
    sample = regression(2, 4, 20000, input_range=3, weight_scale=2)
    inputs = sample.tokens[..., :-1]
    assert inputs.abs().max() <= 1.5
    assert inputs.square().mean() == pytest.approx(9 / 12, rel=0.01)
    assert inputs.mean().abs() < 0.01
    assert sample.weights.square().mean() == pytest.approx(4, rel=0.03)
    assert sample.tokens.dtype == torch.float32


def test_embedding_windows_are_rows_of_length_one():
    table = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    table[3] = 0
    tokens = torch.tensor([5, 3, 7, 7, 19, 0, 2, 11])
    windows = embedding_windows(table, tokens, 3)
    assert windows.shape == (2, 3, 6)
    for place, token in enumerate(tokens[:6].tolist()):
        length = table[token].norm() if token != 3 else 1
        torch.testing.assert_close(windows.view(6, 6)[place], table[token] / length)
    shuffled = embedding_windows(table, tokens[:6], 3, shuffled=True, seed=1).view(6, 6)
    assert not torch.equal(shuffled, windows.view(6, 6))
    assert sorted(shuffled.tolist()) == sorted(windows.view(6, 6).tolist())


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        (("normal", 4, 8), {}, "kind is 'normal': give 'unitary', 'orthogonal' or 'haar'."),
        (("haar", 0, 8), {}, "d is 0: give a whole number of at least 1."),
        (("haar", 4, 1), {}, "length is 1: give a whole number of at least 2."),
        (("haar", 4, 8.0), {}, "length is 8.0: give a whole number of at least 2."),
        (("haar", 4, 8, 0), {}, "batch is 0: give a whole number of at least 1."),
        (("haar", 4, 8), {"first": "zeros"}, "first is 'zeros': give 'ones' or 'unit'."),
        (("haar", 4, 8), {"noise": -0.1}, "noise is -0.1: give a standard deviation of 0 or more."),
        (("haar", 4, 8), {"noise": math.nan}, "noise is nan: give a standard deviation of 0 or more."),
        (
            ("orthogonal", 5, 8),
            {},
            "d is 5: give an even number, since eigenvalues come in conjugate pairs.",
        ),
        (
            ("unitary", 4, 8),
            {"dtype": torch.float32},
            "dtype is torch.float32, which kind 'unitary' has no form in: give torch.complex64 or torch.complex128.",
        ),
        (
            ("haar", 4, 8),
            {"dtype": torch.complex64},
            "dtype is torch.complex64, which kind 'haar' has no form in: give torch.float32 or torch.float64.",
        ),
    ],
)
def test_a_process_that_cannot_be_gets_one_sentence(arguments, options, sentence):
    with pytest.raises(InputError) as caught:
        autoregressive(*arguments, **options)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: regression(0, 5), "d is 0: give a whole number of at least 1."),
        (lambda: regression(3, 0), "points is 0: give a whole number of at least 1."),
        (lambda: regression(3, 5, input_range=0), "input_range is 0: give a positive number."),
        (lambda: regression(3, 5, weight_scale=math.inf), "weight_scale is inf: give a positive number."),
        (
            lambda: embedding_windows(torch.eye(4), torch.arange(4), 1),
            "length is 1: give a whole number of at least 2.",
        ),
        (
            lambda: embedding_windows(torch.eye(4), torch.arange(4)),
            "tokens is [4] of torch.int64: give one row of at least 5 ids, one window.",
        ),
        (
            lambda: embedding_windows(torch.eye(4), torch.ones(9)),
            "tokens is [9] of torch.float32: give one row of at least 5 ids, one window.",
        ),
        (
            lambda: embedding_windows(torch.eye(4), torch.arange(5)),
            "tokens reach from 0 to 4, outside the vocabulary 0..3: give ids inside it.",
        ),
    ],
)
def test_other_bad_input_gets_one_sentence(call, sentence):
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value) == sentence
