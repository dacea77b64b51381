"""Opening a GGUF file: the weights dequantised by transformers, the tokenizer out of the same file.

In: a path. Out: a model of transformers with plain floating weights, its tokenizer, and what is known of the file.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from metaint.errors import InputError, ModelError
from metaint.models.boot import reason_of


class Opened(NamedTuple):
    """What came out of a file: `source` are the facts that a scan of the model records."""

    model: Any
    tokenizer: Any
    source: dict[str, str]


def gguf_in(folder: Path) -> Path | None:
    """The one GGUF of a folder, None if it holds none; InputError if it holds several."""
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:5])
        raise InputError(f"{str(folder)!r} holds {len(files)} GGUF files ({names}): name one of them.")
    return files[0] if files else None


def open_gguf(path: Path, dtype: torch.dtype) -> Opened:
    """Dequantise a GGUF to `dtype`, on the CPU.

    Raises ModelError for a file that is no whole GGUF, an architecture that transformers does not map, weights that
    hold NaN or infinity, a tokenizer that cannot be made, and where the package gguf is missing.
    """
    quantisation, stretched = _header(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with quiet():
        model = _weights(path, dtype)
        tokenizer = _tokenizer(path)
    if stretched and not _stretches(model.config):
        raise ModelError(
            f"{path.name} stretches its rotary positions, which transformers does not read from a GGUF: "
            "open this model from a folder in Hugging Face's format."
        )
    _check_finite(model, path)
    return Opened(model, tokenizer, {"quantisation": quantisation, "source_file": path.name, "source_sha256": digest})


def _header(path: Path) -> tuple[str, bool]:
    """The quantisation, and whether rotary positions are stretched; the reader, a hundred megabytes, goes with it."""
    reader = _read(path)
    if (parts := _value(reader, "split.count", 1)) > 1:
        raise ModelError(f"{path.name} is one of {parts} parts of a model: join them with llama-gguf-split --merge.")
    family = _value(reader, "general.architecture", "")
    tables = any(tensor.name.startswith(("rope_freqs", "rope_factors")) for tensor in reader.tensors)
    return _quantisation(reader), tables or _value(reader, f"{family}.rope.scaling.type", "none") != "none"


def _read(path: Path) -> Any:
    """The reader of a whole GGUF, its tensors mapped and not read."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ModelError(f'{path.name} needs the package gguf: pip install "metaint[gguf]" brings it.') from None
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"{str(path)!r} cannot be read ({error.strerror or error}).") from error
    if magic != b"GGUF":
        raise ModelError(f"{str(path)!r} is not a GGUF file: it does not begin with the letters GGUF.")
    try:
        return GGUFReader(path)
    except Exception as error:  # the reader trips over whatever is missing: ValueError, IndexError, KeyError, ...
        raise ModelError(
            f"{str(path)!r} is cut off or damaged ({reason_of(error)}): fetch the file once more."
        ) from error


def _value(reader: Any, key: str, default: Any) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _quantisation(reader: Any) -> str:
    """The name of the file's type, or of the type that most of its weights have."""
    from gguf import LlamaFileType

    known = {int(kind): kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in LlamaFileType}
    if (kind := _value(reader, "general.file_type", None)) in known:
        return known[kind]
    weights: Counter[str] = Counter()
    for tensor in reader.tensors:
        weights[tensor.tensor_type.name] += int(tensor.n_elements)
    return weights.most_common(1)[0][0] if weights else ""


def _weights(path: Path, dtype: torch.dtype) -> Any:
    import transformers

    options: dict[str, Any] = {"gguf_file": path.name, "dtype": dtype}
    if hasattr(transformers, "GgufConfig"):  # without it, newer versions may keep the weights packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        auto: Any = transformers.AutoModelForCausalLM
        model, loading = auto.from_pretrained(str(path.parent), output_loading_info=True, **options)
    except Exception as error:  # ValueError, KeyError, NotImplementedError, ... by architecture and version
        raise ModelError(
            f"{str(path)!r} could not be opened by transformers ({reason_of(error)}): "
            "give a GGUF of an architecture that it maps, such as llama, qwen2 or gemma2."
        ) from error
    if missing := sorted(loading["missing_keys"]):  # which transformers has drawn at random
        raise ModelError(f"{path.name} lacks {len(missing)} tensors of its model, such as {missing[0]}: fetch another.")
    _forget_quantisation(model)
    return model


def _forget_quantisation(model: Any) -> None:
    """The weights are plain tensors now; what says otherwise would keep the model from being saved or scaled."""
    for owner, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_quantized"),
    ):
        if name in vars(owner):
            delattr(owner, name)


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:
        raise ModelError(
            f"no tokenizer could be made from {str(path)!r} ({reason_of(error)}): "
            "open the model with transformers, and pass it to metaint.open_model with its tokenizer."
        ) from error


def _stretches(config: Any) -> bool:
    """Whether transformers stretches rotary positions; from a GGUF of Llama 3 it does not read that, for instance."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [settings, *(part for part in settings.values() if isinstance(part, dict))]  # some, one a kind of layer
    return any(part.get("rope_type", "default") != "default" for part in parts)


def _check_finite(model: Any, path: Path) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"tensor {name} of {path.name} holds NaN or infinity: fetch the file once more.")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and notes of transformers, which tell what was asked for."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
