"""Saturated attention, its approach and the homogeneity of activations, against definitions and closed forms."""

import math

import pytest
import torch
from hypothesis import given, strategies as st

from metaint.errors import InputError
from metaint.measures import saturation as S


def drawn(*shape, seed=0, scale=3.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def test_saturated_attention_of_the_example():
    scores = torch.tensor([1.0, 3.0, 3.0, 2.0])
    assert S.saturated(scores.softmax(-1)).tolist() == [0, 0.5, 0.5, 0]
    for kappa in (16, 64, 1024):
        close = S.sharpened(scores.softmax(-1), kappa)
        assert float((close - torch.tensor([0, 0.5, 0.5, 0])).abs().max()) <= math.exp(-kappa)


@given(kappa=st.floats(0.1, 80), seed=st.integers(0, 50))
def test_sharpened_is_the_softmax_of_scaled_scores(kappa, seed):
    scores = drawn(3, 7, seed=seed)
    torch.testing.assert_close(S.sharpened(scores.softmax(-1), kappa, tau=0), (kappa * scores).softmax(-1))


def test_powers_are_powers_however_they_are_reached():
    relative = S.relative_weights(drawn(5, 9).softmax(-1))
    kappas = [0.5, 1, 2, 3, 16, 64]
    for kappa, power in zip(kappas, S.powers(relative.clone(), kappas), strict=True):
        torch.testing.assert_close(power, relative**kappa, rtol=1e-12, atol=1e-300)
    (hard,) = S.powers(relative.clone(), [math.inf])
    assert (hard == (relative == 1)).all()


def test_zero_is_uniform_over_what_is_visible_and_masked_keys_never_get_weight():
    pattern = drawn(6, 6).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    uniform = torch.ones(6, 6).tril() / torch.arange(1, 7)[:, None]
    torch.testing.assert_close(S.sharpened(pattern, 0), uniform.double())
    for kappa in (0.0, 0.5, 1.0, 7.0, math.inf):
        found = S.sharpened(pattern, kappa)
        assert (found.triu(1) == 0).all()
        torch.testing.assert_close(found.sum(-1), torch.ones(6, dtype=torch.float64))


def test_an_empty_row_stays_empty():
    assert (S.sharpened(torch.zeros(2, 4), 3.0) == 0).all()
    assert (S.saturated(torch.zeros(2, 4)) == 0).all()


def test_ties_within_tau_count_as_equal():
    scores = torch.tensor([2.0, 2.0 - 0.05, 1.0], dtype=torch.float64)
    assert S.saturated(scores.softmax(-1), tau=0.1).tolist() == [0.5, 0.5, 0]
    assert S.saturated(scores.softmax(-1), tau=0.01).tolist() == [1, 0, 0]


def test_distance_to_saturated_falls_with_kappa_and_is_what_lies_off_the_ties():
    pattern = drawn(20, 8).softmax(-1)
    hard = S.saturated(pattern)
    distances = torch.stack([S.total_variation(S.sharpened(pattern, k), hard) for k in (0.5, 1, 2, 4, 8, math.inf)])
    assert (distances.diff(dim=0) < 0).all()
    assert (distances[-1] == 0).all()
    torch.testing.assert_close(distances[1], 1 - pattern.amax(-1))


def test_gap_bounds_what_is_left_off_the_maximum():
    scores = drawn(200, 12)
    top = scores.topk(2).values
    gaps = S.gap(S.relative_weights(scores.softmax(-1)))
    torch.testing.assert_close(gaps, top[:, 0] - top[:, 1])
    for kappa in (1.0, 3.0, 10.0):
        off = 1 - S.sharpened(scores.softmax(-1), kappa).amax(-1)
        assert (off <= 11 * (-kappa * gaps).exp() + 1e-12).all()
    assert S.gap(S.relative_weights(torch.tensor([[0.5, 0.5, 0.0]]))).isinf().all()
    assert S.gap(S.relative_weights(torch.tensor([[0.4, 0.4, 0.2]]))) == pytest.approx(math.log(2), rel=1e-5)


def test_bins_and_edges_agree():
    gaps = torch.cat([torch.tensor([1e-9, 1e-3, 1.0, 500.0, math.inf], dtype=torch.float64), drawn(500).abs()])
    edges = S.gap_edges()
    bins = S.gap_bin(gaps)
    assert (edges[bins] <= gaps).all()
    assert (gaps <= edges[bins + 1]).all()


@pytest.mark.parametrize("kappa", [1.0, 1.5, 4.0, 16.0, 200.0])
def test_prediction_from_the_histogram_holds_the_truth(kappa):
    scores = drawn(4000, 10, seed=3, scale=1.5)
    scores[:400, :3] = scores[:400].amax(-1, keepdim=True)  # ties
    relative = S.relative_weights(scores.softmax(-1))
    m, total = S.tied(relative).sum(-1), relative.sum(-1)
    bins = S.gap_bin(S.gap(relative))
    counts = [torch.zeros(S.GAP_BINS, dtype=torch.float64) for _ in range(3)]
    for count, value in zip(counts, (torch.ones_like(total), (total - m) / m, 1 / m), strict=True):
        count.scatter_add_(0, bins, value.double())
    low, high = S.predicted_variation(*counts, kappa)
    truth = S.total_variation(S.sharpened(scores.softmax(-1), kappa), S.saturated(scores.softmax(-1))).mean()
    assert low <= truth <= high
    if kappa >= 4:
        assert high < 3 * low


def test_prediction_needs_a_kappa_of_one_or_more():
    counts = torch.ones(3, S.GAP_BINS, dtype=torch.float64)
    with pytest.raises(InputError, match=r"kappa is 0\.5"):
        S.predicted_variation(*counts, 0.5)


@pytest.mark.parametrize(("kappas", "words"), [([], "kappas is empty"), ([1, -2], "-2"), ([math.nan], "nan")])
def test_bad_kappas(kappas, words):
    with pytest.raises(InputError, match=words):
        S.check_kappas(kappas)


def test_mismatched_and_centred_against_all_pairs():
    a, b = (torch.nn.functional.normalize(drawn(3, 5, 6, seed=s), dim=-1) for s in (1, 2))
    pairs = [
        torch.dot(a[i, t], b[j, u]) for i in range(3) for j in range(3) if i != j for t in range(5) for u in range(5)
    ]
    within = (a.sum(1) * b.sum(1)).sum()
    found = S.mismatched_cosine(a.sum((0, 1)), b.sum((0, 1)), within, torch.tensor(float(len(pairs))))
    assert float(found) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-12)
    x, y = a.flatten(0, 1), b.flatten(0, 1)
    cx, cy = x - x.mean(0), y - y.mean(0)
    wanted = (cx * cy).sum() / (cx.square().sum() * cy.square().sum()).sqrt()
    centred = S.centred_similarity((x * y).sum(-1).mean(), x.mean(0), y.mean(0))
    assert float(centred) == pytest.approx(float(wanted), abs=1e-12)
    assert float(S.centred_similarity(torch.tensor(1.0), x.mean(0), x.mean(0))) == pytest.approx(1)
    one = torch.tensor([1.0, 0.0])
    assert S.centred_similarity(torch.tensor(1.0), one, one).isnan()  # collapsed: nothing is left to correlate


def test_homogeneity_slope_of_a_monomial():
    u = drawn(4, 8)
    norms = [(c**3 * u).norm(dim=-1) for c in (512.0, 1024.0)]
    torch.testing.assert_close(S.homogeneity_slope(*norms, 512.0, 1024.0), torch.full((4,), 3.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("length", "mean", "split", "deviation"), [(83, 41.0120, 0.9759, 23.938), (700, 349.5014, 0.9971, 202.0699)]
)
def test_the_published_counts_come_out_and_so_do_the_true_ones(length, mean, split, deviation):
    # A head whose visible scores are all negative, which the published mask sends to the later keys.
    scores = -drawn(length, length).abs() - 0.01
    count = S.attended(S.published_pattern(1e12 * scores))
    assert float(count.mean()) == pytest.approx(mean, abs=5e-5)
    assert float((count > 1).double().mean()) == pytest.approx(split, abs=5e-5)
    assert float(count.std(correction=0)) == pytest.approx(deviation, abs=5e-4)
    # The same head under a causal mask attends to one key; a uniform one to (T + 1) / 2.
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    assert (S.attended((1e12 * scores).masked_fill(later, -math.inf).softmax(-1)) == 1).all()
    uniform = S.attended(torch.zeros(length, length).masked_fill(later, -math.inf).softmax(-1))
    assert float(uniform.mean()) == (length + 1) / 2
    assert float((uniform > 1).double().mean()) == pytest.approx((length - 1) / length)
