"""What every command of the shell shares: options, opening a model, the terminal, and one sentence for bad input."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from metaint.errors import InputError

Model = Annotated[
    str, typer.Argument(help="toy, smollm2, a Hugging Face name (gpt2), a folder in its format, or a .gguf file.")
]
Revision = Annotated[str | None, typer.Option(help="Revision (branch, tag, commit) on the hub.")]
Checkpoint = Annotated[int | None, typer.Option(help="Training checkpoint, as TransformerLens labels it.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps; by default the fastest there is.")]
Dtype = Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")]


def open_model(name: str, revision: str | None, checkpoint: int | None, device: str | None, dtype: str) -> Any:
    quieten()
    import metaint

    return metaint.open_model(name, revision=revision, checkpoint=checkpoint, device=device, dtype=dtype)


def quieten() -> None:
    """No bars and warnings of transformers between our own lines."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()


def check_page(path: Path | None, option: str = "--figures") -> None:
    if path is not None:
        check(path.suffix == ".html", f"{option} is {path}: give it a name that ends in .html.")
        check(path.parent.is_dir(), f"{option} is {path}: there is no folder {path.parent}.")


def console() -> Console:
    """The terminal; where there is none, wide enough that no table is cut."""
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200
    return Console(width=wide, highlight=False)


def check(holds: bool, sentence: str) -> None:
    if not holds:
        raise InputError(sentence)
