"""What a model is: its shape, and the facts a scan records about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from metaint.errors import InputError
from metaint.models.direction import is_causal as is_causal
from metaint.models.owner_hooks import OWNER_HOOKS, as_attribute, hooked_by_owner
from metaint.models.protocol import Model
from metaint.models.readout import setting

_attending: WeakKeyDictionary[Any, tuple[int, ...]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Shape:
    """What probes need of a model: sizes and kinds from its configuration, `causal` as it is measured."""

    n_layers: int
    n_heads: int
    causal: bool
    # How many keys back each layer's attention reaches at most; 0 is the whole context.
    windows: tuple[int, ...] = ()
    d_model: int = 0
    # What a block adds to the stream, and where: "sequential" (the MLP reads what attention wrote), "parallel" (both
    # read the same stream) or "attention" (there is no MLP).
    sublayers: str = "sequential"
    # What each layer mixes positions by: "attention", or the model's own word for another thing ("mamba", "conv").
    layer_kinds: tuple[str, ...] = ()
    # Whether each head has a learnt score that takes part in the softmax and stands for no key (gpt-oss).
    learnt_sinks: bool = False

    @property
    def attending(self) -> tuple[int, ...]:
        """The layers that attend; all where none is known to do something else."""
        return attending_among(self.layer_kinds) or tuple(range(self.n_layers))


def check_open(model: Any) -> None:
    """InputError for a model that transformers has loaded and nobody has opened, which has no hooks to read, and for
    one that does not read a sequence of token ids alone."""
    if hasattr(model, "config") and not hasattr(model, "cfg"):
        raise InputError(
            f"model is a {type(model).__name__} of transformers: open it with metaint.open_model(model, tokenizer=...)."
        )
    if reads := _reads_otherwise(model):
        wrapped = type(getattr(model, "original_model", model)).__name__
        raise InputError(f"model is a {wrapped}, {reads}: give one that reads one sequence of token ids.")


def _reads_otherwise(model: Any) -> str:
    """What a model reads beside or instead of one sequence of token ids; empty for the usual."""
    cfg = getattr(model, "cfg", None)  # None for what is no model at all
    if getattr(cfg, "is_visual_model", False):
        return "which reads images"
    if getattr(cfg, "is_audio_model", False):
        return "which reads sound"
    config = getattr(getattr(model, "original_model", None), "config", None)
    both = getattr(config, "is_encoder_decoder", False)
    return "an encoder and a decoder, whose attention lies in two stacks" if both else ""


def shape_of(model: Model) -> Shape:
    """The shape of any model with a TransformerLens `cfg`."""
    check_open(model)
    causal, cfg = is_causal(model), model.cfg
    sizes = (cfg.n_layers, cfg.n_heads, causal, windows_of(model), int(cfg.d_model))
    return Shape(*sizes, sublayers_of(model), layer_kinds_of(model), sink_scores(model) is not None)


def windows_of(model: Model) -> tuple[int, ...]:
    """The sliding window of each layer, 0 for none."""
    return tuple(window_of(model, layer) for layer in range(model.cfg.n_layers))


def window_of(model: Model, layer: int) -> int:
    """How many keys back a query of this layer sees, 0 for all."""
    window = setting(model, "window_size") or setting(model, "sliding_window")
    if not window or setting(model, "use_sliding_window") is False:
        return 0
    for name in ("attn_types", "layer_types", "attention_layers"):
        if kinds := setting(model, name):
            return int(window) if str(kinds[layer]) in ("local", "sliding_attention") else 0
    return int(window)  # a configuration without a list of its layers, such as Mistral's, has it in every layer


def layer_kinds_of(model: Model) -> tuple[str, ...]:
    """What each layer mixes positions by: "attention" where it has a pattern, else what the config calls the layer."""
    hook_points, n_layers = model.hook_dict, int(model.cfg.n_layers)
    attends = [f"blocks.{layer}.attn.hook_pattern" in hook_points for layer in range(n_layers)]
    if all(attends) or not any(attends):
        return ("attention",) * n_layers  # where no layer has a pattern, whoever reads one says so
    config = getattr(getattr(model, "original_model", None), "config", None)
    names = ("layer_types", "layers_block_type", "block_types", "layer_block_types")
    lists = [value for name in names if (value := getattr(config, name, None))]
    words = next((list(map(str, value)) for value in lists if len(value) == n_layers), ["other"] * n_layers)
    return tuple("attention" if here else word for here, word in zip(attends, words, strict=True))


def attending_among(kinds: Sequence[str]) -> tuple[int, ...]:
    """The layers of the kind that attends."""
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "attention")


def attending_layers(model: Model) -> tuple[int, ...]:
    """The layers of a model that attend, remembered for as long as it lives."""
    if model not in _attending:
        _attending[model] = attending_among(layer_kinds_of(model))
    return _attending[model]


def by_layer(model: Model, name: str) -> dict[int, Tensor]:
    """A stack of weights such as "W_O" by the numbers of its layers: a bridge stacks the layers that attend alone."""
    stack = getattr(model, name)
    if len(stack) == int(model.cfg.n_layers):
        return dict(enumerate(stack))
    return dict(zip(attending_layers(model), stack, strict=True))


def sink_scores(model: Model) -> list[Tensor] | None:
    """The learnt score [head] of each layer that takes part in its softmax and stands for no key; None without any."""
    wrapped = getattr(model, "original_model", None)
    if wrapped is None:
        return None
    sinks = [parameter.detach() for name, parameter in wrapped.named_parameters() if name.endswith(".sinks")]
    return sinks if len(sinks) == int(model.cfg.n_layers) else None


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

    Where its owner has forward hooks on it, `owner_hooks` names their hook points: what is read then may be what these
    made of the model. For a model out of a GGUF also `quantisation`, `source_file` and `source_sha256`; for one whose
    checkpoint has not all its weights, or more, `random_weights` and `unused_weights`.
    """
    cfg = model.cfg
    parameter = next(iter(model.parameters()), torch.empty(0))
    hooked = hooked_by_owner(model.hook_dict)
    by_owner = {OWNER_HOOKS: as_attribute(hooked)} if hooked else {}
    return {
        "model": str(getattr(cfg, "model_name", None) or type(model).__name__),
        "revision": str(getattr(model, "metaint_revision", "")),
        "weights": weight_processing(model),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        "n_layers": int(cfg.n_layers),
        "n_heads": int(cfg.n_heads),
        "attention": "causal" if is_causal(model) else "bidirectional",
        **by_owner,
        **getattr(model, "metaint_source", {}),
    }
