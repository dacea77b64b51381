"""Tiny random models of the architectures that TransformerLens names, by transformers' own classes.

`ZOO` names them; `build(name)` gives one of two to four layers, four heads and width 32. The weights are drawn large
enough that attention is far from uniform. Nothing of metaint is used here: what is built is the reference.
"""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

D_VOCAB, WIDTH, HEADS, D_HEAD, N_CTX = 100, 32, 4, 8, 128
BOS, EOS, PAD = 0, 1, 2
_WEIGHT_STD = 0.25


@dataclass(frozen=True)
class Entry:
    """One architecture: the type of its configuration, what differs from `_usual`, and the class of its model."""

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    auto: str = "AutoModelForCausalLM"
    # The layers that attend; None is all.
    attends: tuple[int, ...] | None = None


def build(name: str, seed: int = 0) -> Any:
    """The Hugging Face model of this name, in evaluation mode, float32, on the CPU, with eager attention."""
    import transformers

    entry = ZOO[name]
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        kind = type(transformers.AutoConfig.for_model(entry.kind))
        known = {*inspect.signature(kind.__init__).parameters, *kind.attribute_map, *vars(kind), *_ALWAYS}
        usual = {name: value for name, value in _usual().items() if name in known}
        config = kind(**{**usual, **entry.settings})
        kind = getattr(transformers, entry.auto)
        make = getattr(kind, "from_config", None) or kind
        model = make(config)
        _randomise(model, seed)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    model.config.architectures = [type(model).__name__]  # as every saved checkpoint says
    return model.eval()


def tokenizer() -> Any:
    """Words "w3", "w4", ... beside <bos>, <eos> and <pad>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<bos>", "<eos>", "<pad>", *(f"w{i}" for i in range(3, D_VOCAB))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "w3"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


# What every configuration knows, although not every one names it.
_ALWAYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _usual() -> dict[str, Any]:
    """Settings by the names that most configurations use."""
    return {
        "vocab_size": D_VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": N_CTX,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }


@torch.no_grad()
def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Draws matrices and biases anew about zero, and vectors that are named as weights of norms about one.

    What has another name (decay rates, time steps, gates of state-space layers) stays as the class draws it.
    """
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if parameter.data_ptr() in seen or not parameter.is_floating_point():
            continue
        if last in ("A_log", "D", "dt_bias", "dt_proj", "time_decay", "time_first", "recurrent_param") or "dt_" in name:
            continue
        seen.add(parameter.data_ptr())
        noise = torch.randn(parameter.shape, generator=generator) * _WEIGHT_STD
        parameter.copy_(noise + 1.0 if parameter.ndim == 1 and last == "weight" else noise)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of transformers or TransformerLens."""
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
        transformers_logging.set_verbosity(verbosity)


_HEAD = {"head_dim": D_HEAD}
_FULL = {"num_key_value_heads": HEADS}
_GPT2 = {"n_positions": N_CTX, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS}
_MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16}
_ROUTED |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
_MLA |= _FULL
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_conv": 4}
_MAMBA |= {"mamba_expand": 2, "mamba_chunk_size": 16}
_DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_FOUR = {"num_hidden_layers": 4}
_QWEN_HYBRID = {**_HEAD, **_DELTA, **_FOUR, "layer_types": ["linear_attention", "full_attention"] * 2}
_ENCODER = {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": HEADS}
_ENCODER |= {"decoder_attention_heads": HEADS, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
_T5 = {"d_model": WIDTH, "d_kv": D_HEAD, "d_ff": 64, "num_layers": 2, "num_heads": HEADS, "decoder_start_token_id": 2}
_SEQ = "AutoModelForSeq2SeqLM"

ZOO: dict[str, Entry] = {
    "AFMoE": Entry("afmoe", {**_HEAD, **_MOE, "num_dense_layers": 1, "sliding_window": 16}),
    "Apertus": Entry("apertus"),
    "Arcee": Entry("arcee", _HEAD),
    "Bamba": Entry(
        "bamba",
        {**_MAMBA, **_FOUR, "attn_layer_indices": [1, 3]},
        attends=(1, 3),
    ),
    "BERT": Entry("bert", {}, "BertForMaskedLM"),
    "BERT decoder": Entry("bert", {"is_decoder": True}, "BertLMHeadModel"),
    "BitNet": Entry("bitnet"),
    "BLOOM": Entry("bloom", {"n_layer": 2, "n_head": HEADS}),
    "CodeGen": Entry("codegen", {**_GPT2, "n_ctx": N_CTX, "rotary_dim": 4}),
    "Cohere": Entry("cohere"),
    "Cohere, query-key norm": Entry("cohere", {"use_qk_norm": True}),
    "Cohere 2": Entry("cohere2", {**_HEAD, **_FOUR, "sliding_window": 8}),
    "DeepSeek-V2": Entry("deepseek_v2", {**_MLA, **_ROUTED}),
    "DeepSeek-V2, no query rank": Entry("deepseek_v2", {**_MLA, **_ROUTED, "q_lora_rank": None}),
    "DeepSeek-V3": Entry("deepseek_v3", {**_MLA, **_ROUTED}),
    "DeepSeek-V4": Entry("deepseek_v4", {**_HEAD, **_ROUTED}),
    "Ernie 4.5": Entry("ernie4_5", _HEAD),
    "Ernie 4.5 MoE": Entry("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}),
    "EXAONE 4": Entry("exaone4", {"sliding_window": 16, "sliding_window_pattern": 2}),
    "Falcon": Entry("falcon", {"multi_query": True, "parallel_attn": True}),
    "Falcon, ALiBi": Entry("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False}),
    "Falcon, new decoder": Entry("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "Falcon-H1": Entry("falcon_h1", {**_HEAD, **_MAMBA, "mamba_d_ssm": 64}),
    "Falcon-Mamba": Entry(
        "falcon_mamba",
        {"state_size": 8, "time_step_rank": 4},
        attends=(),
    ),
    "FlexOLMo": Entry("flex_olmo", {"num_experts": 4, "num_experts_per_tok": 2}),
    "Gemma": Entry("gemma", _HEAD),
    "Gemma 2": Entry("gemma2", {**_HEAD, "sliding_window": 16, "query_pre_attn_scalar": 24}),
    "Gemma 3": Entry("gemma3_text", {**_HEAD, "sliding_window": 16, "query_pre_attn_scalar": 24}),
    "Gemma 4": Entry("gemma4_text", {**_HEAD, "hidden_size_per_layer_input": 0, "global_head_dim": 8}),
    "GLM": Entry("glm", _HEAD),
    "GLM-4": Entry("glm4", _HEAD),
    "GLM-4 MoE": Entry("glm4_moe", {**_HEAD, **_ROUTED}),
    "GLM-4 MoE Lite": Entry("glm4_moe_lite", {**_MLA, **_ROUTED}),
    "GLM MoE DSA": Entry("glm_moe_dsa", {**_MLA, **_ROUTED, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 16}),
    "GPT-1": Entry("openai-gpt", _GPT2),
    "GPT-2": Entry("gpt2", _GPT2),
    "GPT-2, inverse layer scale": Entry("gpt2", {**_GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "GPT-BigCode": Entry("gpt_bigcode", {**_GPT2, "multi_query": True}),
    "GPT-BigCode, many keys": Entry("gpt_bigcode", {**_GPT2, "multi_query": False}),
    "GPT-Neo": Entry("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    "GPT-NeoX": Entry("gpt_neox"),
    "GPT-NeoX, sequential": Entry("gpt_neox", {"use_parallel_residual": False}),
    "gpt-oss": Entry("gpt_oss", {**_HEAD, **_MOE, "sliding_window": 16}),
    "GPT-J": Entry("gptj", {**_GPT2, "rotary_dim": 4}),
    "Granite": Entry("granite", {"residual_multiplier": 0.5, "attention_multiplier": 0.25, "logits_scaling": 2.0}),
    "Granite MoE": Entry("granitemoe", {**_MOE, "residual_multiplier": 0.5, "attention_multiplier": 0.25}),
    "Granite MoE hybrid": Entry(
        "granitemoehybrid",
        {**_MAMBA, **_MOE, **_FOUR, "layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 32},
        attends=(1, 3),
    ),
    "Granite MoE hybrid, attention only": Entry(
        "granitemoehybrid", {**_MAMBA, **_MOE, "layer_types": ["attention"] * 2, "shared_intermediate_size": 32}
    ),
    "HRM": Entry("hrm_text", _HEAD),
    "HunYuan": Entry("hunyuan_v1_dense", _HEAD),
    "Jais 2": Entry("jais2", _HEAD),
    "Jamba": Entry(
        "jamba",
        {**_FOUR, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
        attends=(1, 3),
    ),
    "JetMoE": Entry("jetmoe", {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Laguna": Entry("laguna", {**_HEAD, **_MOE, "shared_expert_intermediate_size": 16}),
    "LFM2": Entry(
        "lfm2",
        {**_FOUR, "layer_types": ["conv", "full_attention"] * 2},
        attends=(1, 3),
    ),
    "LFM2 MoE": Entry(
        "lfm2_moe",
        {**_MOE, **_FOUR, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
        attends=(1, 3),
    ),
    "Llama": Entry("llama"),
    "Llama, biases": Entry("llama", {"attention_bias": True}),
    "Llama, many keys": Entry("llama", _FULL),
    "Llama 3.1 rotation": Entry(
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "Llama 4": Entry("llama4_text", {**_HEAD, **_MOE, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 64}),
    "Mamba": Entry(
        "mamba",
        {"state_size": 8, "time_step_rank": 4},
        attends=(),
    ),
    "Mamba 2": Entry(
        "mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16}, attends=()
    ),
    "MiniMax-M2": Entry("minimax_m2", {**_HEAD, **_MOE}),
    "Ministral 3": Entry("ministral3", _HEAD),
    "Mistral": Entry("mistral", {"sliding_window": 16}),
    "Mixtral": Entry("mixtral", _MOE),
    "ModernBERT decoder": Entry("modernbert-decoder", {"local_attention": 16}),
    "MPT": Entry("mpt", {"d_model": WIDTH, "n_heads": HEADS, "n_layers": 2, "max_seq_len": N_CTX}),
    "NanoChat": Entry("nanochat"),
    "Nemotron": Entry("nemotron"),
    "Nemotron-H": Entry(
        "nemotron_h",
        {
            **_HEAD,
            "layers_block_type": ["mamba", "attention", "mlp", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 16,
            "num_hidden_layers": 4,
        },
        attends=(1, 3),
    ),
    "OLMo": Entry("olmo", _FULL),
    "OLMo, clipped": Entry("olmo", {**_FULL, "clip_qkv": 1.0}),
    "OLMo 2": Entry("olmo2"),
    "OLMo 3": Entry("olmo3", {"sliding_window": 16}),
    "OLMo hybrid": Entry(
        "olmo_hybrid", {**_DELTA, **_FOUR, "layer_types": ["linear_attention", "full_attention"] * 2}, attends=(1, 3)
    ),
    "OLMoE": Entry("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "OPT": Entry("opt", {"ffn_dim": 64, "word_embed_proj_dim": WIDTH}),
    "OPT-350m": Entry("opt", {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "Phi": Entry("phi"),
    "Phi-3": Entry("phi3"),
    "Qwen 2": Entry("qwen2"),
    "Qwen 2 MoE": Entry("qwen2_moe", {**_MOE, "shared_expert_intermediate_size": 16}),
    "Qwen 3": Entry("qwen3", _HEAD),
    "Qwen 3 MoE": Entry("qwen3_moe", {**_HEAD, **_MOE}),
    "Qwen3-Next": Entry(
        "qwen3_next",
        {**_QWEN_HYBRID, **_MOE, "shared_expert_intermediate_size": 16},
        attends=(1, 3),
    ),
    "Qwen 3.5": Entry(
        "qwen3_5_text",
        _QWEN_HYBRID,
        attends=(1, 3),
    ),
    "Qwen 3.5 MoE": Entry(
        "qwen3_5_moe_text", {**_QWEN_HYBRID, **_MOE, "shared_expert_intermediate_size": 16}, attends=(1, 3)
    ),
    "RecurrentGemma": Entry(
        "recurrent_gemma",
        {
            **_HEAD,
            "num_hidden_layers": 4,
            "block_types": ["recurrent", "attention"],
            "lru_width": WIDTH,
            "attention_window_size": 16,
        },
        attends=(1, 3),
    ),
    "RoBERTa": Entry("roberta", {"max_position_embeddings": N_CTX + 8}, "RobertaForMaskedLM"),
    "RWKV": Entry(
        "rwkv",
        {"attention_hidden_size": WIDTH, "context_length": N_CTX},
        attends=(),
    ),
    "Seed-OSS": Entry("seed_oss", _HEAD),
    "SmolLM3": Entry("smollm3"),
    "StableLM": Entry("stablelm"),
    "StableLM, parallel": Entry("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "StarCoder 2": Entry("starcoder2", {"sliding_window": 16}),
    "VaultGemma": Entry("vaultgemma", {**_HEAD, "sliding_window": 16, "query_pre_attn_scalar": 24}),
    "XGLM": Entry("xglm", {"d_model": WIDTH, "ffn_dim": 64, "num_layers": 2, "attention_heads": HEADS}),
    "Youtu": Entry("youtu", _MLA),
    "Zamba2": Entry(
        "zamba2",
        {
            **_FULL,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_ngroups": 1,
            "chunk_size": 16,
            "num_mem_blocks": 1,
            "use_mem_rope": True,
            "attention_head_dim": 16,
        },
        attends=(1, 3),
    ),
    "BART": Entry("bart", _ENCODER, _SEQ),
    "mBART": Entry("mbart", _ENCODER, _SEQ),
    "M2M100": Entry("m2m_100", _ENCODER, _SEQ),
    "Pegasus": Entry("pegasus", _ENCODER, _SEQ),
    "T5": Entry("t5", _T5, _SEQ),
    "mT5": Entry("mt5", _T5, _SEQ),
    "LongT5": Entry("longt5", _T5, _SEQ),
    "Switch": Entry("switch_transformers", {**_T5, "num_experts": 2}, _SEQ),
    "PhiMoE": Entry("phimoe", _MOE),
    "ViT": Entry("vit", {"image_size": 32, "patch_size": 8}, "ViTModel"),
}
