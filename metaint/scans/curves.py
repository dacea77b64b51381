"""What a recording shows along its steps: norms, labelled heads, and how much each memory of the toy recalls.

In: recordings. Out: curves and steps. The memories and their names are those of Bietti et al. 2023 (2306.00802).
Figures and findings both rest on these; nothing is drawn here.
"""

import numpy as np
import xarray as xr

from metaint.scans.labels import THRESHOLDS, label_heads

NORM = "total_norm_without_embeddings"
ANY = "any label"


def memory_curves(recording: xr.DataTree) -> xr.Dataset:
    """By `step`, what each memory of the toy recalls, by the paper's names, each with its `_chance`.

    `W_O2` (of the last layer: `W_O1` in a model of one) token -> its own logit, `W_K2` what layer 1 wrote of a token ->
    that token, over the triggers alone where these are fixed (`W_K2_all`: over all tokens), `W_K1` position -> the one
    before, and `W_K1_early` the first 64 positions; `W_F_kl` in nats where there is a W_F. As far as the model has
    them.
    """
    data = recording["memory"].to_dataset()
    last = data.sizes["layer"]
    curves = {f"W_O{last}": data["ov_recall"][:, -1, 0], f"W_O{last}_chance": data["ov_recall_chance"]}
    if last > 1:
        pair = {"layer": 0, "head": 0, "layer_to": 1, "head_to": 0}
        fewer = "_triggers" if "key_composition_recall_triggers" in data else ""
        for name, variable in (("W_K2", f"key_composition_recall{fewer}"), ("W_K2_all", "key_composition_recall")):
            curves[name], curves[f"{name}_chance"] = data[variable].isel(pair), data[f"{variable}_chance"]
        for name, end in (("W_K1", ""), ("W_K1_early", "_early")):
            variable = f"previous_position_recall{end}"
            curves[name], curves[f"{name}_chance"] = data[variable][:, 0, 0], data[f"{variable}_chance"]
    if "bigram_kl" in data:
        curves["W_F_kl"] = data["bigram_kl"]
    return xr.Dataset({name: ("step", value.values) for name, value in curves.items()}, {"step": data["step"].values})


def first_passing(curves: xr.Dataset, name: str, threshold: float = 0.5) -> int | None:
    """The first recorded step from which on a curve is at least `threshold` to the end; None if it ends below.

    A recall over five triggers passes one half by chance, and falls back.
    """
    below = (~(curves[name].values >= threshold)).nonzero()[0]
    first = below[-1] + 1 if len(below) else 0
    return int(curves["step"].values[first]) if first < curves.sizes["step"] else None


def steady_norms(recording: xr.DataTree) -> tuple[np.ndarray, np.ndarray]:
    """Steps and norms without embeddings from the end of the warmup on (`warmup_steps` in the attributes, or 0)."""
    weights = recording["weights"].to_dataset()
    after = weights["step"].values >= recording.attrs.get("warmup_steps", 0)
    return weights["step"].values[after], weights[NORM].values[after]


def head_counts(recording: xr.DataTree) -> xr.Dataset:
    """How many heads hold each label at each step (`label_heads`), and any label; `heads` of them in the attributes."""
    heads = recording["heads"].to_dataset()
    steps = heads["step"].values
    labels = [label_heads(heads.isel(step=i, drop=True))["label"].tolist() for i in range(len(steps))]
    total = heads.sizes["layer"] * heads.sizes["head"]
    counts = {label: ("step", [names.count(label) for names in labels]) for label in THRESHOLDS}
    counts[ANY] = ("step", [total - names.count("none") for names in labels])
    return xr.Dataset(counts, {"step": steps}, {"heads": total, **heads.attrs})
