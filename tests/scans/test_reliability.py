"""Whether labels hold: q-values against a plain version and against planted chance, and halves of the sequences."""

import math

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import t

import metaint
from metaint.scans.evidence import Asked, Evidence
from metaint.scans.labels import THRESHOLDS
from metaint.scans.reliability import half_of, label_q_values
from metaint.tasks import repeated_tokens
from tests.builders import available_kinds, build
from tests.planted import LENGTH, PLANTED, VOCAB, planted_model

needs_bridge = pytest.mark.skipif(
    "native-attn-only" not in available_kinds(), reason="needs TransformerBridge.boot_native"
)


def case(score, low, *, floor=0.1, null_std=0.0, allowed=True):
    """Evidence of heads [1, head] with these scores and lower ends."""
    score, low = np.atleast_2d(score), np.atleast_2d(low)
    full = np.full(score.shape, 1.0)
    asked = Asked(score, low, score)
    return Evidence("x", score, low, score, floor * full, floor * full, null_std * full, asked, full * allowed > 0)


def plain_benjamini_hochberg(p_values):
    """The definition: the smallest level at which a step-up of the sorted p-values rejects each."""
    q_values = []
    for p in p_values:
        levels = [other * len(p_values) / sum(each <= other for each in p_values) for other in p_values if other >= p]
        q_values.append(min(1.0, *levels) if len(levels) > 1 else min(1.0, levels[0]))
    return q_values


def test_q_values_against_a_plain_version():
    generator = np.random.default_rng(0)
    cases, p_values = {}, []
    for label in ("induction", "sink"):
        score = generator.uniform(0, 0.6, 30)
        low = score - generator.uniform(0.01, 0.3, 30)
        cases[label] = case(score, low, null_std=0.02)
        for value, end in zip(score, low, strict=True):
            error = math.hypot((value - end) / 1.96 * math.sqrt(10 / 9), 0.02)
            p_values.append(float(t.sf((value - 0.1 - 0.05) / error, 9)))
    measured = np.concatenate([q.ravel() for q in label_q_values(cases, 0.05, 10).values()])
    np.testing.assert_allclose(measured, plain_benjamini_hochberg(p_values), rtol=1e-10)


def test_what_cannot_earn_a_label_counts_against_the_others_and_what_is_unknown_does_not():
    alone = label_q_values({"sink": case(0.3, 0.25)}, 0.05, 10)["sink"][0, 0]
    out = {"sink": case(0.3, 0.25), **{f"local {i}": case(0.9, 0.8, allowed=False) for i in range(9)}}
    q_values = label_q_values(out, 0.05, 10)
    assert q_values.pop("sink")[0, 0] == pytest.approx(10 * alone)
    assert all(q == 1 for q in q_values.values())
    unknown = {"sink": case([0.3, math.nan], [0.25, math.nan])}
    both = label_q_values(unknown, 0.05, 10)["sink"][0]
    assert both[0] == pytest.approx(alone)
    assert math.isnan(both[1])


def test_certain_scores_have_no_doubt_and_no_effect_no_label():
    q_values = label_q_values({"sink": case([1.0, 0.15], [1.0, 0.15])}, 0.05, 10)["sink"]
    assert q_values.tolist() == [[0.0, 1.0]]


def test_at_most_one_in_twenty_is_chance_among_heads_that_score_nothing():
    """Nine in ten heads lie exactly at the floor and margin; their sequences are drawn, and the false ones counted."""
    generator = np.random.default_rng(0)
    shares, heads, sequences = [], 200, 10
    for _ in range(200):
        truth = np.where(np.arange(heads) < 20, 0.3, 0.15)
        drawn = generator.normal(truth, 0.05, (sequences, heads))
        score = drawn.mean(0)
        weights = generator.multinomial(sequences, [1 / sequences] * sequences, 400)
        low = np.quantile(weights @ drawn / sequences, 0.025, axis=0)
        sure = label_q_values({"sink": case(score, low)}, 0.05, sequences)["sink"][0] <= 0.05
        assert sure[:20].mean() > 0.5
        shares.append(sure[20:].sum() / max(1, sure.sum()))
    assert np.mean(shares) <= 0.06


@needs_bridge
def test_planted_heads_hold_in_every_half():
    tokens = repeated_tokens(VOCAB, LENGTH // 2, batch=12, seed=0)
    table = metaint.label_heads(metaint.scan(planted_model(0), tokens), reliability=True)
    planted = table[[label == PLANTED.get(head) for head, label in zip(table["head"], table["label"], strict=True)]]
    assert len(planted) == len(PLANTED)
    assert (planted["agreement"] == 1).all()
    assert (planted["q_value"] < 0.01).all()
    assert table.attrs["agreement"]["induction"] == 1
    assert table.attrs["reliability"].startswith("at most 5% of the ")
    none = table.query("label == 'none'")
    assert none[["agreement", "q_value"]].isna().all(None)


def test_a_half_is_what_a_scan_of_its_sequences_says(repeated_scan, gpt2, repeated):
    heads = repeated_scan["heads"].to_dataset()
    half = half_of(heads, np.arange(len(repeated) // 2))
    alone = metaint.scan(gpt2, repeated[: len(repeated) // 2])["heads"].to_dataset()
    for name in ("induction", "previous_token", "entropy", "tied_keys", "local_mass"):
        np.testing.assert_allclose(half[name], alone[name], rtol=2e-4, atol=2e-4, err_msg=name)
    few = len(repeated) // 2
    values = metaint.scan(gpt2, repeated[:few])["heads"]["bundle_value"].sel(score="induction").values
    reach = t.ppf(0.975, few - 1) * values.std(0, ddof=1) / math.sqrt(few)
    np.testing.assert_allclose(half["induction_high"] - half["induction"], reach, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(half["induction_null_std"] / heads["induction_null_std"], math.sqrt(2), rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.08], ids=["large-weights", "std-0.02"])
def test_random_models_earn_almost_no_sure_labels(scale):
    sure, possible = 0, 0
    for kind in available_kinds()[:3]:
        for seed in range(2):
            model = build(kind, seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.mul_(scale)
            tokens = repeated_tokens(model.cfg.d_vocab, 32, batch=8, ids=(5, 95), seed=seed)
            table = metaint.label_heads(metaint.scan(model, tokens), reliability=True)
            sure += int((table["q_value"] <= 0.05).sum())
            possible += model.cfg.n_layers * model.cfg.n_heads * len(THRESHOLDS)
    assert sure <= possible / 100


def test_two_sequences_tell_of_chance_and_not_of_halves(gpt2, repeated):
    table = metaint.label_heads(metaint.scan(gpt2, repeated[:2]), {"local": 0.1}, reliability=True)
    assert table["agreement"].isna().all()
    assert "tell nothing of halves" in table.attrs["reliability"]
    alone = metaint.label_heads(metaint.scan(gpt2, repeated[:1]), {"local": 0.1}, reliability=True)
    assert alone["q_value"].isna().all()
    assert alone.attrs["reliability"].startswith("one sequence tells no interval")


def test_labels_are_those_without_and_the_table_of_two_columns_more(repeated_scan):
    plain, with_it = metaint.label_heads(repeated_scan), metaint.label_heads(repeated_scan, reliability=True)
    assert list(with_it.columns) == [*plain.columns, "agreement", "q_value"]
    assert with_it[plain.columns].equals(plain)
    assert with_it.attrs["not_judged"] == plain.attrs["not_judged"]
    old = repeated_scan["heads"].to_dataset().drop_dims(["bundle", "score"])
    assert isinstance(old, xr.Dataset)
    assert metaint.label_heads(old, reliability=True)["agreement"].isna().all()
