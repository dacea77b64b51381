"""Two scans of models of one shape beside each other: base and instruct, before and after, float32 and rounded.

In: two scans. Out: a dataset of the differences of their scores with intervals, of rank agreement, and of labels that
came and went. Where both read the same tokens, differences are taken bundle by bundle of sequences (`bundle_value` of
the groups): what the tokens bring to both falls out, so that small changes show.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from metaint.errors import InputError, door
from metaint.scans.evidence import evidence, values
from metaint.scans.finding import Scan, group_of, name_of
from metaint.scans.labels import label_heads, outputs_of
from metaint.scans.reliability import half_width, jaccard

GROUPS = ("heads", "outputs")
_PLACE = ("layer", "head")
# From the end of a 95 % interval of a normal variable to its middle, in standard deviations.
_TO_END = 1.96


@dataclass(frozen=True)
class _Difference:
    """A score in both scans, and b - a with its interval and p-value; each an array (layer, head)."""

    a: np.ndarray
    b: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p_value: np.ndarray


@door
def compare(scan_a: Scan, scan_b: Scan) -> xr.Dataset:
    """How the heads of `scan_b` differ from those of `scan_a`: b - a of every score that both have, and their labels.

    By score, layer and head, for each score of `/heads` and `/outputs` that has an interval in both:

    - `a`, `b`, `difference` (b - a), and `low`, `high`, its 95 % interval. Where both scans read the same tokens
      (`paired` in the attributes, or in `unpaired` why not) it is Student's over the differences of bundles of
      sequences; else it is made of both scans' own intervals, a little wider where sequences are few (Zou and Donner
      2008), and much wider than pairs give.
    - `q_value`: of the differences with q up to 0.05, at most 5 % are expected to be chance (Benjamini and Hochberg
      1995, over the heads of each score). A difference can be sure and tiny: read it beside its size.

    By score: `spearman`, the rank correlation of the heads' scores, and `spread`, their standard deviation over the
    heads of a, which tells large differences from small ones. By label, layer and head: `gained`, `lost` and `kept`,
    and `borderline` where the scan that gives the label says so; by label `jaccard`, what the two share of what either
    has. Labels are those of `metaint.label_heads`, of scans with `/heads`.

    Raises InputError for models of different shapes, recordings over steps, and scans without a score in common.

    >>> import metaint, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> scan = metaint.scan(model, torch.arange(40).view(4, 10))
    >>> comparison = metaint.compare(scan, scan)
    >>> comparison.attrs["paired"], float(abs(comparison["difference"]).max()), int(comparison["gained"].sum())
    (1, 0.0, 0)
    """
    groups = common_groups(scan_a, scan_b)
    unpaired = {name: why_unpaired(*pair) for name, pair in groups.items()}
    differences, group_of_score = {}, []
    for group, (a, b) in groups.items():
        for score in (name for name in scores_of(a) if name in set(scores_of(b))):
            differences[score] = _difference(score, a, b, not unpaired[group])
            group_of_score.append(group)
    if not differences:
        raise InputError("scan_a and scan_b have no score in common: scan both with the same probes.")
    first = next(iter(groups.values()))[0]
    data = _as_dataset(differences, first).assign_coords(group=("score", group_of_score))
    if "heads" in groups:
        data = data.assign(_labels(scan_a, scan_b, *groups["heads"]))
    reasons = [reason for reason in unpaired.values() if reason]
    data.attrs = {"a": name_of(scan_a), "b": name_of(scan_b), "paired": int(not reasons)}
    data.attrs |= {"sequences": int(first.attrs.get("sequences", 0))}
    data.attrs |= {"unpaired": reasons[0]} if reasons else {}
    return data


def scores_of(group: xr.Dataset) -> list[str]:
    """The scores of single heads that have an interval."""
    return [
        str(name)
        for name in group.data_vars
        if {f"{name}_low", f"{name}_high"} <= set(group.data_vars) and set(group[name].dims) == set(_PLACE)
    ]


def why_unpaired(a: xr.Dataset, b: xr.Dataset) -> str:
    """Why two groups can't be compared sequence by sequence; nothing where they can."""
    for name, group in (("a", a), ("b", b)):
        if "bundle_print" not in group:
            return f"scan {name} keeps nothing of single sequences (there is one, or an earlier version made it)"
        if not group["bundle_print"].values.all():
            return f"the tokens of scan {name} are not known"
    same = np.array_equal(a["bundle_print"].values, b["bundle_print"].values)
    return "" if same else "the two read different tokens"


def shape_of(group: xr.Dataset) -> tuple[int, int]:
    return group.sizes["layer"], group.sizes["head"]


# ---- groups -----------------------------------------------------------------------------------------------------


def common_groups(scan_a: Scan, scan_b: Scan) -> dict[str, tuple[xr.Dataset, xr.Dataset]]:
    """The groups of heads that both scans have, by name; InputError unless they are of one shape."""
    in_a, in_b = _groups_of(scan_a, "scan_a"), _groups_of(scan_b, "scan_b")
    common = {name: (in_a[name], in_b[name]) for name in GROUPS if name in in_a and name in in_b}
    if not common:
        raise InputError(
            f"scan_a has {_listed(in_a)} and scan_b {_listed(in_b)}: scan both with metaint.HeadProbe() or "
            "metaint.OutputProbe()."
        )
    for a, b in common.values():
        if shape_of(a) != shape_of(b):
            (layers_a, heads_a), (layers_b, heads_b) = shape_of(a), shape_of(b)
            raise InputError(
                f"scan_a is of {layers_a} layers x {heads_a} heads and scan_b of {layers_b} x {heads_b}: compare scans "
                "of models of one shape."
            )
    return common


def _groups_of(scan: Scan, who: str) -> dict[str, xr.Dataset]:
    """`/heads` and `/outputs` of a scan, as far as it has them."""
    if isinstance(scan, xr.DataTree) and not scan.data_vars and scan.name not in GROUPS:
        named = {name: group_of(scan, name, who) for name in GROUPS if name in scan.children}
    else:
        name = "outputs" if isinstance(scan, xr.DataTree | xr.Dataset) and "output_share" in scan else "heads"
        named = {name: group_of(scan, name, who)}
    for group in named.values():
        if "step" in group.dims:
            raise InputError(f"{who} is a recording over steps: pass one of them, such as scan.isel(step=-1).")
    return named


def _listed(groups: dict[str, xr.Dataset]) -> str:
    return " and ".join(f"/{name}" for name in groups) or "no group of heads"


# ---- differences ------------------------------------------------------------------------------------------------


def _difference(score: str, a: xr.Dataset, b: xr.Dataset, is_paired: bool) -> _Difference:
    """One score of both scans; what is known in one alone has no difference."""
    in_a, in_b = values(a, score), values(b, score)
    if is_paired and all(score in group["score"].values for group in (a, b)):
        low, high, p = _paired_bounds(in_b - in_a, *(_of_bundles(group, score) for group in (a, b)))
    else:
        few = min(int(group.attrs.get("sequences", 0)) for group in (a, b)) - 1
        low, high, p = _unpaired_bounds(in_b - in_a, _reach(a, score), _reach(b, score), few)
    return _Difference(in_a, in_b, low, high, p)


def _of_bundles(group: xr.Dataset, score: str) -> np.ndarray:
    return group["bundle_value"].sel(score=score).transpose("bundle", *_PLACE).values.astype(float)


def _paired_bounds(
    difference: np.ndarray, pseudo_a: np.ndarray, pseudo_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The interval and p-value of a difference, from pseudo-values (bundle, layer, head) of the same tokens."""
    from scipy.stats import t

    moved = pseudo_b - pseudo_a
    half, few = half_width(moved[None])[0], len(moved) - 1
    return difference - half, difference + half, _p_value(difference, half / t.ppf(0.975, few), few)


def _reach(group: xr.Dataset, score: str) -> tuple[np.ndarray, np.ndarray]:
    """How far below and above a score its interval reaches; wider than it says of few sequences, as Student's is."""
    from scipy.stats import t

    middle, sequences = values(group, score), max(2, int(group.attrs.get("sequences", 0)))
    wider = t.ppf(0.975, sequences - 1) / _TO_END * np.sqrt(sequences / (sequences - 1))
    return wider * (middle - values(group, f"{score}_low")), wider * (values(group, f"{score}_high") - middle)


def _unpaired_bounds(
    difference: np.ndarray, reach_a: tuple[np.ndarray, np.ndarray], reach_b: tuple[np.ndarray, np.ndarray], few: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The interval of b - a from how far both reach, which keeps their skewness (Zou and Donner 2008)."""
    from scipy.stats import t

    below, above = np.hypot(reach_b[0], reach_a[1]), np.hypot(reach_b[1], reach_a[0])
    error = np.where(difference > 0, below, above) / t.ppf(0.975, max(1, few))
    return difference - below, difference + above, _p_value(difference, error, max(1, few))


def _p_value(difference: np.ndarray, error: np.ndarray, few: float) -> np.ndarray:
    """Two-sided, by Student's t; 1 where nothing differs."""
    from scipy.stats import t

    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * t.sf(np.abs(difference) / error, few)
    return np.where((difference == 0) & np.isfinite(error), 1.0, p)


def _as_dataset(differences: dict[str, _Difference], like: xr.Dataset) -> xr.Dataset:
    """The differences of all scores, with what is said of each score as a whole."""
    cases = list(differences.values())
    names = ("a", "b", "low", "high")
    of_heads: dict[str, Any] = {name: np.stack([getattr(case, name) for case in cases]) for name in names}
    of_heads["difference"] = of_heads["b"] - of_heads["a"]
    of_heads["q_value"] = np.stack([_q_values(case.p_value) for case in cases])
    data = xr.Dataset(
        {name: (("score", *_PLACE), of_heads[name]) for name in ("a", "b", "difference", "low", "high", "q_value")},
        {"score": list(differences), "layer": like["layer"].values, "head": like["head"].values},
    )
    data["spearman"] = ("score", [_rank_agreement(case.a, case.b) for case in cases])
    data["spread"] = data["a"].std(_PLACE)
    return data


def _q_values(p_values: np.ndarray) -> np.ndarray:
    from scipy.stats import false_discovery_control

    q_values, known = np.full(p_values.shape, np.nan), np.isfinite(p_values)
    q_values[known] = false_discovery_control(p_values[known]) if known.any() else p_values[known]
    return q_values


def _rank_agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation over the heads that both know; NaN where either ranks none."""
    from scipy.stats import rankdata

    known = np.isfinite(a) & np.isfinite(b)
    ranks = [rankdata(scores[known]) for scores in (a, b)]
    if not known.any() or any(np.ptp(rank) == 0 for rank in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


# ---- labels -----------------------------------------------------------------------------------------------------


def _labels(scan_a: Scan, scan_b: Scan, heads_a: xr.Dataset, heads_b: xr.Dataset) -> dict[str, Any]:
    """Labels that came, went and stayed, over those that both scans can give, and the score that each rests on."""
    cases = [evidence(heads, outputs_of(scan)) for heads, scan in ((heads_a, scan_a), (heads_b, scan_b))]
    names = [label for label in cases[0] if label in cases[1]]
    (in_a, line_a), (in_b, line_b) = (_labelled(scan, names, shape_of(heads_a)) for scan in (scan_a, scan_b))
    by_label = {"gained": in_b & ~in_a, "lost": in_a & ~in_b, "kept": in_a & in_b}
    by_label["borderline"] = (in_a & line_a) | (in_b & line_b)
    variables: dict[str, Any] = {name: (("label", *_PLACE), held) for name, held in by_label.items()}
    variables["jaccard"] = ("label", [jaccard(*pair) for pair in zip(in_a, in_b, strict=True)])
    rests_on = [{case[label].variable for case in cases} for label in names]
    variables["rests_on"] = ("label", [same.pop() if len(same) == 1 else "" for same in rests_on])
    return {**variables, "label": names}


def _labelled(scan: Scan, names: list[str], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Which heads have which labels, and which of these stand near the line; each (label, layer, head)."""
    earned, near = np.zeros((2, len(names), *shape), dtype=bool)
    table = label_heads(scan)
    for label, layer, index, borderline in table[["label", "layer", "index", "borderline"]].itertuples(index=False):
        if label in names:
            place = names.index(label), layer, index
            earned[place], near[place] = True, borderline
    return earned, near
