"""What the birth lab trains: the settings of a run.

In: names and sizes. Out: `Settings`, checked, with the task, the untrained model and the trainer that they make.
"""

from dataclasses import dataclass
from typing import Any

from metaint.errors import InputError
from metaint.labs.birth.training import Trainer
from metaint.labs.common.checks import above_zero, at_least, choose
from metaint.tasks.bigram import BigramTask, bigram
from metaint.toys.memory_transformer import memory_transformer

DISTRIBUTIONS = ("uniform", "bigram", "train")
# What `bigram` takes for each distribution of outputs.
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
        triggers: Any = self.triggers
        options = _OF[outputs or self.outputs]
        return bigram(text, triggers=triggers, trigger_count=self.trigger_count, no_repeat=self.no_repeat, **options)

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
    if not given:
        return {}
    try:
        pairs = [part.split(":") for part in given.split(",")]
        steps = {name.strip(): int(step) for name, step in pairs}
    except ValueError:
        steps = {}
    if not steps or min(steps.values()) < 1:
        raise InputError(f"frozen is {given!r}: join matrices and the steps they wait for, such as W_K1:100,W_K2:100.")
    return steps
