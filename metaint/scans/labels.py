"""Names for heads: a label needs an effect, and a margin over uniform attention and over the null."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from metaint.errors import InputError, door
from metaint.scans.evidence import ENOUGH_MATCHES, Evidence, enough_matches, evidence, induction_source, values
from metaint.scans.reliability import add_reliability

# What each label asks at least: for a kind of token its share of the weight beside position 0, else the score. A head
# can earn several. A head whose kind has more than half of what it spends at all is named after it; 0.3 is the line of
# Gu et al. (ICLR 2025) for an attention sink; 0.62 is a length below 0.38 of the layer's mean, the lowest line that
# Sandoval-Segura et al. (2504.03889) published for inactive heads; copying and suppressing count standard deviations
# of a head's own logits (of six untrained architectures no head reaches 0.4).
THRESHOLDS: dict[str, float] = {
    "previous_token": 0.5,
    "induction": 0.5,
    "duplicate_token": 0.5,
    "current_token": 0.5,
    "sink": 0.3,
    "local": 0.6,
    "averaging": 0.8,
    "argmax": 0.8,
    "copying": 0.5,
    "suppressing": 0.5,
    "inactive": 0.62,
}
# Above this a head is taken to write nothing, and is called inactive and nothing else.
WRITES_NOTHING = 0.99
# How far a score stands above uniform attention and the null, on average over queries.
MARGIN = 0.05
DEVIATIONS = 3.0
# Labels that name the token a head looks for say more of a head than the shape of its rows does.
SPECIFIC = ("induction", "previous_token", "duplicate_token", "current_token")
COLUMNS = [
    "head", "label", "score", "off_sink", "uniform", "null_mean", "null_std", "margin", "low", "high", "borderline",
    "on_first", "written", "output_share", "layer", "index",
]  # fmt: skip


@door
def label_heads(
    scan: xr.DataTree | xr.Dataset,
    thresholds: Mapping[str, float] | None = None,
    *,
    margin: float = MARGIN,
    deviations: float = DEVIATIONS,
    strict: bool = False,
    reliability: bool = False,
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
    - `local`: likewise, of `local_mass`, unless more than half of it is on the previous or the current token alone.
    - `averaging`: uniform is the ideal here and also what an untrained head does, so the null is the median of the
      other heads of the layer (of the model, where a layer has one head), and an averaging head departs from uniform
      at most a quarter as far. Where all heads of a layer average alike, as before training, none gets this label.
    - `argmax`: `max_weight`, with at most two keys within 0.1 of the top log weight; a shape, so against uniform only.
    - `copying`, `suppressing`: `copying_deviations`, as it is and with the sign turned: the logit that a head gives
      the token it looks at. The threshold is asked of what lies above the null. For these a scan needs `/outputs`.
    - `inactive`: 1 less the larger of `output_share` and `z_share`. A head that writes nothing gets no other label.

    Columns:

    - head ("5.1"), label, score, with low and high, its 95 % interval; layer, index.
    - off_sink: the share of the weight beside position 0. uniform, null_mean, null_std; margin over both.
    - borderline: the interval of what the label asks for holds the threshold.
    - on_first: the weight on position 0.
    - written: the score with each weight times the length of its value, so whether the head writes what it looks at;
      output_share: how long it writes. Both from `/outputs`.

    With `reliability` two more, and `.attrs["reliability"]` says in a sentence what can be said of all labels:

    - agreement: the share of halves of the sequences (50, of 25 random splits) that earn the label alone, in [0, 1].
      `.attrs["agreement"]` has of each label what two halves share (Jaccard). NaN with fewer than four sequences.
    - q_value: of the labels with q up to 0.05, at most 5 % are expected to be chance: scores that lie no more than
      `margin` above uniform attention and the null (Benjamini and Hochberg 1995, over all pairs of head and label). It
      speaks of the tokens that were drawn, not of other kinds of text.

    `.attrs["not_judged"]` says of each label that the tokens can't tell why. Raises InputError if the scan has no
    `/heads`, `thresholds` has an unknown name, or a number is none.

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
    outputs = outputs_of(scan)
    cases = evidence(heads, outputs)
    asked = {"limits": limits, "margin": margin, "deviations": deviations, "strict": strict}
    earned = earned_labels(cases, **asked)
    rows = []
    for label, case in cases.items():
        borderline = case.borderline(limits[label])
        for i, j in np.argwhere(earned[label]):
            rows.append({**_row(i, j, label, case, heads, outputs), "borderline": bool(borderline[i, j])})
    unnamed = _attending(heads) & ~np.any(list(earned.values()), axis=0)
    rows += [{**_place(i, j, "none"), "borderline": False} for i, j in np.argwhere(unnamed)]
    for row in rows:
        place = row["layer"], row["index"]
        row["on_first"] = float(values(heads, "first_token")[place])
        row["output_share"] = float(values(outputs, "output_share", heads)[place])
    table = pd.DataFrame(rows, columns=COLUMNS)
    table = table.sort_values(["layer", "index", "margin"], ascending=[True, True, False], ignore_index=True)
    table.attrs["not_judged"] = not_judged(heads)
    if reliability:
        return add_reliability(table, heads, outputs, lambda *half: earned_labels(evidence(*half), **asked), margin)
    return table


def earned_labels(
    cases: Mapping[str, Evidence], limits: Mapping[str, float], margin: float, deviations: float, strict: bool
) -> dict[str, np.ndarray]:
    """Where each label is earned, (layer, head)."""
    earned = {label: _earned(case, limits[label], margin, deviations, strict) for label, case in cases.items()}
    if "inactive" in cases:
        nothing = cases["inactive"].score > WRITES_NOTHING
        for label in earned.keys() - {"inactive"}:
            earned[label] &= ~nothing
    return earned


def _earned(case: Evidence, threshold: float, margin: float, deviations: float, strict: bool) -> np.ndarray:
    """Where a label is earned, (layer, head)."""
    spread = np.nan_to_num(case.null_std, nan=0.0) * deviations
    enough = case.allowed & (case.asked.value >= threshold) & (case.score - case.floor >= margin)
    enough &= case.score >= np.nan_to_num(case.null_mean, nan=-np.inf) + spread
    enough &= np.isnan(case.low) | (case.low > case.floor)
    return enough & (case.asked.low >= threshold) if strict else enough


def _attending(heads: xr.Dataset) -> np.ndarray:
    """Heads there are to name, (layer, head): a layer that does not attend has none."""
    attends = np.ones((heads.sizes["layer"], heads.sizes["head"]), dtype=bool)
    if "layer_kind" in heads.coords:
        attends &= (heads["layer_kind"].values == "attention")[:, None]
    return attends


def not_judged(heads: xr.Dataset) -> dict[str, str]:
    """The labels that nobody can earn on these tokens, each with the reason."""
    reasons = {}
    name = induction_source(heads)
    if name == "prefix_match_correct" and not enough_matches(heads, name):
        count = int(np.nan_to_num(values(heads, f"{name}_count")).max())
        reasons["induction"] = (
            f"the tokens do not repeat as a block, and at {count} queries alone an earlier token comes again with the "
            f"same one behind it: {ENOUGH_MATCHES} in two sequences or more are needed."
        )
    return reasons


@door
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


def outputs_of(scan: xr.DataTree | xr.Dataset) -> xr.Dataset | None:
    """The `/outputs` of a scan that holds them."""
    if isinstance(scan, xr.DataTree) and "outputs" in scan.children:
        outputs = scan["outputs"].to_dataset()
        return outputs if "layer" in outputs.dims else None
    return None


def _row(i: int, j: int, label: str, case: Evidence, heads: xr.Dataset, outputs: xr.Dataset | None) -> dict[str, Any]:
    """What a label rests on at one head."""
    names = ("score", "uniform", "null_mean", "null_std", "margin", "low", "high")
    row = {name: float(getattr(case, name)[i, j]) for name in names}
    row["off_sink"] = float(values(heads, f"{case.variable}_off_sink")[i, j])
    row["written"] = float(values(outputs, f"{case.variable}_written", heads)[i, j])
    return {**_place(i, j, label), **row}


def _place(i: int, j: int, label: str) -> dict[str, Any]:
    return {"head": f"{i}.{j}", "label": label, "layer": int(i), "index": int(j)}
