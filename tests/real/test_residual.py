"""Lengths of SmolLM2's residual stream against Hugging Face's hidden states."""

import numpy as np
import pytest

import metaint

pytestmark = pytest.mark.real

BUCKETS = {"0": slice(0, 1), "1-3": slice(1, 4), "4-15": slice(4, 16), "16-63": slice(16, 64), "64+": slice(64, None)}


@pytest.fixture(scope="module")
def residual(smollm2, tokens):
    return metaint.scan(smollm2, tokens, [metaint.ResidualProbe()], batch_size=3)["residual"].to_dataset()


def test_norms_are_those_of_the_hidden_states(residual, plain):
    lengths = plain.streams.double().norm(dim=-1)
    assert list(residual["position"].values) == list(BUCKETS)
    for bucket, places in BUCKETS.items():
        part = lengths[:, :, places].flatten(1)
        at = residual.sel(position=bucket)
        np.testing.assert_allclose(at["norm_mean"], part.mean(1), rtol=1e-4, err_msg=bucket)
        np.testing.assert_allclose(at["norm_geometric"], part.log().mean(1).exp(), rtol=1e-4, err_msg=bucket)


def test_the_last_layer_stands_before_the_final_norm(residual, plain, reference):
    after = reference.model.model.norm(plain.streams[-1]).detach().double().norm(dim=-1)
    for bucket, places in BUCKETS.items():
        found = residual["norm_final_mean"].sel(position=bucket)
        np.testing.assert_allclose(found, after[:, places].mean(), rtol=1e-4, err_msg=bucket)


def test_growth_is_the_mean_ratio_of_lengths(residual, plain):
    lengths = plain.streams[:, :, 1:].double().norm(dim=-1)
    ratio = (lengths[1:] / lengths[:-1]).flatten(1).mean(1)
    np.testing.assert_allclose(residual["growth"], ratio, rtol=1e-4)


def test_the_largest_value_is_where_hugging_face_has_it(residual, plain, tokens):
    magnitudes = plain.streams.abs()
    for layer, stream in enumerate(magnitudes):
        at = residual.isel(layer=layer, rank=0)
        place = int(stream.argmax())
        sequence, position, dimension = np.unravel_index(place, stream.shape)
        np.testing.assert_allclose(at["massive_value"], stream.max(), rtol=1e-4)
        found = tuple(int(at[f"massive_{name}"]) for name in ("position", "dimension", "token"))
        assert found == (position, dimension, int(tokens[sequence, position])), layer
