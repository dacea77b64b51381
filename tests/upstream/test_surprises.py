"""What TransformerLens does that its names don't say, written down so that a change upstream is noticed.

Each test is a reason for something in metaint. A failure here isn't a fault of ours: read which reason went away.
"""

import warnings
from importlib.metadata import version
from typing import Any

import pytest
import torch
import transformer_lens
from torch import Tensor

from tests.builders import N_HEADS, available_kinds, build

MAJOR = int(version("transformer-lens").split(".")[0])
KINDS = available_kinds()
BRIDGES = [kind for kind in KINDS if not kind.startswith("hooked")]
TOKENS = torch.arange(4, 24).reshape(2, 10)

bridges_only = pytest.mark.skipif(MAJOR < 3, reason="TransformerLens 2 has no bridge to be tested here")


def run(model: Any, **hooks: Any) -> Tensor:
    """Logits with these hooks in the first attention layer, as in `run(model, hook_z=edit)`."""
    with torch.no_grad(), model.hooks(fwd_hooks=[(f"blocks.0.attn.{name}", fn) for name, fn in hooks.items()]):
        return model(TOKENS)


def seen(model: Any, *names: str) -> dict[str, Tensor]:
    """What these hooks of the first block carry; a hook that never fires is missing."""
    found: dict[str, Tensor] = {}
    hooks = [(f"blocks.0.{n}", lambda x, hook, n=n: found.update({n: x.clone()})) for n in names]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model(TOKENS)
    return found


@bridges_only
@pytest.mark.parametrize("kind", ["native-attn-only", "native-mlp-ln", "native-gqa", "bert"])
def test_scores_are_the_pattern_and_an_edit_there_does_nothing(kind: str) -> None:
    """Where a module computes its own attention, hook_attn_scores carries what comes after the softmax."""
    model = build(kind)
    found = seen(model, "attn.hook_attn_scores", "attn.hook_pattern")
    assert torch.equal(found["attn.hook_attn_scores"], found["attn.hook_pattern"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(run(model, hook_attn_scores=lambda scores, hook: scores * 0), run(model))


@bridges_only
@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama", "gemma2"])
def test_scores_are_masked_by_the_smallest_number_and_not_by_infinity(kind: str) -> None:
    """-inf on HookedTransformer; raw bridges take Hugging Face's mask as it is."""
    scores = seen(build(kind), "attn.hook_attn_scores")["attn.hook_attn_scores"]
    assert not scores.isinf().any()
    assert scores.min() == torch.finfo(scores.dtype).min


@bridges_only
def test_an_edit_at_the_pattern_of_bert_does_nothing() -> None:
    """The hook is called after the wrapped module has used the pattern; TransformerLens 4 warns of it."""
    model = build("bert")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        edited = run(model, hook_pattern=lambda pattern, hook: pattern * 0)
    assert torch.equal(edited, run(model))
    assert any("discarded" in str(warning.message) for warning in caught) == (MAJOR >= 4)


@bridges_only
@pytest.mark.parametrize("kind", ["native-attn-only", "native-mlp-ln", "native-rms-rotary", "native-gqa"])
def test_an_edit_at_the_pattern_of_a_native_bridge_works_since_4(kind: str) -> None:
    """In TransformerLens 3 it does nothing, as on BERT."""
    model = build(kind)
    edited = run(model, hook_pattern=lambda pattern, hook: pattern * 0)
    assert torch.equal(edited, run(model)) == (MAJOR < 4)


@bridges_only
@pytest.mark.parametrize("kind", ["neox", "native-rms-rotary"])
def test_rotated_queries_are_announced_but_never_shown(kind: str) -> None:
    """hook_rot_q and hook_rot_k are in hook_dict and never fire, so that no hook carries what the scores use."""
    model = build(kind)
    assert "blocks.0.attn.hook_rot_q" in model.hook_dict
    assert seen(model, "attn.hook_rot_q", "attn.hook_rot_k") == {}


@bridges_only
@pytest.mark.parametrize("compatibility", [False, True])
@pytest.mark.parametrize("kind", BRIDGES)
def test_a_hook_is_called_once_whichever_of_its_names_is_used(kind: str, compatibility: bool) -> None:
    """The code can call a hook once for each alias; no name in hook_dict leads there."""
    model = build(kind)
    if compatibility:
        model.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    for name in ("attn.hook_q", "attn.q.hook_out", "attn.hook_pattern", "hook_resid_post", "hook_out"):
        calls: list[str] = []

        def count(activation: Tensor, hook: Any, calls: list[str] = calls) -> None:
            calls.append(hook.name)

        with torch.no_grad(), model.hooks(fwd_hooks=[(f"blocks.0.{name}", count)]):
            model(TOKENS)
        assert len(calls) == 1


@bridges_only
def test_a_raw_bridge_calls_a_hook_by_another_name_than_was_asked_for() -> None:
    """`hook.name` can't be used to tell the layer's hooks apart by their TransformerLens names."""
    calls: list[str] = []
    run(build("gpt2"), hook_q=lambda q, hook: calls.append(hook.name))
    assert calls == ["blocks.0.attn.q.hook_out"]


@bridges_only
@pytest.mark.parametrize("kind", ["native-gqa", "llama", "gemma2"])
def test_grouped_weights_keep_their_own_number_of_heads_on_bridges(kind: str) -> None:
    model = build(kind)
    assert model.W_Q.shape[1] == N_HEADS
    assert model.W_K.shape[1] == model.W_V.shape[1] == 2
    assert seen(model, "attn.hook_k")["attn.hook_k"].shape[2] == 2


@pytest.mark.skipif("hooked-gqa" not in KINDS, reason="this TransformerLens has no HookedTransformer")
def test_grouped_weights_are_repeated_on_hooked_transformers_but_their_hooks_are_not() -> None:
    model = build("hooked-gqa")
    assert model.W_K.shape[1] == model.W_V.shape[1] == N_HEADS
    assert seen(model, "attn.hook_k")["attn.hook_k"].shape[2] == 2


@bridges_only
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_missing_bias_is_an_error_and_not_zeros(kind: str) -> None:
    for name in ("b_Q", "b_K", "b_V", "b_O"):
        with pytest.raises(AttributeError if MAJOR >= 4 else TypeError):
            getattr(build(kind), name)


@bridges_only
def test_what_gemma_divides_its_scores_by_and_its_window_are_not_in_cfg() -> None:
    """cfg says -1 (the square root of the head's width) and no window; only the wrapped model knows better."""
    model = build("gemma2")
    assert model.cfg.attn_scale == -1.0
    assert model.cfg.window_size is None
    config = model.original_model.config
    assert (config.query_pre_attn_scalar, config.sliding_window) == (24, 16)


@bridges_only
def test_a_native_bridge_scales_its_scores_even_when_told_not_to() -> None:
    """use_attn_scale=False divides by one on HookedTransformer."""
    scaled, unscaled = build("native-mlp-ln"), build("native-mlp-ln", use_attn_scale=False)
    assert unscaled.cfg.use_attn_scale is False
    assert torch.equal(run(scaled), run(unscaled))


@bridges_only
def test_the_attention_output_of_bert_holds_the_stream() -> None:
    """hook_attn_out comes after LN(x + out): what attention wrote is at attn.o.hook_out."""
    found = seen(build("bert"), "hook_attn_out", "ln1.hook_out", "attn.o.hook_out")
    assert torch.equal(found["hook_attn_out"], found["ln1.hook_out"])
    assert not torch.allclose(found["hook_attn_out"], found["attn.o.hook_out"])


@bridges_only
def test_cfg_calls_bert_causal_in_3() -> None:
    assert build("bert").cfg.attention_dir == ("bidirectional" if MAJOR >= 4 else "causal")


@bridges_only
def test_some_bridges_compute_the_softmax_in_float32_whatever_their_dtype() -> None:
    pattern = seen(build("llama").to(torch.float64), "attn.hook_pattern")["attn.hook_pattern"]
    assert pattern.dtype == torch.float64
    assert torch.equal(pattern, pattern.float().double())


@bridges_only
@pytest.mark.parametrize("name", ["hook_mlp_in", "attn.hook_result"])
def test_asking_for_a_hook_that_is_switched_off_raises(name: str) -> None:
    """It is in hook_dict all the same."""
    model = build("gpt2")
    assert f"blocks.0.{name}" in model.hook_dict
    with pytest.raises(ValueError, match="is False"):
        seen(model, name)


@pytest.mark.skipif("hooked" not in KINDS, reason="this TransformerLens has no HookedTransformer")
def test_normalized_is_before_the_norms_weights_or_after_depending_on_the_version() -> None:
    model = build("hooked")
    normalized = seen(model, "ln1.hook_normalized")["ln1.hook_normalized"]
    unit = torch.allclose(normalized.std(-1, unbiased=False), torch.ones(normalized.shape[:2]), atol=1e-3)
    assert unit == (MAJOR >= 3)


@pytest.mark.skipif(MAJOR < 4, reason="HookedTransformer exists")
def test_asking_whether_a_removed_name_exists_raises() -> None:
    """hasattr catches AttributeError alone."""
    with pytest.raises(ImportError, match=r"removed in TransformerLens 4"):
        hasattr(transformer_lens, "HookedTransformer")
