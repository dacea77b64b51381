"""Whether a score is load-bearing, judged from its ablation curve, in a sentence that says what would refute it.

In: what `ablation_curve` measured. Out: the same with a verdict in its attributes.
"""

import numpy as np
import xarray as xr

from metaint.circuits.metrics import METRICS

# The part of the draws that may do as much harm as the heads of the score.
LEVEL = 0.05
# Different draws without which nothing is said.
ENOUGH = 5
# The least that the heads of the score must do beyond random ones, as a share of what all heads do.
LEAST = 0.02
_REFUTED = "it would be refuted by tokens, or another way of ablating, for which"


def with_verdict(data: xr.Dataset, better: str) -> xr.Dataset:
    """The dataset with `load_bearing` and `verdict`; `better` is which way the metric improves, "" where only its owner
    knows: then harm is what ablating all heads does."""
    answer, why = _judged(data, better)
    score, model, metric = (str(data.attrs[name]) for name in ("score", "model", "metric"))
    begin = {
        "yes": f"{score} is load-bearing in {model} for {metric}",
        "no": f"{score} is not load-bearing in {model} for {metric}",
        "unknown": f"whether {score} is load-bearing in {model} for {metric} cannot be told",
    }
    data.attrs |= {"load_bearing": answer, "verdict": f"{begin[answer]}: {why}."}
    return data


def _judged(data: xr.Dataset, better: str) -> tuple[str, str]:
    """The answer, and why."""
    sign = {"lower": 1.0, "higher": -1.0}.get(better, float(np.sign(data["all_heads"])))
    if not _least_harm(data, "all_heads", sign) > 0:
        why = f"ablating all heads changes it by {_told(data, 'all_heads')}, which is no harm beyond chance"
        return "no", f"{why}; {_REFUTED} it is"
    if bool(data["area"].isnull()):
        return "unknown", "no other heads are left to compare with"
    if data.attrs["distinct"] < ENOUGH:
        return "unknown", f"there are fewer than {ENOUGH} different draws of other heads to compare with"
    does = f"ablating its {_heads(data)} changes it by {_told(data, 'area')} beyond {_others(data)}"
    against = _against(data, sign)
    if against:
        return "no", f"{does}, {against}; {_REFUTED} they do more harm than random ones"
    most = f"and those that write most by {_told(data, 'norm_area')}"
    reach = f"{_as_much(data, sign)} of {data.sizes['draw']} draws do as much"
    return "yes", f"{does} ({reach}), {most}; {_REFUTED} random heads do as much"


def _against(data: xr.Dataset, sign: float) -> str:
    """What speaks against it; nothing where all is met."""
    as_much = _as_much(data, sign)
    if not _least_harm(data, "area", sign) > 0:
        return "which is no harm beyond chance"
    if as_much > LEVEL * data.sizes["draw"]:
        return f"and {as_much} of {data.sizes['draw']} draws do as much"
    if sign * float(data["area"]) < LEAST * sign * float(data["all_heads"]):
        return f"under {LEAST:.0%} of what all heads do ({_told(data, 'all_heads')})"
    return ""


def _as_much(data: xr.Dataset, sign: float) -> int:
    """How many draws do as much harm."""
    return int((sign * data["random_area"] >= sign * data["area"]).sum())


def _least_harm(data: xr.Dataset, name: str, sign: float) -> float:
    """The end of an interval that is nearer to no harm, or beyond it."""
    return min(sign * float(data[f"{name}_low"]), sign * float(data[f"{name}_high"]))


def _told(data: xr.Dataset, name: str) -> str:
    """A change with its unit and its interval."""
    middle, low, high = (f"{float(data[name + end]):+.3g}".replace("-", "−") for end in ("", "_low", "_high"))
    metric = str(data.attrs["metric"])
    unit = " nats" if metric in METRICS and metric.endswith("_loss") else ""
    return f"{middle}{unit} ({low} to {high})"


def _heads(data: xr.Dataset) -> str:
    """How many of the ranking are ablated."""
    first, last = int(data["count"].min()), int(data["count"].max())
    if last == 1:
        return "highest head"
    return f"{last} highest heads" if first == last else f"{first} to {last} highest heads"


def _others(data: xr.Dataset) -> str:
    same = data.attrs["against"] == "random-same-layers"
    return f"random heads{' of the same layers' * same}, as a mean along the curve"
