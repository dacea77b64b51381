"""Metrics by sequence, against loops over positions."""

import math

import pytest
import torch

from metaint.circuits import metrics
from metaint.circuits.metrics import METRICS, metric_of, places_of, values_of
from metaint.errors import InputError

TOKENS = torch.tensor([[1, 2, 3, 1, 2, 4, 1, 2], [5, 6, 7, 8, 9, 1, 2, 3], [4, 4, 4, 1, 4, 1, 0, 2]])
LOGITS = torch.randn(3, 8, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def plain(score, everywhere=False):
    """Mean of score(logits, next token) by sequence, over places whose next token came after the last such token."""
    means = []
    for row, logits in zip(TOKENS.tolist(), LOGITS, strict=True):
        found = []
        for t in range(len(row) - 1):
            earlier = [s for s in range(t) if row[s] == row[t]]
            if everywhere or (earlier and row[earlier[-1] + 1] == row[t + 1]):
                found.append(float(score(logits[t], row[t + 1])))
        means.append(sum(found) / len(found) if found else math.nan)
    return torch.tensor(means, dtype=torch.float64)


def loss(logits, target):
    return -logits.log_softmax(-1)[target]


def right(logits, target):
    return logits.argmax() == target


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("in_context_loss", plain(loss)),
        ("induction_accuracy", plain(right)),
        ("next_token_loss", plain(loss, everywhere=True)),
    ],
)
def test_against_a_loop(name, expected):
    function = getattr(metrics, name)
    torch.testing.assert_close(function(LOGITS, TOKENS), expected, equal_nan=True)
    metric = metric_of(name)
    places = places_of(metric, TOKENS)
    torch.testing.assert_close(values_of(metric, LOGITS[places], TOKENS, places), expected, equal_nan=True)


def test_where_nothing_counts_is_not_a_number():
    assert torch.isnan(metrics.in_context_loss(LOGITS, TOKENS)).tolist() == [False, True, False]


def test_a_metric_of_ones_own_is_given_everything():
    metric = metric_of(lambda logits, tokens: logits[:, -1, 0] + tokens[:, 0])
    assert places_of(metric, TOKENS) is None
    torch.testing.assert_close(values_of(metric, LOGITS, TOKENS, None), LOGITS[:, -1, 0] + TOKENS[:, 0])


@pytest.mark.parametrize(("found", "said"), [(torch.zeros(3, 2), "[3, 2]"), (0.5, "float"), (torch.zeros(()), "[]")])
def test_a_metric_that_gives_anything_else(found, said):
    with pytest.raises(InputError) as error:
        values_of(metric_of(lambda logits, tokens: found), LOGITS, TOKENS, None)
    assert str(error.value) == f"metric gave {said}: it must give one value for each of 3 sequences."


def test_unknown_names():
    with pytest.raises(InputError) as error:
        metric_of("perplexity")
    assert str(error.value).startswith(
        f"metric is 'perplexity': choose one of {', '.join(METRICS)}, or give a function"
    )
