"""Training the simplified transformer of Bietti et al. 2023 on in-context bigrams, step by step.

In: a `BigramTask` and a `memory_transformer`. Out: the model, trained in place; what it does is told by
`birth_behaviour.py`. Source: transformer-birth `ihead_basic_main.py`, with its losses.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import xarray as xr
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from metaint.errors import InputError
from metaint.labs.birth.behaviour import evaluate
from metaint.labs.common.checks import finite
from metaint.tasks.bigram import BigramSample, BigramTask
from metaint.toys.memory_transformer import memory_transformer

Checkpoint = tuple[int, dict[str, Tensor]]


def matrices(model: Any) -> dict[str, Tensor]:
    """What is trained, by the paper's names: W_K1, W_K2, ... of each layer, W_O of the last, W_F, E and U."""
    named = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        *_, last = name.split(".")
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
            last = f"{last}{layer}" if last in ("W_K", "W_O") else last
        named[{"embed.weight": "E", "unembed.weight": "U"}.get(name, last)] = parameter
    return named


class Trainer:
    """A model, its optimizer and the step they have reached: SGD with momentum on fresh sequences.

    The loss is the mean cross entropy in nats of positions with `outs >= 2`, where the context tells the target, or
    with `loss="all"` of all positions. Matrices named in `frozen` begin to be trained at the step given. The batch of
    a step hangs on seed and step alone, and the global random state stays as it is.

    Raises InputError for settings that can't train, and `Diverged` from a step whose loss isn't finite.
    """

    def __init__(
        self,
        model: Any,
        task: BigramTask,
        *,
        length: int,
        batch: int,
        learning_rate: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        loss: str = "head",
        frozen: Mapping[str, int] | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.task, self.length, self.batch, self.seed = model, task, length, batch, seed
        self.loss, self.frozen, self.step = loss, dict(frozen or {}), 0
        self.matrices = matrices(model)
        if batch < 1:
            raise InputError(f"batch is {batch}: give at least 1.")
        if loss not in ("head", "all"):
            raise InputError(f'loss is {loss!r}: give "head" or "all".')
        if unknown := set(self.frozen) - set(self.matrices):
            raise InputError(f"frozen names {sorted(unknown)[0]!r}: name some of {', '.join(self.matrices)}.")
        options: Any = {"lr": learning_rate, "momentum": momentum, "weight_decay": weight_decay}
        self.optimizer = torch.optim.SGD(self.matrices.values(), **options)

    def take_step(self) -> float:
        """One step on the batch of this step; its loss."""
        for name, matrix in self.matrices.items():
            matrix.requires_grad_(self.step >= self.frozen.get(name, 0))
        if any(matrix.requires_grad for matrix in self.matrices.values()):
            self.optimizer.zero_grad()
            loss = self.loss_of(self.sample())
            loss.backward()
            self.optimizer.step()
        else:
            with torch.no_grad():
                loss = self.loss_of(self.sample())
        for matrix in self.matrices.values():
            matrix.requires_grad_(True)
        rate = self.optimizer.param_groups[0]["lr"]
        value = finite(loss.item(), rate, f"the loss was no longer finite at step {self.step}")
        self.step += 1
        return value

    def gradient_norms(self) -> dict[str, float]:
        """Length of the gradient of each matrix in the step just taken, weight decay apart; NaN if it was frozen."""
        gradients = {name: matrix.grad for name, matrix in self.matrices.items()}
        return {name: math.nan if grad is None else grad.norm().item() for name, grad in gradients.items()}

    def sample(self) -> BigramSample:
        """The batch of this step."""
        generator = torch.Generator().manual_seed((self.seed << 32) + self.step + 1)
        return self.task.sample(self.batch, self.length, generator, self.model.W_E.device)

    def loss_of(self, sample: BigramSample) -> Tensor:
        """The loss that is trained on; 0 where no position counts."""
        inputs, targets = sample.tokens[:, :-1], sample.tokens[:, 1:]
        where = sample.outs >= 2 if self.loss == "head" else torch.ones_like(sample.outs, dtype=torch.bool)
        return cross_entropy(self.model(inputs)[where], targets[where], reduction="sum") / where.sum().clamp(min=1)


def gradient_model(trainer: Trainer) -> Any:
    """A copy of the model with, in place of each trained matrix, minus its gradient on the batch of this step.

    What `MemoryProbe` reads of it tells what the first step writes into each memory. The trainer is left as it is.
    """
    gradients = copy.deepcopy(trainer.model)
    shadow = Trainer(gradients, trainer.task, length=trainer.length, batch=trainer.batch, learning_rate=1.0)
    shadow.seed, shadow.step, shadow.loss = trainer.seed, trainer.step, trainer.loss
    shadow.loss_of(shadow.sample()).backward()
    with torch.no_grad():
        for matrix in shadow.matrices.values():
            gradient = matrix.grad
            if gradient is None:
                matrix.zero_()
            else:
                matrix.copy_(-gradient)
            matrix.grad = None
    return gradients


# ---- a training kept in memory ----------------------------------------------------------------------------------


class Training(NamedTuple):
    """What `train` gives back."""

    model: Any
    checkpoints: list[Checkpoint]
    """(step, the trained matrices by name), closer together early; `restore` puts one into a model."""
    history: xr.Dataset
    """By `step`, what `evaluate` tells of predictions on fixed held-out sequences: accuracies and losses."""


def restore(model: Any, checkpoint: Checkpoint) -> Any:
    """Puts the matrices of one checkpoint into `model`, which is returned."""
    with torch.no_grad():
        for name, matrix in matrices(model).items():
            matrix.copy_(checkpoint[1][name])
    return model


def train(
    task: BigramTask,
    *,
    length: int = 128,
    d: int = 128,
    batch: int = 32,
    learning_rate: float = 0.5,
    target: float = 0.85,
    settle: float = 3.0,
    steps: int = 1000,
    every: int = 10,
    keep: int = 20,
    seed: int = 0,
    device: torch.device | str | None = None,
    on_step: Callable[[int, Any], None] | None = None,
    progress: bool = False,
) -> Training:
    """Trains until an induction head has settled, with states kept along the way.

    Every `every` steps the model meets a fixed held-out batch. Once its in-context accuracy has passed `target` at
    step s, training goes on to step `settle * s` (1 stops at once) while the heads sharpen, and never beyond `steps`;
    `history.attrs["passed_at"]` is s, or -1. About `keep` checkpoints come back, the first and last state among them.
    `on_step(step, model)` is called before each step's update and after the last, for probes along the way.

    The settings are ours, chosen for a small machine (the paper's code: length 256, batch 512, learning rate 0.2,
    5 triggers). With `bigram(trigger_count=48, no_repeat=True)` they take about a minute on one core: the target is
    passed near step 200, and since most characters are triggers, the induction head works for rare tokens
    too. Everything depends on `seed` alone (weights, batches) up to the device's arithmetic, and the global random
    state stays as it was. Raises InputError for settings that can't train.
    """
    for name, value in (("steps", steps), ("every", every)):
        if value < 1:
            raise InputError(f"{name} is {value}: give at least 1.")
    if keep < 2:
        raise InputError(f"keep is {keep}: give at least 2, for the first and the last state.")
    if not 0 < target <= 1:
        raise InputError(f"target is {target}: give an accuracy above 0 and up to 1.")
    if settle < 1:
        raise InputError(f"settle is {settle}: give at least 1, which stops once the target is passed.")
    held_out = held_out_sample(task, 128, length, seed, device)
    model = memory_transformer(d_vocab=task.vocab, n_ctx=length, d_model=d, seed=seed, device=device)
    trainer = Trainer(model, task, length=length, batch=batch, learning_rate=learning_rate, seed=seed)
    states: list[Checkpoint] = []
    rows: list[dict[str, float]] = []
    passed_at, last = -1, steps
    with tqdm(total=steps, disable=not progress, desc="training the toy", unit="step") as bar:
        while True:
            step = trainer.step
            if step % every == 0 or step == last:
                rows.append(evaluate(model, held_out, attention=False))
                states.append((step, {name: m.detach().cpu().clone() for name, m in trainer.matrices.items()}))
                if passed_at < 0 and rows[-1]["accuracy"] > target:
                    passed_at, last = step, min(steps, math.ceil(settle * step))
                    bar.total = last
                bar.set_postfix(accuracy=f"{rows[-1]['accuracy']:.2f}")
            if on_step is not None:
                on_step(step, model)
            if step >= last:
                break
            trainer.take_step()
            bar.update()
    history = xr.Dataset(
        {name: ("step", [row[name] for row in rows]) for name in rows[0]}, {"step": [step for step, _ in states]}
    )
    history.attrs = {
        "target": target, "passed_at": passed_at, "length": length, "d": d, "batch": batch, "seed": seed,
        "learning_rate": learning_rate, "triggers": task.triggers, "trigger_count": task.trigger_count,
        "vocab": task.vocab,
    }  # fmt: skip
    return Training(model, _thin(states, keep), history)


def held_out_sample(task: BigramTask, count: int, length: int, seed: int, device: Any = None) -> BigramSample:
    """Sequences that no step is trained on; InputError if no trigger comes twice in them."""
    held_out = task.sample(count, length, torch.Generator().manual_seed(seed << 32), device)
    if not (held_out.outs >= 2).any():
        raise InputError(f"length is {length}, too short for a trigger to come twice: give more, or more triggers.")
    return held_out


def _thin(states: Sequence[Checkpoint], keep: int) -> list[Checkpoint]:
    """About `keep` of the states, the first and the last among them, closer together early on."""
    last = len(states) - 1
    places = {round(last * (i / (keep - 1)) ** 1.5) for i in range(keep)} if last >= keep else range(last + 1)
    return [states[place] for place in sorted(places)]
