"""One recorded run of the birth lab, which outlives a kill.

In: `Settings`, a folder and a text. Out: the folder with `settings.json`, `recording.zarr`, `state.safetensors` and one
file of trained matrices for each record. The state is saved after each record, so that what a kill leaves of the
recording is at most one record ahead of it.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xarray as xr
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from metaint.errors import InputError, StoreError
from metaint.labs.birth.behaviour import evaluate
from metaint.labs.birth.training import Checkpoint, Trainer, gradient_model, held_out_sample, matrices
from metaint.labs.common.checks import above_zero, at_least, choose
from metaint.labs.common.run_folder import claim, load_state, read_settings, save_state
from metaint.probes.heads import HeadProbe
from metaint.probes.memory import MemoryProbe
from metaint.scanning.recorder import Recorder
from metaint.scanning.scan import scan
from metaint.scans.recordings import read_recording
from metaint.tasks.bigram import BigramTask, bigram
from metaint.toys.memory_transformer import memory_transformer

RECORDING, STATES = "recording.zarr", "states"
# Held-out sequences: for behaviour, for the probes that ride along, and for each other distribution of outputs.
_HELD_OUT, _PROBED, _OTHER = 128, 16, 64
DISTRIBUTIONS = ("uniform", "bigram", "train")
_OF: dict[str, dict[str, Any]] = {
    "uniform": {},
    "bigram": {"bigram_outputs": True},
    "train": {"outputs": "train"},
    "test": {"outputs": "test"},
}


@dataclass(frozen=True)
class Settings:
    """All that makes a run what it is, but for its text.

    `outputs` says what triggers lead to in training: "uniform" any token, "bigram" what the trigger's own bigrams
    allow, "train" the first three quarters of the tokens, with the last quarter met in testing alone. `frozen` names
    matrices and the steps from which they are trained ("W_K1:100,W_K2:100"). With `loss` "all" positions the last layer
    gets a linear W_F, in which the bigrams can be learnt. Raises InputError for what can't be trained.
    """

    triggers: str = "fixed"
    trigger_count: int = 5
    outputs: str = "uniform"
    no_repeat: bool = False
    layers: int = 2
    loss: str = "head"
    frozen: str = ""
    seed: int = 0
    steps: int = 200
    length: int = 256
    batch: int = 256
    d: int = 128
    learning_rate: float = 0.2
    records: int = 24

    def __post_init__(self) -> None:
        choose("triggers", self.triggers, ("fixed", "random"))
        choose("outputs", self.outputs, DISTRIBUTIONS)
        choose("loss", self.loss, ("head", "all"))
        at_least(self, layers=1, seed=0, steps=1, length=2, batch=1, d=2, records=2)
        above_zero("learning_rate", self.learning_rate)
        frozen_steps(self.frozen)

    @property
    def name(self) -> str:
        """What the run and its folder are called."""
        parts = [f"{self.triggers}{self.trigger_count}", self.outputs, f"{self.layers}-layer", f"seed{self.seed}"]
        parts += ["no-repeat"] * self.no_repeat + ["all-positions"] * (self.loss == "all")
        parts += ["frozen-" + self.frozen.replace(":", "@").replace(",", "-")] if self.frozen else []
        return "-".join(parts)

    @property
    def record_steps(self) -> list[int]:
        """About `records` steps from 0 to the last, wider apart as they go."""
        spread = (round(self.steps * (i / (self.records - 1)) ** 1.5) for i in range(self.records))
        released = [step for step in frozen_steps(self.frozen).values() if step < self.steps]
        return sorted({0, self.steps, *spread, *released})

    def task(self, text: str | None, outputs: str | None = None) -> BigramTask:
        """The task of this run, or the same with other outputs."""
        options: dict[str, Any] = {"triggers": self.triggers, "trigger_count": self.trigger_count}
        return bigram(text, **options, no_repeat=self.no_repeat, **_OF[outputs or self.outputs])

    def model(self, vocab: int) -> Any:
        """The untrained model."""
        feed_forward = "linear" if self.loss == "all" else None
        sizes: Any = {"d_vocab": vocab, "n_ctx": self.length, "d_model": self.d, "n_layers": self.layers}
        return memory_transformer(**sizes, feed_forward=feed_forward, seed=self.seed)

    def trainer(self, text: str | None) -> Trainer:
        """Model and task at step 0."""
        task = self.task(text)
        return Trainer(
            self.model(task.vocab),
            task,
            length=self.length,
            batch=self.batch,
            learning_rate=self.learning_rate,
            loss=self.loss,
            frozen=frozen_steps(self.frozen),
            seed=self.seed,
        )


def frozen_steps(given: str) -> dict[str, int]:
    """Matrices and the steps they are frozen until, from "W_K1:100,W_K2:100"; InputError for another form."""
    try:
        pairs = [part.split(":") for part in given.split(",")] if given else []
        found = {name.strip(): int(step) for name, step in pairs}
    except ValueError:
        found = {given: -1}
    if any(step < 1 for step in found.values()):
        raise InputError(f"frozen is {given!r}: join matrices and the steps they wait for, such as W_K1:100,W_K2:100.")
    return found


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
    folder, trainer = Path(folder), settings.trainer(text)
    task = trainer.task
    held_out = held_out_sample(task, _HELD_OUT, settings.length, settings.seed)
    digest = hashlib.sha256(repr((task.vocabulary, task.unigram.tolist())).encode()).hexdigest()[:16]
    claim(folder, {**asdict(settings), "text_sha256": digest})
    others = {name: _other(settings, text, name) for name in _others(settings)}
    recorder = Recorder(
        trainer.model,
        _probes(settings, task),
        every=1,
        path=folder / RECORDING,
        tokens=held_out.tokens[:_PROBED, :-1],
        seed=settings.seed,
        attributes={"task": "in-context bigrams", **asdict(settings)},
        resume=True,
    )
    trainer.step = load_state(folder, trainer.model, trainer.optimizer) or 0
    planned, taken, accuracy = set(settings.record_steps), [], math.nan

    while True:
        if trainer.step in planned:
            found = evaluate(trainer.model, held_out)
            accuracy = found["accuracy"]
            if trainer.step not in recorder.steps:
                for name, sample in others.items():
                    found[f"accuracy_{name}"] = evaluate(trainer.model, sample, attention=False)["accuracy"]
                found |= {f"norm_{name}": matrix.detach().norm().item() for name, matrix in trainer.matrices.items()}
                recorder(trainer.step, **_means(taken, trainer), **found)
            taken.clear()
            _save_matrices(folder, trainer)
            save_state(folder, trainer.model, trainer.optimizer, trainer.step)
        on_step(trainer.step, accuracy)
        if trainer.step >= settings.steps:
            return read_recording(folder / RECORDING)
        taken.append({"loss": trainer.take_step(), **_gradient_norms(trainer)})


def _gradient_norms(trainer: Trainer) -> dict[str, float]:
    return {f"gradient_norm_{name}": norm for name, norm in trainer.gradient_norms().items()}


def _means(taken: list[dict[str, float]], trainer: Trainer) -> dict[str, float]:
    """Means over the steps that were taken, NaN of none."""
    names = ["loss", *_gradient_norms(trainer)]
    return {name: sum(step[name] for step in taken) / len(taken) if taken else math.nan for name in names}


def first_gradients(settings: Settings, text: str | None = None) -> xr.Dataset:
    """`/memory` of the first gradient of each matrix: what the first step writes into it."""
    trainer = settings.trainer(text)
    probe = _probes(settings, trainer.task)[0]
    return scan(gradient_model(trainer), trainer.sample().tokens[:2, :-1], [probe])["memory"].to_dataset()


def states_of(folder: str | Path) -> list[Checkpoint]:
    """The trained matrices at each record; StoreError if they are damaged."""
    found = []
    for path in sorted((Path(folder) / STATES).glob("*.safetensors")):
        try:
            found.append((int(path.stem), load_file(path)))
        except (OSError, SafetensorError, ValueError) as error:
            raise StoreError(
                f"{path} is damaged ({type(error).__name__}): delete {folder} to train it again."
            ) from error
    return found


def settings_of(folder: str | Path) -> Settings | None:
    """The settings of the run in a folder, None if it holds none; StoreError if they are damaged."""
    content = read_settings(Path(folder))
    try:
        known = {name: value for name, value in (content or {}).items() if name != "text_sha256"}
        return None if content is None else Settings(**known)
    except TypeError:
        raise StoreError(f"{folder} holds a run of another kind: give a folder that the birth lab wrote.") from None


def _probes(settings: Settings, task: BigramTask) -> list[Any]:
    """What is read at every record: each token's memories, the fixed triggers' own, and the heads."""
    linear = settings.loss == "all"
    options: dict[str, Any] = {"bigram": task.bigram} if linear else {}
    if settings.triggers == "fixed" and settings.trigger_count > 1:
        options["triggers"] = task.fixed_triggers.tolist()
    return [MemoryProbe(list(range(task.vocab)), **options), HeadProbe()]


def _others(settings: Settings) -> list[str]:
    """Distributions of outputs that the run isn't trained on, and is tried on."""
    return {"uniform": ["bigram"], "bigram": ["uniform"], "train": ["test"]}[settings.outputs]


def _other(settings: Settings, text: str | None, outputs: str) -> Any:
    return held_out_sample(settings.task(text, outputs), _OTHER, settings.length, settings.seed)


def _save_matrices(folder: Path, trainer: Trainer) -> None:
    path = folder / STATES / f"{trainer.step:06d}.safetensors"
    aside = path.with_suffix(".new")
    try:
        path.parent.mkdir(exist_ok=True)
        save_file({name: value.detach().contiguous() for name, value in matrices(trainer.model).items()}, aside)
        aside.replace(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"the matrices of step {trainer.step} can't be written to {path.parent} ({error}).") from error
