"""Which head is which: a planted order is found, and unrelated models have no match."""

import itertools

import numpy as np
import pytest
import torch

import metaint
from metaint.errors import InputError
from metaint.tasks import repeated_tokens
from metaint.toys.small import small_transformer
from tests.builders import available_kinds, build
from tests.planted import LENGTH, VOCAB, planted_model

ORDER = [3, 0, 6, 1, 7, 2, 5, 4]
NAMES = [f"{layer}.{head}" for layer in range(2) for head in range(8)]
MOVED = [f"{layer}.{ORDER.index(head)}" for layer in range(2) for head in range(8)]
needs_bridge = pytest.mark.skipif(
    "native-attn-only" not in available_kinds(), reason="needs TransformerBridge.boot_native"
)


@pytest.fixture(scope="module")
def tokens():
    return repeated_tokens(VOCAB, LENGTH // 2, batch=12, seed=0)


def attending_model():
    """A random model whose heads look somewhere: queries and keys larger than at the start of training."""
    model = small_transformer(
        norm="pre", n_layers=2, n_heads=8, d_model=64, d_mlp=64, d_vocab=VOCAB, n_ctx=LENGTH, seed=1
    )
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_Q.mul_(12)
            block.attn.W_K.mul_(12)
    return model


def in_another_order(model):
    """The same function with the heads of every layer in another order: head i is the old head ORDER[i]."""
    with torch.no_grad():
        for block in model.blocks:
            for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V"):
                parameter = getattr(block.attn, name)
                parameter.copy_(parameter[ORDER].clone())
    return model


def scanned(model, tokens):
    return metaint.scan(model, tokens, [metaint.HeadProbe(), metaint.OutputProbe()])


@needs_bridge
@pytest.mark.parametrize("across_layers", [False, True])
def test_a_planted_order_is_found(tokens, across_layers):
    plain = scanned(planted_model(0), tokens)
    table = metaint.match_heads(plain, plain.isel(head=ORDER), across_layers=across_layers)
    assert table["head"].tolist() == NAMES
    assert table["match"].tolist() == MOVED
    np.testing.assert_allclose(table["similarity"], 1)
    distinct = table.set_index("head")["matched"]
    assert distinct[["0.0", "0.1", "0.2", "0.3"]].all()  # planted; those that were left random are much alike
    assert (table["null_mean"] < table["null_high"]).all()
    assert (table["null_high"] < 1).all()


def test_heads_whose_weights_changed_places_are_found(tokens):
    plain, other = attending_model(), in_another_order(attending_model())
    torch.testing.assert_close(plain(tokens[:1]), other(tokens[:1]), atol=1e-4, rtol=1e-4)
    for across_layers in (False, True):
        table = metaint.match_heads(scanned(plain, tokens), scanned(other, tokens), across_layers=across_layers)
        assert table["match"].tolist() == MOVED
        assert table["matched"].all()


def test_unrelated_models_have_no_match():
    tokens = repeated_tokens(100, 32, batch=8, ids=(5, 95), seed=0)
    matched, heads = 0, 0
    for kind in available_kinds()[:3]:
        scans = [scanned(build(kind, seed), tokens) for seed in range(4)]
        for one, other in itertools.pairwise(scans):
            for across_layers in (False, True):
                table = metaint.match_heads(one, other, across_layers=across_layers)
                matched, heads = matched + int(table["matched"].sum()), heads + len(table)
    assert heads == 3 * 3 * 2 * 8
    assert matched <= 0.05 * heads


@needs_bridge
def test_patterns_tell_apart_heads_of_one_profile(tokens):
    """Two heads of the same scores, each of which looks where only its pattern says."""
    scan = scanned(planted_model(0), tokens)
    twins = scan.isel(head=[0, 0, 1, 1, 2, 2, 3, 3])
    patterns = np.random.default_rng(0).random((2, 8, 16, 16))
    other = patterns[:, ORDER]
    alone = metaint.match_heads(twins, twins.isel(head=ORDER))
    assert not alone["matched"].any()  # no margin over the twin
    both = metaint.match_heads(twins, twins.isel(head=ORDER), patterns=(patterns, other))
    assert both["match"].tolist() == MOVED
    assert (both["margin"] > 0.2).all()


@needs_bridge
def test_every_head_has_one_match_and_the_same_seed_the_same_table(tokens):
    one, other = (scanned(planted_model(seed), tokens) for seed in (0, 1))
    table = metaint.match_heads(one, other)
    assert sorted(table["match"]) == sorted(table["head"])
    assert (table["layer"] == table["match_layer"]).all()
    assert metaint.match_heads(one, other).equals(table)


@needs_bridge
def test_bad_input_is_one_sentence(tokens):
    scan = scanned(planted_model(0), tokens)
    with pytest.raises(InputError, match="scan_a is of 2 layers x 8 heads and scan_b of 2 x 3"):
        metaint.match_heads(scan, scan.isel(head=[0, 1, 2]))
    with pytest.raises(InputError, match=r"patterns holds an array of shape \[2, 4\]: give finite ones"):
        metaint.match_heads(scan, scan, patterns=(np.zeros((2, 4)), np.zeros((2, 4))))
    with pytest.raises(InputError, match="patterns are of different tokens"):
        metaint.match_heads(scan, scan, patterns=(np.zeros((2, 8, 3)), np.zeros((2, 8, 4))))
