"""The in-context bigram task of Bietti et al. 2023 ("Birth of a Transformer", 2306.00802).

A Markov chain over characters, in which a few trigger tokens are always followed by an output token that is
new in every sequence: a model can only predict it by remembering what followed the trigger before, as an
induction head does. In: a text, whose characters give the chain. Out: tokens, and which positions can be
predicted in context.

Source: transformer-birth `ihead_data.py`, `data/prepare.py` (the data as coded there, vectorised here).
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaint.errors import InputError
from metaint.tasks.text import fold_prose, python_prose


class BigramSample(NamedTuple):
    """What `BigramTask.sample` draws."""

    tokens: Int[Tensor, "batch length+1"]
    """Inputs are `tokens[:, :-1]` and next-token targets `tokens[:, 1:]`."""
    outs: Int[Tensor, "batch length"]
    """For each input: 0 where it is no trigger, else how often that trigger has come so far, 1 at its first
    time. The target can be known from the context where `outs >= 2`; where it is 1 the target is a fresh
    random draw."""
    triggers: Int[Tensor, "batch trigger"]
    outputs: Int[Tensor, "batch trigger"]
    """The token that follows `triggers` in that sequence, always."""


@dataclass(frozen=True, eq=False)
class BigramTask:
    """The distribution (`unigram` and `bigram` in float64), and how triggers and outputs are chosen."""

    vocabulary: tuple[str, ...]
    unigram: Float[Tensor, "vocab"]
    bigram: Float[Tensor, "vocab vocab"]
    triggers: Literal["fixed", "random"] = "random"
    trigger_count: int = 5
    offset: int = 0
    bigram_outputs: bool = False
    no_repeat: bool = False
    outputs: Literal["all", "train", "test"] = "all"

    def __post_init__(self) -> None:
        vocab = len(self.vocabulary)
        if self.triggers not in ("fixed", "random"):
            raise InputError(f"triggers is {self.triggers!r}; give 'fixed' or 'random'.")
        if self.outputs not in ("all", "train", "test"):
            raise InputError(f"outputs is {self.outputs!r}; give 'all', 'train' or 'test'.")
        if not 1 <= self.trigger_count <= vocab:
            raise InputError(
                f"trigger_count is {self.trigger_count}; give 1 to {vocab}, the number of different characters."
            )
        if not 0 <= self.offset <= vocab - self.trigger_count:
            raise InputError(
                f"offset is {self.offset}; give 0 to {vocab - self.trigger_count}, "
                f"so that {self.trigger_count} triggers remain below it in the ranking."
            )
        if self.offset and self.triggers == "random":
            raise InputError(
                f"offset is {self.offset}, which moves fixed triggers only; give 0 with triggers='random'."
            )
        if self.bigram_outputs and self.outputs != "all":
            raise InputError(
                f"outputs is {self.outputs!r} together with bigram_outputs; give outputs='all' or bigram_outputs=False."
            )
        pool = self._pool
        if not pool.any() or (self.no_repeat and int(pool.sum()) < 2):
            raise InputError(
                f"outputs is {self.outputs!r}, which leaves {int(pool.sum())} of {vocab} characters "
                f"as outputs; give a text with more different characters."
            )

    @classmethod
    def from_text(cls, text: str, **options) -> "BigramTask":
        """The chain of the characters of `text`: counts over all of it, no smoothing; ids are in sorted
        order.

        A character that only ends the text has no follower: its row is the unigram distribution. Options:
        - `triggers`: "fixed", the `trigger_count` most frequent characters (the most frequent last), after
          leaving out the `offset` most frequent; or "random", drawn for each sequence without replacement by
          frequency.
        - `bigram_outputs`: draw an output from the trigger's own bigram row, and not uniformly.
        - `no_repeat`: never let a trigger be its own output. Without it such sequences stay constant for ever
          (about 7 % of them with 5 triggers and 65 characters), and copying the current token already scores
          about 0.25.
        - `outputs`: "train" or "test" keeps to the first 75 % or the last 25 % of the ids.

        Raises InputError for a text with fewer than two different characters, and for options out of range.
        """
        if not isinstance(text, str) or len(set(text)) < 2:
            found = f"a text of {len(text)} characters" if isinstance(text, str) else f"a {type(text).__name__}"
            raise InputError(f"text is {found}; give a string with at least two different characters.")
        vocabulary = tuple(sorted(set(text)))
        rank = {character: index for index, character in enumerate(vocabulary)}
        unigram = torch.zeros(len(vocabulary), dtype=torch.float64)
        for character, count in Counter(text).items():
            unigram[rank[character]] = count
        bigram = torch.zeros(len(vocabulary), len(vocabulary), dtype=torch.float64)
        for (first, second), count in Counter(pairwise(text)).items():
            bigram[rank[first], rank[second]] = count
        bigram = torch.where(bigram.sum(1, keepdim=True) > 0, bigram, unigram)
        return cls(vocabulary, unigram / unigram.sum(), bigram / bigram.sum(1, keepdim=True), **options)

    @property
    def vocab(self) -> int:
        """The number of different tokens."""
        return len(self.vocabulary)

    def sample(
        self,
        batch: int,
        length: int,
        seed: int | torch.Generator = 0,
        device: torch.device | str | None = None,
    ) -> BigramSample:
        """`batch` sequences of `length` inputs and one more token, the last target.

        All sequences are drawn together, by inverting cumulative distributions on the CPU, with a loop over
        time only. The result depends on `seed` alone; a Generator (on the CPU) is advanced, so that the next
        call goes on. Raises InputError for sizes below 1.
        """
        for name, value in (("batch", batch), ("length", length)):
            if value < 1:
                raise InputError(f"{name} is {value}; give at least 1.")
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        triggers = self._draw_triggers(batch, generator)
        uniform = torch.rand(batch, self.trigger_count, generator=generator, dtype=torch.float64)
        outputs = _invert(self._output_cumulative[triggers], uniform)
        rules = torch.full((batch, self.vocab), -1).scatter_(1, triggers, outputs)

        uniform = torch.rand(batch, length + 1, generator=generator, dtype=torch.float64)
        steps = [_invert(_cumulate(self.unigram).expand(batch, -1), uniform[:, 0])]
        for time in range(1, length + 1):
            ruled = rules.gather(1, steps[-1][:, None])[:, 0]
            free = _invert(self._cumulative[steps[-1]], uniform[:, time])
            steps.append(torch.where(ruled >= 0, ruled, free))
        tokens = torch.stack(steps, dim=1)

        hits = tokens[:, :-1, None] == triggers[:, None]
        outs = (hits * hits.cumsum(1)).sum(-1)
        return BigramSample(*(part.to(device) for part in (tokens, outs, triggers, outputs)))

    def _draw_triggers(self, batch: int, generator: torch.Generator) -> Int[Tensor, "batch trigger"]:
        if self.triggers == "fixed":
            end = self.vocab - self.offset
            ranking = self.unigram.argsort(stable=True)[end - self.trigger_count : end]
            return ranking.repeat(batch, 1)
        # The largest K of log p + Gumbel noise are a draw without replacement (noise -log E, E exponential).
        noise = torch.empty(batch, self.vocab, dtype=torch.float64).exponential_(generator=generator)
        return (self.unigram.log() - noise.log()).topk(self.trigger_count, dim=1).indices

    @cached_property
    def _pool(self) -> Tensor:
        """Which ids may be outputs: bool [vocab]."""
        index, border = torch.arange(self.vocab), int(0.75 * self.vocab)
        return {"all": index >= 0, "train": index < border, "test": index >= border}[self.outputs]

    @cached_property
    def _cumulative(self) -> Float[Tensor, "vocab vocab"]:
        return _cumulate(self.bigram)

    @cached_property
    def _output_cumulative(self) -> Float[Tensor, "trigger output"]:
        """For each trigger, the cumulative distribution of its output."""
        allowed = self._pool.expand(self.vocab, -1).double()
        if self.no_repeat:
            allowed = allowed * (1 - torch.eye(self.vocab, dtype=torch.float64))
        weights = self.bigram * allowed if self.bigram_outputs else allowed
        # A character that is only ever followed by itself has no other bigram output: any will do.
        return _cumulate(torch.where(weights.sum(1, keepdim=True) > 0, weights, allowed))


def bigram(text: str | None = None, **options) -> BigramTask:
    """The in-context bigram task over the characters of `text`; options as in `BigramTask.from_text`.

    Without a text it is Python's own prose in a small alphabet (`fold_prose`): lower-case letters, digits,
    ASCII signs, space and line break, 68 characters on Python 3.11. (The paper's code uses tiny-Shakespeare,
    with 65 characters.)
    """
    return BigramTask.from_text(fold_prose(python_prose()) if text is None else text, **options)


def _cumulate(weights: Float[Tensor, "*row vocab"]) -> Float[Tensor, "*row vocab"]:
    """Cumulative distributions that end in exactly 1, so that `_invert` never lands on a weight of zero."""
    total = weights.cumsum(-1)
    return total / total[..., -1:]


def _invert(
    cumulative: Float[Tensor, "batch *item vocab"], uniform: Float[Tensor, "batch *item"]
) -> Int[Tensor, "batch *item"]:
    """The first index whose cumulative weight exceeds `uniform`, which lies in [0, 1)."""
    return torch.searchsorted(cumulative.contiguous(), uniform[..., None].contiguous(), right=True)[..., 0]
