"""Names for heads: a label needs an effect, and a margin over uniform attention and over the null."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr

from metaint.errors import InputError

# What each label asks at least: for a kind of token its share of the weight beside position 0, else the score. A head
# can earn several. A head whose kind has more than half of what it spends at all is named after it; 0.3 is the line of
# Gu et al. (ICLR 2025) for an attention sink.
THRESHOLDS: dict[str, float] = {
    "previous_token": 0.5,
    "induction": 0.5,
    "duplicate_token": 0.5,
    "current_token": 0.5,
    "sink": 0.3,
    "local": 0.6,
    "averaging": 0.8,
    "argmax": 0.8,
}
# How far a score stands above uniform attention and the null, on average over queries.
MARGIN = 0.05
DEVIATIONS = 3.0
# Labels that name the token a head looks for say more of a head than the shape of its rows does.
SPECIFIC = ("induction", "previous_token", "duplicate_token", "current_token")
# An averaging head departs from uniform at most this fraction of how far the others of its layer do.
TYPICAL_DEPARTURE = 0.25
# Queries at which induction would be right, below which a text does not tell who does it.
ENOUGH_MATCHES = 50
COLUMNS = [
    "head", "label", "score", "off_sink", "uniform", "null_mean", "null_std", "margin", "low", "high", "borderline",
    "on_first", "layer", "index",
]  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """Score of one label at every head, with what it is held against; each an array (layer, head)."""

    score: np.ndarray
    # The share of the weight beside position 0, where that is what a label asks for; else the score again.
    share: np.ndarray
    share_low: np.ndarray
    share_high: np.ndarray
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

    def borderline(self, threshold: float) -> np.ndarray:
        """Whether the interval of what the label asks for holds the threshold, so that other tokens may undo it."""
        return (self.share_low < threshold) & (threshold <= self.share_high)


def label_heads(
    scan: xr.DataTree | xr.Dataset,
    thresholds: Mapping[str, float] | None = None,
    *,
    margin: float = MARGIN,
    deviations: float = DEVIATIONS,
    strict: bool = False,
) -> pd.DataFrame:
    """Label every head of a scan; one row for each head and label, and label "none" where a head earns none.

    A label needs: at least its threshold (`THRESHOLDS`, changed by `thresholds`); a score `margin` above what uniform
    attention scores on the same tokens and above the null mean; `deviations` null deviations above the null mean; and,
    given two sequences or more, a bootstrap interval above both. With `strict`, the whole interval must also lie above
    the threshold. What each label reads:

    - `previous_token`, `duplicate_token`, `current_token`: the scores of those names. The threshold is asked of the
      share of the weight beside position 0 (`off_sink`): a head of a language model leaves its weight there where it
      has nothing to do, on text far more often than on random tokens.
    - `induction`: likewise, of the stripe on repeated tokens; where the tokens do not repeat, of
      `prefix_match_correct`, the matches whose continuation repeats, if there are 50 of them in two sequences.
    - `sink`: `first_token`.
    - `local`: `local_mass`, unless more than half of it is on the previous or the current token alone.
    - `averaging`: uniform is the ideal here and also what an untrained head does, so the null is the median of the
      other heads of the layer (of the model, where a layer has one head), and an averaging head departs from uniform
      at most a quarter as far. Where all heads of a layer average alike, as before training, none gets this label.
    - `argmax`: `max_weight`, with at most two keys within 0.1 of the top log weight; a shape, so against uniform only.

    Columns: head ("5.1"), label, score, off_sink, uniform, null_mean, null_std, margin, low, high (95 % interval of the
    score), borderline (the interval of what the label asks for holds the threshold), on_first (the weight on position
    0), layer, index. `.attrs["not_judged"]` says of each label that the tokens can't tell why. Raises InputError if the
    scan has no `/heads`, `thresholds` has an unknown name, or a number is none.

    >>> import metaint, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> scan = metaint.scan(model, torch.arange(10).repeat(2, 2))
    >>> metaint.label_heads(scan, {"averaging": 0.9})["head"].unique().tolist()
    ['0.0', '0.1', '1.0', '1.1']
    """
    heads = heads_of(scan)
    limits = {**THRESHOLDS, **(thresholds or {})}
    for name, number in {**limits, "margin": margin, "deviations": deviations}.items():
        if not np.isfinite(number):
            raise InputError(f"{name} is {number}: give a number.")
    unknown = sorted(set(limits) - set(THRESHOLDS))
    if unknown:
        raise InputError(f"thresholds names {unknown[0]!r}: the labels are {', '.join(THRESHOLDS)}.")
    rows = []
    earned = np.zeros((heads.sizes["layer"], heads.sizes["head"]), dtype=bool)
    on_first = _values(heads, "first_token")
    for label, case in evidence(heads).items():
        threshold = limits[label]
        spread = np.nan_to_num(case.null_std, nan=0.0) * deviations
        enough = case.allowed & (case.share >= threshold) & (case.score - case.floor >= margin)
        enough &= case.score >= np.nan_to_num(case.null_mean, nan=-np.inf) + spread
        enough &= np.isnan(case.low) | (case.low > case.floor)
        if strict:
            enough &= case.share_low >= threshold
        earned |= enough
        borderline = case.borderline(threshold)
        for i, j in np.argwhere(enough):
            rows.append({**_row(i, j, label, case, on_first), "borderline": bool(borderline[i, j])})
    read = np.ones(len(earned), dtype=bool)  # layers that don't attend have no heads to name
    if "layer_kind" in heads.coords:
        read = heads["layer_kind"].values == "attention"
    for i, j in np.argwhere(~earned & read[:, None]):
        rows.append({**_row(i, j, "none", None, on_first), "borderline": False})
    table = pd.DataFrame(rows, columns=COLUMNS)
    table = table.sort_values(["layer", "index", "margin"], ascending=[True, True, False], ignore_index=True)
    table.attrs["not_judged"] = not_judged(heads)
    return table


def not_judged(heads: xr.Dataset) -> dict[str, str]:
    """The labels that nobody can earn on these tokens, each with the reason."""
    reasons = {}
    name = _induction_source(heads)
    if name == "prefix_match_correct" and not _enough_matches(heads, name):
        count = int(np.nan_to_num(_values(heads, f"{name}_count")).max())
        reasons["induction"] = (
            f"the tokens do not repeat as a block, and at {count} queries alone an earlier token comes again with the "
            f"same one behind it: {ENOUGH_MATCHES} in two sequences or more are needed."
        )
    return reasons


def _induction_source(heads: xr.Dataset) -> str:
    """The measure that tells induction on these tokens: the stripe of repeated tokens, or matches on any text."""
    if "induction" in heads and float(heads["induction_count"].max()) > 0:
        return "induction"
    return "prefix_match_correct" if "prefix_match_correct" in heads else "prefix_match"


def _enough_matches(heads: xr.Dataset, name: str) -> bool:
    """Whether a text held enough matches worth looking at, in more than one sequence (which alone has an interval)."""
    if name != "prefix_match_correct":
        return True
    several = not np.isnan(_values(heads, f"{name}_low")).all()
    return several and float(np.nan_to_num(_values(heads, f"{name}_count")).max()) >= ENOUGH_MATCHES


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
        "current_token": "current_token",
        "sink": "first_token",
    }
    for label, name in sources.items():
        if name in heads:
            by_label[label] = _evidence(heads, name)
    name = _induction_source(heads)
    if name in heads and _enough_matches(heads, name):
        by_label["induction"] = _evidence(heads, name)
    if {"local_mass", "previous_token", "current_token"} <= set(heads):
        one = np.fmax(_values(heads, "previous_token"), _values(heads, "current_token"))
        by_label["local"] = _evidence(heads, "local_mass", one <= _values(heads, "local_mass") / 2)
    if "averaging" in heads:
        score = _values(heads, "averaging")
        typical = _typical(score)
        near = 1 - score <= TYPICAL_DEPARTURE * (1 - typical)
        by_label["averaging"] = _evidence(heads, "averaging", near, typical)
    if {"max_weight", "tied_keys"} <= set(heads):
        few = heads["tied_keys"].sel(tau=0.1, method="nearest").transpose("layer", "head").values <= 2
        by_label["argmax"] = _evidence(heads, "max_weight", few)
    return by_label


def _typical(score: np.ndarray) -> np.ndarray:
    """For each head the median score of the others of its layer; of the model, where it is alone there."""
    median = np.empty_like(score)
    for place in np.ndindex(score.shape):
        others = np.ones(score.shape, dtype=bool)
        others[place] = False
        if score.shape[1] > 1:
            others[np.arange(len(score)) != place[0]] = False
        rest = score[others & ~np.isnan(score)]
        median[place] = np.median(rest) if rest.size else np.nan
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
    share, share_low, share_high = (_values(heads, name + "_off_sink" + part) for part in ("", "_low", "_high"))
    if np.isnan(share).all():  # not a kind, or a scan of an earlier version
        share, share_low, share_high = score, low, high
    return Evidence(score, share, share_low, share_high, uniform, mean, deviation, low, high, allowed)


def _values(heads: xr.Dataset, name: str) -> np.ndarray:
    if name not in heads:
        return np.full((heads.sizes["layer"], heads.sizes["head"]), np.nan)
    return heads[name].transpose("layer", "head").values


def _row(i: int, j: int, label: str, evidence: Evidence | None, on_first: np.ndarray) -> dict[str, object]:
    row: dict[str, object] = {"head": f"{i}.{j}", "label": label, "layer": int(i), "index": int(j)}
    row["on_first"] = float(on_first[i, j])
    if evidence is not None:
        row["off_sink"] = float(evidence.share[i, j])
        names = ("score", "uniform", "null_mean", "null_std", "margin", "low", "high")
        row.update({name: float(getattr(evidence, name)[i, j]) for name in names})
    return row
