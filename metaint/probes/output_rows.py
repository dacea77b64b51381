"""`OutputProbe` in a streamed pass: values, rows and what heads give, as the attention function has them.

In: blocks of rows as they are made. Out: what the probe folds in for a layer.
"""

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from metaint.models.inputs import InputWatch
from metaint.probes.value_weights import WeighedRows

if TYPE_CHECKING:
    from metaint.probes.outputs import OutputProbe


class OutputRows:
    """One layer at a time: lengths of values first, then the rows that weigh them, then the heads' outputs."""

    def __init__(self, probe: "OutputProbe", watch: InputWatch) -> None:
        self._probe, self._watch = probe, watch
        self._rows: WeighedRows | None = None

    def begin_layer(self, layer: int, value: Float[Tensor, "batch key value_head d_head"], queries: int) -> None:
        if self._probe.opens_pass(f"blocks.{layer}.attn.hook_v", self._watch):
            self._probe.begin_pass(value, self._watch)
        self._probe.hold_values(layer, value)
        self._rows = self._probe.weighed_rows(layer)

    def read_rows(self, layer: int, rows: slice, pattern: Float[Tensor, "batch head row key"]) -> None:
        assert self._rows is not None
        self._rows.read(rows, pattern)

    def end_layer(self, layer: int, z: Float[Tensor, "batch query head d_head"]) -> None:
        assert self._rows is not None
        self._probe.fold_rows(layer, self._rows)
        self._probe.fold_writes(layer, z)
        self._rows = None
