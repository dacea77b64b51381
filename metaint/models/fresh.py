"""A model of the same architecture before any training: what a measure says of it, it says of no learning.

In: a TransformerLens model. Out: a second one, drawn by the initialisation that the architecture's own code has.
"""

import copy
from typing import Any

import torch
from torch import nn

from metaint.errors import ModelError, door
from metaint.models.protocol import Model

# Switches that make hooks fire; a bridge hears of them through setters of the same name.
_SWITCHES = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")


@door
def fresh_model(model: Model, seed: int = 0) -> Any:
    """A second model like `model`, at its random initialisation and in evaluation mode.

    It is the same kind of object, with the same hooks (but none of the caller's functions on them), `cfg`, tokenizer,
    dtype and device; only `cfg.seed` and `cfg.init_weights` can differ. Its weights are drawn as the architecture's own
    code draws them: by the Hugging Face class that a bridge wraps, or, for a native bridge and a HookedTransformer, by
    TransformerLens (`cfg.init_mode`, `cfg.initializer_range`). So the fresh toy is a fresh native model, not the first
    state of the training that made the toy.

    A model in compatibility mode gets a fresh one in that mode too, processed with TransformerLens's defaults if its
    own weights were processed: which settings were used then isn't recorded. If that fails, the fresh one stays raw.

    The weights depend on `seed` alone, whatever the device. The given model and the global random state stay as they
    were. Raises ModelError for a model that is quantised, spread over devices or without weights, or of a kind that
    can't be made anew.

    >>> import metaint
    >>> from metaint.toys.embedded import boot_toy
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 16, "d_vocab": 20}
    >>> fresh = metaint.fresh_model(boot_toy(sizes), seed=1)
    >>> fresh.cfg.n_heads, fresh.training
    (2, False)
    """
    fresh = _drawn(model, seed)
    if getattr(model, "compatibility_mode", False):
        processed = getattr(model, "_weights_processed", True)  # a private name, and True is the usual case
        try:
            fresh.enable_compatibility_mode(disable_warnings=True, no_processing=not processed)
        except Exception:
            fresh = _drawn(model, seed)  # Half processed is neither: raw again.
    return fresh.eval()


def _drawn(model: Any, seed: int) -> Any:
    """The fresh model, unprocessed."""
    make = _maker(model)
    device, dtype = _place(model)
    try:
        # Drawn on the CPU, then moved: a seed gives the same weights on every device, and only the CPU's state is used.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            return make(model, device, dtype)
    except Exception as error:  # every library below raises its own family here; the cause stays attached
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"{_name(model)} can't be made anew ({reason.rstrip('.')[:300]}).") from error


def _maker(model: Any) -> Any:
    """The function that makes a model of this kind."""
    from transformers import PreTrainedModel

    wrapped = getattr(model, "original_model", None)
    if isinstance(wrapped, PreTrainedModel):
        return _wrapped
    if getattr(model.cfg, "architecture", None) == "TransformerLensNative" and type(wrapped).__name__ == "NativeModel":
        return _native
    if wrapped is None and hasattr(model, "init_weights") and hasattr(model, "blocks"):
        return _hooked
    raise ModelError(
        f"{_name(model)} can't be made anew: its initialisation is known for bridges over Hugging Face models, native "
        f"bridges and HookedTransformer."
    )


def _wrapped(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A bridge over a new Hugging Face model of the same class and config."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    kind = type(model.original_model)
    inner = _moved(kind(copy.deepcopy(model.original_model.config)), device, dtype)
    cfg = _config(model)
    # No tokenizer here: it would be prepared a second time, in place, and the given model's is in use.
    fresh = build_bridge_from_module(inner, cfg.architecture, tl_config=cfg, model_name=cfg.model_name)
    return _finished(fresh, model)


def _native(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A native bridge with the same config."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge: Any = TransformerBridge  # boot_native is attached to the class when TransformerLens is imported
    cfg = _config(model)
    fresh = bridge.boot_native(cfg, device=device, dtype=dtype, model_name=cfg.model_name)
    return _finished(fresh, model)


def _hooked(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A HookedTransformer with the same config. Folded weights need no folding: fresh norms are the identity."""
    cfg = _config(model)
    name, cfg.tokenizer_name = cfg.tokenizer_name, None  # by its name the tokenizer would be opened again
    fresh = _moved(type(model)(cfg, move_to_device=False), device, dtype)
    fresh.cfg.tokenizer_name = name
    fresh.tokenizer = model.tokenizer
    return fresh


def _config(model: Any) -> Any:
    """A copy of the model's `cfg` that asks for new weights, from the random state as it is."""
    cfg = copy.deepcopy(model.cfg)
    cfg.seed, cfg.init_weights = None, True
    return cfg


def _finished(fresh: Any, model: Any) -> Any:
    """Gives a new bridge the tokenizer and the switches of the given one."""
    if model.tokenizer is not None:
        fresh.tokenizer = model.tokenizer
    for switch in _SWITCHES:
        if getattr(model.cfg, switch, False):
            getattr(fresh, f"set_{switch}")(True)
    return fresh


def _moved(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """In place, as TransformerLens loads: parameters change their dtype, buffers (rotary tables) don't."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return nn.Module.to(module, device)  # HookedTransformer's own `to` prints


def _place(model: Any) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of the model's weights; ModelError where there isn't one of each."""
    parameters = list(model.parameters())
    devices = {parameter.device for parameter in parameters}
    if len(devices) != 1 or torch.device("meta") in devices:
        where = ", ".join(sorted(map(str, devices))) or "nowhere"
        raise ModelError(f"{_name(model)} can't be made anew: its weights are on {where}: put them on one device.")
    config = getattr(getattr(model, "original_model", None), "config", None)
    quantised = getattr(config, "quantization_config", None) is not None
    if quantised or not all(parameter.is_floating_point() for parameter in parameters):
        raise ModelError(f"{_name(model)} can't be made anew: its weights are quantised: open it in a floating dtype.")
    return parameters[0].device, parameters[0].dtype


def _name(model: Any) -> str:
    name = getattr(model.cfg, "model_name", None)
    return f"model {name!r}" if name else f"a {type(model).__name__}"
