"""Folded weights against what TransformerLens folds, and against what the hooks of raw models carry."""

import pytest
import torch

from metaint.models.folded import FoldedWeights, folded_layers, folded_weights, normalised
from metaint.models.reading import Unavailable, random_tokens, read, untouched
from metaint.toys.small import small_transformer
from tests.builders import _randomise, available_kinds, build
from tests.models.handmade import HandMade

KINDS = [kind for kind in available_kinds() if kind != "bert"]
BRIDGES = [kind for kind in KINDS if not kind.startswith("hooked")]
PRE_NORM = next(kind for kind in ("native-mlp-ln", "hooked") if kind in KINDS)
BARE = next(kind for kind in ("native-attn-only", "hooked-attn-only") if kind in KINDS)


def carried(model, layer, *hooks):
    names = [f"blocks.{layer}.{hook}" for hook in hooks]
    with untouched(model):
        reading = read(model, random_tokens(model, 2, 8), names)
    return [reading[name].double() for name in names]


def small(norm, **options):
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 32, "d_mlp": 64, "d_vocab": 50, "n_ctx": 16}
    model = small_transformer(norm=norm, **sizes, **options)
    _randomise(model, 0)
    for block in model.blocks:
        torch.nn.init.uniform_(block.ln1.w, 0.3, 2)
    return model


def close(actual, expected, atol=2e-6):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", BRIDGES)
def test_raw_and_folded_bridges_give_the_same_which_is_what_transformer_lens_folds(kind):
    model = build(kind)
    raw = list(folded_layers(model))
    model.enable_compatibility_mode(disable_warnings=True)
    for layer, (before, after) in enumerate(zip(raw, folded_layers(model), strict=True)):
        for name, a, b in zip(FoldedWeights._fields, before, after, strict=True):
            close(a, b)
            processed = getattr(model, name)[layer]
            if name != "W_O" or kind != "gemma2":  # which TransformerLens leaves to the norm after attention
                close(a, processed.repeat_interleave(len(a) // len(processed), 0))


@pytest.mark.skipif("hooked" not in KINDS, reason="this TransformerLens has no HookedTransformer")
@pytest.mark.parametrize("kind", ["hooked", "hooked-rotary", "hooked-gqa"])
def test_raw_and_folded_hooked_transformers_give_the_same(kind):
    raw = build(kind)
    rms = raw.cfg.normalization_type == "RMS"
    model = build(kind, normalization_type="RMSPre" if rms else "LNPre")
    model.load_and_process_state_dict(
        raw.state_dict(), fold_ln=True, center_writing_weights=not rms, center_unembed=False, fold_value_biases=False
    )
    for layer, (before, after) in enumerate(zip(folded_layers(raw), folded_layers(model), strict=True)):
        for name, a, b in zip(FoldedWeights._fields, before, after, strict=True):
            close(a, b)
            close(a, getattr(model, name)[layer])


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_are_reproduced(kind):
    """Differences between positions, in which biases cancel; grouped heads stand once for each query head."""
    model = build(kind)
    for layer, weights in enumerate(folded_layers(model)):
        stream, *actual = carried(model, layer, "hook_resid_pre", "attn.hook_q", "attn.hook_k", "attn.hook_v")
        vectors = normalised(model, layer, stream)
        vectors = vectors - vectors[:, :1]
        for weight, hook in zip(weights[:3], actual, strict=True):
            assert weight.shape == (model.cfg.n_heads, model.cfg.d_model, model.cfg.d_head)
            assert not weight.requires_grad
            groups = model.cfg.n_heads // hook.shape[2]
            expected = torch.einsum("bpm,hmd->bphd", vectors, weight.double())
            close(expected, (hook - hook[:, :1]).repeat_interleave(groups, 2), atol=5e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gemma2"])
def test_what_heads_write_is_what_attention_adds_less_what_no_layernorm_reads(kind):
    model = build(kind)
    z, out = carried(model, 1, "attn.hook_z", "hook_attn_out")
    written = torch.einsum("bphd,hdm->bpm", z, folded_weights(model, 1).W_O.double())
    if model.cfg.normalization_type == "LN":
        out = out - out.mean(-1, keepdim=True)
    close(written - written[:, :1], out - out[:, :1], atol=5e-5)


def assert_writes_the_direction_of(model, layer, hook):
    z, out = carried(model, layer, "attn.hook_z", hook)
    written = torch.einsum("bphd,hdm->bpm", z, folded_weights(model, layer).W_O.double())
    close(torch.cosine_similarity(written, out, -1), torch.ones(out.shape[:2], dtype=torch.float64))
    plain = torch.einsum("bphd,hdm->bpm", z, model.W_O[layer].detach().double())
    assert torch.cosine_similarity(plain, out, -1).max() < 0.999


@pytest.mark.skipif("gemma2" not in KINDS, reason="this TransformerLens opens no Gemma-2")
def test_the_gain_of_a_norm_after_attention_is_on_what_heads_write():
    model = build("gemma2")
    assert_writes_the_direction_of(model, 1, "hook_attn_out")
    # Its gains are 1 + w.
    gain = 1 + dict(model.blocks[1].ln1.named_parameters())["_original_component.weight"].detach()
    close(folded_weights(model, 1).W_Q, gain[:, None] * model.W_Q[1].detach())


def test_where_the_norm_follows_attention_nothing_is_read_through_it():
    model = small("output")
    torch.nn.init.zeros_(model.blocks[1].attn.b_O)
    torch.nn.init.zeros_(model.blocks[1].ln1.b)
    assert_writes_the_direction_of(model, 1, "hook_attn_out")
    stream, query = carried(model, 1, "hook_resid_pre", "attn.hook_q")
    assert torch.equal(normalised(model, 1, stream), stream)
    assert torch.equal(folded_weights(model, 1).W_Q, model.W_Q[1].detach())
    expected = torch.einsum("bpm,hmd->bphd", stream, folded_weights(model, 1).W_Q.double()) + model.b_Q[1].detach()
    close(expected, query, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_post_norm_is_refused(dtype):
    models = [small("post").to(dtype)] + ([build("bert")] if "bert" in available_kinds() else [])
    for model in models:
        for read_it in (
            lambda m: folded_weights(m, 0),
            lambda m: list(folded_layers(m)),
            lambda m: normalised(m, 0, 0),
        ):
            with pytest.raises(Unavailable, match=r"^a norm follows each addition \(post-norm\)"):
                read_it(model)


def test_a_norm_that_tells_another_length_is_refused(monkeypatch):
    model = small("pre")
    scale = model.blocks[1].ln1.hook_scale
    monkeypatch.setattr(scale, "forward", lambda x: x * 1.1)
    with pytest.raises(Unavailable, match=r"^blocks\.1\.ln1\.hook_scale is not the length of stream at attention"):
        folded_weights(model, 0)


def test_without_norms_all_is_as_it_is():
    for model in (build(BARE), HandMade()):
        for layer, weights in enumerate(folded_layers(model)):
            for name, weight in zip(FoldedWeights._fields, weights, strict=True):
                assert torch.equal(weight, getattr(model, name)[layer])
        vectors = torch.randn(3, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
        assert torch.equal(normalised(model, 0, vectors), vectors)


def test_half_precision_is_widened_before_it_is_multiplied():
    model = small("pre").to(torch.bfloat16).double()
    exact = folded_weights(model, 1)
    assert all(weight.dtype == torch.float64 for weight in exact)
    narrow = folded_weights(model.to(torch.bfloat16), 1)
    for a, b in zip(narrow, exact, strict=True):
        assert a.dtype == torch.float32
        close(a, b.float(), atol=1e-6)


def test_vectors_are_normalised_without_the_gain():
    vectors = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 4
    found = normalised(build(PRE_NORM), 1, vectors)
    close(found.mean(-1), torch.zeros(2, 3, dtype=torch.float64))
    close(found.square().mean(-1), torch.ones(2, 3, dtype=torch.float64), atol=1e-4)
    rms = next((kind for kind in ("llama", "hooked-rotary") if kind in KINDS), None)
    if rms is not None:
        found = normalised(build(rms), 1, vectors)
        close(found, vectors / vectors.square().mean(-1, keepdim=True).sqrt(), atol=1e-4)


def test_each_stack_is_read_once_and_one_pass_tells_the_places(monkeypatch):
    model, stacks, passes = small("pre"), [], []
    plain = type(model).W_Q.fget
    monkeypatch.setattr(type(model), "W_Q", property(lambda self: stacks.append(1) or plain(self)))
    model.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    before = [weights.W_Q.clone() for weights in folded_layers(model)]
    assert (len(stacks), len(passes)) == (1, 1)
    with torch.no_grad():
        model.blocks[1].ln1.w.mul_(2)
    after = [weights.W_Q for weights in folded_layers(model)]
    assert len(passes) == 1
    assert torch.equal(after[0], before[0])
    close(after[1], 2 * before[1])


def test_no_trace_is_left():
    model = small("pre").train()
    calls, state = [], torch.get_rng_state()
    model.add_hook("blocks.0.hook_resid_pre", lambda x, hook: calls.append(1))
    folded_weights(model, 0)
    assert calls == []
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
