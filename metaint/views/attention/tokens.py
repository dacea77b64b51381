"""Tokens coloured by values, as HTML that needs no network, and how tokens are written.

In: tokens and their values. Out: a `View`. All text of tokens is escaped.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaint.errors import InputError, door
from metaint.models.protocol import Model
from metaint.models.tokens import encoded
from metaint.views.drawing.view import View

_SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥"}
# Ends and middle of the colours of values, which colour-blind readers can tell apart (vermilion, white, blue).
LOW, MIDDLE, HIGH = np.array([[213, 94, 0], [255, 255, 255], [0, 114, 178]])


@door
def show_tokens(
    tokens: Sequence[str] | Int[Tensor, "*position"] | str,
    values: Float[Tensor, " position"] | Float[np.ndarray, " position"] | Sequence[float],
    *,
    model: Model | None = None,
) -> View:
    """Tokens coloured by their values: white at 0, blue above, vermilion below; the value is shown under the pointer.

    - `tokens`: texts, written as they are, or ids or a text of the `model`'s tokenizer.
    - `values`: one for each; NaN (such as the loss of the first token) stays grey.

    Raises InputError for infinite values, or none to show.

    >>> import metaint
    >>> "the" in metaint.show_tokens(["the", "cat"], [0.5, -1.0]).body
    True
    """
    labels = _labels(tokens, model)
    numbers = np.array(torch.as_tensor(values).detach().cpu().double().flatten())
    if len(numbers) != len(labels):
        raise InputError(f"values has {len(numbers)} entries, and there are {len(labels)} tokens: give one for each.")
    known = numbers[~np.isnan(numbers)]
    if not len(known) or np.isinf(known).any():
        raise InputError(f"values holds {'infinity' if len(known) else 'no number'}: there is no colour for it.")
    most = float(np.abs(known).max()) or 1.0
    spans = [_span(label, float(x), most, i) for i, (label, x) in enumerate(zip(labels, numbers, strict=True))]
    colours = [LOW, MIDDLE, HIGH] if known.min() < 0 else [MIDDLE, HIGH]
    stripe = ", ".join(rgb(colour) for colour in colours)
    low = f"{-most:.4g}" if known.min() < 0 else "0"
    return View(
        '<div class="metaint-tokens" style="font: 14px/1.9 ui-monospace, monospace; max-width: 900px; margin: 12px 0; '
        f'text-align: left; overflow-wrap: anywhere">{"".join(spans)}'
        f'<div style="font: 12px/2 system-ui, sans-serif">{low} <span style="display: inline-block; width: 160px; '
        f'height: 10px; background: linear-gradient(to right, {stripe})"></span> {most:.4g}</div></div>'
    )


def token_labels(model: Model, ids: Sequence[int]) -> list[str]:
    """What is written for token ids: as the model's tokenizer writes them, spaces and line ends as signs, else ids."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return [str(i) for i in ids]
    return [visible(_written(tokenizer, i)) or str(i) for i in ids]


def visible(text: str) -> str:
    """Text in which nothing hides: spaces, line ends and tabs as signs, what can't be printed by its number."""
    return "".join(map(_visible_sign, text))


def _visible_sign(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    return character if character.isprintable() else f"\\u{ord(character):04x}"


def _written(tokenizer: Any, i: int) -> str:
    text, piece = tokenizer.decode([i]), tokenizer.convert_ids_to_tokens(i) or ""
    if "\ufffd" in text:  # a part of a letter
        return piece
    # Tokenizers of the SentencePiece kind drop a first space.
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text


def _labels(tokens: Any, model: Any) -> list[str]:
    if isinstance(tokens, str | Tensor):
        if getattr(model, "tokenizer", None) is None:
            what = "a text" if isinstance(tokens, str) else "ids"
            raise InputError(f"tokens is {what}, and there is no tokenizer: pass model, or the tokens as strings.")
        tokens = encoded(model, tokens)
        if tokens.ndim > 1 and len(tokens) > 1:
            raise InputError(f"tokens holds {len(tokens)} sequences: show one, such as tokens[0].")
        labels = token_labels(model, tokens.flatten().tolist())
    else:
        labels = [visible(str(token)) for token in tokens]
    if not labels:
        raise InputError("tokens is empty: there is nothing to show.")
    return labels


def _span(label: str, value: float, most: float, position: int) -> str:
    end = HIGH if value >= 0 else LOW
    colour = np.full(3, 200) if math.isnan(value) else MIDDLE + (end - MIDDLE) * abs(value) / most
    # Black or white, whichever has more contrast (WCAG 2's relative luminance, its curve taken for a power).
    ink = "#000" if (colour / 255) ** 2.2 @ [0.2126, 0.7152, 0.0722] > 0.18 else "#fff"
    pointed_at = f"position {position}: {'no value' if math.isnan(value) else f'{value:.4g}'}"
    return (
        f'<span title="{pointed_at}" style="background: {rgb(colour)}; color: {ink}; padding: 2px 0; '
        f'border-right: 1px solid #8886">{escape(label)}</span>{"<br>" * label.endswith("↵")}<wbr>'
    )


def rgb(colour: np.ndarray) -> str:
    """A colour as CSS writes it."""
    return f"rgb({', '.join(str(round(float(part))) for part in colour)})"
