"""What a scan keeps of bundles of sequences: the values, and whether two scans read the same tokens."""

import numpy as np
import pytest
import torch
import xarray as xr

import metaint
from metaint.probes.bundles import MOST_BUNDLES, fingerprints
from metaint.tasks import repeated_tokens
from metaint.toys.small import small_transformer

SIZES = {"n_layers": 2, "n_heads": 2, "d_model": 16, "d_mlp": 32, "d_vocab": 50, "n_ctx": 32}


@pytest.fixture(scope="module")
def model():
    return small_transformer(norm="pre", **SIZES)


def scanned(model, tokens, **options):
    return metaint.scan(model, tokens, [metaint.HeadProbe(), metaint.OutputProbe()], **options)


def test_tokens_are_told_apart_by_what_stands_where_and_not_by_padding():
    tokens = torch.tensor([[5, 6, 7, 8], [5, 7, 6, 8], [5, 6, 7, 9]])
    full = torch.ones_like(tokens, dtype=torch.bool)
    prints = fingerprints(tokens, full, 0)
    assert len(set(prints.tolist())) == 3
    left, right = (torch.nn.functional.pad(tokens, pad, value=1) for pad in ((2, 0), (0, 2)))
    for padded, pad in ((left, (2, 0)), (right, (0, 2))):
        mask = torch.nn.functional.pad(full, pad, value=False)
        assert torch.equal(fingerprints(padded, mask, 0), prints)
    start = fingerprints(tokens[:, :2], full[:, :2], 0)
    assert torch.equal(start + fingerprints(tokens, full, 2), prints)
    assert fingerprints(None, full, 0).tolist() == [0, 0, 0]


def test_random_tokens_never_have_the_same_print():
    tokens = torch.randint(0, 5, (20_000, 12), generator=torch.Generator().manual_seed(0)).unique(dim=0)
    prints = fingerprints(tokens, torch.ones_like(tokens, dtype=torch.bool), 0)
    assert len(prints.unique()) == len(tokens)


@pytest.mark.parametrize("group", ["heads", "outputs"])
def test_bundles_are_few_and_their_mean_is_the_score(model, group):
    data = scanned(model, repeated_tokens(50, 10, batch=32, seed=0))[group].to_dataset()
    assert data.sizes["bundle"] == MOST_BUNDLES
    for score in data["score"].values:
        if score in data:
            mean = data["bundle_value"].sel(score=score, drop=True).mean("bundle")
            np.testing.assert_allclose(mean, data[score], rtol=0.03, atol=0.02, err_msg=str(score))
    induction = data["bundle_value"].sel(score="induction" if group == "heads" else "induction_written")
    exact = data["induction" if group == "heads" else "induction_written"]
    np.testing.assert_allclose(induction.mean("bundle"), exact, rtol=1e-5)  # all bundles count alike


def test_they_are_the_same_however_the_tokens_came(model):
    tokens = repeated_tokens(50, 10, batch=6, seed=0)
    whole, single = (scanned(model, tokens, batch_size=size) for size in (6, 1))
    for group in ("heads", "outputs"):
        xr.testing.assert_equal(whole[group]["bundle_print"], single[group]["bundle_print"])
        xr.testing.assert_allclose(whole[group]["bundle_value"], single[group]["bundle_value"], atol=1e-4)
    halves = [metaint.HeadProbe() for _ in range(2)]
    for probe, part in zip(halves, tokens.split(3), strict=True):
        metaint.scan(model, part, [probe])
    halves[0].merge_state(halves[1])
    xr.testing.assert_equal(halves[0].to_dataset()["bundle_print"], whole["heads"]["bundle_print"])


def test_one_sequence_keeps_none_and_a_store_keeps_them(model, tmp_path):
    assert "bundle_value" not in scanned(model, torch.arange(10)[None])["heads"]
    scan = scanned(model, repeated_tokens(50, 10, batch=4, seed=0))
    loaded = metaint.load(metaint.save(scan, tmp_path / "scan.zarr"))
    xr.testing.assert_identical(loaded["heads"]["bundle_value"], scan["heads"]["bundle_value"])
    xr.testing.assert_equal(loaded["outputs"]["bundle_print"], scan["outputs"]["bundle_print"])
