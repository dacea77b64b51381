"""Rank correlations against pandas and against correlations of residuals."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from metaint.measures.correlation import partial_spearman, ranks


def draw(n, seed):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(n))


def test_ranks_share_ties():
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (3, 200))).float()
    assert np.allclose(ranks(values).numpy(), pd.DataFrame(values.numpy().T).rank().T)


def test_plain_coefficient_is_that_of_pandas():
    x = draw(300, 0)
    y = (x + draw(300, 1)).round(decimals=1)
    value, low, high = partial_spearman(x, y, torch.zeros(0, 300), torch.arange(300) // 10)
    assert value == pytest.approx(np.corrcoef(pd.Series(x.numpy()).rank(), pd.Series(y.numpy()).rank())[0, 1], abs=1e-7)
    assert low < value < high
    assert partial_spearman(x, x.exp(), torch.zeros(0, 300), torch.arange(300))[0] == pytest.approx(1)
    assert partial_spearman(x, -x, torch.zeros(0, 300), torch.arange(300))[0] == pytest.approx(-1)


def test_partial_coefficient_is_the_correlation_of_residuals():
    z, w = draw(500, 2), draw(500, 3)
    x, y = z + draw(500, 4), z - w + draw(500, 5)
    table = np.stack([pd.Series(v.numpy()).rank() for v in (x, y, z, w)])
    design = np.stack([np.ones(500), *table[2:]], 1)
    residual = [row - design @ np.linalg.lstsq(design, row, rcond=None)[0] for row in table[:2]]
    wanted = np.corrcoef(residual)[0, 1]
    found = partial_spearman(x, y, torch.stack([z, w]), torch.arange(500))
    assert found[0] == pytest.approx(wanted, abs=1e-6)
    assert abs(found[0]) < 0.1  # all that x and y share is z
    assert partial_spearman(x, y, torch.zeros(0, 500), torch.arange(500))[0] > 0.3


def test_covariates_that_do_not_vary_or_repeat_are_harmless():
    x, y, z = draw(100, 0), draw(100, 1), draw(100, 2)
    plain = partial_spearman(x, y, z[None], torch.arange(100))[0]
    doubled = partial_spearman(x, y, torch.stack([z, z, torch.ones(100)]), torch.arange(100))[0]
    assert doubled == pytest.approx(plain, abs=1e-4)


def test_what_says_nothing_is_nan():
    x = draw(20, 0)
    assert all(
        math.isnan(v) for v in partial_spearman(x, torch.ones(20).double(), torch.zeros(0, 20), torch.arange(20))
    )
    value, low, high = partial_spearman(x, x.square(), torch.zeros(0, 20), torch.zeros(20, dtype=torch.long))
    assert not math.isnan(value)
    assert math.isnan(low)
    assert math.isnan(high)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    hits = 0
    for seed in range(60):
        x, y = draw(200, 2 * seed), draw(200, 2 * seed + 1)
        _, low, high = partial_spearman(x, y, torch.zeros(0, 200), torch.arange(200) // 4)
        hits += low <= 0 <= high
    assert hits >= 50
