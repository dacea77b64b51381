"""One training run of the norm growth lab: a small language model on characters, recorded, that outlives a kill.

In: `Settings`, a folder and a text. Out: the folder of a resumable run (`labs/common/resumable.py`).
"""

import math
import tempfile
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from metaint.errors import StoreError
from metaint.labs.common.checks import finite
from metaint.labs.common.resumable import RECORDING, TEXT, go_on, keep, load_trained, resume, settings_in
from metaint.labs.common.run_folder import claim
from metaint.labs.norm_growth.settings import Characters, Settings, characters
from metaint.probes.heads import HeadProbe
from metaint.probes.saturation import SaturationProbe
from metaint.probes.weights import WeightProbe
from metaint.scanning.recorder import Recorder
from metaint.scanning.scan import attach
from metaint.toys.small import small_transformer

# Held-out windows that the probes read.
_PROBE_WINDOWS = 16
# Positions of each that the saturation probe samples.
_POSITIONS = 16
# Of SGD.
_MOMENTUM = 0.9
# Seconds of steps that are timed.
_MEASURED = 2.0


def train_run(
    folder: str | Path, settings: Settings, text: str | None = None, *, progress: bool = False
) -> xr.DataTree:
    """Train one model on the characters of a text; what `folder` holds of this run is gone on with, or given back.

    AdamW, or SGD with momentum 0.9, both with weight decay on all parameters; the learning rate rises over the first
    tenth of the steps and stays. At `settings.record_steps` the recording gets `/weights`, `/saturation` (kappa 1 and
    infinity) and `/heads` of held-out windows, and `/training` with `loss` (mean since the record before) and
    `held_out_loss` in nats. A batch hangs on seed and step alone, so that a run that was killed and called again ends
    with the very numbers of one that wasn't (on the same machine, with as many threads).

    Returns the recording. Raises InputError if the folder holds a run with other settings or another text, `Diverged`
    when a loss is not finite, StoreError if the folder is damaged or can't be written.
    """
    folder, data = Path(folder), characters(text, settings.length)
    claim(folder, {**asdict(settings), TEXT: data.sha256})
    run = _Run(folder, settings, data)
    with tqdm(total=settings.steps, initial=run.step, disable=not progress, desc=settings.name, leave=False) as bar:
        return go_on(run, lambda step, _: bar.update(step - bar.n))


def trained_model(folder: str | Path, text: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a run on this text as it was last saved, in this precision; StoreError if there is none."""
    settings = settings_of(folder)
    if settings is None:
        raise StoreError(f"{folder} holds no trained model: give a folder that train_run wrote.")
    model, _ = _build(settings, characters(text, settings.length), dtype)
    return load_trained(folder, model)


def settings_of(folder: str | Path) -> Settings | None:
    """The settings of the run in a folder, None if it holds none; StoreError if they are damaged."""
    return settings_in(folder, Settings)


def seconds(settings: Settings, text: str | None = None) -> tuple[float, float]:
    """What a step and a record of such a run take on this machine, measured within a few seconds."""
    with tempfile.TemporaryDirectory() as folder:
        run = _Run(Path(folder), settings, characters(text, settings.length))
        run.take_step()
        keep(run)  # the first is slow: it audits the model
        times = [time.perf_counter()]
        while len(times) < 4 or times[-1] - times[0] < _MEASURED:
            run.take_step()
            times.append(time.perf_counter())
        keep(run)
        return (times[-1] - times[0]) / (len(times) - 1), time.perf_counter() - times[-1]


class _Run:
    """A run between two records: model, optimizer and recorder, all at `step`."""

    def __init__(self, folder: Path, settings: Settings, data: Characters) -> None:
        self.folder, self.settings, self.data = folder, settings, data
        self.model, self.optimizer = _build(settings, data)
        self.weights = WeightProbe(compare=True)
        saturation = SaturationProbe((1, math.inf), positions=_POSITIONS, seed=settings.seed)
        self.recorder = Recorder(
            self.model,
            [self.weights, saturation, HeadProbe()],
            every=1,
            path=folder / RECORDING,
            tokens=data.held_out[:_PROBE_WINDOWS],
            batch_size=_PROBE_WINDOWS * saturation.copies,
            seed=settings.seed,
            attributes={"task": "text", "run": settings.name, "warmup_steps": settings.warmup_steps},
            resume=True,
        )
        self.losses: list[float] = []
        """Of each step since the record before."""
        self.step = resume(self)

    @property
    def number(self) -> float:
        """The mean loss since the record before; NaN where no step was taken."""
        return sum(self.losses) / len(self.losses) if self.losses else math.nan

    @property
    def recorded(self) -> Collection[int]:
        return self.recorder.steps

    def model_and_optimizer(self) -> tuple[Any, Any]:
        return self.model, self.optimizer

    def has_ended(self) -> bool:
        return self.step >= self.settings.steps

    def take_step(self) -> None:
        """One step on the batch of this step."""
        rate: Any = self.settings.learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate * min(1.0, (self.step + 1) / self.settings.warmup_steps)
        self.optimizer.zero_grad()
        loss = self.model(self.batch(), return_type="loss")
        loss.backward()
        self.optimizer.step()
        self.step += 1
        self.losses.append(self.finite(loss.item()))

    def batch(self) -> Int[Tensor, "batch position"]:
        """Windows of the text at random places, which seed and step tell."""
        generator = torch.Generator().manual_seed((self.settings.seed << 32) + self.step)
        length = self.settings.length
        starts = torch.randint(len(self.data.train) - length + 1, (self.settings.batch, 1), generator=generator)
        return self.data.train[starts + torch.arange(length)]

    def record(self, again: bool) -> None:
        with torch.no_grad():
            held_out = self.finite(self.model(self.data.held_out, return_type="loss").item())
        if again:
            with attach(self.model, self.weights):  # which compares the next record with this one
                pass
        else:
            self.recorder(self.step, loss=self.number, held_out_loss=held_out)
        self.losses.clear()

    def finite(self, loss: float) -> float:
        """The loss; `Diverged` if it isn't finite."""
        s = self.settings
        return finite(loss, s.learning_rate, f"{s.name} had no finite loss at step {self.step}")


def _build(settings: Settings, data: Characters, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    s: Any = settings
    model = small_transformer(
        norm=s.norm,
        n_layers=s.n_layers,
        n_heads=s.n_heads,
        d_model=s.d_model,
        d_mlp=4 * s.d_model,
        d_vocab=data.vocabulary,
        n_ctx=s.length,
        seed=s.seed,
        dtype=dtype,
    )
    if s.optimiser == "adamw":
        return model, torch.optim.AdamW(model.parameters(), s.learning_rate, weight_decay=s.weight_decay)
    return model, torch.optim.SGD(model.parameters(), s.learning_rate, _MOMENTUM, weight_decay=s.weight_decay)
