"""Lengths through W_O, what position 0 holds and the spread of logits, against what they stand for."""

import pytest
import torch

from metaint.measures import outputs
from metaint.measures.inner import Norm, Readout


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("d_head", "d_model"), [(4, 12), (12, 4), (6, 6)])
def test_a_factor_keeps_every_length(d_head, d_model):
    out, vectors = draw(3, d_head, d_model), draw(2, 5, 3, d_head, seed=1)
    factor = outputs.length_factor(out)
    assert factor.shape == (3, d_head, min(d_head, d_model))
    written = torch.einsum("bphd,hdm->bphm", vectors, out)
    torch.testing.assert_close(outputs.through(vectors, factor).norm(dim=-1), written.norm(dim=-1))


def test_a_factor_keeps_lengths_that_W_O_nearly_takes_to_nothing():
    """In float32, where the Gram matrix would round them away."""
    out = draw(1, 4, 12).float()
    out[0, 3] *= 1e-6
    vector = torch.tensor([0.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    found = outputs.through(vector, outputs.length_factor(out)).norm()
    torch.testing.assert_close(found, out[0, 3].norm(), rtol=1e-4, atol=0)


def test_a_dead_head_has_no_length():
    assert (outputs.length_factor(torch.zeros(2, 4, 8)) == 0).all()


def test_drain_compares_the_first_real_value_with_the_other_real_ones():
    lengths = torch.tensor([[[9.0, 1.0, 2.0, 4.0]], [[2.0, 5.0, 3.0, 9.0]]])
    real = torch.tensor([[False, True, True, True], [True, True, True, False]])
    drain = outputs.drain_at_first(lengths, torch.tensor([1, 0]), real)
    assert drain.others.flatten().tolist() == [3.0, 4.0]
    assert drain.missing.flatten().tolist() == [2.0, 2.0]
    alone = outputs.drain_at_first(lengths, torch.tensor([1, 0]), torch.eye(2, 4, dtype=torch.bool).roll(1, 0))
    assert (alone.missing == 0).all()
    assert (alone.others == 0).all()


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_columns_give_centred_logits_through_a_frozen_norm(kind):
    norm = Norm(kind, 1e-5, draw(8, seed=2).abs() + 0.5, draw(8, seed=3))
    readout = Readout(draw(8, 30), draw(30, seed=4), norm, scale=0.5)
    vocabulary = outputs.Vocabulary.of(readout, torch.float64)
    stream, write = draw(1, 8, seed=5), draw(1, 8, seed=6)
    scale = norm.scale(stream)
    gained = (write - write.mean() if kind == "layer" else write) / scale * norm.gain
    logits = (gained @ readout.weight * readout.scale)[0]
    found = (write @ vocabulary.columns(torch.arange(30)).mT / scale)[0]
    torch.testing.assert_close(found, logits - logits.mean())
    torch.testing.assert_close((vocabulary.spread(write) / scale[..., 0])[0], logits.std(correction=0))


def test_a_large_vocabulary_has_the_spread_of_a_sample(monkeypatch):
    readout = Readout(draw(8, 3000))
    whole = outputs.Vocabulary.of(readout, torch.float64).spread(draw(5, 8, seed=7))
    monkeypatch.setattr(outputs, "SPREAD_TOKENS", 1000)
    part = outputs.Vocabulary.of(readout, torch.float64).spread(draw(5, 8, seed=7))
    torch.testing.assert_close(part, whole, rtol=0.08, atol=0)
    assert not torch.equal(part, whole)


def test_what_a_write_says_and_its_null_by_hand():
    columns, writes = torch.eye(4), torch.tensor([[[0.0, 3.0, 1.0, 2.0]]])
    pattern = torch.tensor([[[0.4, 0.3, 0.2, 0.1]]])
    visible = torch.tensor([[False, True, True, True]])
    followed = torch.tensor([[False, True, True, False]])
    said = outputs.said(writes, pattern, columns, torch.full((1, 1), 2.0), visible, followed)
    numbers = [float(part) for part in said]
    following = [0.3 * 1 + 0.2 * 2, 0.5 * 1.5, 0.5, 1.0]
    assert numbers == pytest.approx([0.3 * 3 + 0.2 * 1 + 0.1 * 2, 0.6 * 2, 0.6, 1.2, *following])
