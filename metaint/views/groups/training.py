"""`plot_training`: everything recorded over training in one figure, and the panels that other figures share with it.

In: a recording as `read_recording` gives it, or several by name. Out: a plotly figure over the square root of the step,
with a caption. The panels of norms and saturation are after Merrill et al. 2021 (2010.09697).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from plotly import graph_objects as go

from metaint.errors import InputError, door
from metaint.measures.growth import TRENDS, fit_trends
from metaint.scans.curves import ANY, NORM, head_counts, steady_norms
from metaint.scans.finding import Recordings, Scans, recordings_of
from metaint.scans.labels import THRESHOLDS
from metaint.views.drawing.panels import COLOURS, DASHES, GREY, Line, draw, legend_of, panels
from metaint.views.drawing.steps import on_root, over_training, whole_numbers
from metaint.views.groups.birth import is_birth, plot_birth

SOURCE = (
    "Kinds of heads: Olsson et al. 2022 (arXiv 2209.11895); norms and saturation: Merrill et al. 2021 "
    "(arXiv 2010.09697); memories of an induction head: Bietti et al. 2023 (arXiv 2306.00802)."
)
# How the trends of `measures.growth` are written.
SIGNS = {"t": "t", "sqrt_t": "√t", "fourth_root_t": "t^¼"}
# Layers that have a panel: more are hard to compare.
_LAYERS = 4


@door
def plot_training(recordings: Scans) -> go.Figure:
    """Everything recorded over training: scalars, labelled heads, norm of the parameters, saturation; a panel for each.

    - `recordings`: a recording (`metaint.load`), its `/training`, or a dict from names to these. Recordings of the
      birth lab get the figure of its memories.

    Panels, as far as they are there:

    - losses, accuracies and other scalars of `/training`;
    - how many heads hold each label (`metaint.label_heads`);
    - length of the parameters without embeddings, with its best trend;
    - similarity with the model of saturated attention, at four layers at most.

    Raises InputError where there is nothing of it.

    >>> import metaint, tempfile
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=1, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=64)
    >>> path = tempfile.mkdtemp() + "/run.zarr"
    >>> recorder = metaint.Recorder(model, [metaint.WeightProbe()], every=1, path=path)
    >>> scans = [recorder(step, loss=3 - step) for step in (0, 1)]
    >>> metaint.plot_training(metaint.load(path)).layout.title.subtitle.text.endswith("1 steps")
    True
    """
    trees = recordings_of(recordings)
    if all(is_birth(tree) for tree in trees.values()):
        return plot_birth(trees)
    parts = []
    for group, drawing in _DRAWINGS.items():
        having = _having(trees, group)
        if having:
            parts.append(drawing.make(trees, having))
    if not parts:
        raise InputError(
            f"{next(iter(trees))} holds nothing over steps to draw: record scalars, /heads, /weights, or /saturation "
            "with a kappa of infinity, and pass what metaint.read_recording gives."
        )
    figure = panels([title for part in parts for title in part.titles], [h for part in parts for h in part.heights])
    row = 1
    for part in parts:
        part.draw(figure, row)
        row += len(part.titles)
    read, traps = " ".join(part.read for part in parts), "; ".join(part.trap for part in parts)
    over_training(figure, "Training", list(trees), f"How to read: {read} It misleads {traps}.")
    return figure


def drawn_groups(recording: xr.DataTree) -> set[str]:
    """The groups of a recording that `plot_training` draws."""
    groups = {str(name): node.to_dataset() for name, node in recording.children.items() if "step" in node.dims}
    return {name for name, drawing in _DRAWINGS.items() if name in groups and drawing.can(groups[name])}


def _having(trees: Recordings, group: str) -> dict[str, xr.DataTree]:
    return {name: tree for name, tree in trees.items() if group in drawn_groups(tree)}


def scalars_of(training: xr.Dataset) -> list[str]:
    """The numbers that `/training` holds by step, without the ends of intervals."""
    names = [str(name) for name, values in training.items() if values.dims == ("step",) and values.dtype.kind in "fiu"]
    ends = {f"{name}{end}" for name in names for end in ("_low", "_high")}
    return [name for name in names if name not in ends and bool(training[name].notnull().any())]


# ---- what is drawn of each group --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Panels:
    """Panels of one group: titles and heights, what draws them from a row on, how to read them and when not."""

    titles: Sequence[str]
    heights: Sequence[float]
    draw: Callable[[go.Figure, int], Any]
    read: str
    trap: str


@dataclass(frozen=True)
class _Drawing:
    """Whether a group can be drawn, and its panels, given all recordings and those that have it."""

    can: Callable[[xr.Dataset], bool]
    make: Callable[[Recordings, Recordings], _Panels]


def _scalars(trees: Recordings, having: Recordings) -> _Panels:
    """Losses in a panel, accuracies in another, and each other scalar in its own."""
    by_run = {name: tree["training"].to_dataset() for name, tree in having.items()}
    kinds: dict[str, list[str]] = {"loss": [], "accuracy": []}
    for name in dict.fromkeys(name for data in by_run.values() for name in scalars_of(data)):
        kind = next((kind for kind in ("loss", "accuracy") if kind in name), name)
        kinds.setdefault(kind, []).append(name)
    kinds = {kind: sorted(names, key=lambda name: name != kind) for kind, names in kinds.items() if names}
    return _Panels(
        [_words(kind) for kind in kinds],
        [0.8 if kind in ("loss", "accuracy") else 0.55 for kind in kinds],
        _drawing(_rooted(trees, by_run), list(kinds.values())),
        "scalars are those that the training loop gave.",
        "where records are few, since anything may happen between two",
    )


def _labels(trees: Recordings, having: Recordings) -> _Panels:
    """The labels that any head ever earns: of one run in one panel, of several in a panel each."""
    counts = {name: head_counts(tree) for name, tree in having.items()}
    most = {label: max(int(data[label].max()) for data in counts.values()) for label in [*THRESHOLDS, ANY]}
    earned = [label for label in THRESHOLDS if most[label]] or [ANY]
    rows = [[label] for label in earned] if len(trees) > 1 else [earned]
    lines = _drawing(_rooted(trees, counts), rows)

    def drawn(figure: go.Figure, first: int) -> None:
        lines(figure, first)
        for row, labels in enumerate(rows, first):
            whole_numbers(figure, row, max(most[label] for label in labels))

    return _Panels(
        ["labelled heads" if labels[1:] or labels == [ANY] else f"{labels[0]} heads" for labels in rows],
        [0.55 if len(rows) > 1 else 0.8] * len(rows),
        drawn,
        f"Labels: how many of {heads_told(counts)} heads hold each; one head may hold several.",
        "where a head stands at a label's threshold, and comes and goes",
    )


def _norms(trees: Recordings, having: Recordings) -> _Panels:
    return _Panels(
        ["norm of the parameters"],
        [0.8],
        lambda figure, row: draw_norms(figure, row, trees),
        "Norm: length of all parameters but the embeddings, and dotted its best trend after the warmup; growth by "
        "steps across the parameters is a straight line here.",
        "where a trend is taken for a law, since any smooth rise fits √t and t^¼ alike",
    )


def _similarities(trees: Recordings, having: Recordings) -> _Panels:
    layers = shown_layers(having)
    return _Panels(
        similarity_titles(layers),
        [0.55] * len(layers),
        lambda figure, row: draw_similarities(figure, row, trees, layers),
        "Similarity: mean cosine of the stream after a layer with that of the same model whose attention goes to the "
        "largest scores alone, band: 95 % over sequences; dashed: with a token of another sequence.",
        "where attention adds little, since streams are then similar however soft it is, as before training",
    )


_DRAWINGS = {
    "training": _Drawing(lambda training: bool(scalars_of(training)), _scalars),
    "heads": _Drawing(lambda heads: True, _labels),
    "weights": _Drawing(lambda weights: NORM in weights, _norms),
    "saturation": _Drawing(lambda data: "scale" in data and math.inf in data["scale"].values, _similarities),
}


def _drawing(named: Mapping[str, xr.Dataset], rows: Sequence[Sequence[str]]) -> Callable[[go.Figure, int], None]:
    """What draws a row of variables into each panel: one run has a colour for each, several have dashes for them."""

    def drawn(figure: go.Figure, first: int) -> None:
        for row, variables in enumerate(rows, first):
            looks = [(COLOURS[j % len(COLOURS)], DASHES[j % len(DASHES)]) for j in range(len(variables))]
            lines = [Line(name, _words(name), *look) for name, look in zip(variables, looks, strict=True)]
            draw(figure, row, named, lines, explain=len(named) > 1 or len(lines) > 1)

    return drawn


def _rooted(trees: Recordings, by_run: Mapping[str, xr.Dataset]) -> dict[str, xr.Dataset]:
    """Along roots of steps; a run without anything keeps its place, and so its colour."""
    return {name: on_root(by_run[name]) if name in by_run else xr.Dataset() for name in trees}


def _words(name: str) -> str:
    return name.replace("_", " ")


def heads_told(counts: Mapping[str, xr.Dataset]) -> str:
    """How many heads the runs have."""
    return " or ".join(map(str, sorted({data.attrs["heads"] for data in counts.values()})))


# ---- panels -----------------------------------------------------------------------------------------------------


def draw_norms(figure: go.Figure, row: int, recordings: Recordings) -> Mapping[str, Mapping[str, Any]]:
    """Length of each run's parameters, and its best trend dotted; returns all trends of the runs that have any."""
    having = _having(recordings, "weights")
    norms = {name: tree["weights"].to_dataset()[[NORM]] for name, tree in having.items()}
    draw(figure, row, _rooted(recordings, norms), [Line(NORM, "norm", COLOURS[0])])
    steady = {name: steady_norms(tree) for name, tree in having.items()}
    fits = {name: fit_trends(*curve) for name, curve in steady.items() if len(curve[0])}
    for i, name in enumerate(recordings):
        if name in fits:
            best = _fitted(steady[name][0], fits[name])
            best.update(line_color=COLOURS[i % len(COLOURS)], legendgroup=f"scan {i}", legend=legend_of(row))
            figure.add_trace(best.update(showlegend=len(recordings) == 1), row=row, col=1)
    return fits


def _fitted(steps: np.ndarray, trends: Mapping[str, Any]) -> go.Scatter:
    """The best trend as a thin line; an empty one where nothing was fitted."""
    best = max(TRENDS, key=lambda key: np.nan_to_num(trends[key].r2, nan=-np.inf))
    t = np.linspace(np.sqrt(steps[0]), np.sqrt(steps[-1]), 60) ** 2
    y = trends[best].intercept + trends[best].slope * TRENDS[best](t)
    line = {"width": 1, "dash": "dot"}
    return go.Scatter(x=np.sqrt(t), y=y, mode="lines", line=line, name=f"fit of {SIGNS[best]}", hoverinfo="skip")


def shown_layers(recordings: Recordings) -> list[int]:
    """Four layers at most of the deepest run, the first and the last among them."""
    layers = max((tree["saturation"].to_dataset()["layer"].values.tolist() for tree in recordings.values()), key=len)
    return sorted({layers[round(i * (len(layers) - 1) / (_LAYERS - 1))] for i in range(_LAYERS)})


def similarity_titles(layers: Sequence[int]) -> list[str]:
    return [f"similarity, layer {layer}" for layer in layers]


def draw_similarities(figure: go.Figure, first: int, recordings: Recordings, layers: Sequence[int]) -> None:
    """Similarity with the model of saturated attention beside its null, a panel a layer, all of one scale."""
    by_run = {name: tree["saturation"].to_dataset() for name, tree in _having(recordings, "saturation").items()}
    lines = [Line("similarity", "similarity", COLOURS[0]), Line("similarity_null", "null", GREY, "dash")]
    for row, layer in enumerate(layers, first):
        at = {"scale": math.inf, "layer": layer}
        here = {name: data.sel(at, drop=True) for name, data in by_run.items() if layer in data["layer"]}
        draw(figure, row, _rooted(recordings, here), lines, explain=row == first)
        if row > first:
            figure.update_yaxes(matches=f"y{first if first > 1 else ''}", row=row, col=1)
