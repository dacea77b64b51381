"""What a model is given to read: tokens, a text or nothing, checked once for every call that feeds a model.

In: a model and what its owner gave. Out: `Given`, whose tokens and mask are on the model's device, or one sentence.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from metaint.errors import InputError, door
from metaint.models.describe import check_open
from metaint.models.protocol import Model
from metaint.models.tokens import check_tokens, encoded, first_id, starts_with_bos
from metaint.tasks.repeated import repeated_tokens
from metaint.tasks.text import text_windows

# Seeds that a generator of torch takes.
_LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Given:
    """The inputs of one call, checked: what is fed, and what a scan records of it at its root."""

    tokens: Int[Tensor, "batch position"]
    mask: Int[Tensor, "batch position"] | None
    """1 where a token counts; None where all do."""
    task: str
    """What kind of tokens they are: "repeated_tokens" of our own making, or "given"."""
    seed: int
    bos: bool
    """Whether every sequence begins with the model's BOS."""

    @property
    def facts(self) -> dict[str, Any]:
        """Seed, BOS, shape and task, as they stand in a scan's attributes."""
        shape = list(self.tokens.shape)
        return {"seed": self.seed, "bos": int(self.bos), "tokens_shape": shape, "task": self.task}


def given_inputs(
    model: Model,
    tokens: Int[Tensor, "batch position"] | str | None,
    *,
    attention_mask: Tensor | None = None,
    batch_size: int | None,
    seed: int,
) -> Given:
    """Tokens, a text in the model's own tokens, or (None) `default_tokens`, with everything that can be checked before
    a pass is run. A `batch_size` of None is the caller's to choose. Raises InputError for what can't be read."""
    check_open(model)
    if batch_size is not None:
        check_batch_size(batch_size)
    check_seed(seed)
    task = "given"
    if tokens is None:
        task, tokens = "repeated_tokens", default_tokens(model, seed=seed)
    checked, mask = check_tokens(model, encoded(model, tokens), attention_mask)
    return Given(checked, mask, task, seed, starts_with_bos(model, checked, mask))


def check_batch_size(batch_size: int) -> None:
    """InputError unless this is a number of sequences."""
    if whole(batch_size, "batch_size") < 1:
        raise InputError(f"batch_size is {batch_size}: it must be at least 1.")


def check_seed(seed: int) -> None:
    """InputError unless a generator takes this seed."""
    if abs(whole(seed, "seed")) > _LARGEST_SEED:
        raise InputError(f"seed is {seed}: give a number of at most 63 bits, such as 0.")


def whole(value: Any, name: str) -> int:
    """The value as a whole number; InputError, by this name, if it is none."""
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} is {value!r}: it must be an integer.") from None


@door
def default_tokens(
    model: Model,
    length: int = 50,
    batch: int = 10,
    seed: int = 0,
    bos: bool | None = None,
    exact: bool = False,
) -> Int[Tensor, "batch position"]:
    """Random tokens repeated twice, from the ids that the model's tokenizer knows, after its BOS if it wants one.

    - `length`: tokens in a block, which comes twice. It is shortened to what the model's context and vocabulary hold,
      unless `exact`: then that is an InputError.
    - `batch`: sequences, each with random tokens of its own.
    - `bos`: whether to begin with the model's BOS; by default as its own `to_tokens` would.

    >>> import metaint
    >>> from metaint.toys.small import small_transformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_mlp": 16, "d_vocab": 30, "n_ctx": 16}
    >>> tokens = metaint.default_tokens(small_transformer(norm="pre", **sizes), batch=2)
    >>> tokens.shape, bool((tokens[:, :8] == tokens[:, 8:]).all())
    (torch.Size([2, 16]), True)
    """
    check_open(model)
    vocab, special = _ordinary(model, length)
    first = first_id(model, bos)
    room = int(model.cfg.n_ctx) - (first is not None)
    longest = min(room // 2, vocab - len(special))
    if longest < 2 or (exact and length > longest):
        raise InputError(f"repeat is {length}, and this model can repeat a block of at most {longest} tokens.")
    ids = None
    if special:
        ids = torch.tensor([i for i in range(vocab) if i not in special])
    return repeated_tokens(vocab, min(length, longest), batch=batch, bos=first, ids=ids, seed=seed)


def _ordinary(model: Model, length: int) -> tuple[int, set[int]]:
    """How many ids can be drawn from, and which of them have a meaning of their own."""
    vocab = int(model.cfg.d_vocab)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None or not 2 * length < len(tokenizer) <= vocab:
        return vocab, set()
    return len(tokenizer), {i for i in getattr(tokenizer, "all_special_ids", []) if i is not None}


@door
def text_tokens(
    model: Model, text: str, length: int, windows: int, seed: int | None = 0, bos: bool | None = None
) -> Int[Tensor, "batch position"]:
    """Windows of a text in the model's own tokens, each after its BOS if it wants one.

    - `length`: positions in a window, the BOS among them.
    - `windows`: how many; places are drawn by `seed`, or with None the first ones are taken.

    Raises InputError for a length that the model can't read, a model without a tokenizer and a text that is too short.

    >>> import metaint
    >>> model = metaint.open_model("toy")  # doctest: +SKIP
    >>> metaint.text_tokens(model, metaint.tasks.python_prose(), length=64, windows=4).shape  # doctest: +SKIP
    torch.Size([4, 64])
    """
    if not 2 <= length <= model.cfg.n_ctx:
        raise InputError(f"length is {length}: this model reads windows of 2 to {model.cfg.n_ctx} tokens.")
    if getattr(model, "tokenizer", None) is None:
        raise InputError("text was given, and this model has no tokenizer: pass token ids, or --repeat at the shell.")
    return text_windows(model, text, length, batch=windows, bos=first_id(model, bos), seed=seed)
