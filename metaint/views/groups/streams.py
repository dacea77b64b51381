"""The residual stream as tables: for machines (`layer_frame`, `scan_json`), and one row a layer for the terminal.

Beside them what every view of a group begins with: finding the group in what was passed (`group_of`, `named_groups`).
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import xarray as xr
from rich.console import Console

from metaint.errors import InputError
from metaint.measures.norms import histogram_quantile
from metaint.views.groups.tables import number, print_columns, to_json

Scan = xr.DataTree | xr.Dataset
Scans = Scan | Mapping[str, Scan]

PROBES = {
    "heads": "HeadProbe",
    "residual": "ResidualProbe",
    "inner": "InnerProbe",
    "saturation": "SaturationProbe",
    "memory": "MemoryProbe",
    "weights": "WeightProbe",
}
# A variable that a group always has and no other does; what /heads and /training hold is their owner's choice.
_SIGNS = {
    "residual": "norm_geometric",
    "inner": "gradient_norm",
    "saturation": "similarity",
    "memory": "ov_recall",
    "weights": "parameter_norm",
    "recurrence": "effective_matrix_cosine",
}
# Further dimensions of which each value becomes a column of its own.
_SPREAD = {"position", "rank"}


# ---- groups -----------------------------------------------------------------------------------------------------


def group_of(scan: Scan, group: str, who: str = "the scan") -> xr.Dataset:
    """One group of a scan, or what was passed where it is that group already.

    InputError, in which the scan is called `who`, if it has no such group, nothing was read into it, or it is another
    group or no scan at all.
    """
    wanted = f"pass a {'recording' if group == 'training' else 'scan'}, or its /{group}."
    if not isinstance(scan, xr.DataTree | xr.Dataset):
        raise InputError(f"{who} is a {type(scan).__name__}: {wanted}")
    whole = isinstance(scan, xr.DataTree) and not scan.data_vars and scan.name != group
    if whole and group not in scan.children:
        if group not in PROBES:
            raise InputError(f"{who} has no /{group} group: make one with metaint.recur.")
        raise InputError(
            f"{who} has no /{group} group: scan with metaint.{PROBES[group]}(), or --probes {group} at the shell."
        )
    found = scan.children[group] if isinstance(scan, xr.DataTree) and whole else scan
    data = found.to_dataset() if isinstance(found, xr.DataTree) else found
    if not data.data_vars:
        raise InputError(f"{who}'s /{group} group is empty: nothing was read yet.")
    if not whole and kind_of(data) != group:
        what = f"a /{kind} group" if (kind := kind_of(data)) else "no group of a scan"
        raise InputError(f"{who} is {what}: {wanted}")
    return data


def kind_of(data: xr.Dataset) -> str | None:
    """Which group a dataset is, by what it holds; None where it is none."""
    found = next((group for group, sign in _SIGNS.items() if sign in data), None)
    if found is None and {"layer", "head"} <= set(data.dims):
        return "heads"
    if found is None and data.data_vars and all(values.dims == ("step",) for values in data.data_vars.values()):
        return "training"
    return found


def named_groups(scans: Scans, group: str) -> dict[str, xr.Dataset]:
    """The group of one scan, or of several, by the scans' names, for a figure.

    A scan is called after its model. InputError where `group_of` raises it, for no scan, and for a recording over
    several steps.
    """
    if isinstance(scans, xr.DataTree | xr.Dataset):
        named = {name_of(scans): group_of(scans, group)}
    elif isinstance(scans, Mapping) and scans:
        named = {str(name): group_of(scan, group, f"the scan {name}") for name, scan in scans.items()}
    else:
        what = "empty" if isinstance(scans, Mapping) else f"a {type(scans).__name__}"
        raise InputError(f"scans is {what}: pass a scan, its /{group}, or a dict from names to these.")
    if over_steps := [name for name, data in named.items() if "step" in data.dims]:
        raise InputError(
            f"{over_steps[0]} is a recording over steps: pass one of them, such as scan.isel(step=-1), or draw all of "
            "them with metaint.plot_training."
        )
    return named


def one_group(scan: Scan, group: str) -> tuple[str, xr.Dataset]:
    """The name of a scan and its group, for a figure of one; InputError as in `named_groups`, and for several."""
    if not isinstance(scan, xr.DataTree | xr.Dataset):
        raise InputError(f"scan is a {type(scan).__name__}: pass one scan, or its /{group}.")
    return next(iter(named_groups(scan, group).items()))


def name_of(scan: Scan) -> str:
    """The model that was scanned, told by the scan, or the group on its own; "scan" where neither knows."""
    root = scan.root.attrs if isinstance(scan, xr.DataTree) else {}
    return str(scan.attrs.get("model") or root.get("model") or "scan")


# ---- tables -----------------------------------------------------------------------------------------------------


def layer_frame(scan: xr.DataTree, group: str) -> pd.DataFrame:
    """One row a layer, a column for each variable of `/residual` or `/inner` along layers or blocks.

    A block stands in the row of the layer that it starts from, so the last row has none. Variables that also run
    over position buckets or ranks become a column for each (`norm_geometric_position_1-3`, `massive_value_rank_1`);
    quantiles, histograms and single tokens stay in the scan.
    """
    data = group_of(scan, group)
    columns: dict[str, Any] = {}
    for name in [*data.data_vars, *data.coords]:
        values, key = data[name], str(name)
        along = [dim for dim in values.dims if dim in ("layer", "block")]
        further = [str(dim) for dim in values.dims if dim not in along]
        if len(along) != 1 or key == along[0] or len(further) > 1 or not set(further) <= _SPREAD:
            continue
        if not further:
            columns[key] = pd.Series(values.to_series())
            continue
        spread = values.transpose(along[0], further[0]).to_pandas()
        columns |= {f"{key}_{further[0]}_{value}": spread[value] for value in spread}
    table = pd.DataFrame({name: column.reindex(data["layer"].values) for name, column in columns.items()})
    return table.rename_axis("layer").reset_index()


def scan_json(scan: xr.DataTree) -> str:
    """All groups as JSON: attributes, one record for each head, and for `/residual` and `/inner` their own attributes,
    their scalars and one record for each layer; of other groups all variables; what is not a number is null."""
    from metaint.views.groups.saturation import group_json

    found: dict[str, Any] = json.loads(to_json(scan)) if "heads" in scan.children else {"attributes": scan.attrs}
    for group in ("residual", "inner"):
        if group in scan.children:
            data = group_of(scan, group)
            scalars = {str(k): None if v.isnull() else v.item() for k, v in data.data_vars.items() if not v.dims}
            layers = layer_frame(scan, group).to_json(orient="records", double_precision=12)
            found[group] = {"attributes": data.attrs, **scalars, "layers": json.loads(layers or "[]")}
    for group in ("saturation", "memory", "weights"):
        if group in scan.children:
            found[group] = group_json(group_of(scan, group))
    return json.dumps(found, indent=1, default=str)


def later_norms(residual: xr.Dataset) -> tuple[xr.DataArray, xr.DataArray]:
    """Geometric mean (layer) and quantiles (quantile, layer) of the length over every position but 0."""
    later = residual.sel(position=[bucket for bucket in residual["position"].values if bucket != "0"])
    count = later["norm_count"]
    total = count.sum("position")
    logs = xr.DataArray(count * np.log(later["norm_geometric"])).sum("position")
    histogram = later["norm_histogram"].sum("position").transpose("layer", "bin").values
    quantiles = histogram_quantile(torch.tensor(histogram), torch.tensor(residual["quantile"].values))
    coords = {"quantile": residual["quantile"], "layer": residual["layer"]}
    return xr.DataArray(np.exp(logs / total.where(total > 0))), xr.DataArray(
        quantiles.numpy(), coords, ("quantile", "layer")
    )


class _Column(NamedTuple):
    """A column of a terminal table: its heading, and one cell a layer."""

    heading: str
    cells: Callable[[xr.Dataset], list[str]]


def print_residual(console: Console, scan: xr.DataTree) -> None:
    """Length of the stream at every layer and what each block does to it; a wider terminal gets more columns."""
    data = group_of(scan, "residual")
    rate = data["growth_rate"].item()
    first, last = data.attrs.get("growth_layers", ("first", "last"))
    fit = f"; {number(rate)} a layer from layer {first} to {last}" if not math.isnan(rate) else ""
    _print(console, f"Residual stream{fit}", data, _RESIDUAL)
    null = 2 * data["cos_null_std"].item()
    console.print(
        "[dim]length: geometric mean before any norm, at position 0 and at later ones (all else is of later ones); "
        "growth to cos MLP: of the block that starts at this layer; if ortho.: what growth would be if the step were "
        "orthogonal to the stream (growth below it: the step opposes the stream); "
        f"cosines within ±{number(null)} are those of unrelated directions; *: massive "
        "(above 100 and 1000 times the median). Growth alone is no evidence of inner optimisation: any exact descent "
        "through a final norm lengthens the stream, and so does adding what doesn't oppose it.[/]\n"
    )


def print_inner(console: Console, scan: xr.DataTree) -> None:
    """Loss at every layer and whether each block steps along its gradient; a wider terminal gets more columns."""
    data = group_of(scan, "inner")
    lens = data.attrs.get("lens", "logit lens")
    _print(console, f"Inner optimisation ({lens}, {data.attrs.get('samples', '?')} tokens)", data, _INNER)
    bias = "the logit lens is biased in early layers, and layer 0 of tied embeddings predicts the current token"
    tuned = "a tuned lens was trained to predict the last layer, so a low early loss is partly its own work"
    console.print(
        "[dim]loss, entropy, KL: in nats, if this layer were the last; other: another token's target of the same "
        "sequence; step cos: of the block's step with the descent direction, 1 is a gradient step, and only what "
        "stands above 'other' tells of this token; rank: geometric mean, 1 is the most likely. An operational "
        f"definition inspired by Wu & Varshney (2023); {bias if lens == 'logit lens' else tuned}.[/]\n"
    )


def _print(console: Console, title: str, data: xr.Dataset, columns: list[_Column]) -> None:
    layers = [str(layer) for layer in data["layer"].values]
    print_columns(console, title, [("layer", layers), *((column.heading, column.cells(data)) for column in columns)])


def _short(value: float) -> str:
    """`number`, and a power of ten for what would be a long row of digits."""
    return f"{value:.1e}" if 1e6 <= abs(value) < math.inf else number(value)


def _cells(values: xr.DataArray, layers: xr.DataArray) -> list[str]:
    """One cell a layer; the block that starts there, for what runs along blocks."""
    return [_short(value) for value in values.to_series().reindex(layers.values)]


def _read(heading: str, name: str, **where: Any) -> _Column:
    return _Column(heading, lambda data: _cells(data[name].sel(where, drop=True), data["layer"]))


def _rates(data: xr.Dataset) -> list[str]:
    """Learning rates run over powers of ten: two digits of each."""
    rates = data["learning_rate"].to_series().reindex(data["layer"].values)
    return [number(rate) if math.isnan(rate) else f"{rate:.2g}" for rate in rates]


def _interval(heading: str, name: str) -> _Column:
    def cells(data: xr.Dataset) -> list[str]:
        low, high = (_cells(data[name + end], data["layer"]) for end in ("_low", "_high"))
        return _ranges(low, high)

    return _Column(heading, cells)


def _ranges(low: list[str], high: list[str]) -> list[str]:
    return ["–" if a == "–" else f"{a} to {b}" for a, b in zip(low, high, strict=True)]


def _later(data: xr.Dataset) -> list[str]:
    return _cells(later_norms(data)[0], data["layer"])


def _spread(data: xr.Dataset) -> list[str]:
    quantiles = later_norms(data)[1]
    ends = (quantiles.isel(quantile=i, drop=True) for i in (0, -1))
    return _ranges(*(_cells(end, data["layer"]) for end in ends))


def _largest(data: xr.Dataset) -> list[str]:
    marks = data["massive"].sel(rank=1).values
    values = _cells(data["massive_value"].sel(rank=1, drop=True), data["layer"])
    return [f"{value}{'*' if mark else ' '}" for value, mark in zip(values, marks, strict=True)]


_RESIDUAL = [
    _read("length\nat 0", "norm_geometric", position="0"),
    _Column("length\nlater", _later),
    _read("growth", "growth"),
    _read("if\northo.", "growth_orthogonal"),
    _read("cos\nattn", "cos_stream_attn"),
    _read("cos\nMLP", "cos_stream_mlp"),
    _read("cos to\nfinal", "cos_to_final"),
    _Column("largest\n|x| ", _largest),
    _read("effective\nrank", "effective_rank"),
    _interval("growth\n95 %", "growth"),
    _Column("length later\n5–95 % of tokens", _spread),
    _read("length\nattn adds", "attn_write_norm"),
    _read("length\nMLP adds", "mlp_write_norm"),
    _read("median\n|x|", "median_magnitude"),
]
_INNER = [
    _read("loss", "loss"),
    _read("loss\nother", "loss_null"),
    _read("entropy", "prediction_entropy"),
    _read("rank", "target_rank"),
    _read("KL to\nfinal", "kl_to_final"),
    _read("step\ncos", "step_gradient_cosine"),
    _read("step cos\nother", "step_gradient_cosine_null"),
    _read("improved", "improved"),
    _interval("loss\n95 %", "loss"),
    _interval("step cos\n95 %", "step_gradient_cosine"),
    _read("cos\nattn", "step_gradient_cosine_attn"),
    _read("other", "step_gradient_cosine_null_attn"),
    _read("cos\nMLP", "step_gradient_cosine_mlp"),
    _read("other", "step_gradient_cosine_null_mlp"),
    _read("fidelity", "fidelity"),
    _Column("learning\nrate", _rates),
    _read("Spearman of\nlength, loss", "norm_loss_spearman"),
    _read("partial", "norm_loss_spearman_partial"),
]
