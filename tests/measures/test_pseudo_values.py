"""Pseudo-values of the jackknife: against the ratio without each bundle, and intervals that cover as they say."""

import numpy as np
import pytest
import torch

from metaint.measures.resampling import pseudo_values


@pytest.mark.parametrize(("sequences", "bundles"), [(7, 7), (7, 3), (40, 16), (5, 16), (2, 2)])
def test_they_are_the_ratio_less_the_ratio_without_each_bundle(sequences, bundles):
    generator = torch.Generator().manual_seed(0)
    sums = torch.rand(sequences, 3, 2, generator=generator, dtype=torch.float64)
    counts = torch.randint(1, 9, (sequences, 3, 1), generator=generator).double()
    size = min(sequences, bundles)
    place = [i * size // sequences for i in range(sequences)]
    assert sorted(set(place)) == list(range(size))
    whole = sums.sum(0) / counts.sum(0)
    values = pseudo_values(sums, counts, bundles)
    for bundle in range(size):
        rest = [i for i in range(sequences) if place[i] != bundle]
        without = sums[rest].sum(0) / counts[rest].sum(0)
        torch.testing.assert_close(values[bundle], size * whole - (size - 1) * without)


def test_of_one_count_they_are_the_means_of_bundles_and_their_mean_the_ratio():
    sums = torch.rand(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = pseudo_values(sums, torch.full((12, 1), 5.0), 4)
    torch.testing.assert_close(values, sums.view(4, 3, 4).mean(1) / 5)
    torch.testing.assert_close(values.mean(0), sums.mean(0) / 5)


def test_what_one_bundle_alone_knows_has_none():
    counts = torch.tensor([[3.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    values = pseudo_values(torch.ones(3, 2), counts, 3)
    assert bool(values[0, 0].isnan())
    assert bool(values[:, 1].isfinite().all())


def test_an_interval_from_them_covers_the_truth():
    """Ratios of correlated sums and counts, whose truth is known: 95 % of Student's intervals hold it."""
    from scipy.stats import t

    generator = np.random.default_rng(0)
    counts = generator.integers(5, 15, (12, 4000)).astype(float)
    sums = counts * generator.gamma(8.0, 0.0375, (12, 4000))  # the mean is 0.3, a little skewed
    values = pseudo_values(torch.tensor(sums), torch.tensor(counts), 12).numpy()
    centre, half = values.mean(0), t.ppf(0.975, 11) * values.std(0, ddof=1) / np.sqrt(12)
    covered = float(np.mean(np.abs(centre - 0.3) <= half))
    assert 0.93 <= covered <= 0.96
