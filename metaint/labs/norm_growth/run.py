"""One training run of the norm growth lab: a small language model on characters, recorded, that outlives a kill.

In: `Settings`, a folder and a text. Out: the folder with `settings.json`, `recording.zarr` and `state.safetensors`. The
state is saved after each record, so that what a kill leaves of the recording is at most one record ahead of it.
"""

import hashlib
import math
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from metaint.errors import InputError, StoreError
from metaint.labs.common.checks import above_zero, at_least, choose, finite, zero_or_above
from metaint.labs.common.run_folder import claim, load_state, read_settings, save_state
from metaint.probes.heads import HeadProbe
from metaint.probes.saturation import SaturationProbe
from metaint.probes.weights import WeightProbe
from metaint.scanning.recorder import Recorder
from metaint.scanning.scan import attach
from metaint.scans.recordings import read_recording
from metaint.tasks.text import fold_prose, python_prose
from metaint.toys.small import small_transformer

NORMS, OPTIMISERS = ("pre", "output", "post"), ("adamw", "sgd")
# At these each placement of the norm learns within some hundred steps; the decays are torch's defaults.
LEARNING_RATES = {"adamw": 3e-3, "sgd": 0.3}
WEIGHT_DECAYS = {"adamw": 0.01, "sgd": 0.0}
# Share of the text held out, how many windows of it the loss and the probes read, and the positions they sample.
_HELD_OUT, _LOSS_WINDOWS, _PROBE_WINDOWS, _POSITIONS = 0.1, 64, 16, 16
_WARMUP, _MOMENTUM = 0.1, 0.9
# Seconds of steps that are timed.
_MEASURED = 2.0
RECORDING = "recording.zarr"


@dataclass(frozen=True)
class Settings:
    """All that makes a run what it is, but for its text.

    Without them (None) `learning_rate` and `weight_decay` are those of `LEARNING_RATES` and `WEIGHT_DECAYS`. Raises
    InputError for what can't be trained.
    """

    norm: str
    optimiser: str
    steps: int
    learning_rate: float | None = None
    weight_decay: float | None = None
    seed: int = 0
    records: int = 25
    n_layers: int = 4
    n_heads: int = 4
    d_model: int = 64
    length: int = 64
    batch: int = 16

    def __post_init__(self) -> None:
        choose("norm", self.norm, NORMS)
        choose("optimiser", self.optimiser, OPTIMISERS)
        for name, defaults, check in (
            ("learning_rate", LEARNING_RATES, above_zero),
            ("weight_decay", WEIGHT_DECAYS, zero_or_above),
        ):
            value: Any = getattr(self, name)
            value = defaults[self.optimiser] if value is None else value
            check(name, value)
            object.__setattr__(self, name, float(value))
        at_least(self, steps=1, seed=0, records=2, length=3, batch=1)

    @property
    def name(self) -> str:
        """What the run and its folder are called."""
        return f"{self.norm}-{self.optimiser}-lr{self.learning_rate:g}-wd{self.weight_decay:g}"

    @property
    def warmup_steps(self) -> int:
        """For how many steps the learning rate rises."""
        return math.ceil(_WARMUP * self.steps)

    @property
    def record_steps(self) -> list[int]:
        """About `records` steps from 0 to the last, like a power law: every step at first, then ever wider apart."""
        spread = (max(i, round(self.steps * (i / (self.records - 1)) ** 2.5)) for i in range(self.records))
        return sorted({0, self.steps, *(step for step in spread if step < self.steps)})


class Characters(NamedTuple):
    """A text as tokens, one a character: what is trained on, and windows of what is held out."""

    train: Int[Tensor, " position"]
    held_out: Int[Tensor, "window position"]
    vocabulary: int
    entropy: float
    """Of the text's characters, in nats: the loss of a model that knows their frequencies and no more."""
    sha256: str


def characters(text: str | None, length: int) -> Characters:
    """The text (default: Python's prose), folded, as characters; InputError if it is too short for the windows."""
    folded = fold_prose(python_prose() if text is None else text)
    rest = math.floor(len(folded) * _HELD_OUT)
    if rest < 2 * length:
        need = math.ceil(2 * length / _HELD_OUT)
        raise InputError(f"text has {len(folded)} characters: give at least {need}, for windows of {length}.")
    ids = {character: i for i, character in enumerate(sorted(set(folded)))}
    tokens = torch.tensor([ids[character] for character in folded])
    share = tokens.bincount().double() / len(tokens)
    held_out = tokens[-rest:][: rest // length * length].view(-1, length)[:_LOSS_WINDOWS]
    digest = hashlib.sha256(folded.encode()).hexdigest()[:16]
    return Characters(tokens[:-rest], held_out, len(ids), -(share * share.log()).sum().item(), digest)


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
    claim(folder, {**asdict(settings), "text_sha256": data.sha256})
    _Run(folder, settings, data).train(progress)
    return read_recording(folder / RECORDING)


def trained_model(folder: str | Path, text: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a run on this text as it was last saved, in this precision; StoreError if there is none."""
    folder, settings = Path(folder), settings_of(folder)
    if settings is not None:
        model = _build(settings, characters(text, settings.length), dtype)[0]
        if load_state(folder, model) is not None:
            return model
    raise StoreError(f"{folder} holds no trained model: give a folder that train_run wrote.")


def settings_of(folder: str | Path) -> Settings | None:
    """The settings of the run in a folder, None if it holds none; StoreError if they are damaged."""
    content = read_settings(Path(folder))
    try:
        known = {name: value for name, value in (content or {}).items() if name != "text_sha256"}
        return None if content is None else Settings(**known)
    except TypeError:
        raise StoreError(f"{folder} holds a run of another kind: give a folder that train_run wrote.") from None


def seconds(settings: Settings, text: str | None = None) -> tuple[float, float]:
    """What a step and a record of such a run take on this machine, measured within a few seconds."""
    with tempfile.TemporaryDirectory() as folder:
        run = _Run(Path(folder), settings, characters(text, settings.length))
        run.take_step()
        run.record([])  # the first is slow: it audits the model
        times = [time.perf_counter()]
        while len(times) < 4 or times[-1] - times[0] < _MEASURED:
            run.take_step()
            times.append(time.perf_counter())
        run.record([])
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
        saved = load_state(folder, self.model, self.optimizer)
        missing = {step for step in settings.record_steps if step <= (saved or 0)} - set(self.recorder.steps)
        if saved is not None and missing:
            raise StoreError(f"{folder} lacks its record of step {min(missing)}: delete the folder to train it again.")
        self.step = saved or 0

    def train(self, progress: bool) -> None:
        """From here to the last step."""
        steps, planned = self.settings.steps, set(self.settings.record_steps)
        losses: list[float] = []
        if self.step < steps:
            self.record(losses)
        with tqdm(total=steps, initial=self.step, disable=not progress, desc=self.settings.name, leave=False) as bar:
            while self.step < steps:
                losses.append(self.take_step())
                bar.update()
                if self.step in planned:
                    self.record(losses)
                    losses.clear()

    def take_step(self) -> float:
        """One optimiser step on the batch of this step; its loss in nats."""
        rate: Any = self.settings.learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate * min(1.0, (self.step + 1) / self.settings.warmup_steps)
        self.optimizer.zero_grad()
        loss = self.model(self.batch(), return_type="loss")
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return self.finite(loss.item())

    def batch(self) -> Int[Tensor, "batch position"]:
        """Windows of the text at random places, which seed and step tell."""
        generator = torch.Generator().manual_seed((self.settings.seed << 32) + self.step)
        length = self.settings.length
        starts = torch.randint(len(self.data.train) - length + 1, (self.settings.batch, 1), generator=generator)
        return self.data.train[starts + torch.arange(length)]

    def record(self, losses: list[float]) -> None:
        """Record this step, unless it is recorded already, and save the state."""
        with torch.no_grad():
            held_out = self.finite(self.model(self.data.held_out, return_type="loss").item())
        if self.step in self.recorder.steps:
            with attach(self.model, self.weights):  # which compares the next record with this one
                pass
        else:
            loss = sum(losses) / len(losses) if losses else math.nan
            self.recorder(self.step, loss=loss, held_out_loss=held_out)
        save_state(self.folder, self.model, self.optimizer, self.step)

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
