"""One recorded run of the birth lab, which outlives a kill.

In: `Settings`, a folder and a text. Out: the folder of a resumable run (`labs/common/resumable.py`), and in it one file
of trained matrices for each record.
"""

import hashlib
import math
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xarray as xr
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from metaint.errors import StoreError
from metaint.labs.birth.behaviour import evaluate
from metaint.labs.birth.settings import Settings
from metaint.labs.birth.training import Checkpoint, gradient_model, held_out_sample, matrices
from metaint.labs.common.resumable import RECORDING, TEXT, go_on, resume, settings_in
from metaint.labs.common.run_folder import claim
from metaint.probes.heads import HeadProbe
from metaint.probes.memory import MemoryProbe
from metaint.scanning.recorder import Recorder
from metaint.scanning.scan import scan
from metaint.tasks.bigram import BigramTask

STATES = "states"
# Held-out sequences for behaviour.
_HELD_OUT = 128
# How many of them the probes read that ride along.
_PROBED = 16
# Held-out sequences for each other distribution of outputs.
_OTHER = 64
# Distributions of outputs that a run is tried on beside its own, by which that is.
_OTHERS = {"uniform": ["bigram"], "bigram": ["uniform"], "train": ["test"]}


def train_run(
    folder: str | Path,
    settings: Settings,
    text: str | None = None,
    on_step: Callable[[int, float], None] = lambda step, accuracy: None,
) -> xr.DataTree:
    """Train one model; what `folder` holds of this run is gone on with, or given back. Returns its recording.

    At `settings.record_steps` the recording gets `/memory` and `/heads` of held-out sequences, and `/training` with
    what `evaluate` tells, `norm_<matrix>` of what is trained, and `accuracy_<outputs>` on sequences whose outputs are
    drawn otherwise than in training. Of training itself it gets means over the steps since the record before (NaN at
    the first): the `loss`, and `gradient_norm_<matrix>`, the length of its gradient, NaN while it is frozen. `on_step`
    is told the step and the last in-context accuracy. A run that was killed and called again ends with the numbers of
    one that wasn't (on the same machine, with as many threads).

    Raises InputError if the folder holds a run with other settings or another text, `Diverged` when a loss is not
    finite, StoreError if the folder is damaged or can't be written.
    """
    folder = Path(folder)
    task = settings.task(text)
    digest = hashlib.sha256(repr((task.vocabulary, task.unigram.tolist())).encode()).hexdigest()[:16]
    claim(folder, {**asdict(settings), TEXT: digest})
    return go_on(_Run(folder, settings, text), on_step)


class _Run:
    """A run between two records: a trainer and a recorder."""

    def __init__(self, folder: Path, settings: Settings, text: str | None) -> None:
        self.folder, self.settings = folder, settings
        self.trainer = settings.trainer(text)
        self.held_out = held_out_sample(self.trainer.task, _HELD_OUT, settings.length, settings.seed)
        self.others = {}
        for outputs in _OTHERS[settings.outputs]:
            task = settings.task(text, outputs)
            self.others[outputs] = held_out_sample(task, _OTHER, settings.length, settings.seed)
        self.recorder = Recorder(
            self.trainer.model,
            _probes(settings, self.trainer.task),
            every=1,
            path=folder / RECORDING,
            tokens=self.held_out.tokens[:_PROBED, :-1],
            seed=settings.seed,
            attributes={"task": "in-context bigrams", **asdict(settings)},
            resume=True,
        )
        self.trainer.step = resume(self)
        self.taken: list[dict[str, float]] = []
        """What is told of each step since the record before."""
        self.number = math.nan
        """The last in-context accuracy."""

    @property
    def step(self) -> int:
        return self.trainer.step

    @property
    def recorded(self) -> Collection[int]:
        return self.recorder.steps

    def model_and_optimizer(self) -> tuple[Any, Any]:
        return self.trainer.model, self.trainer.optimizer

    def has_ended(self) -> bool:
        return self.step >= self.settings.steps

    def take_step(self) -> None:
        loss = self.trainer.take_step()
        self.taken.append({"loss": loss, **self.gradient_norms()})

    def gradient_norms(self) -> dict[str, float]:
        return {f"gradient_norm_{name}": norm for name, norm in self.trainer.gradient_norms().items()}

    def record(self, again: bool) -> None:
        model = self.trainer.model
        behaviour = evaluate(model, self.held_out)
        self.number = behaviour["accuracy"]
        if not again:
            for name, sample in self.others.items():
                behaviour[f"accuracy_{name}"] = evaluate(model, sample, attention=False)["accuracy"]
            for name, matrix in self.trainer.matrices.items():
                behaviour[f"norm_{name}"] = matrix.detach().norm().item()
            self.recorder(self.step, **self.means(), **behaviour)
        self.taken.clear()
        _save_matrices(self.folder, model, self.step)

    def means(self) -> dict[str, float]:
        """Means over the steps since the record before, NaN where none was taken."""
        names = ["loss", *self.gradient_norms()]
        if not self.taken:
            return dict.fromkeys(names, math.nan)
        return {name: sum(step[name] for step in self.taken) / len(self.taken) for name in names}


def first_gradients(settings: Settings, text: str | None = None) -> xr.Dataset:
    """`/memory` of the first gradient of each matrix: what the first step writes into it."""
    trainer = settings.trainer(text)
    probe = _probes(settings, trainer.task)[0]
    return scan(gradient_model(trainer), trainer.sample().tokens[:2, :-1], [probe])["memory"].to_dataset()


def states_of(folder: str | Path) -> list[Checkpoint]:
    """The trained matrices at each record; StoreError if they are damaged."""
    states = []
    for path in sorted((Path(folder) / STATES).glob("*.safetensors")):
        try:
            states.append((int(path.stem), load_file(path)))
        except (OSError, SafetensorError, ValueError) as error:
            raise StoreError(
                f"{path} is damaged ({type(error).__name__}): delete {folder} to train it again."
            ) from error
    return states


def settings_of(folder: str | Path) -> Settings | None:
    """The settings of the run in a folder, None if it holds none; StoreError if they are damaged."""
    return settings_in(folder, Settings)


def _probes(settings: Settings, task: BigramTask) -> list[Any]:
    """What is read at every record: each token's memories, the fixed triggers' own, and the heads."""
    options: dict[str, Any] = {}
    if settings.loss == "all":  # the last layer has a linear W_F, in which the bigrams can be learnt
        options["bigram"] = task.bigram
    if settings.triggers == "fixed" and settings.trigger_count > 1:
        options["triggers"] = task.fixed_triggers.tolist()
    return [MemoryProbe(list(range(task.vocab)), **options), HeadProbe()]


def _save_matrices(folder: Path, model: Any, step: int) -> None:
    path = folder / STATES / f"{step:06d}.safetensors"
    aside = path.with_suffix(".new")
    try:
        path.parent.mkdir(exist_ok=True)
        save_file({name: value.detach().contiguous() for name, value in matrices(model).items()}, aside)
        aside.replace(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"the matrices of step {step} can't be written to {path.parent} ({error}).") from error
