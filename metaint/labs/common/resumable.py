"""A training run that outlives a kill: recorded at some of its steps, and gone on with from where it was last saved.

In: a folder, and what a lab trains in it (`Run`). Out: the folder with `settings.json`, `recording.zarr` and
`state.safetensors`. The state is saved after each record, so that what a kill leaves of the recording is at most one
record ahead of it; that one is not recorded again, and the run ends with the numbers of one that was never killed.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol, TypeVar

import xarray as xr

from metaint.errors import StoreError
from metaint.labs.common.run_folder import STATE, load_state, read_settings, save_state
from metaint.scans.recordings import read_recording

RECORDING = "recording.zarr"
# What is in the settings of a run on a text beside the fields of its lab's Settings.
TEXT = "text_sha256"

Settings = TypeVar("Settings")


class Run(Protocol):
    """What a lab trains: a model and its optimizer, at a step of its settings."""

    folder: Path
    settings: Any
    """With `record_steps`."""

    @property
    def step(self) -> int:
        """How many steps were taken."""
        ...

    @property
    def number(self) -> float:
        """What is told beside the step, such as the last loss."""
        ...

    @property
    def recorded(self) -> Collection[int]:
        """The steps in the recording."""
        ...

    def model_and_optimizer(self) -> tuple[Any, Any]:
        """The model and its optimizer, whose states are saved."""
        ...

    def has_ended(self) -> bool:
        """Whether no step is to follow."""
        ...

    def take_step(self) -> None:
        """One step of the optimizer; `Diverged` where the loss is not finite."""
        ...

    def record(self, again: bool) -> None:
        """Read this step into the recording; `again`: it is there already, from before a kill."""
        ...


def go_on(run: Run, on_step: Callable[[int, float], object], every: int = 1) -> xr.DataTree:
    """Train from where a run is to its end, and return its recording; `on_step` is told step and number every so often.

    Raises what the run raises, and StoreError if its folder can't be written.
    """
    planned = set(run.settings.record_steps)
    saved = run.step if (run.folder / STATE).is_file() else None
    while True:
        ended = run.has_ended()
        if ended or run.step in planned:
            keep(run, saved)
        if ended or run.step % every == 0:
            on_step(run.step, run.number)
        if ended:
            return read_recording(run.folder / RECORDING)
        run.take_step()


def keep(run: Run, saved: int | None = None) -> None:
    """Record this step, unless it is recorded already, and save its state, unless that is the `saved` one."""
    run.record(again=run.step in run.recorded)
    if run.step != saved:
        save_state(run.folder, *run.model_and_optimizer(), run.step)


def resume(run: Run) -> int:
    """Bring model and optimizer to their saved state; returns its step, 0 where nothing was saved.

    Raises StoreError for a state that is damaged, and for a recording that lacks a step before it.
    """
    saved = load_state(run.folder, *run.model_and_optimizer())
    if saved is None:
        return 0
    missing = {step for step in run.settings.record_steps if step <= saved} - set(run.recorded)
    if missing:
        raise StoreError(f"{run.folder} lacks its record of step {min(missing)}: delete the folder to train it again.")
    return saved


def settings_in(folder: str | Path, kind: type[Settings]) -> Settings | None:
    """The settings of the run in a folder, None if it holds none.

    Raises StoreError if they are damaged, or not of this kind.
    """
    content = read_settings(Path(folder))
    if content is None:
        return None
    content.pop(TEXT, None)
    try:
        return kind(**content)
    except TypeError:
        raise StoreError(f"{folder} holds a run of another kind: give a folder that this lab wrote.") from None


def load_trained(folder: str | Path, model: Any) -> Any:
    """The model, with the parameters that a run saved last; StoreError if there are none."""
    if load_state(Path(folder), model) is None:
        raise StoreError(f"{folder} holds no trained model: give a folder that train_run wrote.")
    return model
