"""The folder of a training run: settings that must stay the same, and a state that outlives a kill.

In: a folder, settings that JSON can hold, a model and its optimizer. Out: `settings.json` and `state.safetensors`, each
written aside and renamed; no pickle.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from metaint.errors import InputError, StoreError

SETTINGS, STATE = "settings.json", "state.safetensors"


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder that of a run with these settings.

    Raises InputError if it is a file or holds a run with others, StoreError if it is damaged or can't be written.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"folder is {folder}, which is a file: name a folder.")
    saved = read_settings(folder)
    for name in settings if saved is not None else ():
        if saved is not None and saved.get(name) != settings[name]:
            raise InputError(
                f"folder is {folder}, which holds a run with {name} {saved.get(name)}, and {settings[name]} was asked "
                "for: ask for the same, give another folder, or delete this one."
            )
    if saved is not None:
        return
    aside = folder / f".{SETTINGS}.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(dict(settings), indent=1))
        aside.replace(folder / SETTINGS)
    except OSError as error:
        raise StoreError(f"the run can't be written to {folder} ({error.strerror or error}).") from error


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder, None if it holds none; StoreError if they are damaged."""
    path = folder / SETTINGS
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({type(error).__name__}): delete {folder} to train it again.") from error


def save_state(folder: Path, model: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Replace the saved state by this one; StoreError if it can't be written, with the one before intact."""
    tensors = {f"model.{name}": value.detach() for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": value for name, value in state.items() if torch.is_tensor(value)}
    aside = folder / f".{STATE}.new"
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, aside, {"step": str(step)})
        aside.replace(folder / STATE)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"the state of step {step} can't be written to {folder} ({error}).") from error


def load_state(folder: Path, model: Any, optimizer: torch.optim.Optimizer | None = None) -> int | None:
    """Bring model and optimizer to the saved state; returns its step, or None if there is none.

    The optimizer keeps its own options (learning rate, decay). Raises StoreError for a state that is damaged or not of
    this model.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            step = int(file.metadata()["step"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state: dict[int, dict[str, Tensor]] = {}
        for name in [name for name in tensors if name.startswith("optimiser.")]:
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensors.pop(name)
        model.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items()})
        if optimizer is not None:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise StoreError(f"{path} is damaged ({type(error).__name__}): delete {folder} to train it again.") from error
    return step
