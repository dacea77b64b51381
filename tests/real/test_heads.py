"""Every score of `/heads` on SmolLM2 against the same measure of Hugging Face's own attentions."""

import math

import numpy as np
import pytest
import torch

import metaint
from metaint.measures.attention import HEAD_MEASURES
from tests.measures import plain as one_query

pytestmark = pytest.mark.real

KINDS = [measure.name for measure in HEAD_MEASURES if measure.form == "kind"]
TIES = ("tied_keys", "tied_keys_normalised", "tied_keys_log")
SINK_QUERIES, SINK_WEIGHT = 64, 0.3
TAU_SLACK = 1e-4  # Weights of two implementations differ by rounding, and so may what is within tau of the largest.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def heads(smollm2, tokens):
    return metaint.scan(smollm2, tokens, batch_size=3)["heads"].to_dataset()


@pytest.fixture(scope="module")
def patterns(plain):
    """Hugging Face's attentions in double precision: [layer, sequence, head, query, key]."""
    return plain.patterns.double()


def targets_of(kind, tokens):
    """Each query of each sequence with the keys that the kind names for it, where it names any."""
    length = tokens.shape[1]
    for sequence, row in enumerate(tokens.tolist()):
        for query in range(1, length):
            keys = one_query.keys_of(kind, row, [True] * length, query, causal=True)
            if keys:
                yield sequence, query, keys


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_the_weight_on_its_targets(heads, patterns, tokens, kind):
    queries = list(targets_of(kind, tokens))
    weights = [patterns[:, sequence, :, query, keys].sum(-1) for sequence, query, keys in queries]
    np.testing.assert_allclose(heads[kind], torch.stack(weights).mean(0), **TOLERANCE)
    uniform = [len(keys) / (query + 1) for _, query, keys in queries]
    np.testing.assert_allclose(heads[f"{kind}_uniform"], np.mean(uniform), **TOLERANCE)
    assert (heads[f"{kind}_count"] == len(queries)).all()


def statistics_of(rows):
    """Every statistic but the tie counts of rows [..., query, key] of a causal pattern, each [..., query]."""
    length = rows.shape[-1]
    visible = torch.arange(1, length + 1).double()
    lags = (torch.arange(length)[:, None] - torch.arange(length)).clamp(min=0).double()
    entropy = torch.special.entr(rows).sum(-1)
    mean = (rows * lags).sum(-1)
    return {
        "entropy": entropy / visible.clamp(min=2).log(),
        "effective_keys": entropy.exp(),
        "effective_keys_l2": 1 / rows.square().sum(-1),
        "averaging": torch.minimum(rows, (1 / visible)[:, None]).tril().sum(-1),
        "max_weight": rows.max(-1).values,
        "distance_mean": mean,
        "distance_std": (rows * (lags - mean[..., None]).square()).sum(-1).sqrt(),
    }


def test_a_statistic_is_the_mean_over_rows(heads, patterns):
    wanted = statistics_of(patterns)
    assert {*wanted, *TIES, "sink_rate", *KINDS} == {measure.name for measure in HEAD_MEASURES}
    for name, values in wanted.items():
        mean = values[..., 1:].mean((1, 3))
        np.testing.assert_allclose(heads[name], mean, **TOLERANCE, err_msg=name)
        assert (heads[f"{name}_count"] == values[0, :, 0, 1:].numel()).all()


def tie_scores(count, visible):
    return {
        "tied_keys": count,
        "tied_keys_normalised": (count - 1) / (visible - 1).clamp(min=1),
        "tied_keys_log": count.log() / visible.clamp(min=2).log(),
    }


@pytest.mark.parametrize("tau", one_query.TAUS)
def test_tied_keys_are_those_within_tau_of_the_largest(heads, patterns, tau):
    length = patterns.shape[-1]
    visible = torch.arange(1, length + 1).double()
    seen = torch.ones(length, length).tril().bool()
    largest = patterns.max(-1, keepdim=True).values

    def scores(within):
        near = (patterns >= largest * math.exp(-within)) & seen
        each = tie_scores(near.sum(-1).double(), visible)
        return {name: value[..., 1:].mean((1, 3)).numpy() for name, value in each.items()}

    fewest, most = scores(max(tau - TAU_SLACK, 0)), scores(tau + TAU_SLACK)
    for name in TIES:
        found = heads[name].sel(tau=tau).values
        assert (found >= fewest[name] - 1e-6).all(), name
        assert (found <= most[name] + 1e-6).all(), name


def test_the_sink_rate_is_the_share_of_sequences_with_a_sink(heads, patterns):
    weight = patterns[..., :SINK_QUERIES, 0].mean(-1)  # of each layer, sequence and head
    assert ((weight - SINK_WEIGHT).abs() > 1e-5).all()  # no head stands on the edge, where rounding decides
    np.testing.assert_allclose(heads["sink_rate"], (weight > SINK_WEIGHT).double().mean(1), **TOLERANCE)
    assert 0.1 < heads["sink_rate"].mean() < 0.9
