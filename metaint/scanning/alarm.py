"""An alarm over training: heads whose largest attention logit is above a line, told while the run goes on.

In: a scan with `max_logit`. Out: a call, or a warning, and a mark in the record.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from metaint.errors import InputError
from metaint.probes.heads import HeadProbe
from metaint.probes.probe import Probe

# What marks the step in `/training`: 1 where a head was above the line, else 0.
MARK = "logit_alarm"

# Called with the step and the heads above the line, each with its largest logit.
Warn = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Alarm:
    """Rings where a head's `max_logit` is above a line."""

    above: float
    call: Warn | None

    @staticmethod
    def of(above: float | None, call: Warn | None, probes: list[Probe]) -> "Alarm | None":
        """The alarm that a recorder was asked for; InputError where it could never ring."""
        if above is None:
            if call is not None:
                raise InputError("on_warning was given without warn_above: give the line too, such as 100.")
            return None
        if not isinstance(above, int | float) or not math.isfinite(above):
            raise InputError(f"warn_above is {above!r}: give a number, such as 100, or None for no alarm.")
        if not any(isinstance(probe, HeadProbe) and probe.max_logit for probe in probes):
            raise InputError("warn_above was given, and no probe reads logits: add metaint.HeadProbe(max_logit=True).")
        return Alarm(float(above), call)

    def heads(self, scan: xr.DataTree) -> dict[str, float]:
        """The heads above the line, each with its largest logit."""
        logits = scan["heads"]["max_logit"].transpose("layer", "head").values
        return {f"{i}.{j}": float(logits[i, j]) for i, j in np.argwhere(logits > self.above)}

    def tell(self, step: int, heads: Mapping[str, float]) -> None:
        """Call, or warn, of heads above the line."""
        if not heads:
            return
        if self.call is not None:
            self.call(step, heads)
            return
        largest = max(heads, key=heads.__getitem__)
        warnings.warn(
            f"step {step}: the largest attention logit of {len(heads)} heads is above {self.above:g}, up to "
            f"{heads[largest]:.0f} in head {largest}.",
            stacklevel=3,
        )
