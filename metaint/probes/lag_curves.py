"""Curves of weight by lag, as `HeadProbe` keeps them: sums over all sequences, so without an interval.

In: what the rows of a layer put at each lag. Out: `by_lag` and `by_match_lag` of `/heads`, each (lag, layer, head).
"""

from typing import Any

import torch
import xarray as xr

from metaint.measures.lags import LAGS, ORIGINS, ByLag

# States, by the field of `ByLag` they add up.
STATES = {name: f"lag_{name}" for name in ByLag._fields}
_PARTS = {"weight": "", "uniform": "_uniform", "null": "_null_mean"}


def add_states(probe: Any) -> None:
    """The states that hold the curves; they get their size from the first layer."""
    for name in STATES.values():
        probe.add_state(name, torch.zeros(()), dist_reduce_fx="sum")


def fold_lags(probe: Any, layer: int, read: ByLag) -> None:
    """Add one layer's rows."""
    for name, state in STATES.items():
        value = getattr(read, name)
        if getattr(probe, state).ndim == 0:
            shape = (probe.shape.n_layers, *value.shape)
            setattr(probe, state, torch.zeros(shape, dtype=value.dtype, device=value.device))
        getattr(probe, state)[layer] += value


def lag_curves(probe: Any) -> dict[str, xr.Variable]:
    """The curves as variables; NaN at a lag where no query has a key."""
    if probe.lag_count.ndim == 0:
        return {}
    count = probe.lag_count.cpu()
    n_heads = probe.lag_weight.shape[-1]
    curves = {}
    for i, (name, words) in enumerate(ORIGINS.items()):
        for field, suffix in _PARTS.items():
            total = getattr(probe, STATES[field]).cpu()[:, i]
            heads = total if total.ndim == 3 else total[..., None].expand(-1, -1, n_heads)
            mean = heads / count[:, i, :, None]
            curves[name + suffix] = xr.Variable(("lag", "layer", "head"), mean.movedim(1, 0).float().numpy())
        curves[name].attrs["description"] = words
        curves[f"{name}_count"] = xr.Variable(("lag", "layer"), count[:, i].mT.numpy())
    return curves


def lag_coordinate() -> list[int]:
    return list(LAGS)
