"""Whether labels hold: on halves of the sequences, and against chance over all heads and labels at once.

In: labels and the groups they were read from. Out: the columns `agreement` and `q_value` of `metaint.label_heads`, and
what can be said of them in a sentence.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from metaint.scans.evidence import Evidence, evidence, values

Labels = dict[str, np.ndarray]
# How often the sequences are split in halves, by this seed.
_SPLITS = 25
_SEED = 0
# Labels up to this q-value are counted in the sentence.
LEVEL = 0.05
# From the end of a 95 % interval of a normal variable to its middle, in standard deviations.
_TO_END = 1.96


def add_reliability(
    table: pd.DataFrame,
    heads: xr.Dataset,
    outputs: xr.Dataset | None,
    judge: Callable[[xr.Dataset, xr.Dataset | None], Labels],
    margin: float,
) -> pd.DataFrame:
    """The labels with `agreement` and `q_value`, and in `.attrs` the sentence and the agreement of each label.

    `judge` gives the labels of any groups, each an array (layer, head).
    """
    q_values = label_q_values(evidence(heads, outputs), margin, int(heads.attrs.get("sequences", 0)))
    halves = _labels_of_halves(heads, outputs, judge)
    agreement, q_column = [], []
    for label, i, j in zip(table["label"], table["layer"], table["index"], strict=True):
        earned = [half[label][i, j] for pair in halves for half in pair] if label != "none" else []
        agreement.append(np.mean(earned) if earned else np.nan)
        q_column.append(q_values[label][i, j] if label != "none" else np.nan)
    attributes = table.attrs
    table = table.assign(agreement=agreement, q_value=q_column)
    by_label = {label: _mean_jaccard(halves, label) for label in q_values} if halves else {}
    sentence = _sentence(table, q_values, halves)
    table.attrs = {**attributes, "agreement": by_label, "reliability": sentence}
    return table


# ---- against chance ---------------------------------------------------------------------------------------------


def label_q_values(cases: Mapping[str, Evidence], margin: float, sequences: int) -> Labels:
    """The q-value (Benjamini and Hochberg 1995) of each head and label, (layer, head), over all of them together.

    The hypothesis is that a score lies no more than `margin` above uniform attention and the null. Its error is that
    of its interval, from below, and the null's deviation; Student's t, since sequences are few. A head that can't earn
    a label has 1; what is not known, NaN.
    """
    from scipy.stats import false_discovery_control, t  # half a second, for those who ask

    if not cases:
        return {}
    few = max(1, sequences - 1)
    p_values = {}
    for label, case in cases.items():
        error = (case.score - case.low) / _TO_END * np.sqrt((few + 1) / few)  # resampling n knows of n - 1
        with np.errstate(divide="ignore", invalid="ignore"):
            above = (case.margin - margin) / np.hypot(error, np.nan_to_num(case.null_std))
        p = t.sf(above, few)
        p[np.isfinite(error) & (case.margin == margin)] = 1.0  # no error and no effect
        p_values[label] = np.where(case.allowed | np.isnan(p), p, 1.0)
    joined = np.stack(list(p_values.values()))
    known = np.isfinite(joined)
    joined[known] = false_discovery_control(joined[known]) if known.any() else joined[known]
    return dict(zip(p_values, joined, strict=True))


# ---- halves -----------------------------------------------------------------------------------------------------


def _labels_of_halves(
    heads: xr.Dataset, outputs: xr.Dataset | None, judge: Callable[[xr.Dataset, xr.Dataset | None], Labels]
) -> list[tuple[Labels, Labels]]:
    """The labels that each half of the sequences earns alone, split after split; none where halves can't be told."""
    bundles = heads.sizes.get("bundle", 0)
    if bundles < 4:  # a half of one has no interval
        return []
    generator = np.random.default_rng(_SEED)
    halves = []
    for _ in range(_SPLITS):
        order = generator.permutation(bundles)
        parts = order[: bundles // 2], order[bundles // 2 :]
        first, second = (judge(half_of(heads, part), outputs and half_of(outputs, part)) for part in parts)
        halves.append((first, second))
    return halves


def half_of(group: xr.Dataset, chosen: np.ndarray) -> xr.Dataset:
    """A group as these bundles of its sequences alone tell it: scores with intervals, and a wider null.

    What the tokens make (uniform attention, the null's mean, counts) stays. Intervals are Student's.
    """
    if "bundle_value" not in group:
        return group
    every = group["bundle_value"].transpose("score", "bundle", "layer", "head").values.astype(float)
    shift = every[:, chosen].mean(1) - every.mean(1)
    reach = half_width(every[:, chosen])
    changed = {}
    for name, moved, wide in zip(group["score"].values.tolist(), shift, reach, strict=True):
        if name in group:
            score = values(group, name) + moved
            changed |= {name: score, f"{name}_low": score - wide, f"{name}_high": score + wide}
            if f"{name}_null_std" in group:
                wider = np.sqrt(every.shape[1] / len(chosen))
                changed[f"{name}_null_std"] = values(group, f"{name}_null_std") * wider
    variables: dict[str, Any] = {name: (("layer", "head"), value) for name, value in changed.items()}
    if "tied_keys" in group:
        names = [f"tied_keys_tau_{tau:g}" for tau in group["tau"].values]
        places = [group["score"].values.tolist().index(name) for name in names]
        tied = group["tied_keys"].transpose("tau", "layer", "head").values + shift[places]
        variables["tied_keys"] = (("tau", "layer", "head"), tied)
    return group.assign(variables)


def half_width(pseudo: np.ndarray) -> np.ndarray:
    """Half of the 95 % interval of the mean of pseudo-values (score, bundle, layer, head), by Student's t."""
    from scipy.stats import t

    n = pseudo.shape[1]
    return t.ppf(0.975, n - 1) * pseudo.std(1, ddof=1) / np.sqrt(n)


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """What two sets of heads share of what either has, in [0, 1]; NaN where both are empty."""
    either = int((one | other).sum())
    return float((one & other).sum() / either) if either else float("nan")


def _mean_jaccard(halves: list[tuple[Labels, Labels]], *labels: str) -> float:
    """What the halves share of some labels together, mean over splits; NaN where none earns any."""
    shares = []
    for pair in halves:
        first, second = (np.stack([half[label] for label in labels]) for half in pair)
        shares.append(jaccard(first, second))
    known = [share for share in shares if not np.isnan(share)]
    return float(np.mean(known)) if known else float("nan")


def _sentence(table: pd.DataFrame, q_values: Labels, halves: list[tuple[Labels, Labels]]) -> str:
    """What can be said of the labels together."""
    labels = table.query("label != 'none'")
    pairs = int(sum(np.isfinite(q).sum() for q in q_values.values()))
    sure = int(np.sum(labels["q_value"].to_numpy() <= LEVEL))
    text = (
        f"at most {LEVEL:.0%} of the {sure} labels with q_value <= {LEVEL} (of {len(labels)}) are expected to be "
        f"chance, by Benjamini and Hochberg over {pairs} pairs of head and label"
    )
    if pairs == 0:
        text = "one sequence tells no interval, so nothing is known of chance"
    if not halves:
        return f"{text}; fewer than four sequences, or a scan of an earlier version, tell nothing of halves."
    share = _mean_jaccard(halves, *q_values)
    if np.isnan(share):
        return f"{text}; no half of the sequences earns a label."
    return f"{text}; two halves of the sequences share {share:.2f} of their labels (mean of {_SPLITS} splits)."
