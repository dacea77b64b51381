"""Composition scores against whole matrices, their null against rotations drawn at random, and TransformerLens."""

import math
from importlib.metadata import version

import pytest
import torch

from metaint.measures.composition import composition, composition_chance, read_factor, write_factor
from metaint.models.folded import folded_layers
from tests.builders import available_kinds, build

MAJOR = int(version("transformer-lens").split(".")[0])


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(count, d_model, d_head, seed=0):
    """Two thin factors [count, d_model, d_head] and [count, d_head, d_model] with unlike singular values."""
    scale = torch.linspace(0.2, 2, d_head, dtype=torch.float64)
    return gaussian(count, d_model, d_head, seed=seed) * scale, gaussian(count, d_head, d_model, seed=seed + 1)


def of(first, second):
    return composition(write_factor(*first), read_factor(*second))


def plain_score(M1, M2):
    """By the singular values of the three matrices, each whole."""
    product, one, two = (float(torch.linalg.svdvals(M).square().sum().sqrt()) for M in (M1 @ M2, M1, M2))
    return product / (one * two)


def rotation(d, generator):
    """Haar in O(d): the QR of a Gaussian with the signs of its triangle."""
    q, r = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


@pytest.mark.parametrize(("d_model", "d_head", "rank_to"), [(24, 4, 4), (24, 3, 6), (4, 6, 4), (5, 1, 1)])
def test_scores_are_those_of_whole_matrices(d_model, d_head, rank_to):
    first, second = heads(3, d_model, d_head), heads(2, d_model, rank_to, seed=5)
    found = of(first, second).score
    for i in range(3):
        for j in range(2):
            wanted = plain_score(first[0][i] @ first[1][i], second[0][j] @ second[1][j])
            assert float(found[i, j]) == pytest.approx(wanted, rel=1e-12)


def test_pieces_give_what_the_whole_gives(monkeypatch):
    first, second = heads(5, 16, 4), heads(3, 16, 4, seed=5)
    whole = of(first, second)
    monkeypatch.setattr("metaint.measures.composition._CHUNK", 1)
    for a, b in zip(whole, of(first, second), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("d_model", "d_head"), [(12, 3), (8, 2), (2, 1)])
def test_the_null_is_that_of_drawn_rotations(d_model, d_head):
    first, second = heads(1, d_model, d_head), heads(1, d_model, d_head, seed=5)
    generator, (score, z) = torch.Generator().manual_seed(0), of(first, second)
    turned = torch.stack([rotation(d_model, generator) for _ in range(20_000)])
    squares = of(first, (turned @ second[0], second[1].expand(len(turned), -1, -1))).score[0].square()
    assert float(squares.mean()) == pytest.approx(1 / d_model, rel=0.03)
    drawn = (score.square() - squares.mean()) / squares.std()
    assert float(drawn) == pytest.approx(float(z), rel=0.05, abs=0.02)
    assert composition_chance(d_model) == pytest.approx(float(squares.mean().sqrt()), rel=0.02)


def test_in_two_dimensions_the_null_is_a_cosine():
    """Two heads of one direction each at an angle t score |cos t|, and cos² t has mean 1/2 and variance 1/8."""
    angle = torch.linspace(0, 1.5, 7, dtype=torch.float64)
    direction = torch.stack([angle.cos(), angle.sin()])
    out = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    score, z = of((gaussian(1, 2, 1), out), (direction.mT[:, :, None], gaussian(7, 1, 2)))
    torch.testing.assert_close(score[0], angle.cos())
    torch.testing.assert_close(z[0], (angle.cos() ** 2 - 0.5) / math.sqrt(1 / 8))


def test_random_heads_score_chance():
    for d_model, d_head in ((768, 64), (256, 64)):
        first = gaussian(4, d_model, d_head), gaussian(4, d_head, d_model, seed=1)
        second = gaussian(12, d_model, d_head, seed=2), gaussian(12, d_head, d_model, seed=3)
        score, z = of(first, second)
        assert composition_chance(d_model) == 1 / math.sqrt(d_model)
        assert float(score.mean()) == pytest.approx(composition_chance(d_model), rel=0.01)
        assert score.flatten().tolist() == pytest.approx([composition_chance(d_model)] * 48, rel=0.05)
        assert abs(float(z.mean())) < 3 / math.sqrt(48)
        assert 0.7 < float(z.std()) < 1.3


def test_z_of_random_heads_is_near_to_standard_normal():
    _, z = of(heads(40, 128, 16), heads(40, 128, 16, seed=5))
    assert abs(float(z.mean())) < 0.1
    assert float(z.std()) == pytest.approx(1, abs=0.1)
    assert float((z > 1.64).double().mean()) == pytest.approx(0.05, abs=0.03)


def test_a_planted_pair_stands_out():
    first, second = heads(6, 96, 8), heads(6, 96, 8, seed=5)
    second[0][4] = first[1][2].mT  # head 4 reads the very directions that head 2 writes
    score, z = of(first, second)
    assert int(z.argmax()) == int(score.argmax()) == 2 * 6 + 4
    others = z.flatten()[torch.arange(36) != 16]
    assert z[2, 4] > 15 > 5 > others.max()


def test_heads_that_share_directions_evenly_score_one_over_the_root_of_their_number():
    for rank in (1, 4, 16):
        basis = torch.linalg.qr(gaussian(32, 32)).Q[:, :rank]
        score, _ = of((basis[None], basis.mT[None]), (basis[None], basis.mT[None]))
        assert float(score) == pytest.approx(1 / math.sqrt(rank), rel=1e-12)


def test_a_change_of_basis_inside_a_head_a_rotation_of_the_stream_and_scales_change_nothing():
    (value, out), (left, right) = heads(2, 20, 4), heads(3, 20, 4, seed=5)
    wanted = of((value, out), (left, right))
    S = torch.stack([gaussian(4, 4, seed=7) + 3 * torch.eye(4), gaussian(4, 4, seed=8) - 3 * torch.eye(4)])
    turn = rotation(20, torch.Generator().manual_seed(9))
    for first, second in (
        ((value @ S, S.inverse() @ out), (left, right)),
        ((value, out), (left @ S[0], S[0].inverse() @ right)),
        ((value @ turn[:4, :4], turn[:4, :4].inverse() @ out), (left, right)),
        ((value, out @ turn), (turn.mT @ left, right)),
        ((-3 * value, out), (left, 1e-6 * right)),
    ):
        for a, b in zip(of(first, second), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_what_reads_nothing_of_it_scores_zero_below_chance():
    basis = torch.linalg.qr(gaussian(32, 32)).Q
    some, rest = basis[:, :8], basis[:, 8:]
    score, z = of((some[None], some.mT[None]), (rest[None], rest.mT[None]))
    assert float(score) == pytest.approx(0, abs=1e-7)
    assert float(z) < -2


def test_zero_and_broken_weights_and_heads_without_a_direction_are_not_a_number():
    (value, out), second = heads(4, 8, 8), heads(2, 8, 8, seed=5)
    value[0], value[1], value[3] = 0, torch.nan, torch.linalg.qr(gaussian(8, 8)).Q
    out[3] = torch.linalg.qr(gaussian(8, 8, seed=3)).Q  # an orthogonal head writes all directions alike
    score, z = of((value, out), second)
    assert score[:2].isnan().all()
    assert z[[0, 1, 3]].isnan().all()
    assert score[2].isfinite().all()
    assert z[2].isfinite().all()
    assert score[3].tolist() == pytest.approx([1 / math.sqrt(8)] * 2, rel=1e-12)


def model_scores(model):
    """Scores of the heads of layer 0 with those of layer 1 for Q, K and V."""
    (_, _, first, written), (query, key, value, out) = folded_layers(model)
    halves = ((query, key.mT), (key, query.mT), (value, out))
    return {kind: of((first, written), half).score.numpy() for kind, half in zip("QKV", halves, strict=True)}


BRIDGES = [kind for kind in ("gpt2", "neox", "llama", "native-gqa") if kind in available_kinds()]


@pytest.mark.parametrize("kind", BRIDGES)
def test_it_equals_transformer_lens_on_a_processed_bridge(kind):
    """Raw, its scores leave out the gains of the norms, and so are others."""
    model = build(kind)
    ours = model_scores(model)
    for letter, wanted in ours.items():
        raw = model.all_composition_scores(letter)
        assert abs(getattr(raw, "scores", raw)[0, :, 1].detach().numpy() - wanted).max() > 1e-3
    model.enable_compatibility_mode(disable_warnings=True)
    for letter, wanted in ours.items():
        found = model.all_composition_scores(letter)
        assert getattr(found, "scores", found)[0, :, 1].detach().numpy() == pytest.approx(wanted, rel=1e-4)
        assert model_scores(model)[letter] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.skipif("hooked" not in available_kinds(), reason="this TransformerLens has no HookedTransformer")
@pytest.mark.parametrize("kind", ["hooked", "hooked-rotary", "hooked-gqa", "hooked-attn-only"])
def test_it_equals_transformer_lens_on_a_processed_hooked_transformer(kind):
    model = build(kind)
    ours = model_scores(model)
    state, rms = model.state_dict(), model.cfg.normalization_type == "RMS"
    if model.cfg.normalization_type is not None:
        model = build(kind, normalization_type="RMSPre" if rms else "LNPre")
        model.load_and_process_state_dict(state, fold_ln=True, center_writing_weights=not rms)
    for letter, wanted in ours.items():
        assert model.all_composition_scores(letter)[0, :, 1].detach().numpy() == pytest.approx(wanted, rel=1e-4)
        assert model_scores(model)[letter] == pytest.approx(wanted, rel=1e-5)
