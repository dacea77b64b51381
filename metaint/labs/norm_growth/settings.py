"""What the norm growth lab trains, and on what: the settings of a run, and a text as characters.

In: names, sizes and a text. Out: `Settings`, checked, and `Characters`.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from metaint.errors import InputError
from metaint.labs.common.checks import above_zero, at_least, choose, zero_or_above
from metaint.tasks.text import fold_prose, python_prose

NORMS = ("pre", "output", "post")
OPTIMISERS = ("adamw", "sgd")
# At these each placement of the norm learns within some hundred steps; the decays are torch's defaults.
LEARNING_RATES = {"adamw": 3e-3, "sgd": 0.3}
WEIGHT_DECAYS = {"adamw": 0.01, "sgd": 0.0}
# Share of the text that is held out.
_HELD_OUT = 0.1
# How many windows of it the loss is read on, at most.
_LOSS_WINDOWS = 64
# Share of the steps over which the learning rate rises.
_WARMUP = 0.1


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
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", LEARNING_RATES[self.optimiser])
        if self.weight_decay is None:
            object.__setattr__(self, "weight_decay", WEIGHT_DECAYS[self.optimiser])
        rate: Any = self.learning_rate
        decay: Any = self.weight_decay
        above_zero("learning_rate", rate)
        zero_or_above("weight_decay", decay)
        object.__setattr__(self, "learning_rate", float(rate))
        object.__setattr__(self, "weight_decay", float(decay))
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
    prose = python_prose() if text is None else text
    folded = fold_prose(prose)
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
