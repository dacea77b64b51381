"""`/weights` as tables.

In: a scan. Out: terminal tables, of norms and copying by layer and of the pairs of heads that compose most; a frame for
machines.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from rich.console import Console

from metaint.views.saturation import head_at, numbers
from metaint.views.streams import group_of
from metaint.views.tables import number, print_columns

# Pairs of heads in the table.
_TOP = 8
_PRODUCTS = {"qk_norm": "W_Q W_K^T", "ov_norm": "W_V W_O"}
_KINDS = {"Q": "q_composition", "K": "k_composition", "V": "v_composition"}


def weights_frame(scan: xr.DataTree) -> pd.DataFrame:
    """One row a head; the norms of a layer's parts stand in the rows of all its heads."""
    data = group_of(scan, "weights")
    frame = data[[name for name in data.data_vars if data[name].dims == ("layer", "head")]].to_dataframe()
    norms = data["parameter_norm"].to_pandas().add_prefix("parameter_norm_")
    return frame.join(norms, on="layer").reset_index()


def print_weights(console: Console, scan: xr.DataTree) -> None:
    """Norms of the parameters by layer and part, and what the heads' weights can do."""
    data = group_of(scan, "weights")
    parts = {part: data["parameter_norm"].sel(part=part) for part in data["part"].values}
    columns = [("layer", [str(layer) for layer in data["layer"].values])]
    columns += [(str(part), numbers(norms)) for part, norms in parts.items()]
    columns += [(f"{label}\nmean head", numbers(data[name].mean("head"))) for name, label in _PRODUCTS.items()]
    for name, label in (("full_ov_copying", "full OV copying"), ("ov_copying", "OV copying")):
        for end, which in (("highest", "argmax"), ("lowest", "argmin")):
            columns.append((f"{label}\n{end}", head_at(data[name], which)))
    print_columns(console, "Norms of the parameters, and copying", columns)
    totals = ", ".join(
        f"{name.removesuffix('_norm').replace('_', ' ')} {number(data[name].item())}"
        for name in ("embedding_norm", "unembedding_norm", "total_norm", "total_norm_without_embeddings")
        if not data[name].isnull()
    )
    spread = [number(float(data[f"{name}_null_std"].max()) * 2) for name in ("ov_copying", "full_ov_copying")]
    console.print(
        f"[dim]norms: {totals}; raw weights, biases and gains included, tied weights once. Copying: sum of the real "
        "parts over sum of the magnitudes of the eigenvalues of W_V W_O (full: of W_E W_V W_O W_U), 1 copies, -1 "
        f"suppresses; within ±{spread[0]} (full: ±{spread[1]}) of their mean lie random heads of these sizes. Norms, "
        "their gains and MLPs are left out, so a copying score tells what a head's weights can do, not what it does."
        "[/]\n"
    )
    _print_pairs(console, data)


def _print_pairs(console: Console, data: xr.Dataset) -> None:
    """The pairs of heads with the largest z over the three kinds of composition; nothing where none is known."""
    if "composition" in data.attrs:
        console.print(f"[dim]Composition of pairs of heads is {data.attrs['composition']}.[/]\n")
    known = {kind: f"{name}_z" for kind, name in _KINDS.items() if name in data and data[f"{name}_z"].notnull().any()}
    if not known:
        return
    top = sorted((pair for kind in known for pair in _strongest(data, kind)), key=lambda pair: -pair.z)[:_TOP]
    chance, total = number(data["composition_chance"].item()), sum(int(data[z].notnull().sum()) for z in known.values())
    columns = [("kind", [pair.kind for pair in top]), ("from", [pair.writes for pair in top])]
    columns += [("to", [pair.reads for pair in top]), ("score", [number(pair.score) for pair in top])]
    columns += [("chance", [chance] * len(top)), ("z", [f"{pair.z:.1f}" for pair in top])]
    print_columns(console, f"Composition: top {len(top)} of {total} pairs", columns)
    medians = ", ".join(f"{kind} {float(data[z].median()):.1f}" for kind, z in known.items())
    console.print(
        "[dim]score: ||M1 M2|| / (||M1|| ||M2||), M1 = W_V W_O what a head writes, M2 what a later one reads for its "
        "queries (W_Q W_K^T), keys (W_K W_Q^T) or values (W_V W_O), with the gains of norms; chance: had one of them "
        "been turned at random in the stream; z: how far the squared score lies above that, in standard deviations "
        f"(median of all pairs: {medians}). It misleads where read as use: these are weights alone, at relative "
        "position 0, without rotary rotations, biases and MLPs, and all heads of a trained model share directions, so "
        "that a large z says more than the chance of a rotation, and not that the pair is used.[/]\n"
    )


class _Pair(NamedTuple):
    kind: str
    writes: str
    reads: str
    score: float
    z: float


def _strongest(data: xr.Dataset, kind: str) -> list[_Pair]:
    """The pairs with the largest z of one kind of composition, those without one left out."""
    score, z = (data[name].values for name in (_KINDS[kind], f"{_KINDS[kind]}_z"))
    order = np.argsort(np.where(np.isfinite(z), -z, np.inf), axis=None, kind="stable")[:_TOP]
    places = [place for place in zip(*np.unravel_index(order, z.shape), strict=True) if np.isfinite(z[place])]
    return [
        _Pair(kind, f"{layer}.{head}", f"{layer_to}.{head_to}", float(score[place]), float(z[place]))
        for place in places
        for layer, head, layer_to, head_to in [place]
    ]
