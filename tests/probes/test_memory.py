import numpy as np
import pytest
import torch

import metaint
from metaint.errors import HookAuditError, InputError
from metaint.measures import in_context
from metaint.models.memory import Memories
from metaint.probes.memory import _BEHAVIOUR, DESCRIPTIONS, MemoryProbe
from metaint.toys.linear_attention import linear_attention
from metaint.toys.memory_transformer import memory_transformer, write_induction_head
from tests.builders import available_kinds, build

ATTENTION_ONLY = next(kind for kind in ("native-attn-only", "hooked-attn-only") if kind in available_kinds())
SIZES = {"d_vocab": 20, "n_ctx": 48, "d_model": 96}


def read(model, probe, tokens=None):
    tokens = torch.randint(model.cfg.d_vocab, (4, 12), generator=torch.Generator().manual_seed(0))
    return metaint.scan(model, tokens, [probe])["memory"].to_dataset()


def test_a_written_induction_head_recalls_and_one_without_does_not():
    model = memory_transformer(**SIZES)
    before = read(model, MemoryProbe(20))
    write_induction_head(model)
    after = read(model, MemoryProbe(20))
    assert float(after["ov_recall"][1, 0]) == 1
    assert float(after["key_composition_recall"][0, 0, 1, 0]) == 1
    assert float(after["previous_position_recall"][0, 0]) == 1
    assert float(after["previous_position_recall_early"][0, 0]) == 1
    assert float(before["ov_recall"][1, 0]) < 0.3
    assert float(before["previous_position_recall"][0, 0]) < 0.2
    assert float(after["ov_recall"][0, 0]) == float(before["ov_recall"][0, 0])  # the first layer's OV was left alone
    assert float(after["ov_recall_chance"]) == pytest.approx(1 / 20)
    assert float(after["key_composition_recall_chance"]) == pytest.approx(1 / 20)
    assert float(after["previous_position_recall_chance"]) == pytest.approx(1 / 47)
    # Only a later layer reads what a head writes.
    upper = after["key_composition_recall"].isel(layer=0, layer_to=1)
    assert int(after["key_composition_recall"].notnull().sum()) == int(upper.size)


def test_triggers_have_a_recall_of_their_own():
    model = memory_transformer(**SIZES)
    write_induction_head(model, triggers=[3, 5, 7])
    found = read(model, MemoryProbe(20, triggers=[3, 5, 7]))
    assert float(found["key_composition_recall_triggers"][0, 0, 1, 0]) == 1
    assert float(found["key_composition_recall"][0, 0, 1, 0]) < 0.6
    assert float(found["key_composition_recall_triggers_chance"]) == pytest.approx(1 / 3)
    assert "key_composition_recall_triggers" not in read(model, MemoryProbe(20))


def test_bigram_kl_is_zero_for_a_feed_forward_that_knows_them():
    model = memory_transformer(**{**SIZES, "d_vocab": 6}, feed_forward="linear").double()
    pi = torch.rand(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    with torch.no_grad():
        model.blocks[-1].mlp.W_F.copy_(torch.linalg.pinv(model.W_E) @ pi.log() @ torch.linalg.pinv(model.W_U))
    assert float(read(model, MemoryProbe(6, bigram=pi))["bigram_kl"]) == pytest.approx(0, abs=1e-8)
    other = pi.flip(1)
    expected = [float((other[i] * (other[i] / pi[i]).log()).sum()) for i in range(6)]
    assert float(read(model, MemoryProbe(6, bigram=other))["bigram_kl"]) == pytest.approx(np.mean(expected))
    spared = read(model, MemoryProbe(6, bigram=other, triggers=[1, 4]))["bigram_kl"]
    assert float(spared) == pytest.approx(np.mean([expected[i] for i in (0, 2, 3, 5)]))
    with pytest.raises(InputError, match=r"^bigram is \[6, 6\], for a model of 6 tokens without a linear W_F"):
        read(memory_transformer(**{**SIZES, "d_vocab": 6}), MemoryProbe(6, bigram=pi))


def test_behaviour_equals_a_plain_loop(any_model):
    tokens = torch.randint(4, 9, (3, 14), generator=torch.Generator().manual_seed(1))
    found = metaint.scan(any_model, tokens, [MemoryProbe(8)], batch_size=2)["memory"].to_dataset()
    if any_model.cfg.attention_dir == "bidirectional" or "Bert" in str(getattr(any_model.cfg, "architecture", "")):
        assert np.isnan(found["in_context_accuracy"])
        return
    with torch.no_grad():
        guess = any_model(tokens).argmax(-1)
    kinds = {name: [] for name in _BEHAVIOUR}
    for b in range(3):
        for t in range(13):
            earlier = [s for s in range(t) if tokens[b, s] == tokens[b, t]]
            right = bool(guess[b, t] == tokens[b, t + 1])
            if not earlier:
                kinds["first_occurrence_accuracy"].append(right)
            elif tokens[b, earlier[-1] + 1] == tokens[b, t + 1]:
                kinds["in_context_accuracy"].append(right)
                if tokens[b, t] != tokens[b, t + 1]:
                    kinds["in_context_accuracy_without_copies"].append(right)
    for name, hits in kinds.items():
        assert int(found[f"{name}_count"]) == len(hits)
        assert float(found[name]) == pytest.approx(np.mean(hits))


def test_padding_does_not_count():
    model = build(ATTENTION_ONLY)
    tokens = torch.randint(4, 9, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    found = metaint.scan(model, tokens, [MemoryProbe(8)], attention_mask=mask)["memory"].to_dataset()
    real = mask.bool()[:, 1:]
    known = in_context.follower(tokens)[:, :-1]
    assert int(found["in_context_accuracy_count"]) == int(((known == tokens[:, 1:]) & real).sum())
    assert int(found["first_occurrence_accuracy_count"]) == int(((known == -1) & real).sum())


def test_recalls_are_those_of_memories(any_model):
    found = read(any_model, MemoryProbe(30, seed=4))
    if bool(found["ov_recall"].isnull().all()):
        assert "Bert" in str(getattr(any_model.cfg, "architecture", ""))
        return
    memories = Memories(any_model, 30, seed=4)
    assert float(found["ov_recall"][1, 2]) == memories.ov([(1, 2)]).share()
    assert float(found["ov_recall_top5"][1, 2]) == memories.ov([(1, 2)]).share(5)
    recall = memories.key_composition((0, 3), (1, 1))
    assert float(found["key_composition_recall"][0, 3, 1, 1]) == recall.share()
    assert float(found["key_composition_recall_top5"][0, 3, 1, 1]) == recall.share(5)
    assert float(found["key_composition_recall_chance"]) == pytest.approx(1 / 30)
    for layer in range(2):
        one = metaint.previous_position_recall(any_model, f"{layer}.1")
        assert float(found["previous_position_recall"][layer, 1]) == one.share()
        assert float(found["previous_position_recall_chance"]) == pytest.approx(one.chance)
    assert all(found[name].attrs["description"] for name in found.data_vars)
    assert found.attrs["tokens_read"] == 30


def test_many_heads_keep_no_pairs(monkeypatch):
    monkeypatch.setattr("metaint.probes.memory.MOST_HEADS", 7)
    found = read(build(ATTENTION_ONLY), MemoryProbe(8))
    assert "key_composition_recall" not in found
    assert bool(found["ov_recall"].notnull().all())


def test_a_model_without_token_embeddings_is_refused():
    with pytest.raises(HookAuditError, match="reads token embeddings"):
        MemoryProbe().prepare(linear_attention(3))


def test_every_variable_is_described():
    found = read(memory_transformer(**SIZES), MemoryProbe(20, triggers=[1, 2]))
    assert set(map(str, found.data_vars)) <= set(DESCRIPTIONS)
