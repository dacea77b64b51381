"""Which head of one model is which of another of the same shape: seeds number the same heads differently.

In: two scans, and patterns on the same tokens where they are at hand. Out: a table of matches, each beside what the
best match of shuffled profiles gives, since the best of many is never bad.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike

from metaint.errors import InputError, door
from metaint.scans.compare import common_groups, scores_of, shape_of
from metaint.scans.evidence import values
from metaint.scans.finding import Scan

# Heads with a q-value up to this, and so much more similar than the next best, are said to match.
LEVEL, CLEAR = 0.05, 0.05
# Shuffled profiles that make the null.
_DRAWS = 200
_COLUMNS = [
    "head", "match", "matched", "similarity", "null_mean", "null_high", "margin", "q_value", "layer", "index",
    "match_layer", "match_index",
]  # fmt: skip


@door
def match_heads(
    scan_a: Scan,
    scan_b: Scan,
    *,
    across_layers: bool = False,
    patterns: tuple[ArrayLike, ArrayLike] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Which head of `scan_b` is which of `scan_a`, a row for each head of a: the assignment most similar in all.

    A head's profile is its scores of `/heads` and `/outputs`, each less the mean and over the standard deviation of
    the heads it is matched among: those of its layer or, `across_layers`, all. Similarity is the cosine of two
    profiles, in [-1, 1].

    - `patterns`: of both models, [layer, head, ...], such as the mean pattern of each head over the same tokens. They
      become part of the profiles, with as much weight as all scores together.

    Columns: head and match ("5.1"), similarity; null_mean and null_high, the mean and the 95 % quantile of what the
    best assignment gives when profiles are shuffled (their principal components among the heads, which keeps how
    scores go together); margin, the similarity less that of the next most similar head; q_value (Benjamini and
    Hochberg 1995), and matched where it is at most 0.05 and the margin at least 0.05. An assignment names a match for
    every head: trust those that are `matched`. layer, index, match_layer, match_index.

    Raises InputError for models of different shapes, and scans without scores in common.

    >>> import metaint, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=4, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> scan = metaint.scan(model, torch.arange(10).repeat(4, 2))
    >>> table = metaint.match_heads(scan, scan.isel(head=[1, 0, 2, 3]))
    >>> table["match"].tolist()[:4]
    ['0.1', '0.0', '0.2', '0.3']
    """
    from scipy.stats import false_discovery_control

    profiles = _profiles(scan_a, scan_b, patterns, across_layers)
    n_layers, n_heads, length = profiles[0].shape
    pools = 1 if across_layers else n_layers  # sets of heads that are matched with each other
    by_pool = [profile.reshape(pools, -1, length) for profile in profiles]
    places = np.stack(np.unravel_index(np.arange(n_layers * n_heads), (n_layers, n_heads)), -1).reshape(pools, -1, 2)
    rows: list[dict[str, Any]] = []
    nulls = _nulls(by_pool[0], by_pool[1], seed)
    for here, one, other, null in zip(places, by_pool[0], by_pool[1], nulls, strict=True):
        similarity = _cosines(one, other)
        match = _assigned(similarity)
        for i, j in enumerate(match):
            exceeded = 1 + int((null >= similarity[i, j] - 1e-12).sum())
            others = np.delete(similarity[i], j)
            rows.append(
                {
                    **_names(here[i], here[j]),
                    "similarity": similarity[i, j],
                    "null_mean": null.mean(),
                    "null_high": np.quantile(null, 0.95),
                    "margin": similarity[i, j] - others.max() if others.size else np.nan,
                    "q_value": exceeded / (1 + null.size),
                }
            )
    table = pd.DataFrame(rows)
    table["q_value"] = false_discovery_control(table["q_value"].to_numpy())
    table["matched"] = (table["q_value"] <= LEVEL) & ~(table["margin"] < CLEAR)
    return table.loc[:, _COLUMNS]


def _names(place: np.ndarray, match: np.ndarray) -> dict[str, Any]:
    layer, index, match_layer, match_index = (int(number) for number in (*place, *match))
    names = {"head": f"{layer}.{index}", "match": f"{match_layer}.{match_index}"}
    return {**names, "layer": layer, "index": index, "match_layer": match_layer, "match_index": match_index}


# ---- profiles ---------------------------------------------------------------------------------------------------


def _profiles(
    scan_a: Scan, scan_b: Scan, patterns: tuple[ArrayLike, ArrayLike] | None, across_layers: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The profiles of both, (layer, head, part), standardised among the heads that are matched with each other."""
    groups = common_groups(scan_a, scan_b)
    axes = (0, 1) if across_layers else (1,)
    scores = [
        tuple(values(group, score) for group in pair) for pair in groups.values() for score in _shared_scores(*pair)
    ]
    if not scores:
        raise InputError("scan_a and scan_b have no score in common: scan both with the same probes.")
    parts = [tuple(_standardised(score, axes) for score in pair) for pair in scores]
    profiles = [np.stack(side, -1) / np.sqrt(len(side)) for side in zip(*parts, strict=True)]
    if patterns is not None:
        shape = shape_of(next(iter(groups.values()))[0])
        of_patterns = [_of_patterns(pattern, shape, axes) for pattern in patterns]
        if of_patterns[0].shape != of_patterns[1].shape:
            raise InputError("patterns are of different tokens: give both models the same.")
        profiles = [np.concatenate(both, -1) for both in zip(profiles, of_patterns, strict=True)]
    return profiles[0], profiles[1]


def _shared_scores(a: xr.Dataset, b: xr.Dataset) -> list[str]:
    """The scores that both know of every head that is not without attention."""
    return [
        score
        for score in scores_of(a)
        if score in scores_of(b) and not np.isnan(values(a, score)).all() and not np.isnan(values(b, score)).all()
    ]


def _standardised(score: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Less the mean and over the deviation of the heads that know it; 0 where it is unknown or all are alike."""
    known = np.isfinite(score)
    count = np.maximum(known.sum(axes, keepdims=True), 1)
    moved = np.where(known, score - np.where(known, score, 0).sum(axes, keepdims=True) / count, 0)
    deviation = np.sqrt(np.square(moved).sum(axes, keepdims=True) / count)
    scale = np.abs(np.where(known, score, 0)).max(axes, keepdims=True)
    return np.where(deviation > 1e-9 * scale, moved / np.where(deviation > 0, deviation, 1), 0)


def _of_patterns(given: ArrayLike, shape: tuple[int, int], axes: tuple[int, ...]) -> np.ndarray:
    """Patterns as part of a profile, with a mean length of 1, as the scores have."""
    pattern = np.asarray(given, dtype=float)
    if pattern.ndim < 3 or pattern.shape[:2] != shape or not np.isfinite(pattern).all():
        raise InputError(
            f"patterns holds an array of shape {list(pattern.shape)}: give finite ones [layer, head, ...] of "
            f"{shape[0]} layers x {shape[1]} heads."
        )
    flat = pattern.reshape(*shape, -1)
    flat = flat - flat.mean(axes, keepdims=True)
    length = np.sqrt(np.square(flat).sum(-1).mean())
    return flat / length if length > 0 else flat


# ---- matches ----------------------------------------------------------------------------------------------------


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The cosine of each profile of the one with each of the other; 0 of an empty one."""
    lengths = [np.linalg.norm(side, axis=-1) for side in (one, other)]
    return one @ other.T / np.maximum(np.outer(*lengths), 1e-30)


def _assigned(similarity: np.ndarray) -> np.ndarray:
    """For each head of a, the head of b that it is given, so that all similarities together are the largest."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(similarity, maximize=True)[1]


def _nulls(a: np.ndarray, b: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """For each pool of heads, similarities that the best assignment gives to shuffled profiles of b.

    In the basis of b's principal components, which are not correlated, each is shuffled among the heads of the pool:
    that leaves what profiles are made of, and how much, and takes away which head they belong to.
    """
    basis = np.linalg.svd(b.reshape(-1, b.shape[-1]), full_matrices=False)[2]
    components = b @ basis.T
    generator = np.random.default_rng(seed)
    for one, parts in zip(a, components, strict=True):
        turned = one @ basis.T
        scale = np.linalg.norm(turned, axis=-1) / np.maximum(np.linalg.norm(one, axis=-1), 1e-30)
        drawn = []
        for _ in range(_DRAWS):
            similarity = _cosines(turned, generator.permuted(parts, axis=0)) * scale[:, None]
            drawn.append(similarity[np.arange(len(one)), _assigned(similarity)])
        yield np.stack(drawn)
