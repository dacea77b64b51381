"""What a model is: its shape, and the facts a scan records about it."""

from dataclasses import dataclass
from typing import Any

import torch

from metaint.errors import InputError
from metaint.models.protocol import Model


@dataclass(frozen=True)
class Shape:
    """The sizes that probes need, read from `cfg` alone."""

    n_layers: int
    n_heads: int
    causal: bool
    # How many keys back each layer's attention reaches at most; 0 is the whole context.
    windows: tuple[int, ...] = ()
    d_model: int = 0
    # What a block adds to the stream, and where: "sequential" (the MLP reads what attention wrote), "parallel" (both
    # read the same stream) or "attention" (there is no MLP).
    sublayers: str = "sequential"


def check_open(model: Any) -> None:
    """InputError for a model that transformers has loaded and nobody has opened: it has no hooks to read."""
    if hasattr(model, "config") and not hasattr(model, "cfg"):
        raise InputError(
            f"model is a {type(model).__name__} of transformers: open it with metaint.open_model(model, tokenizer=...)."
        )


def shape_of(model: Model) -> Shape:
    """The shape of any model with a TransformerLens `cfg`."""
    causal, cfg = is_causal(model), model.cfg
    return Shape(cfg.n_layers, cfg.n_heads, causal, windows_of(model), int(cfg.d_model), sublayers_of(model))


def is_causal(model: Model) -> bool:
    """Whether queries see earlier keys alone; the bridge of TransformerLens 3.9 calls BERT causal, which it is not."""
    check_open(model)
    cfg = model.cfg
    bert = "Bert" in str(getattr(cfg, "architecture", ""))
    return not bert and getattr(cfg, "attention_dir", "causal") != "bidirectional"


def windows_of(model: Model) -> tuple[int, ...]:
    """The sliding window of each layer, 0 for none: from the Hugging Face config, or from TransformerLens's own."""
    cfg = model.cfg
    config = getattr(getattr(model, "original_model", None), "config", None)
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    kinds = kinds or getattr(cfg, "attn_types", None) or []
    size = getattr(config, "sliding_window", None) or getattr(cfg, "window_size", None) or 0
    # A configuration that has a window and no list of its layers, such as Mistral's, has it in every layer.
    everywhere = bool(size) and bool(getattr(config, "use_sliding_window", config is not None))
    local = [kind in ("sliding_attention", "local") for kind in kinds] or [everywhere] * cfg.n_layers
    return tuple(int(size) if here else 0 for here in local[: cfg.n_layers])


def sublayers_of(model: Model) -> str:
    """How the blocks are built: "attention", "parallel" or "sequential"."""
    if getattr(model.cfg, "attn_only", False):
        return "attention"
    parallel = getattr(model.cfg, "parallel_attn_mlp", False) or "blocks.0.hook_resid_mid" not in model.hook_dict
    return "parallel" if parallel else "sequential"


def weight_processing(model: Model) -> str:
    """Whether layer norms were folded into the weights: "folded" or "raw"."""
    norm = str(getattr(model.cfg, "normalization_type", None) or "")
    return "folded" if getattr(model, "compatibility_mode", False) or norm.endswith("Pre") else "raw"


def facts_of(model: Model) -> dict[str, str | int]:
    """Attributes of a scan that belong to the model: name, revision, weight processing, dtype, device, sizes.

    For a model out of a GGUF also `quantisation`, `source_file` and `source_sha256`.
    """
    cfg = model.cfg
    parameter = next(iter(model.parameters()), torch.empty(0))
    return {
        "model": str(getattr(cfg, "model_name", None) or type(model).__name__),
        "revision": str(getattr(model, "metaint_revision", "")),
        "weights": weight_processing(model),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        "n_layers": int(cfg.n_layers),
        "n_heads": int(cfg.n_heads),
        "attention": "causal" if is_causal(model) else "bidirectional",
        **getattr(model, "metaint_source", {}),
    }
