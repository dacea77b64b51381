"""A tiny Llama as a GGUF, written with the gguf package: what llama.cpp's converter writes, for tests."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType

HEADS, KV_HEADS, WIDTH, HIDDEN, LAYERS, CONTEXT = 4, 2, 64, 96, 2, 64
_SPECIAL = ["<bos>", "<eos>", "<unk>"]


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE: three special tokens, all bytes, and "he", "hell", "hello"."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges = ["h e", "l l", "he ll", "hell o"]
    return [*_SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in merges)], merges


def tiny_llama(seed: int = 0) -> Any:
    """The model of transformers that the files hold, every weight drawn at random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(vocabulary()[0]),
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        rms_norm_eps=1e-5,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator) + 0.1)
    return model


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """The weights under their names in a GGUF; rows of queries and keys in llama.cpp's order."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    tensors = {}
    for name, parameter in model.state_dict().items():
        values = parameter.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            values = interleaved(values, HEADS if "q_proj" in name else KV_HEADS)
        tensors[names.get_name(name, try_suffixes=(".weight",))] = values
    return tensors


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face keeps the two halves of the rotary pairs of a head apart, llama.cpp side by side."""
    half = len(weight) // heads // 2
    rows = [head * 2 * half + pair + side * half for head in range(heads) for pair in range(half) for side in (0, 1)]
    return weight[rows]


def halved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleaved`."""
    order = interleaved(np.arange(len(weight)), heads)
    return weight[np.argsort(order)]


def write_gguf(
    path: Path,
    model: Any = None,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    architecture: str = "llama",
    tokenizer: str = "gpt2",
    file_type: bool = True,
    tensors: dict[str, np.ndarray] | None = None,
    facts: dict[str, int | str] | None = None,
) -> Path:
    """Write the model, its matrices in this type; `tensors` and `facts` go beside (or in place of) its own."""
    model = tiny_llama() if model is None else model
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(CONTEXT)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    if file_type:
        ours = "ALL_F32" if kind.name == "F32" else f"MOSTLY_{kind.name}"
        writer.add_file_type(LlamaFileType[ours])
    tokens, merges = vocabulary()
    writer.add_tokenizer_model(tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([3 if token in _SPECIAL else 1 for token in tokens])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    for name, value in (facts or {}).items():
        (writer.add_uint16 if isinstance(value, int) else writer.add_string)(name, value)  # type: ignore[arg-type]
    for name, values in {**tensors_of(model), **(tensors or {})}.items():
        plain = values.ndim < 2
        raw = values if plain or kind.name == "F32" else gguf.quants.quantize(values, kind)
        writer.add_tensor(name, raw, raw_dtype=None if plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
