"""Diagonal heads: against the paper's sum in plain loops, at both minima, under probes, differentiated and trained."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import metaint
from metaint.errors import HookAuditError, InputError
from metaint.toys.diagonal_attention import DiagonalAttention, diagonal_attention, orthogonal_minimum, unitary_minimum
from tests.toys.hooked import readings
from tests.toys.vector_models import close

D, HEADS, LENGTH = 4, 3, 8
DOUBLE: dict[str, Any] = {"dtype": torch.float64}


def made() -> DiagonalAttention:
    """A model with weights of about 1."""
    model = diagonal_attention(D, HEADS, LENGTH, **DOUBLE)
    for parameter in model.parameters():
        parameter.data *= 10
    return model


def noise(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, LENGTH, D, dtype=dtype, generator=torch.Generator().manual_seed(1))


def phases(batch: int, d: int) -> Tensor:
    return 2 * math.pi * torch.rand(batch, d, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def powers(theta: Tensor, length: int) -> Tensor:
    """s_t = exp(i theta)^(t-1), [batch, length, d]."""
    return torch.exp(1j * theta[:, None] * torch.arange(length)[:, None])


def conjugate_pairs(batch: int, d: int) -> Tensor:
    theta = phases(batch, d // 2)
    return torch.stack([theta, -theta], -1).flatten(1)


def rotations(batch: int, d: int, length: int) -> Tensor:
    """Real sequences: coordinates 2k, 2k + 1 turn together on a circle of radius sqrt(2)."""
    angle = math.pi / 4 + phases(batch, d // 2)[:, None] * torch.arange(length)[:, None]
    return math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], -1).flatten(2)


def plain_prediction(model: DiagonalAttention, s: Tensor, last: int) -> Tensor:
    """The prediction of s_{T+1}, with T = last + 1, sum by sum."""
    C = model.b.T @ model.a
    expected = torch.zeros_like(s[0])
    for t in range(last + 1):
        for i in range(D):
            for j in range(D):
                expected[i] += model.P[last - 1, t] * s[t, i] * C[i, j] * s[last - 1, j].conj() * s[t, j]
    return expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_predictions_are_the_papers_sum(dtype: torch.dtype) -> None:
    model = made()
    sequences = noise(dtype)
    with torch.no_grad():
        for s, predicted in zip(sequences, model(sequences), strict=True):
            assert not predicted[0].any()
            for last in range(1, LENGTH):
                close(predicted[last], plain_prediction(model, s, last))


def test_single_precision_takes_single_precision() -> None:
    model, double = diagonal_attention(D, HEADS, LENGTH), diagonal_attention(D, HEADS, LENGTH, **DOUBLE)
    found = model(noise(torch.complex64))
    assert found.dtype == torch.complex64
    torch.testing.assert_close(found, double(noise(torch.complex64).to(torch.complex128)).to(torch.complex64))


# ---- the minima -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [6, 8])
def test_the_unitary_minimum_makes_no_error(heads: int) -> None:
    s = powers(phases(5, 6), LENGTH + 1)
    close(unitary_minimum(6, heads, LENGTH, **DOUBLE)(s[:, :-1])[:, 1:], s[:, 2:])


@pytest.mark.parametrize("heads", [3, 5])
def test_the_orthogonal_minimum_makes_no_error(heads: int) -> None:
    model = orthogonal_minimum(6, heads, LENGTH, **DOUBLE)
    for s in (powers(conjugate_pairs(5, 6), LENGTH + 1), rotations(5, 6, LENGTH + 1)):
        close(model(s[:, :-1])[:, 1:], s[:, 2:])


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_each_missing_head_of_the_unitary_minimum_costs_one(heads: int) -> None:
    s = powers(phases(5, 6), LENGTH + 1)
    model = unitary_minimum(6, heads, LENGTH, **DOUBLE)
    error = (model(s[:, :-1]) - s[:, 1:]).abs().square().sum(-1)[:, 1:]
    close(error, torch.full_like(error, 6 - heads))  # of each sequence, since what is missing has modulus 1


@pytest.mark.parametrize("heads", [1, 2])
def test_each_missing_head_of_the_orthogonal_minimum_costs_two(heads: int) -> None:
    s = powers(conjugate_pairs(5, 6), LENGTH + 1)
    model = orthogonal_minimum(6, heads, LENGTH, **DOUBLE)
    error = (model(s[:, :-1]) - s[:, 1:]).abs().square().sum(-1)[:, 1:]
    close(error, torch.full_like(error, 6 - 2 * heads))


@pytest.mark.parametrize("minimum", [unitary_minimum, orthogonal_minimum])
def test_no_small_change_of_the_weights_lowers_the_expected_loss(minimum: Callable[..., DiagonalAttention]) -> None:
    """With too few heads, too. Averages over a grid of phases are exact, as all powers that occur are below 16."""
    theta = 2 * math.pi / 16 * torch.cartesian_prod(*[torch.arange(16, dtype=torch.float64)] * 2)
    theta = theta if minimum is unitary_minimum else torch.stack([theta, -theta], -1).flatten(1)
    s, d = powers(theta, 5), theta.shape[1]
    generator = torch.Generator().manual_seed(4)

    def loss(model: DiagonalAttention) -> Tensor:
        return (model(s[:, :-1]) - s[:, 1:])[:, 1:].abs().square().sum((1, 2)).mean()

    model = minimum(d, 1, 4, **DOUBLE)
    least = loss(model)
    least.backward()
    close(least, torch.tensor(3.0 * d / 2, dtype=torch.float64))  # three predictions, each d - 1 of 2 or d - 2 of 4
    for parameter in model.parameters():
        assert parameter.grad is not None
        close(parameter.grad, torch.zeros_like(parameter))
    for _ in range(20):
        model = minimum(d, 1, 4, **DOUBLE)
        for parameter in model.parameters():
            parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        assert loss(model) > least


def test_minima_are_laid_out_as_the_docstrings_say() -> None:
    model = orthogonal_minimum(4, 2, 4)
    blocks = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
    assert torch.equal(model.b.T @ model.a, blocks)
    expected = [[-0.5, 1, 0, 0], [0, -0.5, 1, 0], [0, 0, -0.5, 1], [0, 0, 0, 0]]
    assert torch.equal(model.P, torch.tensor(expected))
    assert torch.equal(unitary_minimum(3, 3, 3).P, torch.ones(2).diag(1))


# ---- hooks, audit and probes ------------------------------------------------------------------------------------


def test_hooks_carry_what_their_names_say() -> None:
    model = made()
    s = noise(torch.complex128)
    found = readings(model, s)
    assert set(found) == set(model.hook_dict)
    close(found["blocks.0.attn.hook_q"][:, 5, 1], model.a[1] * s[:, 4].conj())
    close(found["blocks.0.attn.hook_v"][:, 5, 1], model.b[1] * s[:, 5])
    pattern = found["blocks.0.attn.hook_pattern"]
    assert pattern.shape == (2, HEADS, LENGTH, LENGTH)
    score = (model.a[2] * s[0, 4].conj() * s[0, 3]).sum()
    close(found["blocks.0.attn.hook_attn_scores"][0, 2, 5, 3], score)
    close(pattern[0, 2, 5, 3], score * model.P[4, 3])
    assert not pattern.triu(1).any()
    close(found["blocks.0.hook_resid_post"], model(s))


@pytest.mark.parametrize("hook", ["hook_q", "hook_k", "hook_v", "hook_attn_scores", "hook_pattern", "hook_z"])
def test_edits_take_effect_and_leave_no_trace(hook: str) -> None:
    model = made()
    before = model(noise())
    edited = model.run_with_hooks(noise(), fwd_hooks=[(f"blocks.0.attn.{hook}", lambda x, hook: 0.5 * x)])
    close(edited, 0.5 * before)
    assert torch.equal(model(noise()), before)
    out, cache = model.run_with_cache(noise())
    assert torch.equal(out, before)
    assert set(cache) == set(model.hook_dict)
    assert not any(point._forward_hooks for point in model.hook_dict.values())


def test_the_audit_and_probes_find_what_holds() -> None:
    model = made()
    found = metaint.audit(model).set_index("check")["status"].to_dict()
    holding = {"pattern_fires", "pattern_order", "pattern_causal", "value_mix", "stream"}
    holding |= {"edit_pattern", "edit_z", "edit_value", "direction", "head_shapes"}
    assert {check for check, status in found.items() if status == "holds"} == holding
    failing = {"pattern_rows", "pattern_from_scores", "residual"}
    assert {check for check, status in found.items() if status == "fails"} == failing
    with pytest.raises(HookAuditError, match="pattern_rows"), metaint.attach(model, metaint.HeadProbe()):
        pass
    s = rotations(3, D, LENGTH)
    with metaint.attach(model, metaint.ResidualProbe()) as probe:
        predicted = model(s).detach()
    data = probe.to_dataset()
    assert float(data["norm_mean"][0, 0]) == pytest.approx(2)
    assert float(data["norm_mean"][1, 0]) == 0
    assert float(data["norm_mean"][1, 1]) == pytest.approx(float(predicted[:, 1:4].norm(dim=-1).mean()))
    assert bool(data["attn_write_norm"].isnull().all())


# ---- derivatives, training, seeds and bad input -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_effective_matrix_is_the_derivative_of_the_sum(dtype: torch.dtype) -> None:
    model = made()
    s = noise(dtype)
    tangents = torch.zeros(D, *s.shape, dtype=dtype)
    for i in range(D):
        tangents[i, :, -1, i] = 1
    found = torch.func.vmap(lambda t: torch.func.jvp(lambda x: model(x)[:, -1], (s,), (t,))[1])(tangents)
    C, p = model.b.T @ model.a, model.P[LENGTH - 2, -1]
    for b in range(2):
        before, last = s[b, -2].conj(), s[b, -1]
        expected = p * (torch.diag(C.to(dtype) @ (before * last)) + last[:, None] * C * before)
        close(found[:, b].T, expected)


def test_gradients_of_single_sequences() -> None:
    model = made()
    hooks: list[Any] = [("blocks.0.attn.hook_z", lambda z, hook: 2 * z)]

    def last(sequence: Tensor) -> Tensor:
        return model.run_with_hooks(sequence[None], fwd_hooks=hooks)[0, -1, 0]

    leaf = noise().requires_grad_()
    (expected,) = torch.autograd.grad(model.run_with_hooks(leaf, fwd_hooks=hooks)[:, -1, 0].sum(), leaf)
    close(torch.func.vmap(torch.func.grad(last))(noise()), expected)


def test_training_finds_the_unitary_minimum() -> None:
    model = diagonal_attention(2, 2, 4, **DOUBLE)
    s = powers(phases(200, 2), 5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(150):
        loss = (model(s[:, :-1]) - s[:, 1:])[:, 1:].abs().square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(2, abs=0.1)
    assert losses[-1] < 0.05
    rows = torch.arange(3)
    products = model.P[rows, rows + 1][:, None, None] * (model.b.T @ model.a)
    torch.testing.assert_close(products, torch.eye(2, dtype=torch.float64).expand(3, -1, -1), rtol=0, atol=0.15)


def test_weights_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    model, same, other = (diagonal_attention(20, 20, 30, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == {
        "blocks.0.attn.a": (20, 20),
        "blocks.0.attn.b": (20, 20),
        "blocks.0.attn.P": (30, 30),
    }
    for name in "abP":
        assert torch.equal(getattr(model, name), getattr(same, name))
        assert not torch.equal(getattr(model, name), getattr(other, name))
        assert getattr(model, name).std().item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: diagonal_attention(0, 1, 1), "d is 0: give at least 1."),
        (lambda: unitary_minimum(2, 0, 3), "heads is 0: give at least 1."),
        (lambda: orthogonal_minimum(2, 1, 0), "length is 0: give at least 1."),
        (
            lambda: orthogonal_minimum(3, 1, 4),
            "d is 3: give an even number, since eigenvalues come in conjugate pairs.",
        ),
        (
            lambda: unitary_minimum(2, 2, 3)(torch.zeros(1, 4, 2)),
            "inputs is (1, 4, 2): give vectors [batch, 1 to 3 positions, 2].",
        ),
        (
            lambda: unitary_minimum(2, 2, 3)(torch.zeros(1, 3, 2, dtype=torch.complex128)),
            "inputs is torch.complex128, and the model computes in torch.float32: convert one of them.",
        ),
    ],
)
def test_what_cannot_be_done_is_said(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert str(error.value) == sentence
