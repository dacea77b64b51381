import pytest
import torch

from metaint.errors import HookAuditError, InputError
from metaint.models.heads import head_of
from metaint.models.memory import (
    Memories,
    key_composition_recall,
    ov_recall,
    previous_position_recall,
)
from metaint.models.readout import final_norm_of
from tests.builders import available_kinds, build

ATTENTION_ONLY = next(kind for kind in ("native-attn-only", "hooked-attn-only") if kind in available_kinds())
NORMED = next(kind for kind in ("gpt2", "hooked") if kind in available_kinds())


def share(scores, targets):
    return (scores.argmax(1) == targets).double().mean().item()


def test_without_norms_the_recalls_are_products_of_the_weights():
    model = build(ATTENTION_ONLY).double()
    model.cfg.dtype = torch.float64  # to which TransformerLens 2 casts the pattern
    E, U, P = model.W_E, model.W_U, next(model.pos_embed.parameters())
    memories, ids = Memories(model, list(range(100))), torch.arange(100)
    for head in range(4):
        ov = model.W_V[0, head] @ model.W_O[0, head]
        assert memories.ov([(0, head)]).share() == share(E @ ov @ U, ids)
        qk = model.W_Q[1, 2] @ model.W_K[1, 2].T
        assert memories.key_composition((0, head), (1, 2)).share() == share(E @ qk @ (E @ ov).T, ids)
        W_Q, W_K = model.W_Q[1, head], model.W_K[1, head]
        scores = (P[1:] @ W_Q) @ (P[:-1] @ W_K).T
        assert previous_position_recall(model, f"1.{head}").share() == share(scores, torch.arange(len(P) - 1))
    both = E @ (model.W_V[0, 1] @ model.W_O[0, 1] + model.W_V[1, 3] @ model.W_O[1, 3]) @ U
    found = ov_recall(model, ["0.1", "1.3"], tokens=[5, 7, 90])
    assert found.share() == share(both[[5, 7, 90]], torch.tensor([5, 7, 90]))
    assert found.chance == pytest.approx(1 / 100)
    some = key_composition_recall(model, "0.1", "1.2", tokens=[5, 7, 90])
    assert torch.equal(some.rank, memories_of(model, [5, 7, 90]).key_composition((0, 1), (1, 2)).rank)
    assert some.chance == pytest.approx(1 / 3)


def memories_of(model, ids):
    return Memories(model, ids)


def test_pairs_together_are_pairs_one_by_one():
    memories = Memories(build(NORMED), 40)
    together = {(i, j): found.rank for i, j, found in memories.key_compositions(0, 1)}
    assert len(together) == 16
    for (i, j), rank in together.items():
        assert torch.equal(rank, memories.key_composition((0, i), (1, j)).rank)


@torch.no_grad()
def test_norms_act_as_in_the_model():
    """Against the modules of the model itself: a token seen through the first norm, its write through the last."""
    model = build(NORMED)
    ids = torch.arange(0, 100, 3)
    first, last = model.blocks[0].ln1, model.ln_final

    def plain(module, x):  # without its bias
        zero = torch.zeros(1, 1, x.shape[-1])
        return (module(x[None]) - module(zero))[0]

    seen = plain(first, model.W_E[ids])
    write = seen @ model.W_V[0, 1] @ model.W_O[0, 1]
    assert final_norm_of(model) is not None
    scores = plain(last, write) @ model.W_U
    assert ov_recall(model, ["0.1"], tokens=ids.tolist()).share() == pytest.approx(share(scores, ids), abs=0.03)


@pytest.mark.skipif("gpt2" not in available_kinds(), reason="needs a bridge that can fold its norms")
def test_a_folded_model_recalls_what_the_raw_one_does():
    raw, folded = build("gpt2"), build("gpt2")
    folded.enable_compatibility_mode()
    one, other = Memories(raw, 60), Memories(folded, 60)
    same = []
    for layer, head in ((0, 1), (1, 2)):
        pairs = [(one.ov([(layer, head)]), other.ov([(layer, head)]))]
        pairs += [(a[2], b[2]) for a, b in zip(one.key_compositions(0, 1), other.key_compositions(0, 1), strict=True)]
        same += [(a.rank == b.rank).double().mean() for a, b in pairs]
        positions = [previous_position_recall(model, f"{layer}.{head}").rank for model in (raw, folded)]
        same.append((positions[0] == positions[1]).double().mean())
    # Rounding may exchange two candidates that score nearly alike.
    assert torch.stack(same).min() > 0.97


def test_mlp0_is_the_stream_after_block_0_without_attention_and_position():
    model = build(NORMED)
    found = Memories(model, [3, 9], "mlp0").embedded
    with torch.no_grad():
        stream = model.W_E[[3, 9]][:, None] + (0 if model.b_O is None else model.b_O[0])
        wanted = stream + model.blocks[0].mlp(model.blocks[0].ln2(stream))
    assert torch.allclose(found, wanted[:, 0], atol=1e-4)
    assert not any(point._forward_hooks for point in model.hook_dict.values())


@pytest.mark.skipif("llama" not in available_kinds(), reason="needs a rotary model")
def test_rotary_heads_are_asked_for_lags():
    found = previous_position_recall(build("llama"), "1.2")
    assert found.chance == pytest.approx(1 / 64)
    assert 0 <= found.share() <= 1


def test_bad_input_gets_one_sentence():
    model = build(ATTENTION_ONLY)
    for call, sentence in (
        (lambda: head_of(model, "2.0"), "head is '2.0': name one from 0.0 to 1.3."),
        (lambda: ov_recall(model, "0.1"), 'heads is \'0.1\': give a list of heads, such as ["5.1", "5.5"].'),
        (lambda: ov_recall(model, ["0.1"], tokens=1), "tokens is 1: a recall needs at least 2 tokens."),
        (
            lambda: ov_recall(model, ["0.1"], tokens=[1, 100]),
            "tokens must be at least 2 different ids from 0 to 99.",
        ),
        (
            lambda: ov_recall(model, ["0.1"], embedding="mlp"),
            'embedding is \'mlp\': choose "token" or "mlp0".',
        ),
        (
            lambda: key_composition_recall(model, "1.0", "1.1"),
            "head is in layer 1 and head_to in layer 1: it must be in a later layer.",
        ),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert str(caught.value) == sentence


@pytest.mark.skipif("bert" not in available_kinds(), reason="needs a post-norm model")
def test_a_post_norm_model_is_refused():
    with pytest.raises(HookAuditError, match="attention_input"):
        ov_recall(build("bert"), ["0.1"])
