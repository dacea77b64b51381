"""Pictures of the birth lab's models: what their memories hold, and where their heads look.

In: models of `memory_transformer` by name. Out: plotly figures, each with a caption that says how to read it and when
it misleads. After Bietti et al. 2023 (2306.00802).
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from metaint.errors import InputError
from metaint.models.reading import read
from metaint.views.drawing.panels import finish, short_name, wrapped

# What is shown of a model: positions of W_K1, tokens of a sequence.
_POSITIONS, _SHOWN = 64, 48
Ids = Sequence[int] | Int[Tensor, "*token"]
_LOOKS = ("token that looks", "token looked at")


class _Map(NamedTuple):
    """A matrix to draw, what its rows and columns are, and their labels: None for numbers."""

    values: Float[np.ndarray, "row column"]
    y: str
    x: str
    labels: Sequence[str] | None
    most: float


def plot_recall_maps(models: Mapping[str, Any], tokens: Ids, vocabulary: Sequence[str]) -> go.Figure:
    """What each memory of models of `memory_transformer` scores, standardised by row: a column a model.

    `tokens` are the ids that are asked, each once, `vocabulary` what is written for an id; of positions the first 64
    are. Models of one layer have W_O alone, those that turn queries and keys no W_K1. InputError without models, and
    for ids beyond the vocabulary.
    """
    ids, labels = _known(models, torch.as_tensor(tokens).unique(), vocabulary)
    maps = [_memory_maps(model, ids, labels) for model in models.values()]
    rows = list(dict.fromkeys(name for memories in maps for name in memories))
    caption = (
        "How to read: each row asks a memory: W_O what a token's value makes of the logits, W_K2 which token, as layer "
        "1 wrote it, a token finds, W_K1 which position a position finds; scores are in standard deviations from the "
        "mean of their row, white below it. A dark diagonal, of W_K1 the line below it, is a memory that recalls; "
        "below each map, the share of rows that are highest there, among what is shown. It misleads about strength: "
        "each row has a scale of its own, so that a faint memory looks like a strong one; and W_K2 learns the triggers "
        "alone where these are fixed, so that its other rows find what they may."
    )
    grid: dict[tuple[int, int], _Map] = {}
    for i, name in enumerate(rows):
        grid |= {(i, j): memories[name] for j, memories in enumerate(maps) if name in memories}
    figure = _grid(grid, rows, list(models), "standard<br>deviations")
    return _pictured(figure, "What the memories hold", f"{len(ids)} tokens", caption)


def plot_attention_at_birth(models: Mapping[str, Any], tokens: Ids, vocabulary: Sequence[str]) -> go.Figure:
    """Attention of the first and the last layer's first head on the first 48 tokens of a sequence: a row a model.

    Read at `hook_pattern`, and no trace is left. InputError without models, and for ids beyond the vocabulary.
    """
    ids, labels = _known(models, tokens, vocabulary)
    ids, labels = ids[:_SHOWN], labels[:_SHOWN]
    grid: dict[tuple[int, int], _Map] = {}
    future = np.triu(np.full((len(ids), len(ids)), np.nan), 1)
    for i, model in enumerate(models.values()):
        hooks = [f"blocks.{layer}.attn.hook_pattern" for layer in sorted({0, int(model.cfg.n_layers) - 1})]
        patterns = read(model, torch.tensor([ids], device=model.W_E.device), hooks)
        for j, name in enumerate(hooks):
            grid[i, j] = _Map(patterns[name][0, 0].cpu().double().numpy() + future, *_LOOKS, labels, 1.0)
    heads = ["first layer's head", "last layer's head"][: 1 + max(j for _, j in grid)]
    caption = (
        "How to read: each row is a token that looks, its cells the tokens that it may look at, itself the last, dark "
        "where its weight goes. When the induction head is born, the first layer's dark cells lie just below the "
        "diagonal, on the token before, and in the last layer a token looks at what followed its earlier occurrences. "
        "It misleads as one sequence of many, and where tokens repeat: weight on any copy of a token does the same."
    )
    figure = _grid(grid, list(models), heads, "weight")
    return _pictured(figure, "Where the heads look", f"{len(ids)} tokens of one sequence", caption)


def _known(models: Any, tokens: Any, vocabulary: Sequence[str]) -> tuple[list[int], list[str]]:
    """The ids, and how each is written."""
    if not isinstance(models, Mapping) or not models:
        raise InputError("models is empty: pass a dict from names to models.")
    ids = [int(i) for i in torch.as_tensor(tokens).flatten()]
    if not ids or min(ids) < 0 or max(ids) >= len(vocabulary):
        raise InputError(
            f"tokens must be ids from 0 to {len(vocabulary) - 1}, the end of the vocabulary, at least one."
        )
    signs = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})
    return ids, [escape(vocabulary[i].translate(signs), quote=False) for i in ids]


@torch.no_grad()
def _memory_maps(model: Any, ids: list[int], labels: list[str]) -> dict[str, _Map]:
    """The memories' scores by the names of `memory_curves`, as far as the model has them."""
    last, E = int(model.cfg.n_layers) - 1, model.W_E[ids]
    W_Q, W_K, W_V, W_O = (getattr(model, f"W_{part}")[:, 0] for part in "QKVO")
    logits = E @ W_V[last] @ W_O[last] @ model.W_U[:, ids]
    maps = {f"W_O{last + 1}": _standardised(logits, "token", "logit", labels)}
    if last:
        keys = E @ W_V[0] @ W_O[0] @ W_K[1]
        maps["W_K2"] = _standardised(E @ W_Q[1] @ keys.mT, "token", "written by layer 1", labels)
    if last and model.cfg.positional_embedding_type == "standard":
        P = model.W_pos[:_POSITIONS]
        maps["W_K1"] = _standardised(P @ W_Q[0] @ (P @ W_K[0]).mT, "position", "position", None)
    return maps


def _standardised(scores: Float[Tensor, "row column"], y: str, x: str, labels: list[str] | None) -> _Map:
    """Scores in standard deviations from the mean of their row, and how many are highest where they should be."""
    asked = scores if labels else scores[1:, :-1]  # a position should find the one before
    share = (asked.argmax(1).cpu() == torch.arange(len(asked))).double().mean().item()
    values = scores.cpu().double().numpy()
    spread = values.std(1, keepdims=True)
    values = (values - values.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1)
    return _Map(values, y, f"{x}: recall {share:.2f}", labels, min(5.0, math.sqrt(max(1, len(values) - 1))))


def _grid(grid: Mapping[tuple[int, int], _Map], rows: Sequence[str], columns: Sequence[str], unit: str) -> go.Figure:
    """Maps side by side, rows and columns named, and a bar of colours where a row has a scale of its own."""
    size, gap = min(340, 720 // len(columns)), 52
    inside = (size + gap) * len(rows) - gap
    titles = [escape(short_name(name), quote=False) for name in columns]
    figure = make_subplots(
        len(rows), len(columns), subplot_titles=titles, vertical_spacing=gap / inside, horizontal_spacing=0.07
    )
    figure.update_layout(height=inside)
    figure.update_annotations(font_size=13)
    shown: Any = figure.layout
    for (i, j), cell in grid.items():
        axis, place = f"coloraxis{i + 1}", {"row": i + 1, "col": j + 1}
        names = cell.labels or [str(k) for k in range(len(cell.values))]
        pairs = [[f"{y} → {x}" for x in names] for y in names]
        heat = go.Heatmap(z=cell.values, text=pairs, hovertemplate="%{text}: %{z:.3f}<extra></extra>", coloraxis=axis)
        figure.add_traces([heat], rows=i + 1, cols=j + 1)
        every = math.ceil(7 * len(names) / size) if cell.labels else 16
        ticks: Any = {"tickvals": list(range(0, len(names), every)), "ticktext": names[::every], "tickangle": 0}
        ticks |= {"tickfont_size": min(12, max(8, size * every // len(names))), "showgrid": False, **place}
        figure.update_xaxes(title={"text": cell.x, "standoff": 6, "font_size": 12}, **ticks)
        head = f"{wrapped(rows[i])}<br>{cell.y}" if j == 0 else ""
        figure.update_yaxes(title={"text": head, "font_size": 12}, autorange="reversed", **ticks)
        own = i == 0 or cell.most != shown[f"coloraxis{i}"].cmax
        top = shown["yaxis" if i == 0 else f"yaxis{i * len(columns) + 1}"].domain[1]
        bar = {"title": unit, "thickness": 12, "len": 160, "lenmode": "pixels", "y": top, "yanchor": "top"}
        shown[axis] = {"cmin": 0, "cmax": cell.most, "colorscale": "Blues", "colorbar": bar, "showscale": own}
    return figure


def _pictured(figure: go.Figure, title: str, subtitle: str, caption: str) -> go.Figure:
    finish(figure, title, {"": xr.Dataset()}, caption, "")
    figure.update_layout(title_subtitle_text=subtitle, hovermode="closest")
    return figure
