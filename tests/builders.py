"""Tiny models for tests, by kind: two layers, four heads, width 32, no download.

`build(kind)` returns a model, `available_kinds()` the kinds that the installed TransformerLens can build, and
`hf_directory(kind)` the folder a Hugging Face kind was saved to, with its tokenizer. Every weight, bias and
norm is drawn at random and large enough that attention is far from uniform: a test that a model left at its
initialisation would pass by accident (zero biases, unit norms) means something here.
"""

import atexit
import functools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
import transformer_lens
from transformers.utils import logging as transformers_logging

N_LAYERS, N_HEADS, D_MODEL, D_VOCAB, N_CTX = 2, 4, 32, 100, 128
BOS, EOS, PAD, UNK = 0, 1, 2, 3
_WEIGHT_STD = 0.25
_LIBRARY: Any = transformer_lens  # Its names differ between the versions that the tests run on.


def available_kinds() -> list[str]:
    """The kinds that the installed TransformerLens can build, in a fixed order."""
    kinds: list[str] = []
    if _hooked_transformer() is not None:
        kinds += _HOOKED
    if hasattr(_bridge(), "boot_native"):
        kinds += _NATIVE
    if hasattr(_bridge(), "boot_transformers"):
        kinds += _HF_CONFIGS
    return kinds


def build(kind: str, seed: int = 0, **overrides: Any) -> Any:
    """A model of this kind in eval mode, float32, on the CPU; `overrides` go to its configuration.

    The same arguments give the same weights, and the global random state is left as it was.
    """
    if kind not in available_kinds():
        raise ValueError(f"kind {kind!r} can't be built here; available: {', '.join(available_kinds())}")
    with quiet(), torch.random.fork_rng(devices=[]):
        if kind in _HF_CONFIGS:
            model = _bridge().boot_transformers(
                str(hf_directory(kind, seed, **overrides)), device="cpu", dtype=torch.float32
            )
        elif kind in _NATIVE:
            model = _bridge().boot_native({**_shape(), **_NATIVE[kind], **overrides}, tokenizer=tokenizer())
            _randomise(model, seed)
        else:
            model = _build_hooked({**_shape(), **_HOOKED[kind], **overrides})
            _randomise(model, seed)
    return model.eval()


def hf_directory(kind: str, seed: int = 0, **overrides: Any) -> Path:
    """The folder with config, weights and tokenizer of a Hugging Face kind; made once per process.

    Raises KeyError for a kind that isn't a Hugging Face one.
    """
    return _hf_directory(kind, seed, tuple(sorted(overrides.items())))


@functools.cache
def tokenizer() -> Any:
    """A word tokenizer whose words are "w4", "w5", ... beside <bos>, <eos>, <pad> and <unk>.

    Opened from a folder, since TransformerLens opens a tokenizer a second time by its `name_or_path`.
    """
    from transformers import PreTrainedTokenizerFast

    folder = _session_folder() / "tokenizer"
    _new_tokenizer().save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _new_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<bos>", "<eos>", "<pad>", "<unk>"]
    words = special + [f"w{i}" for i in range(len(special), D_VOCAB)]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def _shape() -> dict[str, Any]:
    return {
        "n_layers": N_LAYERS,
        "n_heads": N_HEADS,
        "d_model": D_MODEL,
        "d_head": D_MODEL // N_HEADS,
        "d_vocab": D_VOCAB,
        "n_ctx": N_CTX,
    }


_NATIVE: dict[str, dict[str, Any]] = {
    "native-attn-only": {"attn_only": True, "normalization_type": None},
    "native-mlp-ln": {"d_mlp": 64, "act_fn": "gelu", "normalization_type": "LN"},
    "native-rms-rotary": {
        "d_mlp": 64,
        "act_fn": "silu",
        "gated_mlp": True,
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
    },
    "native-gqa": {"d_mlp": 64, "act_fn": "gelu", "normalization_type": "LN", "n_key_value_heads": 2},
}

_HOOKED: dict[str, dict[str, Any]] = {
    "hooked": {"d_mlp": 64, "act_fn": "gelu", "normalization_type": "LN"},
    "hooked-attn-only": {"attn_only": True, "normalization_type": None},
    "hooked-rotary": {
        "d_mlp": 64,
        "act_fn": "silu",
        "gated_mlp": True,
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_dim": D_MODEL // N_HEADS,
    },
    "hooked-gqa": {"d_mlp": 64, "act_fn": "gelu", "normalization_type": "LN", "n_key_value_heads": 2},
}


def _gpt2(**overrides: Any) -> Any:
    from transformers import GPT2Config

    sizes = {"vocab_size": D_VOCAB, "n_positions": N_CTX, "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS}
    return GPT2Config(**{**sizes, **overrides})


def _neox(**overrides: Any) -> Any:
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(**{**_hf_shape(), "use_parallel_residual": True, **overrides})


def _llama(**overrides: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**{**_hf_shape(), "num_key_value_heads": 2, **overrides})


def _gemma2(**overrides: Any) -> Any:
    from transformers import Gemma2Config

    gemma = {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 16,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 30.0,
    }
    return Gemma2Config(**{**_hf_shape(), **gemma, **overrides})


def _bert(**overrides: Any) -> Any:
    from transformers import BertConfig

    return BertConfig(**{**_hf_shape(), **overrides})


_HF_CONFIGS: dict[str, Callable[..., Any]] = {
    "gpt2": _gpt2,
    "neox": _neox,
    "llama": _llama,
    "gemma2": _gemma2,
    "bert": _bert,
}


def _hf_shape() -> dict[str, Any]:
    return {
        "vocab_size": D_VOCAB,
        "hidden_size": D_MODEL,
        "intermediate_size": 64,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "max_position_embeddings": N_CTX,
    }


@functools.cache
def _hf_directory(kind: str, seed: int, overrides: tuple[tuple[str, Any], ...]) -> Path:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    config = _HF_CONFIGS[kind](**{**special, **dict(overrides)})
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    folder = _session_folder() / f"{kind}-{len(os.listdir(_session_folder()))}"
    with quiet(), torch.random.fork_rng(devices=[]):
        model = auto.from_config(config)
        _randomise(model, seed)
        model.save_pretrained(folder)
        _new_tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def _session_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="metaint-builders-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _build_hooked(config: dict[str, Any]) -> Any:
    """A HookedTransformer of this configuration, with the test tokenizer."""
    settings = _LIBRARY.HookedTransformerConfig(**config, device="cpu")
    return _LIBRARY.HookedTransformer(settings, tokenizer=tokenizer())


@torch.no_grad()
def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Draws every parameter anew: norms' scales about one, everything else about zero."""
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for name, parameter in torch.nn.Module.named_parameters(model):
        if parameter.data_ptr() in seen or not parameter.is_floating_point():
            continue
        seen.add(parameter.data_ptr())
        noise = torch.randn(parameter.shape, generator=generator) * _WEIGHT_STD
        is_scale = parameter.ndim == 1 and name.rsplit(".", 1)[-1] in ("weight", "w")
        parameter.copy_(noise + 1.0 if is_scale else noise)


def _hooked_transformer() -> Any:
    try:
        return _LIBRARY.HookedTransformer
    except (AttributeError, ImportError):  # TransformerLens 4 answers the name with an ImportError.
        return None


def _bridge() -> Any:
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        return None
    return TransformerBridge


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of transformers or TransformerLens while a model is built."""
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
