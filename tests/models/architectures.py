"""Further architectures of Hugging Face's, tiny and random, for what only they have; `builders` has the usual kinds.

`folder(kind)` saves one with the test tokenizer, `bridged(kind)` opens it. Weights are drawn as `builders` draws them.
"""

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import metaint
from tests import builders
from tests.builders import D_MODEL, D_VOCAB, N_CTX, N_HEADS, N_LAYERS

needs_bridge = pytest.mark.skipif(not hasattr(builders._bridge(), "boot_transformers"), reason="opens with bridges")

_SPECIAL = {"bos_token_id": builders.BOS, "eos_token_id": builders.EOS, "pad_token_id": builders.PAD}
_SHAPE = {**builders._hf_shape(), **_SPECIAL}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2, "head_dim": D_MODEL // N_HEADS}
_LATENT = {"num_key_value_heads": N_HEADS, "q_lora_rank": 16, "kv_lora_rank": 16}
_LATENT |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
_EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
_EXPERTS |= {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_GPT = {"vocab_size": D_VOCAB, "n_positions": N_CTX, "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS}
_OPT = {"vocab_size": D_VOCAB, "hidden_size": D_MODEL, "ffn_dim": 64, "num_hidden_layers": N_LAYERS}
_OPT |= {"num_attention_heads": N_HEADS, "max_position_embeddings": N_CTX, **_SPECIAL}
_SIDES = {
    f"{side}_{what}": size
    for side in ("encoder", "decoder")
    for what, size in (("layers", N_LAYERS), ("attention_heads", N_HEADS), ("ffn_dim", 64))
}
_SEQUENCES = {**_SIDES, "vocab_size": D_VOCAB, "d_model": D_MODEL, "max_position_embeddings": N_CTX, **_SPECIAL}
_SEQUENCES |= {"decoder_start_token_id": builders.EOS, "forced_eos_token_id": builders.EOS}
_T5 = {"vocab_size": D_VOCAB, "d_model": D_MODEL, "d_kv": 8, "d_ff": 64, "num_layers": N_LAYERS, "num_heads": N_HEADS}
_T5 |= {"decoder_start_token_id": builders.PAD, **_SPECIAL}

# The class of the configuration, the class that opens the model, and the settings.
_KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "deepseek2": ("DeepseekV2Config", "AutoModelForCausalLM", {**_SHAPE, **_LATENT, **_EXPERTS}),
    "deepseek3": ("DeepseekV3Config", "AutoModelForCausalLM", {**_SHAPE, **_LATENT, **_EXPERTS}),
    "modernbert-decoder": ("ModernBertDecoderConfig", "AutoModelForCausalLM", {**_SHAPE, "cls_token_id": 0}),
    "gpt1": ("OpenAIGPTConfig", "AutoModelForCausalLM", {**_GPT, **_SPECIAL}),
    "phi3": ("Phi3Config", "AutoModelForCausalLM", {**_GROUPED}),
    "glm": ("GlmConfig", "AutoModelForCausalLM", {**_GROUPED}),
    "glm4": ("Glm4Config", "AutoModelForCausalLM", {**_GROUPED}),
    "cohere": ("CohereConfig", "AutoModelForCausalLM", {**_SHAPE, "num_key_value_heads": 2}),
    "opt350": (
        "OPTConfig",
        "AutoModelForCausalLM",
        {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "falcon40": (
        "FalconConfig",
        "AutoModelForCausalLM",
        {
            "vocab_size": D_VOCAB,
            "hidden_size": D_MODEL,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": N_HEADS,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            **_SPECIAL,
        },
    ),
    "phimoe": ("PhimoeConfig", "AutoModelForCausalLM", {**_SHAPE, "num_key_value_heads": 2, "num_local_experts": 4}),
    "t5": ("T5Config", "AutoModelForSeq2SeqLM", _T5),
    "bart": ("BartConfig", "AutoModelForSeq2SeqLM", _SEQUENCES),
    "marian": ("MarianConfig", "AutoModelForSeq2SeqLM", _SEQUENCES),
    "vit": (
        "ViTConfig",
        "AutoModelForImageClassification",
        {
            "hidden_size": D_MODEL,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": N_HEADS,
            "intermediate_size": 64,
            "image_size": 16,
            "patch_size": 4,
        },
    ),
}


def folder(kind: str) -> Path:
    """The folder of a kind, made once a process."""
    return _folder(kind)


def bridged(kind: str) -> Any:
    """The open model of a kind, on the CPU."""
    with builders._quiet():
        return metaint.open_model(folder(kind), device="cpu")


def original(kind: str) -> Any:
    """The model of a kind as transformers loads it."""
    import transformers

    with builders._quiet():
        return getattr(transformers, _KINDS[kind][1]).from_pretrained(folder(kind), attn_implementation="eager").eval()


@functools.cache
def _folder(kind: str) -> Path:
    import transformers

    config, auto, settings = _KINDS[kind]
    where = Path(tempfile.mkdtemp(dir=builders._session_folder(), prefix=kind))
    with builders._quiet(), torch.random.fork_rng(devices=[]):
        model = getattr(transformers, auto).from_config(getattr(transformers, config)(**settings))
        builders._randomise(model, 0)
        model.save_pretrained(where)
        if kind != "vit":
            builders._new_tokenizer().save_pretrained(where)
    return where
