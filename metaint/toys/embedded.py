"""The embedded model: a two-layer attention-only transformer over characters, kept in the user's cache directory.

In: a trained model and its vocabulary. Out: one safetensors file, and the model again with a character tokenizer.
The file holds the weights, and in its header the configuration, the vocabulary and what is known of the training.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_dir
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from metaint.errors import ModelError

FILE = "toy.safetensors"
_FIELDS = ("n_layers", "n_heads", "d_model", "d_head", "n_ctx", "d_vocab")


def toy_folder() -> Path:
    """Where the toy is kept: `$METAINT_CACHE/toy` if that variable is set, else `toy` in the user's cache directory
    of metaint (on Linux `~/.cache/metaint/toy`)."""
    return Path(os.environ.get("METAINT_CACHE") or user_cache_dir("metaint")) / "toy"


def boot_toy(
    shape: dict[str, Any],
    *,
    tokenizer: Any = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """An untrained TransformerLens model of that shape: attention only, no normalisation, learned positions.

    `shape` has the keys n_layers, n_heads, d_model, d_head, n_ctx, d_vocab. `cfg.model_name` is "toy" and no BOS is
    prepended. The global random state stays as it was. Raises ModelError where TransformerLens has no `boot_native`.
    """
    try:
        from transformer_lens.config import TransformerBridgeConfig
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        raise ModelError(
            "the toy model needs TransformerBridge.boot_native, which this transformer_lens lacks: "
            "install transformer_lens 3.9 or newer."
        ) from None
    # With a seed, TransformerLens forks the random state; the weights it draws are overwritten by the callers.
    config = TransformerBridgeConfig(**shape, attn_only=True, normalization_type=None, seed=0)
    config.default_prepend_bos = False
    bridge: Any = TransformerBridge  # boot_native is attached to the class when TransformerLens is imported
    return bridge.boot_native(config, tokenizer=tokenizer, device=device, dtype=dtype, model_name="toy")


def toy_of(model: Any) -> Any:
    """The toy that computes what a `memory_transformer` with its default switches computes: the same weights."""
    toy = boot_toy({name: int(getattr(model.cfg, name)) for name in _FIELDS}, device=model.W_E.device)
    state = {name: torch.zeros_like(value) for name, value in toy.state_dict().items()}  # the biases stay so
    state |= {"embed.weight": model.W_E, "pos_embed.weight": model.W_pos, "unembed.weight": model.W_U.mT}
    for letter in "QKVO":
        for layer, weight in enumerate(getattr(model, f"W_{letter}")):
            state[f"blocks.{layer}.attn.{letter.lower()}.weight"] = weight[0].mT  # torch.nn.Linear keeps [out, in]
    toy.load_state_dict(state)
    return toy


def save_toy(model: Any, vocabulary: list[str], info: dict[str, Any], folder: str | Path | None = None) -> Path:
    """Writes a model made by `boot_toy` to `folder` (default: `toy_folder()`), and returns that folder.

    `vocabulary` lists the character of each id; `info` is anything JSON can hold (steps, accuracy, settings). The file
    is written aside and renamed, so that an earlier one is there until the new one is whole.

    Raises ModelError for a vocabulary that does not fit the model, and where the folder cannot be written.
    """
    if len(vocabulary) != model.cfg.d_vocab or any(len(c) != 1 for c in vocabulary):
        raise ModelError(
            f"vocabulary has {len(vocabulary)} entries: give one single character for each of the "
            f"{model.cfg.d_vocab} ids of the model."
        )
    folder = toy_folder() if folder is None else Path(folder)
    header = {
        "config": {name: int(getattr(model.cfg, name)) for name in _FIELDS},
        "vocabulary": list(vocabulary),
        "info": info,
    }
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    aside = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=folder, prefix=".toy-", suffix=".part")
        os.close(handle)
        save_file(weights, aside, {name: json.dumps(value) for name, value in header.items()})
        os.replace(aside, folder / FILE)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the toy model cannot be written to {folder} ({error}): give another folder.") from None
    finally:
        if aside is not None:
            Path(aside).unlink(missing_ok=True)
    return folder


def load_toy(
    folder: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """The model that `save_toy` wrote, with a character tokenizer, so that `model.to_tokens("text")` works.

    What `save_toy` was told as `info` stands in `model.cfg.info`. Raises ModelError when the file is absent or damaged.
    """
    path = (toy_folder() if folder is None else Path(folder)) / FILE
    if not path.is_file():
        raise ModelError(f"there is no toy model at {path}: run `metaint demo` first, which trains and keeps one.")
    try:
        with safe_open(path, framework="pt") as file:
            header = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tokenizer = character_tokenizer(header["vocabulary"])
        model = boot_toy(header["config"], tokenizer=tokenizer, device=device, dtype=dtype)
        model.load_state_dict(weights)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"the toy model at {path} is damaged ({type(error).__name__}): delete it and run `metaint demo` again."
        ) from error
    model.cfg.info = header.get("info", {})
    return model


def character_tokenizer(vocabulary: list[str]) -> Any:
    """A fast tokenizer with one token a character: id `i` is `vocabulary[i]`.

    Text is lower-cased if the vocabulary has no capitals; a character it lacks becomes a space (the first entry, if it
    lacks the space too). Line breaks serve as BOS, EOS and padding, so that no id lies outside the model's vocabulary.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    unknown, blank = (sign if sign in vocabulary else vocabulary[0] for sign in (" ", "\n"))
    table = {character: index for index, character in enumerate(vocabulary)}
    if len(table) != len(vocabulary):
        raise ValueError("the vocabulary names a character twice")
    tokenizer = Tokenizer(models.WordLevel(table, unk_token=unknown))
    if not any(character.isupper() for character in vocabulary):
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    # No BOS here: TransformerLens would look for this tokenizer on the hub to switch it on; it takes the EOS instead.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=blank, pad_token=blank)
