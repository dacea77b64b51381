"""The groups of a scan, one record each: all that lists groups goes through `GROUPS`.

A new probe adds a line here, and its view one in `views/groups/catalogue.py`. Imports nothing, so that the shell knows
the names at once.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """A group of a scan, and the probe that reads it."""

    name: str
    probe: str
    """Its public name: `metaint.<probe>`."""
    sign: str | None
    """A variable that the group always has and no other; None where what it holds is its owner's choice."""
    scanned: bool = True
    """Whether `metaint.scan` reads it; one that is not is made by `metaint.recur`."""


GROUPS = (
    Group("heads", "HeadProbe", None),
    Group("outputs", "OutputProbe", "output_share"),
    Group("residual", "ResidualProbe", "norm_geometric"),
    Group("inner", "InnerProbe", "gradient_norm"),
    Group("saturation", "SaturationProbe", "similarity"),
    Group("memory", "MemoryProbe", "ov_recall"),
    Group("weights", "WeightProbe", "parameter_norm"),
    Group("recurrence", "RecurrenceProbe", "effective_matrix_cosine", scanned=False),
)
BY_NAME = {group.name: group for group in GROUPS}
SCANNED = [group.name for group in GROUPS if group.scanned]
