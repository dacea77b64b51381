"""Opening a model by name: the toy, a local Hugging Face folder, or a hub name."""

from pathlib import Path
from typing import Any

import torch

from metaint.errors import InputError, ModelError

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}


def open_model(
    name: str,
    *,
    revision: str | None = None,
    checkpoint: int | None = None,
    device: str | None = None,
    dtype: str | torch.dtype = "float32",
) -> Any:
    """Open a model with raw (unfolded) weights, in evaluation mode.

    `name` is "toy" (the model that `metaint demo` trains), a folder in Hugging Face's format, or a name on its hub,
    there with a `revision` or, for models with training checkpoints that TransformerLens knows, the `checkpoint`
    (step or tokens, as TransformerLens labels it). Raises ModelError if it can't be opened, InputError for arguments
    that make no sense together.
    """
    kind = as_dtype(dtype)
    _check_device(device)
    if revision is not None and checkpoint is not None:
        raise InputError("revision and checkpoint were both given: each names a state of training, choose one.")
    if name == "toy":
        if revision is not None or checkpoint is not None:
            raise InputError("the toy has no revisions or checkpoints: leave revision and checkpoint out.")
        from metaint.models.toy import load_toy

        model = load_toy(device=device, dtype=kind)
    else:
        folder = Path(name).expanduser()
        local = folder.is_dir()
        if not local and name.startswith(("/", "./", "../", "~")):
            raise ModelError(f"{name!r} is not a folder: give one in Hugging Face's format, or a hub name.")
        if local and not (folder / "config.json").is_file():
            raise ModelError(f"{name!r} is a folder without config.json: give one in Hugging Face's format.")
        if local and revision is not None:
            raise InputError(f"revision is {revision!r}, and {name!r} is a folder, which has none: leave it out.")
        options = {"revision": revision, "checkpoint_value": checkpoint, "device": device, "dtype": kind}
        model = _boot(str(folder) if local else name, local, {k: v for k, v in options.items() if v is not None})
    if revision is not None or checkpoint is not None:
        model.metaint_revision = revision if revision is not None else f"checkpoint {checkpoint}"
    return model.eval()


def _check_device(device: str | None) -> None:
    try:
        place = torch.device(device or "cpu").type
    except RuntimeError as error:
        raise InputError(f"device is {device!r}: choose cpu, cuda or mps.") from error
    if place == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device is {device!r}, and this machine has no CUDA: choose cpu.")


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating dtype from its name; InputError for anything else."""
    kind = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if kind not in DTYPES.values():
        raise InputError(f"dtype is {dtype!r}: choose one of {', '.join(DTYPES)}.")
    return kind  # type: ignore[return-value]


def _boot(name: str, local: bool, options: dict[str, Any]) -> Any:
    """Open with the bridge or, before TransformerLens 3, with HookedTransformer's unprocessed loading."""
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        import transformer_lens

        library: Any = transformer_lens  # whose version 4 has no such class
        boot = library.HookedTransformer.from_pretrained_no_processing
    else:
        boot = TransformerBridge.boot_transformers
    try:
        return boot(name, **options)
    except Exception as error:  # every library below raises its own family here; the cause stays attached
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = (
            "check that the folder holds config.json, the weights and a tokenizer"
            if local
            else "check the spelling, or the network if it is not in the local cache; 'toy' and folders need none"
        )
        raise ModelError(f"model {name!r} could not be opened ({reason.rstrip('.')[:300]}): {hint}.") from error
