"""Attention patterns as HTML that needs no network: in a notebook, in a report, or in a file.

In: a model and a sequence. Out: a `View`. Small sets of patterns are drawn by circuitsvis,
whose own script is taken from its package; large ones by `canvas.py`. All text of tokens is escaped.
"""

import base64
import json
import math
import re
import zlib
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaint.errors import ActivationError, HookAuditError, InputError, door
from metaint.models.describe import check_open, is_causal
from metaint.models.heads import head_of
from metaint.models.protocol import Model
from metaint.models.reading import steady, tolerance, widen
from metaint.models.tokens import check_tokens, encoded
from metaint.views.attention.canvas import MOST_CELLS, attention_canvas, canvas_script
from metaint.views.attention.tokens import HIGH, rgb, token_labels
from metaint.views.drawing.view import View

# circuitsvis 1.43.3 draws 10,000 cells a second, and gives every head a canvas of 1000 x 1000 pixels.
_CIRCUITSVIS_CELLS = 2**14
_CIRCUITSVIS_HEADS = 16
_CIRCUITSVIS_BYTES = 5e6
_SOURCE = "The weights that the model attends with, read at TransformerLens's hook_pattern."


@door
def show_attention(
    model: Model,
    tokens: Int[Tensor, "*position"] | str,
    heads: Sequence[str] | str | None = None,
    *,
    window: tuple[int, int] | None = None,
    how: Literal["circuitsvis", "canvas"] | None = None,
    megabytes: float = 2.0,
) -> View:
    """Attention of heads on one sequence, read at `hook_pattern` in one forward pass that leaves no trace.

    - `tokens`: ids of one sequence, or a text for the model's tokenizer.
    - `heads`: names such as "5.1"; None is all.
    - `window`: the first position shown and the one after the last, as queries and as keys.
    - `how`: "circuitsvis" (weights to three digits, at most 5 MB; drawn at 10,000 weights a second) or "canvas" (to 8
      bits of their square root); by default circuitsvis where it is installed and the weights are few.
    - `megabytes`: the most that a canvas takes; with less room more of the small weights are averaged.

    Raises InputError for what can't be shown, HookAuditError where the hook carries no attention weights,
    ActivationError for NaN.

    >>> import metaint, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> view = metaint.show_attention(model, torch.arange(8), "1.0", how="canvas")
    >>> "1.0" in view.body
    True
    """
    check_open(model)
    if isinstance(tokens, str) and getattr(model, "tokenizer", None) is None:
        raise InputError("tokens is a text, and this model has no tokenizer: pass token ids.")
    tokens, _ = check_tokens(model, encoded(model, tokens))
    if len(tokens) > 1:
        raise InputError(f"tokens holds {len(tokens)} sequences: show one, such as tokens[0].")
    names = _head_names(model, heads)
    start, stop = _window(window, tokens.shape[1])
    if len(names) * (stop - start) ** 2 > MOST_CELLS:
        most = math.isqrt(MOST_CELLS // len(names))
        raise InputError(
            f"{len(names)} heads of {stop - start} tokens are too many to show: choose heads, or a window of at most "
            f"{most} tokens."
        )
    patterns = _patterns(model, tokens, names, slice(start, stop))
    labels = token_labels(model, tokens[0, start:stop].tolist())
    if how is None:
        few = patterns.size <= _CIRCUITSVIS_CELLS and len(names) <= _CIRCUITSVIS_HEADS
        how = "circuitsvis" if few and _bundle() else "canvas"
    if how == "canvas":
        body = attention_canvas(patterns, names, labels, start=start, causal=is_causal(model), megabytes=megabytes)
        return View(body, (canvas_script(),), _SOURCE)
    if how != "circuitsvis":
        raise InputError(f'how is {how!r}: it must be "circuitsvis" or "canvas".')
    if start:  # it counts from 0
        labels = [f"{position}: {label}" for position, label in enumerate(labels, start)]
    return _circuitsvis(patterns, names, labels, is_causal(model))


def _head_names(model: Model, heads: Sequence[str] | str | None) -> list[str]:
    if heads is None:
        return [f"{layer}.{head}" for layer in range(int(model.cfg.n_layers)) for head in range(int(model.cfg.n_heads))]
    chosen = [head_of(model, name) for name in ([heads] if isinstance(heads, str) else heads)]
    if not chosen:
        raise InputError('heads is empty: name one, such as "0.0", or leave it out to show all.')
    return [f"{layer}.{head}" for layer, head in dict.fromkeys(chosen)]


def _window(window: tuple[int, int] | None, length: int) -> tuple[int, int]:
    start, stop = (0, length) if window is None else window
    if not 0 <= start < stop <= length:
        raise InputError(f"window is {window}: it must be (first, last + 1), within the positions 0 to {length - 1}.")
    return start, stop


def _patterns(model: Model, tokens: Tensor, names: list[str], shown: slice) -> Float[np.ndarray, "head token token"]:
    """The chosen heads' weights in the window, in the order of their names."""
    by_layer: dict[str, list[int]] = {}
    for name in names:
        layer, head = name.split(".")
        by_layer.setdefault(f"blocks.{layer}.attn.hook_pattern", []).append(int(head))
    for hook in by_layer:
        if hook not in model.hook_dict:
            raise HookAuditError(f"{hook} is not among this model's hooks: attention is read there.")
    weights: dict[str, np.ndarray] = {}

    def keep(pattern: Tensor, hook: Any) -> None:
        chosen = widen(pattern.detach()[0, by_layer[hook.name]])
        _check(hook.name, chosen, pattern.dtype)
        of_heads = chosen[:, shown, shown].cpu().numpy().astype(np.float32)
        layer = re.sub(r"\D+", "", hook.name)
        weights.update({f"{layer}.{head}": of_heads[i] for i, head in enumerate(by_layer[hook.name])})

    with steady(model), model.hooks(fwd_hooks=[(hook, keep) for hook in by_layer]):
        model(tokens, return_type=None)
    for name in names:
        if name not in weights:
            raise HookAuditError(f"the hook on the pattern of head {name} never fired: fused attention has none.")
    return np.stack([weights[name] for name in names])


def _check(hook: str, pattern: Float[Tensor, "head query key"], dtype: torch.dtype) -> None:
    total = pattern.sum(-1)
    if not bool(total.isfinite().all()):
        raise ActivationError(f"{hook} holds NaN or infinity: the weights or the activations before it overflow.")
    off = (total - 1).abs().max().item()
    if off > tolerance(dtype) or pattern.min().item() < 0:
        raise HookAuditError(f"{hook} carries no attention weights: they add up to 1 only within {off:.2g}.")


def _circuitsvis(
    patterns: Float[np.ndarray, "head token token"], heads: list[str], labels: list[str], causal: bool
) -> View:
    """Patterns drawn by circuitsvis's own `AttentionHeads`, without its way of loading it."""
    if not _bundle():
        raise InputError('how is "circuitsvis", which is not installed: pip install circuitsvis, or how="canvas".')
    props = {
        "attention": patterns.astype(float).round(3).tolist(),
        "tokens": labels,
        "attentionHeadNames": heads,
        "maxValue": max(0.001, round(float(patterns.max()), 3)),
        "maskUpperTri": causal,
        "positiveColor": rgb(HIGH),
    }
    text = escape(json.dumps(props, separators=(",", ":"), ensure_ascii=False))
    if len(text) > _CIRCUITSVIS_BYTES:
        size = f"{len(heads)} heads of {len(labels)} tokens take {len(text) / 1e6:.0f} MB"
        raise InputError(f'how is "circuitsvis", where {size}: pass how="canvas".')
    # Its labels and headings are dark whatever the page is like.
    style = "background: #fff; color: #222; padding: 8px; max-width: 980px; margin: 12px 0; overflow: auto;"
    body = (
        f'<div class="metaint-circuitsvis" data-props="{text}" style="{style} position: relative; font-family: '
        'system-ui, sans-serif">Attention patterns: scripts must be allowed to run to show them (trust the notebook).'
        '</div><script>window[Symbol.for("metaint.circuitsvis")]()</script>'
    )
    return View(body, (_circuitsvis_script(),), _SOURCE)


def _bundle() -> Path | None:
    """Where circuitsvis keeps its script; the package itself stays unimported, since it looks for the network."""
    package = find_spec("circuitsvis")
    if package is None or package.origin is None:
        return None
    path = Path(package.origin).parent / "dist/cdn/iife.js"
    return path if path.is_file() else None


@cache
def _circuitsvis_script() -> str:
    path = _bundle()
    assert path is not None
    code = re.sub(r"//# sourceMappingURL=\S*", "", path.read_text("utf-8"))
    # In a function, so that the page gets no name of it; a key only we know leads to it.
    code = f'(() => {{{code}\nwindow[Symbol.for("metaint.circuitsvis.bundle")] = CircuitsVis;}})()'
    packed = base64.b64encode(zlib.compress(code.encode(), 9)).decode()
    return f"<script>{_LOADER.replace('BUNDLE', packed)}</script>"


# Unpacks the script the first time it is met on a page, then draws what is not drawn yet.
_LOADER = """(() => {
  const key = Symbol.for("metaint.circuitsvis"), bundle = Symbol.for("metaint.circuitsvis.bundle");
  if (window[key]) return;
  const bytes = Uint8Array.from(atob("BUNDLE"), (sign) => sign.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const loaded = new Response(stream).text().then((code) => {
    const script = document.createElement("script");
    script.textContent = code;
    document.head.append(script);
    script.remove();
  });
  let drawn = 0;
  window[key] = () => loaded.then(() => {
    for (const host of document.querySelectorAll(".metaint-circuitsvis:not([id])")) {
      host.id = `metaint-circuitsvis-${Date.now()}-${drawn++}`;
      const { render, AttentionHeads } = window[bundle];
      host.textContent = "";
      render(host.id, AttentionHeads, JSON.parse(host.dataset.props));
    }
  });
})();"""
