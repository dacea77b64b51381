"""Text as a task: windows of a model's own tokens, a file read safely, and prose that is always at hand.

In: a model and a string, or a path. Out: `tokens[window, position]`, or a string.
"""

import re
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from metaint.errors import InputError, door

_CHUNK = 20_000
"""Characters handed to a tokenizer at once where it would cut longer texts at the model's context length."""


@door
def text_windows(
    model: Any,
    text: str,
    length: int = 128,
    *,
    batch: int | None = None,
    bos: int | None = None,
    seed: int | None = None,
) -> Int[Tensor, "window position"]:
    """Windows of `text` in the model's own tokens, one after the other and without overlap.

    `model` is anything with `to_tokens(text, prepend_bos=False)` that returns [1, position]. At most `batch`
    windows come back (all of them if None): the first ones, or with a `seed` a random choice in random order.
    With `bos` each window begins with that id and holds `length - 1` tokens of the text. The rest that fills
    no window is dropped.

    Raises InputError for an empty text, one shorter than a window, and a length or batch below what can be
    used.
    """
    if not isinstance(text, str) or not text:
        raise InputError(f"text is {_describe(text)}: give a string that is not empty.")
    body = length - (bos is not None)
    if body < 1:
        raise InputError(
            f"length is {length}: give at least {1 + (bos is not None)}, so that a token of the text fits."
        )
    if batch is not None and batch < 1:
        raise InputError(f"batch is {batch}: give at least 1, or None for every window.")
    ids = _tokenize(model, text)
    count = len(ids) // body
    if count == 0:
        raise InputError(
            f"text has {len(ids)} tokens, fewer than the {body} that one window of length {length} needs: "
            f"give a longer text or a smaller length."
        )
    windows = ids[: count * body].view(count, body)
    if seed is None:
        windows = windows[:batch]
    else:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:batch]
        windows = windows[order.to(windows.device)]
    if bos is None:
        return windows
    return torch.cat([windows.new_full((len(windows), 1), bos), windows], dim=1)


@door
def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file.

    Raises InputError for a file that is missing, not readable, binary (a zero byte, or not UTF-8) or empty.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"path is {str(path)!r}, which does not exist: give a text file in UTF-8.") from None
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise InputError(f"path is {str(path)!r}, which can't be read ({reason}): give a text file.") from None
    if b"\0" in data:
        raise InputError(f"path is {str(path)!r}, a binary file (it holds zero bytes): give a text file in UTF-8.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"path is {str(path)!r}, which is not UTF-8 (byte {error.start}): give a text file in UTF-8."
        ) from None
    if not text.strip():
        raise InputError(f"path is {str(path)!r}, which holds no text: give a file that is not empty.")
    return text


@door
def alike_tokens(model: Any) -> Int[Tensor, " vocabulary"]:
    """A class for each token id: ids whose texts differ in case and in spaces around them share the lowest of them.

    `model` has a `tokenizer` with `batch_decode`. For `metaint.measures.matches.prefix_match_of`. Raises InputError
    for a model without one.

    >>> import metaint
    >>> from metaint.tasks import alike_tokens
    >>> class Words:
    ...     def batch_decode(self, ids): return [["The", " the", "", " a"][i] for i, in ids]
    >>> class Model:
    ...     tokenizer, cfg = Words(), type("Config", (), {"d_vocab": 4})
    >>> alike_tokens(Model()).tolist()
    [0, 0, 2, 3]
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise InputError("model has no tokenizer, which says what tokens are alike: open it with one.")
    lowest: dict[str, int] = {}
    classes = []
    for i, text in enumerate(tokenizer.batch_decode([[i] for i in range(int(model.cfg.d_vocab))])):
        word = text.strip().lower()
        classes.append(lowest.setdefault(word, i) if word else i)
    return torch.tensor(classes)


def python_prose() -> str:
    """The prose that ships with Python: the language reference behind `help()`, 450 to 700 kB of English.

    It differs a little between versions of Python, so a text drawn from it is the same on one interpreter
    only.
    """
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def fold_prose(text: str) -> str:
    """`text` in a small alphabet: lower case, printable ASCII and line breaks, no runs of blanks or rules.

    Everything else becomes a space, and a run of one same sign that is neither letter nor digit becomes a
    single one, so that ruled tables and indents don't make "a sign follows itself" the commonest bigram.
    """
    text = re.sub(r"[^\n -~]", " ", text.lower())
    return re.sub(r"([^a-z0-9])\1+", r"\1", text)


def _tokenize(model: Any, text: str) -> Int[Tensor, "position"]:
    """All tokens of `text`, none cut off: `to_tokens` truncates to `n_ctx` unless told not to."""
    options: dict[str, Any] = {"prepend_bos": False}
    try:
        accepts = "truncate" in signature(model.to_tokens).parameters
    except (TypeError, ValueError):
        accepts = False
    if accepts:
        return model.to_tokens(text, truncate=False, **options)[0]
    # A chunk yields about one token for four characters, and never more than one for each byte.
    size = min(_CHUNK, max(1, getattr(getattr(model, "cfg", None), "n_ctx", _CHUNK) // 4))
    chunks = [text[start : start + size] for start in range(0, len(text), size)]
    return torch.cat([model.to_tokens(chunk, **options)[0] for chunk in chunks])


def _describe(text: object) -> str:
    return "empty" if text == "" else f"of type {type(text).__name__}"
