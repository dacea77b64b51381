"""Two scans beside each other: nothing differs from itself, pairs see more, and intervals hold what they say."""

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import spearmanr

import metaint
from metaint.errors import InputError
from metaint.scans.compare import _paired_bounds, _q_values, _reach, _unpaired_bounds
from metaint.tasks import repeated_tokens
from metaint.toys.small import small_transformer
from tests.planted import LENGTH, VOCAB

SIZES = {"n_layers": 2, "n_heads": 4, "d_model": 32, "d_mlp": 32, "d_vocab": VOCAB, "n_ctx": LENGTH}


def probes():
    return [metaint.HeadProbe(), metaint.OutputProbe()]


@pytest.fixture(scope="module")
def tokens():
    return repeated_tokens(VOCAB, LENGTH // 2, batch=12, seed=0)


@pytest.fixture(scope="module")
def model():
    return small_transformer(norm="pre", **SIZES)


@pytest.fixture(scope="module")
def scan(model, tokens):
    return metaint.scan(model, tokens, probes())


@pytest.fixture(scope="module")
def moved(model, tokens):
    """A scan of the model with a little noise on its weights."""
    generator = torch.Generator().manual_seed(0)
    other = small_transformer(norm="pre", **SIZES)
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs + 0.02 * theirs.std().nan_to_num() * torch.randn(theirs.shape, generator=generator))
    return metaint.scan(other, tokens, probes())


def test_a_scan_differs_from_itself_by_exactly_nothing(scan):
    comparison = metaint.compare(scan, scan)
    assert comparison.attrs["paired"] == 1
    assert set(comparison["group"].values) == {"heads", "outputs"}
    for name in ("difference", "low", "high"):
        known = comparison[name].values[np.isfinite(comparison["a"].values)]
        assert known.size
        assert (known == 0).all(), name
    assert float(comparison["q_value"].min()) == 1
    ranked = comparison["spread"] > 1e-12
    np.testing.assert_allclose(comparison["spearman"].where(ranked, 1), 1)
    assert int(comparison["gained"].sum()) == int(comparison["lost"].sum()) == 0
    assert set(comparison["jaccard"].dropna("label").values) <= {1.0}


def test_differences_are_b_less_a_with_an_interval_around_them(scan, moved):
    comparison = metaint.compare(scan, moved)
    for score in ("induction", "entropy"):
        one = comparison.sel(score=score)
        np.testing.assert_array_equal(one["difference"], moved["heads"][score].values - scan["heads"][score].values)
        assert float(one["spearman"]) == pytest.approx(
            spearmanr(scan["heads"][score].values.ravel(), moved["heads"][score].values.ravel()).statistic
        )
    assert bool((comparison["low"] <= comparison["difference"]).where(comparison["low"].notnull(), True).all())
    back = metaint.compare(moved, scan)
    np.testing.assert_allclose(back["low"], -comparison["high"])
    np.testing.assert_array_equal(back["gained"], comparison["lost"])


def test_pairs_see_more_than_two_intervals(scan, moved):
    paired = metaint.compare(scan, moved)
    without = moved.map_over_datasets(lambda data: data.drop_vars("bundle_print", errors="ignore"))
    unpaired = metaint.compare(scan, without)
    assert unpaired.attrs["paired"] == 0
    assert "single sequences" in unpaired.attrs["unpaired"]
    np.testing.assert_array_equal(paired["difference"], unpaired["difference"])
    narrower = (paired["high"] - paired["low"]) / (unpaired["high"] - unpaired["low"])
    assert float(narrower.sel(score=["previous_token", "entropy", "first_token"]).median()) < 0.5


def test_other_tokens_are_not_paired(model, scan, tokens):
    other = metaint.scan(model, repeated_tokens(VOCAB, LENGTH // 2, batch=12, seed=1), probes())
    comparison = metaint.compare(scan, other)
    assert comparison.attrs["unpaired"] == "the two read different tokens"
    assert float((comparison["q_value"] <= 0.05).mean()) < 0.05  # the same model: what differs is chance
    turned = metaint.compare(scan, metaint.scan(model, tokens.flip(0), probes()))
    assert turned.attrs["paired"] == 0


def test_intervals_hold_the_truth():
    """Two models of scores 0.4 and 0.45 that tokens move together: in 95 of 100 draws the interval holds 0.05."""
    generator = np.random.default_rng(0)
    runs, sequences = 3000, 10
    common = generator.normal(0, 0.1, (sequences, runs, 1))
    a, b = (score + common + generator.normal(0, 0.02, common.shape) for score in (0.4, 0.45))
    difference = b.mean(0) - a.mean(0)
    low, high, p = _paired_bounds(difference, a, b)
    assert 0.94 <= ((low <= 0.05) & (high >= 0.05)).mean() <= 0.96
    low, high, p = _paired_bounds(difference - 0.05, a, b - 0.05)
    assert 0.04 <= (p <= 0.05).mean() <= 0.06

    c = 0.45 + generator.normal(0, 0.1, common.shape)
    truth = {}
    for name, side in (("a", a), ("c", c)):
        half = 1.96 * side.std(0) / np.sqrt(sequences)  # what resampling ten sequences gives
        bounds = {"x": side.mean(0), "x_low": side.mean(0) - half, "x_high": side.mean(0) + half}
        dims = ("layer", "head")
        truth[name] = xr.Dataset({key: (dims, value) for key, value in bounds.items()}, attrs={"sequences": sequences})
    reaches = [_reach(truth[name], "x") for name in ("a", "c")]
    low, high, p = _unpaired_bounds(c.mean(0) - a.mean(0), *reaches, sequences - 1)
    assert 0.945 <= ((low <= 0.05) & (high >= 0.05)).mean() <= 0.98
    _, _, p = _unpaired_bounds(c.mean(0) - a.mean(0) - 0.05, *reaches, sequences - 1)
    assert 0.02 <= (p <= 0.05).mean() <= 0.055


def test_an_unpaired_interval_keeps_the_longer_side():
    reach_a, reach_b = [(np.array(0.1), np.array(0.02)), (np.array(0.4), np.array(0.01))]
    low, high, _ = _unpaired_bounds(np.array(0.6), reach_a, reach_b, 9)
    assert low == pytest.approx(0.6 - np.hypot(0.4, 0.02))
    assert high == pytest.approx(0.6 + np.hypot(0.01, 0.1))


def test_q_values_are_of_what_is_known():
    q_values = _q_values(np.array([[0.01, np.nan], [0.04, 0.5]]))
    np.testing.assert_allclose(q_values, [[0.03, np.nan], [0.06, 0.5]])


def test_labels_that_come_and_go(scan):
    heads = scan["heads"].to_dataset()
    changed = heads.copy(deep=True)
    for end in ("", "_low", "_high", "_off_sink", "_off_sink_low", "_off_sink_high"):
        changed[f"previous_token{end}"].loc[{"layer": 0, "head": 2}] = 0.9
    comparison = metaint.compare(heads, changed)
    gained = comparison["gained"].sel(label="previous_token")
    assert gained.values.sum() == 1
    assert bool(gained.sel(layer=0, head=2))
    assert not bool(comparison["borderline"].sel(label="previous_token", layer=0, head=2))
    assert str(comparison["rests_on"].sel(label="previous_token").values) == "previous_token"
    assert metaint.compare(changed, heads)["lost"].sel(label="previous_token").values.sum() == 1


def test_one_group_is_enough_and_outputs_need_both(scan):
    assert set(metaint.compare(scan, scan["heads"])["group"].values) == {"heads"}
    outputs = metaint.compare(scan["outputs"], scan["outputs"])
    assert set(outputs["group"].values) == {"outputs"}
    assert "gained" not in outputs


def test_what_cannot_be_compared_is_one_sentence(scan):
    small = metaint.scan(small_transformer(norm="pre", **{**SIZES, "n_heads": 2}))
    with pytest.raises(InputError, match="scan_a is of 2 layers x 4 heads and scan_b of 2 x 2: compare scans of mod"):
        metaint.compare(scan, small)
    with pytest.raises(InputError, match="scan_b is a dict: pass a scan"):
        metaint.compare(scan, {})
    with pytest.raises(InputError, match="scan_a has /heads and scan_b /outputs"):
        metaint.compare(scan["heads"], scan["outputs"])
    steps = xr.concat([scan["heads"].to_dataset()] * 2, "step")
    with pytest.raises(InputError, match=r"scan_b is a recording over steps: pass one of them"):
        metaint.compare(scan, xr.DataTree.from_dict({"/heads": steps}))
    weights = metaint.scan(small_transformer(norm="pre", **SIZES), probes=[metaint.WeightProbe()])
    with pytest.raises(InputError, match="scan_b no group of heads: scan both with"):
        metaint.compare(scan, weights)


def test_nothing_in_the_scans_changes(scan, moved):
    before = scan.copy(deep=True)
    metaint.compare(scan, moved)
    assert scan.identical(before)
