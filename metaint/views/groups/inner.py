"""`/inner` as a figure: the loss at every layer, whether steps follow its gradient, and length against loss.

In: one scan, or several by name to compare them. Out: a plotly figure of a fixed width with a caption. What it shows is
an operational definition inspired by Wu & Varshney (2310.05884), see `measures/inner.py`.
"""

import math
from collections.abc import Mapping
from functools import partial

import numpy as np
import xarray as xr
from plotly import graph_objects as go
from rich.console import Console

from metaint.errors import door
from metaint.probes.inner import MOST_TOKENS
from metaint.scans.finding import Scans, group_of, named_groups
from metaint.views.drawing.panels import (
    BLUE,
    COLOURS,
    DEPTH,
    GREEN,
    GREY,
    ORANGE,
    Line,
    draw,
    finish,
    legend_of,
    log_axis,
    log_scale,
    panels,
    rule,
    symbol,
    there,
)
from metaint.views.drawing.terminal import number
from metaint.views.groups.group_view import GroupView
from metaint.views.groups.layers import Column, column, interval, layer_frame, layers_json, print_layers

_PARTS = {"": "block", "_attn": "attention", "_mlp": "MLP"}
_LOSSES = (
    Line("loss", "loss", BLUE),
    Line("loss_null", "another token's target", GREY, "dash"),
    Line("prediction_entropy", "entropy of the prediction", ORANGE, "dot"),
)


@door
def plot_inner(scans: Scans) -> go.Figure:
    """Loss and rank of the next token at every layer, how each step follows the loss's gradient, and length and loss.

    - `scans`: a scan, its `/inner`, or a dict from names to these.

    Panels, with bands that are 95 % intervals over sequences:

    - loss in nats beside that of another token's target and the prediction's entropy;
    - geometric mean rank (1 is the most likely, log axis);
    - cosine in [-1, 1] of what each block, its attention and its MLP add with the descent direction, beside its null;
    - share of tokens whose loss the block lowers;
    - fidelity, the fall that the gradient foretells over the real one, where the loss surely falls;
    - a dot for each token, length of the stream against loss at the last layer, with Spearman's coefficients.

    Raises InputError where `/inner` is missing.

    >>> import metaint, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> scan = metaint.scan(model, torch.arange(10).repeat(2, 2), [metaint.InnerProbe()])
    >>> metaint.plot_inner(scan).layout.title.text
    'Inner optimisation'
    """
    named = {name: _with_fidelity(data) for name, data in named_groups(scans, "inner").items()}
    parts = [part for part in _PARTS if part == "" or _known(named, f"step_gradient_cosine{part}")]
    lower = ["share improved", *(["fidelity"] if _known(named, "fidelity_sure") else [])]
    titles = ["nats", "rank", *(f"cosine, {_PARTS[part]}" for part in parts), *lower, "loss (nats)"]
    figure = panels(titles, [1, 0.6, *[0.55] * (len(titles) - 3), 1], apart=True)
    draw(figure, 1, named, _LOSSES)
    draw(figure, 2, named, [Line("target_rank", "rank", GREEN)], explain=False)
    log_axis(figure, 2)
    for row, part in enumerate(parts, 3):
        _draw_beside_null(figure, row, named, "step_gradient_cosine", part)
        rule(figure, row, 0)
        if row > 3:
            figure.update_yaxes(matches="y3", row=row, col=1)
    _draw_beside_null(figure, 3 + len(parts), named, "improved")
    rule(figure, 3 + len(parts), 0.5)
    if len(lower) > 1:
        draw(figure, 4 + len(parts), named, [Line("fidelity_sure", "fidelity", BLUE)], explain=False)
        rule(figure, 4 + len(parts), 1)
    finish(figure, "Inner optimisation", named, _caption(named, len(lower) > 1), DEPTH)
    figure.update_xaxes(title_text=DEPTH, row=len(titles) - 1, col=1)
    _draw_tokens(figure, len(titles), named)
    return figure


def _known(named: Mapping[str, xr.Dataset], variable: str) -> bool:
    return any(there(data, variable) for data in named.values())


def _with_fidelity(data: xr.Dataset) -> xr.Dataset:
    """With `fidelity_sure`, which is left out where the loss may not fall at all: there it is a ratio of chances."""
    falls = data["loss_decrease_low"] > 0
    return data.assign({f"fidelity_sure{end}": data[f"fidelity{end}"].where(falls) for end in ("", "_low", "_high")})


def _draw_beside_null(
    figure: go.Figure, row: int, named: Mapping[str, xr.Dataset], variable: str, part: str = ""
) -> None:
    lines = [
        Line(f"{variable}{part}", "next token", BLUE),
        Line(f"{variable}_null{part}", "another token's target", GREY, "dash"),
    ]
    draw(figure, row, named, lines, explain=row == 3)


def _draw_tokens(figure: go.Figure, row: int, named: Mapping[str, xr.Dataset]) -> None:
    """Length of the stream against loss at the last layer, on an x axis of its own; coefficients in the legend."""
    lengths = []
    for i, data in enumerate(named.values()):
        here = data.isel(layer=-1)
        coefficients = [_coefficient(here, f"norm_loss_spearman{end}", len(named) == 1) for end in ("", "_partial")]
        name = f"{coefficients[0]}{'<br>' if len(named) == 1 else ', '}partial {coefficients[1]}"
        figure.add_trace(_dots(here, i).update(name=name, legend=legend_of(row)), row=row, col=1)
        lengths.append(here["token_norm"].values)
    axis = {"dtick": None, "tick0": None, **log_scale(np.concatenate(lengths))}
    figure.update_xaxes(axis, title_text="length of the stream at the last layer", row=row, col=1)
    figure.update_layout({legend_of(row): {"title": "Spearman"}})


def _coefficient(here: xr.Dataset, name: str, interval: bool) -> str:
    value, low, high = (float(here[name + end]) for end in ("", "_low", "_high"))
    return number(value) + (f" ({number(low)} to {number(high)})" if interval and not np.isnan(low) else "")


def _dots(here: xr.Dataset, i: int) -> go.Scatter:
    return go.Scatter(
        x=here["token_norm"].values,
        y=here["token_loss"].values,
        customdata=np.stack([here[key].values for key in ("token", "target", "token_position")], -1),
        hovertemplate="token %{customdata[0]}, next %{customdata[1]}, position %{customdata[2]}"
        "<br>length %{x:.4g}, loss %{y:.4g}<extra></extra>",
        mode="markers",
        marker={"color": COLOURS[i % len(COLOURS)], "size": 5, "opacity": 0.5, "symbol": symbol(i)},
        showlegend=True,
    )


def _caption(named: Mapping[str, xr.Dataset], fidelity: bool) -> str:
    trap = (
        "early on, since the logit lens is biased in early layers, and layer 0 of tied embeddings predicts the current "
        "token"
    )
    if all(data.attrs.get("lens") == "tuned lens" for data in named.values()):
        trap = "early on, since a tuned lens was trained to predict the last layer: what it reads is partly its work"
    ratio = "; fidelity: the fall that the gradient foretells over the real one, where the loss surely falls"
    return (
        "How to read: loss of the next token if the stream at this layer were the last (as high as with another "
        "token's target: it knows nothing of this position), and geometric mean rank, 1 is the most likely; cosine of "
        "what is added with the descent direction of that loss, 1 is a gradient step, and only what stands above "
        f"another token's target tells of this token; share of tokens whose loss the block lowers"
        f"{ratio if fidelity else ''}. Last, a dot is a token, {MOST_TOKENS} a scan at most (coefficients use all that "
        "were sampled; partial: frequencies and position taken out). Bands and brackets: 95 % intervals over "
        "sequences. Operational definition inspired by Wu & Varshney (2023), no theorem of theirs. It misleads "
        f"{trap}; and where a correlation over tokens is taken for a cause."
    )


def print_inner(console: Console, scan: xr.DataTree) -> None:
    """Loss at every layer and whether each block steps along its gradient; a wider terminal gets more columns."""
    data = group_of(scan, "inner")
    lens = data.attrs.get("lens", "logit lens")
    print_layers(console, f"Inner optimisation ({lens}, {data.attrs.get('samples', '?')} tokens)", data, _COLUMNS)
    bias = "the logit lens is biased in early layers, and layer 0 of tied embeddings predicts the current token"
    tuned = "a tuned lens was trained to predict the last layer, so a low early loss is partly its own work"
    console.print(
        "[dim]loss, entropy, KL: in nats, if this layer were the last; other: another token's target of the same "
        "sequence; step cos: of the block's step with the descent direction, 1 is a gradient step, and only what "
        "stands above 'other' tells of this token; rank: geometric mean, 1 is the most likely. An operational "
        f"definition inspired by Wu & Varshney (2023); {bias if lens == 'logit lens' else tuned}.[/]\n"
    )


def _rates(data: xr.Dataset) -> list[str]:
    """Learning rates run over powers of ten: two digits of each."""
    rates = data["learning_rate"].to_series().reindex(data["layer"].values)
    return [number(rate) if math.isnan(rate) else f"{rate:.2g}" for rate in rates]


_COLUMNS = [
    column("loss", "loss"),
    column("loss\nother", "loss_null"),
    column("entropy", "prediction_entropy"),
    column("rank", "target_rank"),
    column("KL to\nfinal", "kl_to_final"),
    column("step\ncos", "step_gradient_cosine"),
    column("step cos\nother", "step_gradient_cosine_null"),
    column("improved", "improved"),
    interval("loss\n95 %", "loss"),
    interval("step cos\n95 %", "step_gradient_cosine"),
    column("cos\nattn", "step_gradient_cosine_attn"),
    column("other", "step_gradient_cosine_null_attn"),
    column("cos\nMLP", "step_gradient_cosine_mlp"),
    column("other", "step_gradient_cosine_null_mlp"),
    column("fidelity", "fidelity"),
    Column("learning\nrate", _rates),
    column("Spearman of\nlength, loss", "norm_loss_spearman"),
    column("partial", "norm_loss_spearman_partial"),
]


VIEW = GroupView(
    group="inner",
    figures=lambda scan: {"inner": plot_inner(scan)},
    frames={"inner": partial(layer_frame, group="inner")},
    shown=(("layer",), ("block",)),
    print=print_inner,
    source="An operational definition of our own, after Wu & Varshney 2023, A Meta-Learning Perspective on "
    "Transformers for Causal Language Modeling (arXiv 2310.05884).",
    json=partial(layers_json, group="inner"),
)
