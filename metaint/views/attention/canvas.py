"""Attention patterns small enough for a page: 8-bit weights, deflated, drawn on canvases by `canvas.js`.

In: patterns [head, query, key] with names and labels. Out: HTML that asks nothing of the network.

A weight w is kept as the whole number nearest 255 √w, so that a weight shown is off by √w / 255 at most, and small
weights are told apart: the least above 0 is 0.000004. Where the patterns would take more room than given, weights below
a floor are kept as averages over 16 x 16 tokens, the lowest floor of a few with which they fit; the view says so.
"""

import base64
import json
import math
import zlib
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from metaint.errors import InputError

# Tokens along a block of averages; codes below which weights are averaged, tried in turn (1: only what rounds to 0).
BLOCK = 16
_FLOORS = (1, 4, 8, 12, 16, 20, 24, 28, 32, 40, 50, 64, 90, 128, 180)
# Cells from which floors are tried on some of the heads first, and the most that a browser holds with ease.
_MANY, MOST_CELLS = 2**22, 2**26


class Packed(NamedTuple):
    """Deflated bytes: the gaps and then the codes of all kept weights, head after head, then the averages.

    A gap is how many cells on from the last entry, row by row (of a causal pattern, the cells up to the diagonal
    alone); an entry of code 0 only bridges a gap too long for a byte. An average m of the weights below `floor` in a
    block is the whole number nearest 255 √(m / floor). `counts` are the entries of each head.
    """

    data: bytes
    counts: list[int]
    floor: float
    averaged: bool


def attention_canvas(
    patterns: Float[np.ndarray, "head token token"],
    heads: Sequence[str],
    labels: Sequence[str],
    *,
    start: int = 0,
    causal: bool = True,
    megabytes: float = 2.0,
) -> str:
    """HTML of patterns (weights in [0, 1]) of at most so many megabytes, the script that draws them counted.

    `labels` are what is written for each token, the first at position `start`; a causal pattern has nothing above its
    diagonal. Needs `canvas_script()` before it on the page, once for all. InputError if it can't be made so small.
    """
    view = {"heads": list(heads), "labels": list(labels), "start": start, "causal": causal, "block": BLOCK}
    # Of the facts only counts and floor are missing so far: 200 bytes, and 12 a head.
    around = len((canvas_script() + _element(view, "")).encode()) + 200 + 12 * len(heads)
    room = int(megabytes * 1e6) - around
    packed = pack(patterns, causal, room * 3 // 4)
    if packed is None:
        much = f"{len(heads)} head{'s' * (len(heads) > 1)} of {len(labels)} tokens"
        raise InputError(
            f"{much} do not fit into {megabytes:g} megabytes: choose fewer heads or a window, or allow more."
        )
    view |= {"counts": packed.counts, "floor": packed.floor, "averaged": packed.averaged}
    return _element(view, base64.b64encode(packed.data).decode())


@cache
def canvas_script() -> str:
    """The script element that draws every view of `attention_canvas` on its page."""
    return f"<script>{files('metaint.views.attention').joinpath('canvas.js').read_text('utf-8')}</script>"


def _element(view: dict, data: str) -> str:
    facts = escape(json.dumps(view, separators=(",", ":"), ensure_ascii=False))
    return (
        f'<div class="metaint-attention" data-view="{facts}" data-pattern="{data}">Attention patterns: scripts must be '
        'allowed to run to show them (trust the notebook).</div><script>window[Symbol.for("metaint.attention")]()'
        "</script>"
    )


def pack(patterns: Float[np.ndarray, "head token token"], causal: bool, most: int) -> Packed | None:
    """Patterns in at most so many bytes, with the lowest floor that does; None if none does."""
    tokens = patterns.shape[-1]
    rows, columns = np.tril_indices(tokens) if causal else np.divmod(np.arange(tokens**2), tokens)
    blocks = rows // BLOCK * math.ceil(tokens / BLOCK) + columns // BLOCK
    weights = patterns[:, rows, columns].clip(0, 1)
    codes = np.rint(255 * np.sqrt(weights)).astype(np.uint8)
    some = slice(None, None, math.ceil(weights.size / _MANY))
    share = len(weights) / len(weights[some])
    for floor in _FLOORS:
        if share > 1 and len(_packed(weights[some], codes[some], blocks, floor).data) * share > most:
            continue
        packed = _packed(weights, codes, blocks, floor)
        if len(packed.data) <= most:
            return packed
    return None


def _packed(
    weights: Float[np.ndarray, "head cell"],
    codes: UInt8[np.ndarray, "head cell"],
    blocks: Int[np.ndarray, " cell"],
    least: int,
) -> Packed:
    """Weights whose code is `least` or more as they are, the others as averages over blocks."""
    entries = [_entries(head, least) for head in codes]
    floor = ((least - 0.5) / 255) ** 2
    averages = [_averages(w, c < least, blocks, floor) for w, c in zip(weights, codes, strict=True)]
    parts = [*(gaps for gaps, _ in entries), *(values for _, values in entries), *averages]
    # Level 6: 9 takes ten times as long for a few per cent.
    data = zlib.compress(b"".join(part.tobytes() for part in parts), 6)
    return Packed(data, [len(gaps) for gaps, _ in entries], floor, least > 1)


def _entries(
    codes: UInt8[np.ndarray, " cell"], least: int
) -> tuple[UInt8[np.ndarray, " entry"], UInt8[np.ndarray, " entry"]]:
    """Gaps and codes of what is kept of a head."""
    at = np.flatnonzero(codes >= least)
    steps = np.diff(at, prepend=-1)
    bridges = (steps - 1) // 255
    ends = np.cumsum(bridges + 1) - 1
    gaps = np.full(len(at) + bridges.sum(), 255, np.uint8)
    values = np.zeros_like(gaps)
    gaps[ends], values[ends] = steps - 255 * bridges, codes[at]
    return gaps, values


def _averages(
    weights: Float[np.ndarray, " cell"], below: np.ndarray, blocks: Int[np.ndarray, " cell"], floor: float
) -> UInt8[np.ndarray, " block"]:
    count = int(blocks.max()) + 1
    total = np.bincount(blocks[below], weights[below], count)
    number = np.bincount(blocks[below], minlength=count)
    return np.rint(255 * np.sqrt(total / np.maximum(number, 1) / floor)).astype(np.uint8)
