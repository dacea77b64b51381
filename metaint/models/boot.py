"""Handing a model to TransformerLens: by its name or folder, or already loaded by transformers.

In: a name, or a model of transformers and its tokenizer. Out: a bridge (a HookedTransformer before TransformerLens 3),
or ModelError with one sentence.
"""

import copy
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from metaint.errors import MetaintError, ModelError
from metaint.models.loading import Loader, Missing, check_logits, has_weights, reference_logits

# What a failure to open a folder (True) or a name may come of, where nothing tells.
_HINTS = {
    True: "check that the folder holds config.json, the weights and a tokenizer",
    False: "check the spelling, or the network if it is not in the local cache; 'toy' and folders need none",
}


def boot(name: str, local: bool, missing: Missing = "refuse", **options: Any) -> Any:
    """Open by name, or the folder `name` if it is `local`; options that are None are left out.

    `missing` is of weights that the checkpoint lacks; version 2 of TransformerLens, which knows its models, is not
    asked.
    """
    loader = Loader(missing)
    if _bridge() is None:
        return _boot(name, lambda: _HINTS[local], options)
    model = _boot(name, lambda: _hint(name, local, loader.kind), {**options, "model_class": loader})
    check_logits(model, loader.reference, loader.kind)
    model.metaint_source = loader.facts
    return model


def _hint(name: str, local: bool, kind: str) -> str:
    """What to do about a failure: `kind` is what transformers has loaded, empty if it has not come to that."""
    from transformers import AutoConfig, AutoTokenizer

    lens = f"TransformerLens {version('transformer-lens')}"
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception:
        return _HINTS[local]
    kind = kind or next(iter(getattr(config, "architectures", None) or ()), "")
    try:
        AutoTokenizer.from_pretrained(name)
    except Exception:
        if not _is_seen_or_heard(config):
            return "its tokenizer can't be opened, without which no text becomes tokens: put its files beside the model"
    if kind and (not local or has_weights(Path(name))):
        return f"{lens} has no bridge that fits this {kind}"
    return _HINTS[local]


def _is_seen_or_heard(config: Any) -> bool:
    return hasattr(config, "image_size") or hasattr(config, "num_mel_bins")


def boot_loaded(model: Any, tokenizer: Any, name: str) -> Any:
    """Wrap a model of transformers where it is, in the dtype it has; `name` is where a missing tokenizer is looked for.

    TransformerLens replaces modules of what it wraps and sets its attention to "eager": hand it a model of your own, or
    `same_weights(model)`. Given a tokenizer, nothing is looked for on the hub.
    """
    if tokenizer is not None:
        tokenizer = with_bos(tokenizer, model.config)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")  # TransformerLens leaves some families at "sdpa", which has no pattern
    parameter = next(model.parameters())
    options = {"hf_model": model, "tokenizer": tokenizer, "device": str(parameter.device), "dtype": parameter.dtype}
    hint = "pass the tokenizer it was trained with" if tokenizer is None else "TransformerLens must know its kind"
    reference = reference_logits(model)
    opened = _boot(name, lambda: hint, options)
    check_logits(opened, reference, type(model).__name__)
    return opened


def same_weights(model: Any) -> Any:
    """A second tree of modules over the very same parameters and buffers, which costs next to no memory."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def with_bos(tokenizer: Any, config: Any) -> Any:
    """A copy of a tokenizer that adds BOS, as TransformerLens opens the tokenizers of folders.

    It would open the one given a second time by its `name_or_path`, which may be nowhere; here that is a folder which
    is gone afterwards.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="metaint-") as folder:
        tokenizer.save_pretrained(folder)
        config.save_pretrained(folder)  # which the class of the tokenizer may depend on
        try:
            twin = AutoTokenizer.from_pretrained(folder, add_bos_token=True)
        except ValueError:  # it has no BOS, or one that cannot be put before a text
            twin = AutoTokenizer.from_pretrained(folder)
    twin.name_or_path = twin.init_kwargs["name_or_path"] = tokenizer.name_or_path
    twin.padding_side = tokenizer.padding_side
    return twin


def require_bridge(what: str) -> None:
    """ModelError before TransformerLens 3, which opens by names that it knows alone."""
    if _bridge() is None:
        raise ModelError(f"{what} needs TransformerLens 3 or newer: install it, or open a model that version 2 knows.")


def fastest_device() -> torch.device:
    """The device that bridges choose."""
    from transformer_lens.utilities.devices import get_device

    return torch.device(get_device())


def _boot(name: str, hint: Callable[[], str], options: dict[str, Any]) -> Any:
    """Open with the bridge or, before TransformerLens 3, with HookedTransformer's unprocessed loading; `hint` is asked
    what to do where that fails."""
    bridge = _bridge()
    if bridge is None:
        import transformer_lens

        library: Any = transformer_lens  # whose version 4 has no such class
        boot = library.HookedTransformer.from_pretrained_no_processing
    else:
        boot = bridge.boot_transformers
    try:
        return boot(name, **{option: value for option, value in options.items() if value is not None})
    except MetaintError:
        raise
    except Exception as error:  # every library below raises its own family here; the cause stays attached
        raise ModelError(f"model {name!r} could not be opened ({reason_of(error)}): {hint()}.") from error


def _bridge() -> Any | None:
    """TransformerLens's class of bridges, None before its version 3."""
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        return None
    return TransformerBridge


def reason_of(error: Exception) -> str:
    """The first line of what another library said, with the next where it ends in a colon; no list of all it knows."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    reason = reason.split(" Available architectures:")[0]
    return reason.rstrip(".:,")[:300]
