"""Weight by lag against plain loops, on patterns whose curves are known, and folded by HeadProbe."""

import numpy as np
import pytest
import torch

import metaint
from metaint.measures.lags import LAGS, Lagged
from metaint.measures.tile import Context, Tile
from metaint.tasks import repeated_tokens
from tests.builders import build

LENGTH = 24


def random_tile(causal, window=0, padding=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 6, (2, LENGTH), generator=generator)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, :padding] = False
    context = Context(torch.arange(LENGTH), mask, tokens, causal, window)
    scores = torch.randn(2, 3, LENGTH, LENGTH, generator=generator)
    pattern = scores.masked_fill(~context.visible[:, None], -torch.inf).softmax(-1).nan_to_num()
    return Tile(pattern.double(), context)


def plain_curves(tile):
    """One query after the other: sums of weights, of the null and of uniform attention, and how many."""
    context, n_heads = tile.context, tile.pattern.shape[1]
    tokens, mask = context.tokens.tolist(), context.mask.tolist()
    visible = context.visible
    weight, null = np.zeros((2, len(LAGS), n_heads)), np.zeros((2, len(LAGS), n_heads))
    uniform, count = np.zeros((2, len(LAGS))), np.zeros((2, len(LAGS)))
    for b in range(2):
        first = mask[b].index(True)
        for q in range(LENGTH):
            if not mask[b][q] or q == first:
                continue
            seen = [k for k in range(LENGTH) if visible[b, q, k]]
            before = [k for k in range(q) if mask[b][k] and tokens[b][k] == tokens[b][q]]
            for origin, place in enumerate((q, before[-1] if before else None)):
                for i, lag in enumerate(LAGS):
                    key = None if place is None else place + lag
                    if key not in seen or key == first:
                        continue
                    others = [k for k in seen if k != first]
                    for head in range(n_heads):
                        row = tile.pattern[b, head, q]
                        weight[origin, i, head] += float(row[key])
                        null[origin, i, head] += sum(float(row[k]) for k in others) / len(others)
                    uniform[origin, i] += 1 / len(seen)
                    count[origin, i] += 1
    return weight, null, uniform, count


@pytest.mark.parametrize(("causal", "window", "padding"), [(True, 0, 0), (True, 6, 0), (True, 0, 5), (False, 0, 3)])
def test_curves_are_those_of_plain_loops(causal, window, padding):
    tile = random_tile(causal, window, padding)
    read = Lagged.of(tile.context).read(tile, 1.0, torch.float64)
    for found, expected in zip(read, plain_curves(tile), strict=True):
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_a_peak_at_minus_one_is_a_previous_token_head_and_one_after_a_match_is_induction(gpt2):
    tokens = repeated_tokens(95, 20, batch=2, seed=0)
    length = tokens.shape[1]
    previous, induction = torch.zeros(length, length), torch.zeros(length, length)
    for q in range(length):
        previous[q, max(q - 1, 0)] = 1
        induction[q, q - 19 if q >= 20 else 0] = 1
    probe = metaint.HeadProbe(["entropy"], by_lag=True)
    hooks = dict(probe.fwd_hooks(gpt2, tokens))
    hooks[next(iter(hooks))](tokens, None)
    for layer in range(gpt2.cfg.n_layers):
        heads = torch.stack([previous, induction, previous, induction]).expand(2, -1, -1, -1)
        hooks[f"blocks.{layer}.attn.hook_pattern"](heads, None)
    curves = probe.to_dataset().isel(layer=0)
    assert curves["by_lag"].sel(lag=-1, head=0) == pytest.approx(1)
    assert int(curves["by_lag"].isel(head=0).idxmax("lag")) == -1
    assert curves["by_match_lag"].sel(lag=1, head=1) == pytest.approx(1)
    assert int(curves["by_match_lag"].isel(head=1).idxmax("lag")) == 1
    assert bool(curves["by_lag"].sel(lag=slice(1, None)).isnull().all())  # no query sees what comes after it
    assert (curves["by_lag"].sel(lag=-1) - curves["by_lag_uniform"].sel(lag=-1)).values[0] > 0.9


def test_curves_of_halves_merged_are_those_of_the_whole(any_model):
    tokens = torch.randint(3, 50, (4, min(20, any_model.cfg.n_ctx)), generator=torch.Generator().manual_seed(1))
    whole, left, right = (metaint.HeadProbe(["previous_token"], by_lag=True) for _ in range(3))
    metaint.scan(any_model, tokens, [whole], batch_size=3)
    metaint.scan(any_model, tokens[:2], [left])
    metaint.scan(any_model, tokens[2:], [right])
    left.merge_state(right)
    expected, found = whole.to_dataset(), left.to_dataset()
    for name in ("by_lag", "by_lag_null_mean", "by_lag_uniform", "by_lag_count", "by_match_lag"):
        np.testing.assert_allclose(found[name].values, expected[name].values, atol=1e-6)
    # The score of a kind is the curve at its lag.
    at_one = expected["by_lag"].sel(lag=-1).values
    np.testing.assert_allclose(at_one, expected["previous_token"].values, atol=1e-5)


def test_a_scan_with_curves_is_kept_and_handed_on(tmp_path):
    model = build("gpt2")
    scan = metaint.scan(model, torch.arange(5, 15).repeat(2, 2), [metaint.HeadProbe(by_lag=True)])
    metaint.save(scan, tmp_path / "scan.zarr")
    kept = metaint.load(tmp_path / "scan.zarr")["heads"]["by_lag"]
    np.testing.assert_array_equal(kept.values, scan["heads"]["by_lag"].values)
    assert metaint.tables_of(scan)
