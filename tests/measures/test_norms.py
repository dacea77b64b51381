"""Norms against plain arithmetic, closed forms and the identities they must keep."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from metaint.measures import norms


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def test_a_step_is_split_and_the_square_of_the_norm_accounted_for():
    x, step = draw(5, 7, 12), draw(5, 7, 12, seed=1, scale=3.0)
    split = norms.split_step(x, step)
    direction = x / norms.norm(x)[..., None]
    along = norms.dot(direction, step)
    torch.testing.assert_close(split.radial, along)
    torch.testing.assert_close(split.tangential, norms.norm(step - along[..., None] * direction))
    torch.testing.assert_close(split.radial**2 + split.tangential**2, split.square)
    grown = norms.norm(x + step) ** 2 - norms.norm(x) ** 2
    torch.testing.assert_close(split.cross + split.square, grown, rtol=1e-10, atol=1e-10)


def test_an_inner_product_over_a_vocabulary_is_true_to_rounding():
    logits = (4 * draw(8, 49152) + 10).float()
    p = logits.softmax(-1)
    torch.testing.assert_close(norms.dot(p, logits).double(), (p.double() * logits.double()).sum(-1), rtol=2e-6, atol=0)


def test_a_step_from_nothing_has_no_direction():
    split = norms.split_step(torch.zeros(2, 3), torch.ones(2, 3))
    assert torch.equal(split.radial, torch.zeros(2))
    torch.testing.assert_close(split.tangential, torch.full((2,), math.sqrt(3)))
    assert torch.equal(norms.cosine(torch.zeros(3), torch.ones(3)), torch.tensor(0.0))


@given(st.floats(0.01, 100), st.integers(0, 50))
def test_cosine_knows_no_scale(factor, seed):
    x, y = draw(4, 6, seed=seed), draw(4, 6, seed=seed + 1)
    torch.testing.assert_close(norms.cosine(x * factor, y), norms.cosine(x, y))
    torch.testing.assert_close(norms.cosine(x, -factor * x), -torch.ones(4, dtype=torch.float64))


def test_quantiles_of_the_histogram_are_those_of_the_values_to_a_bin():
    values = torch.exp(draw(20000))
    histogram = torch.bincount(norms.histogram_bin(values), minlength=norms.BINS).double()
    wanted = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    found = norms.histogram_quantile(histogram, wanted)
    torch.testing.assert_close(found, values.quantile(wanted), rtol=0.02, atol=0)
    edges = norms.bin_edges()
    inside = norms.histogram_bin(values)
    assert ((edges[inside] <= values * (1 + 1e-12)) & (values < edges[inside + 1] * (1 + 1e-12))).all()


def test_extreme_norms_fall_into_the_end_bins_and_nothing_is_nan():
    ends = norms.histogram_bin(torch.tensor([0.0, 1e-30, 1e30]))
    assert ends.tolist() == [0, 0, norms.BINS - 1]
    empty = norms.histogram_quantile(torch.zeros(2, norms.BINS), torch.tensor([0.5]))
    assert empty.shape == (1, 2)
    assert empty.isnan().all()


def test_exponential_growth_is_found_exactly():
    layers = torch.arange(5, 42)
    rate, r2 = norms.exponential_fit(layers, 2.0 + layers.double() * math.log(1.045))
    assert float(rate) == pytest.approx(1.045, abs=1e-12)
    assert float(r2) == pytest.approx(1.0)
    assert norms.exponential_fit(layers[:1], torch.ones(1))[0].isnan()
    rate, r2 = norms.exponential_fit(torch.arange(4), torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert float(rate) == pytest.approx(math.exp(0.2))
    assert float(r2) == pytest.approx(0.2)


def test_participation_ratio_of_known_spectra():
    assert float(norms.participation_ratio(torch.eye(7))) == pytest.approx(7)
    assert float(norms.participation_ratio(torch.diag(torch.tensor([1.0, 0, 0])))) == pytest.approx(1)
    values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    turn = torch.linalg.qr(draw(4, 4).float()).Q
    found = norms.participation_ratio(turn @ torch.diag(values) @ turn.T)
    assert float(found) == pytest.approx(64 / 22, rel=1e-5)


@pytest.mark.parametrize(("rank", "decay"), [(1, 1.0), (3, 1.0), (768, 0.99), (768, 0.9), (100, 1.0)])
def test_the_sketch_gives_the_participation_ratio_of_the_full_covariance(rank, decay):
    basis = torch.linalg.qr(draw(768, 768).float()).Q[:, :rank]
    spectrum = decay ** torch.arange(rank, dtype=torch.float32)
    full = (basis * spectrum) @ basis.T
    wanted = float(norms.participation_ratio(full))
    sketch = norms.sketch(768)
    found = float(norms.participation_ratio(sketch.T @ full @ sketch, 768))
    assert found == pytest.approx(wanted, rel=0.05)


def test_small_models_are_not_sketched():
    assert torch.equal(norms.sketch(32), torch.eye(32))
    assert norms.sketch(768).shape == (768, 128)


def test_massive_is_large_and_far_above_the_median():
    value, median = torch.tensor([99.0, 101.0, 500.0, 2000.0]), torch.tensor([0.01, 0.05, 0.6, 2.0])
    assert norms.is_massive(value, median).tolist() == [False, True, False, True]


@settings(max_examples=20)
@given(st.integers(0, 100), st.sampled_from(["layer", "rms"]))
def test_the_scale_of_a_norm_tells_the_length(seed, kind):
    x = draw(3, 16, seed=seed)
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    scale = (centred.square().mean(-1) + 1e-5).sqrt()
    torch.testing.assert_close(norms.norm_from_scale(scale, 16, 1e-5), norms.norm(centred))
