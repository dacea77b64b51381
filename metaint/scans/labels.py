"""Names for heads: a label needs an effect, and a margin over uniform attention and over the null."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr

from metaint.errors import InputError

# Smallest score that earns each label. A head can earn several.
THRESHOLDS: dict[str, float] = {
    "previous_token": 0.4,
    "induction": 0.4,
    "duplicate_token": 0.4,
    "sink": 0.5,
    "local": 0.6,
    "averaging": 0.8,
    "argmax": 0.8,
}
MARGIN, DEVIATIONS = 0.1, 3.0
# Labels that name the token a head looks for say more of a head than the shape of its rows does.
SPECIFIC = ("induction", "previous_token", "duplicate_token")
# An averaging head departs from uniform at most this fraction of how far the model's typical head does.
TYPICAL_DEPARTURE = 0.25
COLUMNS = [
    "head", "label", "score", "uniform", "null_mean", "null_std", "margin", "low", "high", "on_first", "layer", "index",
]  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """Score of one label at every head, with what it is held against; each an array (layer, head)."""

    score: np.ndarray
    uniform: np.ndarray
    null_mean: np.ndarray
    null_std: np.ndarray
    low: np.ndarray
    high: np.ndarray
    allowed: np.ndarray

    @property
    def floor(self) -> np.ndarray:
        """What a label is measured from: the larger of uniform and null."""
        return np.fmax(self.null_mean, self.uniform)

    @property
    def margin(self) -> np.ndarray:
        """How far the score stands above that."""
        return self.score - self.floor


def label_heads(
    scan: xr.DataTree | xr.Dataset,
    thresholds: Mapping[str, float] | None = None,
    *,
    margin: float = MARGIN,
    deviations: float = DEVIATIONS,
) -> pd.DataFrame:
    """Label every head of a scan; one row for each head and label, and label "none" where a head earns none.

    A label needs: a score of at least its threshold (`THRESHOLDS`, changed by `thresholds`); `margin` above what
    uniform attention scores on the same tokens and above the null mean; `deviations` null deviations above the null
    mean; and, given two sequences or more, a bootstrap interval above both. What each label reads:

    - `previous_token`, `duplicate_token`: the scores of those names.
    - `induction`: the stripe on repeated tokens; where the tokens do not repeat, `prefix_match`.
    - `sink`: `first_token`.
    - `local`: `local_mass`, unless more than half of it is on the previous or the current token alone.
    - `averaging`: uniform is the ideal here and also what an untrained head does, so the null is the model's typical
      head (the median over heads with the same attention window), and an averaging head departs from uniform at most
      a quarter as far. Where all heads average alike, as before training, none gets this label.
    - `argmax`: `max_weight`, with at most two keys within 0.1 of the top log weight; a shape, so against uniform only.

    Columns: head ("5.1"), label, score, uniform, null_mean, null_std, margin, low, high (95 % interval), on_first (the
    weight on position 0), layer, index. Raises InputError if the scan has no `/heads` or `thresholds` an unknown name.

    >>> import metaint, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> scan = metaint.scan(model, torch.arange(10).repeat(2, 2))
    >>> metaint.label_heads(scan, {"averaging": 0.9})["head"].unique().tolist()
    ['0.0', '0.1', '1.0', '1.1']
    """
    heads = heads_of(scan)
    limits = {**THRESHOLDS, **(thresholds or {})}
    unknown = sorted(set(limits) - set(THRESHOLDS))
    if unknown:
        raise InputError(f"thresholds names {unknown[0]!r}: the labels are {', '.join(THRESHOLDS)}.")
    rows = []
    earned = np.zeros((heads.sizes["layer"], heads.sizes["head"]), dtype=bool)
    on_first = _values(heads, "first_token")
    for label, case in evidence(heads).items():
        spread = np.nan_to_num(case.null_std, nan=0.0) * deviations
        enough = case.allowed & (case.score >= limits[label]) & (case.score - case.floor >= margin)
        enough &= case.score >= np.nan_to_num(case.null_mean, nan=-np.inf) + spread
        enough &= np.isnan(case.low) | (case.low > case.floor)
        earned |= enough
        rows += [_row(i, j, label, case, on_first) for i, j in np.argwhere(enough)]
    read = np.ones(len(earned), dtype=bool)  # layers that don't attend have no heads to name
    if "layer_kind" in heads.coords:
        read = heads["layer_kind"].values == "attention"
    rows += [_row(i, j, "none", None, on_first) for i, j in np.argwhere(~earned & read[:, None])]
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.sort_values(["layer", "index", "margin"], ascending=[True, True, False], ignore_index=True)


def telling_heads(scan: xr.DataTree | xr.Dataset, most: int = 15) -> pd.DataFrame:
    """The `most` labelled heads that tell most, a row of `label_heads` each: the widest margin of each label in turn.

    Labels that name the token a head looks for (`SPECIFIC`) take their turns before those that describe the shape of
    its rows, and each head stands once, at the label that chose it. Raises InputError as `label_heads` does, and for
    `most` below 1.

    >>> import metaint, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> scan = metaint.scan(model, torch.arange(10).repeat(2, 2))
    >>> list(metaint.telling_heads(scan, 3))[:3]
    ['head', 'label', 'score']
    """
    if most < 1:
        raise InputError(f"most is {most}: ask for at least one head.")
    named = label_heads(scan).query("label != 'none'").sort_values("margin", ascending=False)
    order = [*SPECIFIC, *(label for label in THRESHOLDS if label not in SPECIFIC)]
    named["order"] = named["label"].map(order.index)
    named["turn"] = named.groupby("label").cumcount()
    named["shape"] = ~named["label"].isin(SPECIFIC)
    chosen = named.sort_values(["shape", "turn", "order"]).drop_duplicates("head").head(most)
    chosen = chosen.sort_values(["order", "margin"], ascending=[True, False], ignore_index=True)
    return chosen.loc[:, COLUMNS]


def heads_of(scan: xr.DataTree | xr.Dataset) -> xr.Dataset:
    """The `/heads` of a scan, or the group itself as node or dataset; InputError if there is none."""
    group = scan
    if isinstance(scan, xr.DataTree):
        if "heads" not in scan.children and scan.name != "heads":
            raise InputError("scan has no /heads group: scan with a HeadProbe.")
        group = scan["heads"].to_dataset() if "heads" in scan.children else scan.to_dataset()
    if "layer" not in group.dims or not group.data_vars:
        raise InputError("scan holds no heads: nothing was read yet.")
    return group  # type: ignore[return-value]


def evidence(heads: xr.Dataset) -> dict[str, Evidence]:
    """What each label rests on, for the labels whose measures the scan holds."""
    by_label = {}
    sources = {
        "previous_token": "previous_token",
        "duplicate_token": "duplicate_token",
        "sink": "first_token",
    }
    for label, name in sources.items():
        if name in heads:
            by_label[label] = _evidence(heads, name)
    stripe = "induction" in heads and float(heads["induction_count"].max()) > 0
    name = "induction" if stripe else "prefix_match"
    if name in heads:
        by_label["induction"] = _evidence(heads, name)
    if {"local_mass", "previous_token", "current_token"} <= set(heads):
        one = np.fmax(_values(heads, "previous_token"), _values(heads, "current_token"))
        by_label["local"] = _evidence(heads, "local_mass", one <= _values(heads, "local_mass") / 2)
    if "averaging" in heads:
        score = _values(heads, "averaging")
        typical = _typical(score, heads)
        near = 1 - score <= TYPICAL_DEPARTURE * (1 - typical)
        by_label["averaging"] = _evidence(heads, "averaging", near, typical)
    if {"max_weight", "tied_keys"} <= set(heads):
        few = heads["tied_keys"].sel(tau=0.1, method="nearest").transpose("layer", "head").values <= 2
        by_label["argmax"] = _evidence(heads, "max_weight", few)
    return by_label


def _typical(score: np.ndarray, heads: xr.Dataset) -> np.ndarray:
    """Median of a score over the heads whose layers have the same attention window."""
    median = np.empty_like(score)
    windows = heads["window"].values if "window" in heads.coords else np.zeros(len(score))
    for window in np.unique(windows):
        alike = windows == window
        median[alike] = np.nan if np.isnan(score[alike]).all() else np.nanmedian(score[alike])
    return median


def _evidence(
    heads: xr.Dataset, name: str, allowed: np.ndarray | None = None, typical: np.ndarray | None = None
) -> Evidence:
    score, low, high = (_values(heads, name + part) for part in ("", "_low", "_high"))
    uniform, mean, deviation = (_values(heads, name + part) for part in ("_uniform", "_null_mean", "_null_std"))
    if typical is not None:
        uniform, mean = np.full(score.shape, np.nan), typical
    everywhere = np.ones(score.shape, dtype=bool)
    allowed = everywhere if allowed is None else allowed
    return Evidence(score, uniform, mean, deviation, low, high, allowed)


def _values(heads: xr.Dataset, name: str) -> np.ndarray:
    if name not in heads:
        return np.full((heads.sizes["layer"], heads.sizes["head"]), np.nan)
    return heads[name].transpose("layer", "head").values


def _row(i: int, j: int, label: str, evidence: Evidence | None, on_first: np.ndarray) -> dict[str, object]:
    row: dict[str, object] = {"head": f"{i}.{j}", "label": label, "layer": int(i), "index": int(j)}
    row["on_first"] = float(on_first[i, j])
    if evidence is not None:
        names = ("score", "uniform", "null_mean", "null_std", "margin", "low", "high")
        row.update({name: float(getattr(evidence, name)[i, j]) for name in names})
    return row
