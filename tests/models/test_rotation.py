import pytest
import torch

from metaint.models.reading import Unavailable, random_tokens, read
from metaint.models.rotation import plane_rotations, rotations
from tests.builders import available_kinds, build

ROTARY = [
    kind for kind in ("llama", "gemma2", "neox", "native-rms-rotary", "hooked-rotary") if kind in available_kinds()
]


@pytest.mark.parametrize("kind", ROTARY)
def test_a_query_and_a_key_some_lags_apart_score_as_in_the_model(kind):
    """Scores by R_D of raw queries and keys against the log ratios of the model's own pattern."""
    model = build(kind, **({"attn_logit_softcapping": 1e6} if kind == "gemma2" else {}))
    tokens, kept = random_tokens(model, 3, 9), {}
    names = [f"blocks.1.attn.{name}" for name in ("hook_q", "hook_k", "hook_pattern")]
    hooks = [(name, lambda x, hook, name=name: kept.update({name: x.double()})) for name in names]
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    query, key, pattern = (kept[name] for name in names)
    key = key.repeat_interleave(query.shape[2] // key.shape[2], 2)
    found = list(rotations(model, 9))[1]
    assert found is not None
    assert found.rotations.shape == (9, *[query.shape[-1]] * 2)
    assert torch.allclose(found.rotations[0], torch.eye(query.shape[-1]).double(), atol=1e-6)
    # log A[8, k] - log A[8, 8] is linear in the difference of scores, with one unknown factor for all of a model.
    pairs = [(query[:, 8], found.rotations[8 - k], key[:, k]) for k in range(9)]
    scores = torch.stack([torch.einsum("bhd,de,bhe->bh", *pair) for pair in pairs])
    wanted = (pattern[:, :, 8].movedim(-1, 0).log() - pattern[:, :, 8, 8].log())[:8]
    told = (scores - scores[8])[:8]
    factor = (wanted * told).sum() / told.square().sum()
    assert torch.allclose(told * factor, wanted, atol=1e-3)


def test_models_without_rotation_have_none():
    kind = "gpt2" if "gpt2" in available_kinds() else "hooked"
    assert list(rotations(build(kind), 4)) == [None, None]


@pytest.mark.parametrize("adjacent", [False, True])
def test_planes_turn_by_their_angles(adjacent):
    found = plane_rotations(6, 4, 5, 100.0, adjacent)
    x = torch.arange(1.0, 7.0).double()
    pairs = [(0, 1), (2, 3)] if adjacent else [(0, 2), (1, 3)]
    for t in range(5):
        wanted = x.clone()
        for i, (a, b) in enumerate(pairs):
            z = complex(x[a], x[b]) * torch.exp(torch.tensor(1j * t * 100.0 ** (-2 * i / 4))).item()
            wanted[a], wanted[b] = z.real, z.imag
        assert torch.allclose(x @ found[t], wanted, atol=1e-6)


@pytest.mark.skipif("llama" not in ROTARY, reason="needs a bridge with a hook on rotated queries")
def test_more_than_a_rotation_is_unavailable(monkeypatch):
    def squared(*args):
        reading = read(*args)
        for name in ("blocks.0.attn.hook_rot_q", "blocks.1.attn.hook_rot_q"):
            reading.activations[name] = reading.activations[name].square()
        return reading

    monkeypatch.setattr("metaint.models.rotation.read", squared)
    with pytest.raises(Unavailable, match="not only rotated"):
        list(rotations(build("llama"), 6))
