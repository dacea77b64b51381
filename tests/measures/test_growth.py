"""Norms of parameters, their growth and the weights of heads against plain arithmetic on whole matrices."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from metaint.errors import InputError
from metaint.measures import growth

SHAPES = [(), (1,), (0, 3), (7,), (5, 4), (3, 2, 6)]


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def flat(tensors):
    return torch.cat([tensor.double().flatten() for tensor in tensors])


def total_change(before, after):
    return torch.stack([growth.change(old, new) for old, new in zip(before, after, strict=True)]).sum(0)


@pytest.mark.parametrize("chunk", [4, 2**20])
def test_tensor_by_tensor_equals_one_long_vector(monkeypatch, chunk):
    monkeypatch.setattr(growth, "_CHUNK", chunk)
    before = [draw(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    before.append(draw(9, 8).T[::2])  # neither contiguous nor dense
    after = [tensor + draw(*tensor.shape, seed=50 + i, scale=0.3) for i, tensor in enumerate(before)]
    found = total_change(before, after)
    theta, new = flat(before), flat(after)
    delta = new - theta
    torch.testing.assert_close(found, torch.stack([theta @ theta, theta @ delta, delta @ delta]))
    torch.testing.assert_close(growth.squared_norm_after(found), new @ new)
    torch.testing.assert_close(growth.step_norm(found), delta.norm())
    torch.testing.assert_close(growth.alignment(found), torch.cosine_similarity(theta, delta, dim=0))
    torch.testing.assert_close(growth.direction_cosine(found), torch.cosine_similarity(theta, new, dim=0))
    torch.testing.assert_close(sum(growth.squared_norm(tensor) for tensor in after), new @ new)


def test_closed_forms_of_one_step():
    theta = draw(6, 5)
    doubled = growth.change(theta, 2 * theta)
    assert float(growth.direction_cosine(doubled)) == pytest.approx(1, abs=1e-15)
    assert float(growth.alignment(doubled)) == pytest.approx(1, abs=1e-15)
    assert float(growth.alignment(growth.change(theta, 0.5 * theta))) == pytest.approx(-1, abs=1e-15)
    across = growth.change(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]))
    assert across.tolist() == [9, 0, 16]
    assert float(growth.squared_norm_after(across)) == 25
    assert float(growth.direction_cosine(across)) == pytest.approx(0.6)
    oblique = growth.change(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 1.0]))
    assert float(growth.squared_norm_after(oblique)) == 5  # 2 + 2 · 1 + 1: without its factor 2 the cross term misses


def test_what_has_no_direction_is_not_a_number():
    theta, nothing = draw(4), torch.zeros(4, dtype=torch.float64)
    still = growth.change(theta, theta)
    assert float(growth.step_norm(still)) == 0
    assert growth.alignment(still).isnan()
    assert float(growth.direction_cosine(still)) == pytest.approx(1)
    for change in (growth.change(nothing, theta), growth.change(theta, nothing)):
        assert growth.direction_cosine(change).isnan()


def test_a_short_step_is_not_lost_in_rounding():
    theta, delta = draw(200, 50, scale=100.0), draw(200, 50, seed=1, scale=1e-7)
    new = theta + delta
    wanted = (new - theta).norm()
    torch.testing.assert_close(growth.step_norm(growth.change(theta, new)), wanted, rtol=1e-12, atol=0)
    naive = (new * new).sum() - 2 * (new * theta).sum() + (theta * theta).sum()
    assert abs(float(naive) / float(wanted) ** 2 - 1) > 0.01


def test_half_precision_is_summed_in_full():
    values = torch.full((300, 1000), 0.1, dtype=torch.bfloat16)
    each = float(values[0, 0])
    assert float(growth.squared_norm(values)) == pytest.approx(300_000 * each**2, rel=1e-12)
    found = growth.change(values, (values * 2).requires_grad_())
    assert found.tolist() == pytest.approx([300_000 * each**2] * 3, rel=1e-12)
    assert not found.requires_grad


@given(st.floats(1e-3, 1e3), st.integers(0, 30))
@settings(max_examples=20)
def test_cosines_know_no_scale(factor, seed):
    theta, new = draw(3, 4, seed=seed), draw(3, 4, seed=seed + 1)
    plain, scaled = growth.change(theta, new), growth.change(theta * factor, new * factor)
    torch.testing.assert_close(growth.alignment(scaled), growth.alignment(plain))
    torch.testing.assert_close(growth.direction_cosine(scaled), growth.direction_cosine(plain))
    torch.testing.assert_close(growth.step_norm(scaled), factor * growth.step_norm(plain))


def test_tensors_of_two_shapes_are_refused():
    with pytest.raises(InputError, match=r"^before is \[2, 3\] and after \[3, 2\]: they must be of one shape\.$"):
        growth.change(torch.zeros(2, 3), torch.zeros(3, 2))


# ---- series -----------------------------------------------------------------------------------------------------

STEPS = np.array([0, 1, 2, 5, 10, 100, 1000, 5000])


def test_each_trend_is_found_exactly_in_a_series_made_by_it():
    for name, power in (("t", 1), ("sqrt_t", 0.5), ("fourth_root_t", 0.25)):
        fits = growth.fit_trends(STEPS, 2 * STEPS**power + 1)
        assert len(fits) == 3
        assert fits[name] == pytest.approx((1, 2, 1), rel=1e-9)
        assert all(fits[other].r2 < 1 - 1e-3 for other in fits if other != name)


def test_a_trend_is_what_numpy_fits():
    norms = np.sqrt(3.0 + STEPS) + np.cos(STEPS)
    for name, trend in growth.fit_trends(STEPS, norms).items():
        x = growth.TRENDS[name](STEPS.astype(float))
        slope, intercept = np.polyfit(x, norms, 1)
        assert trend == pytest.approx((intercept, slope, np.corrcoef(x, norms)[0, 1] ** 2))


def test_r2_hardly_separates_the_roots_and_the_exponent_does():
    steps = np.arange(100, 10_000, 100)
    for power in (0.5, 0.25):
        fits = growth.fit_trends(steps, steps**power)
        assert min(fits["sqrt_t"].r2, fits["fourth_root_t"].r2) > 0.97
        steps_from_0 = np.concatenate([[0], steps])
        found = growth.growth_exponent(steps_from_0, np.sqrt(7.0 + steps_from_0 ** (2 * power)))
        assert found == pytest.approx((2 * power, power, 1), rel=1e-9)


def test_the_exponent_of_misaligned_steps_is_told_from_any_start():
    norms = np.sqrt(4 + 0.3 * STEPS)
    for start in (0, 2):
        assert growth.growth_exponent(STEPS[start:], norms[start:]) == pytest.approx((1, 0.5, 1), rel=1e-9)


@pytest.mark.filterwarnings("error")
def test_a_norm_that_does_not_grow_has_no_exponent():
    grows = np.sqrt(4.0 + STEPS)
    dips = grows.copy()
    dips[1] = 1.9
    for norms in (grows[::-1], dips, np.ones(8)):
        assert all(map(math.isnan, growth.growth_exponent(STEPS, norms)))
    assert all(map(math.isnan, growth.growth_exponent(STEPS[:3], grows[:3])))
    flat_line = growth.fit_trends(STEPS, np.ones(8))["t"]
    assert flat_line[:2] == (1, 0)
    assert math.isnan(flat_line.r2)
    for norms in (np.array([1.0, 2.0]), np.array([1.0, math.nan, 2.0, 3.0])):
        assert all(map(math.isnan, growth.fit_trends(STEPS[: len(norms)], norms)["t"]))


def test_the_norm_lies_between_its_models():
    walk = draw(30, 8).cumsum(0)
    norms, deltas = walk.norm(dim=1).numpy(), walk.diff(dim=0).norm(dim=1).numpy()
    found = growth.dynamics(norms, deltas)
    assert (found.observed <= found.aligned + 1e-9).all()
    by_hand = [norms[0] + deltas[:10].sum(), math.sqrt(norms[0] ** 2 + (deltas[:10] ** 2).sum())]
    assert [found.aligned[10], found.misaligned[10]] == pytest.approx(by_hand)
    parallel = growth.dynamics(np.array([1.0, 3.0, 4.0]), np.array([2.0, 1.0]))
    assert np.array_equal(parallel.observed, parallel.aligned)
    orthogonal = torch.eye(8, dtype=torch.float64).cumsum(0).norm(dim=1).numpy()
    misaligned = growth.dynamics(orthogonal, np.ones(7)).misaligned
    assert misaligned == pytest.approx(orthogonal)


def test_the_models_depend_on_the_spacing():
    walk = draw(31, 8).cumsum(0)
    every, third = (
        growth.dynamics(part.norm(dim=1).numpy(), part.diff(dim=0).norm(dim=1).numpy()) for part in (walk, walk[::3])
    )
    assert every.observed[-1] == third.observed[-1]
    assert third.aligned[-1] < 0.8 * every.aligned[-1]


@pytest.mark.parametrize("steps", [[0, 5, 5, 7], [3, 2, 4, 5], [-1, 0, 1, 2]])
def test_steps_must_rise(steps):
    for fit in (growth.fit_trends, growth.growth_exponent):
        with pytest.raises(InputError, match=r"^steps must rise from 0 or more"):
            fit(np.array(steps), np.ones(4))


def test_series_of_two_lengths_are_refused():
    with pytest.raises(InputError, match=r"^norms has 3 values for 4 steps: give one for each\.$"):
        growth.fit_trends(np.arange(4), np.ones(3))
    with pytest.raises(InputError, match=r"^step_norms has 3 values: for 3 norms there must be one less\.$"):
        growth.dynamics(np.ones(3), np.ones(3))


# ---- heads ------------------------------------------------------------------------------------------------------

HEADS, D_MODEL, D_HEAD, VOCAB = 3, 12, 4, 20


def head_weights(seed=0):
    value, output = draw(HEADS, D_MODEL, D_HEAD, seed=seed), draw(HEADS, D_HEAD, D_MODEL, seed=seed + 1)
    return value, output


def plain_score(circuit):
    """From all eigenvalues of the large matrix, most of which are zero."""
    values = torch.linalg.eigvals(circuit)
    return values.real.sum(-1) / values.abs().sum(-1)


def test_the_norm_of_a_product_is_that_of_the_large_matrix():
    value, output = head_weights()
    torch.testing.assert_close(growth.product_norm(value, output), torch.linalg.matrix_norm(value @ output))
    assert growth.product_norm(value[0].float(), output[0].float()).dtype == torch.float64
    turn = torch.linalg.qr(draw(D_HEAD, D_HEAD)).Q
    torch.testing.assert_close(growth.product_norm(value @ turn, turn.T @ output), growth.product_norm(value, output))


def test_copying_scores_are_those_of_the_large_circuits(monkeypatch):
    value, output = head_weights()
    torch.testing.assert_close(growth.copying_score(value, output), plain_score(value @ output))
    embed, unembed = draw(VOCAB, D_MODEL, seed=5), draw(D_MODEL, VOCAB, seed=6)
    monkeypatch.setattr(growth, "_CHUNK", 3 * D_MODEL)  # 20 words in pieces of three
    loop = growth.vocabulary_loop(unembed, embed)
    torch.testing.assert_close(loop, unembed @ embed)
    full = plain_score(embed @ value @ output @ unembed)
    torch.testing.assert_close(growth.copying_score(value, output, loop), full, rtol=1e-6, atol=1e-6)


def test_planted_heads_score_as_planted():
    value, output = torch.eye(D_MODEL)[:, :2], torch.eye(D_MODEL)[:2]
    quarter_turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    mixed = torch.diag(torch.tensor([3.0, -1.0]))
    for between, wanted in ((torch.eye(2), 1), (-torch.eye(2), -1), (quarter_turn, 0), (mixed, 0.5)):
        assert float(growth.copying_score(value @ between, output)) == pytest.approx(wanted, abs=1e-12)
    embed = draw(VOCAB, D_MODEL).float()
    assert float(growth.copying_score(value, output, growth.vocabulary_loop(embed.T, embed))) == pytest.approx(1)


def test_scale_and_basis_do_not_change_a_score():
    value, output = head_weights()
    change = draw(D_HEAD, D_HEAD, seed=9)
    score = growth.copying_score(value, output)
    torch.testing.assert_close(growth.copying_score(7 * value @ change, torch.linalg.inv(change) @ output), score)
    torch.testing.assert_close(growth.copying_score(-value, output), -score)


def test_an_empty_or_broken_head_is_not_a_number_and_spoils_no_other():
    value, output = head_weights()
    whole = growth.copying_score(value, output)
    value[0], output[1, 0, 0] = 0, math.inf
    found = growth.copying_score(value, output)
    assert found.isnan().tolist() == [True, True, False]
    assert found[2] == whole[2]


def test_the_null_of_the_copying_score():
    state = torch.get_rng_state()
    mean, std = growth.copying_null(512, 32)
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(mean) < 4 * std / math.sqrt(32)
    assert std == pytest.approx(1.5 / 32, rel=0.35)
    assert growth.copying_null(512, 32) == (mean, std)
    assert growth.copying_null(512, 32, seed=1) != (mean, std)
    identity = torch.eye(16, dtype=torch.float64)
    assert growth.copying_null(16, 4, identity) == pytest.approx(growth.copying_null(16, 4))
    stretched = growth.copying_null(64, 16, torch.diag(0.5 ** torch.arange(64, dtype=torch.float64)))
    assert stretched[1] > 2 * growth.copying_null(64, 16)[1]  # what W_U W_E is like counts
