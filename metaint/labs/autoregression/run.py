"""One recorded run of the autoregression lab, which outlives a kill.

In: `Settings` and a folder. Out: the folder of a resumable run (`labs/common/resumable.py`).
"""

import math
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from torch import nn

from metaint.labs.autoregression.settings import Settings
from metaint.labs.autoregression.training import (
    DESCENTS,
    REACHED,
    Starts,
    build,
    draw,
    expected_losses,
    held_out,
    held_out_loss,
    objective,
    regression_scan,
    trained,
)
from metaint.labs.common.checks import finite
from metaint.labs.common.resumable import RECORDING, go_on, load_trained, resume
from metaint.labs.common.run_folder import claim
from metaint.measures import closed_forms
from metaint.models.structure import structure
from metaint.scanning.record_store import append, create, trim, with_step
from metaint.scanning.recur import recur
from metaint.scans.recordings import read_recording
from metaint.toys.diagonal_attention import DiagonalAttention
from metaint.toys.vector_model import VectorModel

# Sequences that comparisons read.
_READ = 128
# Norms of gradients are clipped at this; the second as in the source, where it is 10 from 3 layers on.
_CLIP = {"haar": 1.0, "icl-regression": 0.001}


def train_run(
    folder: str | Path, settings: Settings, on_step: Callable[[int, float], None] = lambda step, loss: None
) -> xr.DataTree:
    """Train one model; what `folder` holds of this run is gone on with, or given back. Returns its recording.

    Diagonal models by gradient descent on the expected loss, "positional" on `batch` sequences until the loss is below
    0.001, both as the authors do; the others by Adam on fresh sequences, whose rate falls linearly over the second half
    of the steps (ours; the authors' stays). At `settings.record_steps` the recording gets `/recurrence`, of diagonal
    models `/structure`, and `/training` with `loss` (of the last step) and `held_out_loss`, and where there are several
    starts `reached`, the share of them within 0.02 d of the known minimum. `on_step` is told step and loss now and
    then. A run that was killed and called again ends with the numbers of one that wasn't (on the same machine, with as
    many threads).

    Raises InputError if the folder holds a run with other settings, `Diverged` when the loss is not finite, StoreError
    if the folder is damaged or can't be written.
    """
    folder = Path(folder)
    claim(folder, asdict(settings))
    return go_on(_Run(folder, settings), on_step, every=max(1, settings.steps // 100))


class _Run:
    """A run between two records: what is trained and its optimizer, at `step`."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings, self.loss = folder, settings, math.nan
        self.module = build(settings)
        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        if isinstance(self.module, Starts):
            self.optimizer: Any = torch.optim.SGD(parameters, settings.learning_rate)
        else:
            betas = (0.9, 0.98 if settings.setting == "icl-regression" else 0.999)
            self.optimizer = torch.optim.Adam(parameters, settings.learning_rate, betas)
        self.path = folder / RECORDING
        self.steps: list[int] = []
        if self.path.exists():
            self.steps = read_recording(self.path)["training"].to_dataset()["step"].values.tolist()
        if self.steps:
            trim(self.path, len(self.steps))  # what a kill left of a torn record
        self.step = resume(self)

    @property
    def number(self) -> float:
        """The last loss."""
        return self.loss

    @property
    def recorded(self) -> Collection[int]:
        return self.steps

    def model_and_optimizer(self) -> tuple[Any, Any]:
        return self.module, self.optimizer

    def has_ended(self) -> bool:
        """Whether all steps were taken, or the loss of "positional" is so low that it is done."""
        if self.step >= self.settings.steps:
            return True
        if self.settings.setting != "positional":
            return False
        with torch.no_grad():
            return bool(expected_losses(self.settings, self.module)[0] < REACHED)

    def take_step(self) -> None:
        """One optimiser step on the sequences of this step."""
        s = self.settings
        self.optimizer.zero_grad()
        if isinstance(self.module, Starts):
            losses = expected_losses(s, self.module)
            # Summed over contexts, as in the source; its "positional" averages.
            (losses.nansum() * (1 if s.setting == "positional" else s.length - 1)).backward()
            loss = losses.detach().nan_to_num(math.inf).min()
        else:
            generator = torch.Generator().manual_seed((s.seed << 32) + self.step + 1)
            loss = objective(s, self.module, draw(s, s.batch, generator)).mean()
            loss.backward()
            if s.setting in _CLIP:
                bound = 10.0 if s.setting == "icl-regression" and s.layers > 2 else _CLIP[s.setting]
                nn.utils.clip_grad_norm_(self.module.parameters(), bound)
            for group in self.optimizer.param_groups:
                group["lr"] = s.learning_rate * min(1.0, 2 * (1 - self.step / s.steps))
        self.optimizer.step()
        self.step += 1
        self.loss = self.finite(loss.item())

    def record(self, again: bool) -> None:
        if again:
            return
        groups = {name: with_step(data, self.step) for name, data in self.read().items()}
        if self.steps:
            append(self.path, groups, len(self.steps))
        else:
            attributes = {"task": "autoregressive", "run": self.settings.name, **asdict(self.settings)}
            create(self.path, groups, attributes)
        self.steps.append(self.step)

    @torch.no_grad()
    def read(self) -> dict[str, xr.Dataset]:
        """The groups of a record."""
        s = self.settings
        model = trained(s, self.module)
        scalars = {"loss": self.loss, "held_out_loss": self.finite(held_out_loss(s, model))}
        if s.diagonal:
            kind: Any = s.setting
            least = closed_forms.diagonal_minimum(kind, s.d, s.heads)
            near = expected_losses(s, self.module) < least + 0.02 * s.d
            scalars["reached"] = near.double().mean().item()
        groups = {"training": xr.Dataset(scalars)}
        if s.setting == "icl-regression":
            return {**groups, "recurrence": regression_scan(s, model)}
        length = max(s.length, s.d + 1) + 1 if s.setting == "augmented" else None
        sample: Any = draw(s, _READ, held_out(s), length)
        options: dict[str, Any] = {"positions": s.positions(), "steps": DESCENTS, "batch_size": _READ}
        groups["recurrence"] = recur(model, *sample, **options)["recurrence"].to_dataset()
        return {**groups, "structure": structure(model)} if isinstance(model, DiagonalAttention) else groups

    def finite(self, loss: float) -> float:
        """The loss; `Diverged` if it isn't finite."""
        s = self.settings
        return finite(loss, s.learning_rate, f"{s.name} had no finite loss at step {self.step}")


def run_model(folder: str | Path, settings: Settings) -> VectorModel:
    """The model of a run as it was last saved; StoreError if there is none."""
    return trained(settings, load_trained(folder, build(settings)))
