"""What labels rest on: the score of each label at every head, and what it is held against.

In: `/heads`, and `/outputs` where a scan has it. Out: one `Evidence` for each label whose variables are there.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xarray as xr

# Labels that are the score of a kind of token, and its variable.
KINDS = {
    "previous_token": "previous_token",
    "duplicate_token": "duplicate_token",
    "current_token": "current_token",
    "sink": "first_token",
}
# An averaging head departs from uniform at most this fraction of how far the others of its layer do.
TYPICAL_DEPARTURE = 0.25
# Queries at which induction would be right, below which a text does not tell who does it.
ENOUGH_MATCHES = 50
# A variable and the ends of its interval.
_ENDS = ("", "_low", "_high")


class Asked(NamedTuple):
    """What a threshold is asked of, with its interval; each an array (layer, head)."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Evidence:
    """Score of one label at every head, with what it is held against; each an array (layer, head)."""

    # The variable of the scan that is read.
    variable: str
    score: np.ndarray
    low: np.ndarray
    high: np.ndarray
    uniform: np.ndarray
    null_mean: np.ndarray
    null_std: np.ndarray
    # The score, or the share of the weight beside position 0, or how far what is said stands above its null.
    asked: Asked
    # False where a head is out of question whatever it scores.
    allowed: np.ndarray

    @property
    def floor(self) -> np.ndarray:
        """The larger of uniform attention and the null, or minus infinity where there is neither."""
        return np.fmax(np.fmax(self.uniform, self.null_mean), -np.inf)

    @property
    def margin(self) -> np.ndarray:
        """How far the score stands above that."""
        return self.score - self.floor

    def borderline(self, threshold: float) -> np.ndarray:
        """Whether the interval of what the label asks for holds the threshold, so that other tokens may undo it."""
        return (self.asked.low < threshold) & (threshold <= self.asked.high)


def evidence(heads: xr.Dataset, outputs: xr.Dataset | None = None) -> dict[str, Evidence]:
    """What each label rests on, for the labels whose variables the scan holds."""
    by_label = {}
    for label, name in KINDS.items():
        if name in heads:
            by_label[label] = _of_heads(heads, name)
    name = induction_source(heads)
    if name in heads and enough_matches(heads, name):
        by_label["induction"] = _of_heads(heads, name)
    if {"local_mass", "previous_token", "current_token"} <= set(heads):
        one = np.fmax(values(heads, "previous_token"), values(heads, "current_token"))
        by_label["local"] = _of_heads(heads, "local_mass", allowed=one <= values(heads, "local_mass") / 2)
    if "averaging" in heads:
        score = values(heads, "averaging")
        typical = _typical(score)
        near = 1 - score <= TYPICAL_DEPARTURE * (1 - typical)
        by_label["averaging"] = _of_heads(heads, "averaging", allowed=near, typical=typical)
    if {"max_weight", "tied_keys"} <= set(heads):
        few = heads["tied_keys"].sel(tau=0.1, method="nearest").transpose("layer", "head").values <= 2
        by_label["argmax"] = _of_heads(heads, "max_weight", allowed=few)
    if outputs is not None:
        by_label |= _of_outputs(outputs)
    return by_label


def induction_source(heads: xr.Dataset) -> str:
    """The measure that tells induction on these tokens: the stripe of repeated tokens, or matches on any text."""
    if "induction" in heads and float(heads["induction_count"].max()) > 0:
        return "induction"
    return "prefix_match_correct" if "prefix_match_correct" in heads else "prefix_match"


def enough_matches(heads: xr.Dataset, name: str) -> bool:
    """Whether a text held enough matches worth looking at, in more than one sequence (which alone has an interval)."""
    if name != "prefix_match_correct":
        return True
    several = not np.isnan(values(heads, f"{name}_low")).all()
    return several and float(np.nan_to_num(values(heads, f"{name}_count")).max()) >= ENOUGH_MATCHES


def values(group: xr.Dataset | None, name: str, like: xr.Dataset | None = None) -> np.ndarray:
    """A variable as an array (layer, head); NaN of the shape of `like`, or of the group, where it is not there."""
    if group is not None and name in group:
        return group[name].transpose("layer", "head").values
    sizes = (like if group is None else group).sizes  # type: ignore[union-attr]
    return np.full((sizes["layer"], sizes["head"]), np.nan)


def _of_heads(
    heads: xr.Dataset, name: str, *, allowed: np.ndarray | None = None, typical: np.ndarray | None = None
) -> Evidence:
    score, low, high = (values(heads, name + part) for part in ("", "_low", "_high"))
    uniform, mean, deviation = (values(heads, name + part) for part in ("_uniform", "_null_mean", "_null_std"))
    if typical is not None:
        uniform, mean = np.full(score.shape, np.nan), typical
    if allowed is None:
        allowed = np.ones(score.shape, dtype=bool)
    asked = Asked(*(values(heads, name + "_off_sink" + part) for part in _ENDS))
    if np.isnan(asked.value).all():  # not a kind, or a scan of an earlier version
        asked = Asked(score, low, high)
    return Evidence(name, score, low, high, uniform, mean, deviation, asked, allowed)


def _of_outputs(outputs: xr.Dataset) -> dict[str, Evidence]:
    """How little a head writes, and whether it says the token that it looks at, or speaks against it."""
    by_label = {}
    nothing = np.full((outputs.sizes["layer"], outputs.sizes["head"]), np.nan)
    everywhere = np.ones(nothing.shape, dtype=bool)
    if {"output_share", "z_share", "output_norm"} <= set(outputs):
        shares = [np.fmax(values(outputs, f"output_share{part}"), values(outputs, f"z_share{part}")) for part in _ENDS]
        silent = values(outputs, "output_norm") == 0  # its share is none where the whole layer writes nothing
        score, low, high = (np.where(silent, 1.0, 1 - share) for share in (shares[0], shares[2], shares[1]))
        average = np.zeros(score.shape)
        asked = Asked(score, low, high)
        case = Evidence("output_share", score, low, high, average, nothing, nothing, asked, everywhere)
        by_label["inactive"] = case
    name = "copying_deviations"
    if {name, f"{name}_null"} <= set(outputs):
        null = values(outputs, f"{name}_null")
        said, low, high = (values(outputs, name + part) for part in _ENDS)
        zero = np.zeros(said.shape)
        copying = (said, low, high)
        suppressing = (-said, -high, -low)
        for label, numbers, against in (("copying", copying, null), ("suppressing", suppressing, -null)):
            asked = Asked(*(number - against for number in numbers))
            by_label[label] = Evidence(name, *numbers, zero, against, nothing, asked, everywhere)
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
