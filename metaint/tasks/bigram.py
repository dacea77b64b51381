"""The in-context bigram task of Bietti et al. 2023 ("Birth of a Transformer", 2306.00802).

A Markov chain over characters or tokens, in which a few trigger tokens are always followed by an output token that
is new in every sequence: a model can only predict it by remembering what followed the trigger before, as an
induction head does. In: a text, a row of token ids, or counts, which give the chain. Out: tokens, and which
positions can be predicted in context.

Source: transformer-birth `ihead_data.py`, `data/prepare.py` (the data as coded there, vectorised in `bigram_draws.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaint.errors import InputError, door
from metaint.tasks.bigram_draws import LARGEST, Draws, draws_of, uniform_numbers
from metaint.tasks.text import fold_prose, python_prose

_DENSE = 16_384
"""The largest vocabulary whose bigram matrix is built (2 GiB)."""


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


class TriggerOptions(TypedDict, total=False):
    """What says how triggers and outputs are chosen: fields of `BigramTask`, as `from_text` explains them."""

    triggers: Literal["fixed", "random"]
    trigger_count: int
    offset: int
    bigram_outputs: bool
    no_repeat: bool
    outputs: Literal["all", "train", "test"]


@dataclass(frozen=True, eq=False)
class BigramTask:
    """The chain, in float64, and how triggers and outputs are chosen. Made by `from_text`, `from_tokens` or
    `from_counts`."""

    vocabulary: tuple[str, ...]
    unigram: Float[Tensor, "vocab"]
    """Shares, which sum to 1; 0 for an id that doesn't occur: it is never drawn, as trigger, output or else."""
    pairs: Int[Tensor, "2 pair"]
    """Each id and one that follows it, in ascending order. An id that is missing here goes on by `unigram`."""
    weights: Float[Tensor, "pair"]
    """The probability of the follower given the id."""
    triggers: Literal["fixed", "random"] = "random"
    trigger_count: int = 5
    offset: int = 0
    bigram_outputs: bool = False
    no_repeat: bool = False
    outputs: Literal["all", "train", "test"] = "all"

    def __post_init__(self) -> None:
        occurring = len(self._occurring)
        unit = "characters" if all(len(word) == 1 for word in self.vocabulary) else "tokens"
        if self.triggers not in ("fixed", "random"):
            raise InputError(f"triggers is {self.triggers!r}: give 'fixed' or 'random'.")
        if self.outputs not in ("all", "train", "test"):
            raise InputError(f"outputs is {self.outputs!r}: give 'all', 'train' or 'test'.")
        if not 1 <= self.trigger_count <= occurring:
            raise InputError(
                f"trigger_count is {self.trigger_count}: give 1 to {occurring}, the number of different {unit}."
            )
        if not 0 <= self.offset <= occurring - self.trigger_count:
            raise InputError(
                f"offset is {self.offset}: give 0 to {occurring - self.trigger_count}, "
                f"so that {self.trigger_count} triggers remain below it in the ranking."
            )
        if self.offset and self.triggers == "random":
            raise InputError(
                f"offset is {self.offset}, which moves fixed triggers only: give 0 with triggers='random'."
            )
        if self.bigram_outputs and self.outputs != "all":
            raise InputError(
                f"outputs is {self.outputs!r} together with bigram_outputs: give outputs='all' or bigram_outputs=False."
            )
        if len(self._pool) < 1 + self.no_repeat:
            raise InputError(
                f"outputs is {self.outputs!r}, which leaves {len(self._pool)} of {occurring} {unit} "
                f"as outputs: give a text with more different {unit}."
            )

    @classmethod
    def from_text(cls, text: str, **options: Unpack[TriggerOptions]) -> "BigramTask":
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
        - `outputs`: "train" or "test" keeps to the first 75 % or the last 25 % of the ids that occur.

        Raises InputError for a text with fewer than two different characters, and for options out of range.
        """
        if not isinstance(text, str) or len(set(text)) < 2:
            kind = f"a text of {len(text)} characters" if isinstance(text, str) else f"a {type(text).__name__}"
            raise InputError(f"text is {kind}: give a string with at least two different characters.")
        vocabulary = sorted(set(text))
        rank = {ord(character): index for index, character in enumerate(vocabulary)}
        codes = np.frombuffer(text.translate(rank).encode("utf-32-le", "surrogatepass"), "<u4")
        return cls.from_tokens(torch.from_numpy(codes.astype(np.int64)), vocabulary=vocabulary, **options)

    @classmethod
    def from_tokens(
        cls,
        ids: Int[Tensor, "position"] | Sequence[int],
        vocab: int | None = None,
        vocabulary: Sequence[str] | None = None,
        **options: Unpack[TriggerOptions],
    ) -> "BigramTask":
        """The chain of a text in a model's own tokens, whose samples can be fed to that model.

        `vocab` is the size of the model's vocabulary, however few of its tokens occur (by default that of
        `vocabulary`, else the largest id plus one); `vocabulary` has a name for each id, by default "<7>" and so on.
        Triggers and outputs are drawn from the ids that occur. Options as in `from_text`. Raises InputError for ids
        outside of the vocabulary, or fewer than two different ones.
        """
        ids = torch.as_tensor(ids).cpu()
        if ids.dim() != 1 or ids.dtype == torch.bool or ids.is_floating_point():
            kind = str(ids.dtype).removeprefix("torch.")
            raise InputError(f"ids is {kind} of shape {tuple(ids.shape)}: give one row of whole numbers, [position].")
        if vocab is None:
            vocab = len(vocabulary or ())
            if not vocabulary and len(ids):
                vocab = int(ids.max()) + 1
        for wrong in ids[(ids < 0) | (ids >= vocab)][:1].tolist():
            raise InputError(f"ids holds {wrong}, outside the vocabulary 0..{vocab - 1}: give ids inside it.")
        ids = ids.long()
        pairs = torch.stack([ids[:-1], ids[1:]])
        ones = torch.ones(pairs.shape[1], dtype=torch.float64)
        counts = torch.sparse_coo_tensor(pairs, ones, (vocab, vocab), check_invariants=True)
        return cls.from_counts(ids.bincount(minlength=vocab), counts, vocabulary, **options)

    @classmethod
    def from_counts(
        cls, unigram: Tensor, bigram: Tensor, vocabulary: Sequence[str] | None = None, **options: Unpack[TriggerOptions]
    ) -> "BigramTask":
        """The chain with these counts, or weights on any scale: `unigram` [vocab], and `bigram` [vocab, vocab], the
        row followed by the column, dense or `torch.sparse_coo_tensor`.

        `vocabulary` and options as in `from_tokens`. Raises InputError for shapes that don't go together, counts
        below 0 or not finite, pairs of an id that `unigram` lacks, or fewer than two ids that occur.
        """
        if bigram.shape != 2 * unigram.shape:
            shapes = f"{tuple(unigram.shape)} and {tuple(bigram.shape)}"
            raise InputError(f"unigram and bigram have shapes {shapes}: give [vocab] and [vocab, vocab].")
        vocab = len(unigram)
        if vocab > LARGEST:
            raise InputError(f"unigram has {vocab} ids: give at most {LARGEST}.")
        if vocabulary is not None and len(vocabulary) != vocab:
            raise InputError(f"vocabulary has {len(vocabulary)} entries: give {vocab}, one for each id.")
        sparse = bigram.detach().cpu().to_sparse().coalesce()
        unigram, counts, pairs = unigram.detach().cpu().double(), sparse.values().double(), sparse.indices()
        for name, values in (("unigram", unigram), ("bigram", counts)):
            for wrong in values[~((values >= 0) & values.isfinite())][:1].tolist():
                raise InputError(f"{name} holds {wrong:g}: give finite counts of at least 0.")
        if (unigram > 0).sum() < 2:
            raise InputError(f"{int((unigram > 0).sum())} of {vocab} ids occur: give at least two different ones.")
        counts, pairs = counts[counts > 0], pairs[:, counts > 0]
        for wrong in pairs[unigram[pairs] == 0][:1].tolist():
            raise InputError(f"bigram has a pair with id {wrong}, whose unigram count is 0: give it one above 0.")
        totals = torch.zeros(vocab).double().index_add_(0, pairs[0], counts)
        names = tuple(vocabulary or (f"<{index}>" for index in range(vocab)))
        return cls(names, unigram / unigram.sum(), pairs, counts / totals[pairs[0]], **options)

    @property
    def vocab(self) -> int:
        """The number of different tokens."""
        return len(self.vocabulary)

    @cached_property
    def bigram(self) -> Float[Tensor, "vocab vocab"]:
        """The probability of the column after the row, as a matrix; raises InputError above 16,384 tokens."""
        if self.vocab > _DENSE:
            raise InputError(
                f"vocab is {self.vocab}, too large for a matrix [vocab, vocab]: "
                f"read pairs and weights, or make a task with at most {_DENSE} tokens."
            )
        matrix = self.unigram.repeat(self.vocab, 1)
        matrix[self.pairs[0]] = 0
        matrix[*self.pairs] = self.weights
        return matrix

    @property
    def unigram_entropy(self) -> float:
        """Of a token by itself, in nats."""
        return float(-torch.xlogy(self.unigram, self.unigram).sum())

    @property
    def bigram_entropy(self) -> float:
        """Of a token given the one before, in nats: the mean over `unigram` of the entropy of its row."""
        followed = -(self.unigram[self.pairs[0]] * torch.xlogy(self.weights, self.weights)).sum()
        without_row = torch.ones(self.vocab, dtype=torch.bool).index_fill(0, self.pairs[0], False)
        return float(followed + self.unigram[without_row].sum() * self.unigram_entropy)

    @cached_property
    def fixed_triggers(self) -> Int[Tensor, "trigger"]:
        """The ids that are triggers in every sequence, the most frequent last; none with triggers="random"."""
        end = self.vocab - self.offset
        start = end - self.trigger_count if self.triggers == "fixed" else end
        return self.unigram.argsort(stable=True)[start:end]

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
                raise InputError(f"{name} is {value}: give at least 1.")
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        if self.triggers == "fixed":
            triggers = np.tile(self.fixed_triggers.numpy(), (batch, 1))
        else:
            triggers = self._draws.triggers(batch, self.trigger_count, generator)
        uniform = uniform_numbers(batch, self.trigger_count, generator)
        outputs = self._draws.outputs(triggers, uniform, self.bigram_outputs, self.no_repeat)
        tokens, outs = self._draws.sequences(triggers, outputs, uniform_numbers(batch, length + 1, generator))
        return BigramSample(*(torch.as_tensor(part).to(device) for part in (tokens, outs, triggers, outputs)))

    @cached_property
    def _occurring(self) -> Int[Tensor, "id"]:
        return self.unigram.nonzero()[:, 0]

    @cached_property
    def _pool(self) -> Int[Tensor, "id"]:
        """The ids that may be outputs."""
        ids, border = self._occurring, int(0.75 * len(self._occurring))
        return {"all": ids, "train": ids[:border], "test": ids[border:]}[self.outputs]

    @cached_property
    def _draws(self) -> Draws:
        return draws_of(self.unigram, self.pairs, self.weights, self._pool)


@door
def bigram(
    text: str | None = None,
    *,
    triggers: Literal["fixed", "random"] = "random",
    trigger_count: int = 5,
    offset: int = 0,
    bigram_outputs: bool = False,
    no_repeat: bool = False,
    outputs: Literal["all", "train", "test"] = "all",
) -> BigramTask:
    """The in-context bigram task over the characters of `text`; the other arguments are those of `BigramTask`.

    Without a text it is Python's own prose in a small alphabet (`fold_prose`): lower-case letters, digits,
    ASCII signs, space and line break, 68 characters on Python 3.11. (The paper's code uses tiny-Shakespeare,
    with 65 characters.)

    >>> task = bigram("abracadabra", trigger_count=2)
    >>> task.vocabulary, task.sample(4, 10).tokens.shape
    (('a', 'b', 'c', 'd', 'r'), torch.Size([4, 11]))
    """
    if text is None:
        text = fold_prose(python_prose())
    return BigramTask.from_text(
        text,
        triggers=triggers,
        trigger_count=trigger_count,
        offset=offset,
        bigram_outputs=bigram_outputs,
        no_repeat=no_repeat,
        outputs=outputs,
    )
