"""What every command of the shell shares: options, opening a model, the terminal, and one sentence for bad input."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from metaint.errors import InputError, MetaintError, StoreError

Model = Annotated[
    str, typer.Argument(help="toy, smollm2, a Hugging Face name (gpt2), a folder in its format, or a .gguf file.")
]
Revision = Annotated[str | None, typer.Option(help="Revision (branch, tag, commit) on the hub.")]
Checkpoint = Annotated[int | None, typer.Option(help="Training checkpoint, as TransformerLens labels it.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps; by default the fastest there is.")]
Dtype = Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")]


# Larger numbers are slips: what they ask for would take days, or more memory than there is.
MOST_TOKENS = 10_000_000
MOST_LENGTH = 1_000_000
# Beside a file stands, while it is written, one whose name is so many bytes longer; file systems allow 255.
_LONGEST_NAME = 255 - 20


def open_model(name: str, revision: str | None, checkpoint: int | None, device: str | None, dtype: str) -> Any:
    try:
        Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a folder that is closed, ~nobody, a zero
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"the model is {name[:80]!r}, which can't be looked up ({why}): give a name or a path."
        ) from None
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
        check_place(path, option)
        check(path.parent.is_dir(), f"{option} is {path}: there is no folder {path.parent}.")


def check_place(path: Path | None, option: str = "--out") -> None:
    """Whether something can be written at a path, before the work begins."""
    if path is None:
        return
    check("\0" not in str(path), f"{option} is {str(path)!r}: a name holds no zero byte.")
    check(
        all(len(os.fsencode(part)) <= _LONGEST_NAME for part in path.parts),
        f"{option} is {str(path)[:80]!r}...: a name may have {_LONGEST_NAME} bytes.",
    )
    folder = next((parent for parent in path.absolute().parents if os.path.lexists(parent)), Path("/"))
    check(folder.is_dir(), f"{option} is {path}: {folder} is no folder.")
    check(os.access(folder, os.W_OK | os.X_OK), f"{option} is {path}: nothing can be written in {folder}.")


def check_range(option: str, value: float | None, least: float, most: float = math.inf) -> None:
    """Whether the number of an option, if it was given, lies between these."""
    if value is not None:
        check(value >= least, f"{option} is {value}: it must be at least {least}.")
        check(value <= most, f"{option} is {value}: it must be at most {most}.")


def check_seed(seed: int, option: str = "--seed") -> None:
    check_range(option, seed, 0, 2**63 - 1)


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """What another program wrote lacks what we look for, wherever that is noticed: one sentence."""
    try:
        yield
    except MetaintError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise StoreError(f"{path} is no {what} of metaint's ({type(error).__name__}: {error}).") from error


def console() -> Console:
    """The terminal; where there is none, wide enough that no table is cut."""
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200
    return Console(width=wide, highlight=False)


def check(holds: bool, sentence: str) -> None:
    if not holds:
        raise InputError(sentence)
