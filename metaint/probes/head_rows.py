"""`HeadProbe` in a streamed pass: statistics of each block of rows, folded when a layer is whole.

In: blocks of rows as they are made. Out: what the probe adds for a layer, and no weight of any pattern.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from metaint.errors import ActivationError
from metaint.measures.attention import HEAD_MEASURES, WALKLESS, sink_mass
from metaint.measures.tile import Tile
from metaint.models.inputs import InputWatch
from metaint.probes.plan import on_targets

if TYPE_CHECKING:
    from metaint.probes.heads import HeadProbe


class HeadRows:
    """What of a layer's rows is kept until its last one: a few numbers a row, and the weight on targets."""

    def __init__(self, probe: "HeadProbe", watch: InputWatch) -> None:
        self._probe, self._watch = probe, watch
        # A statistic of one's own may ask for anything, so it is read while there are weights.
        self._own = [m for m in probe.statistics if m not in (*HEAD_MEASURES, sink_mass)]
        self._walking = any(m not in (*WALKLESS, *self._own) for m in probe.statistics)
        # `sink_mass` may be asked of any model.
        self._totals = probe.learnt_sinks or sink_mass in probe.statistics
        self._parts: list[dict[str, Tensor]] = []
        self._shapes: list[dict[str, Tensor]] = []
        self._read: dict[str, list[Tensor]] = {}
        self._on_targets = torch.zeros(0)

    def begin_layer(self, layer: int, value: Float[Tensor, "batch key value_head d_head"], queries: int) -> None:
        if self._probe.opens_pass(f"blocks.{layer}.attn.hook_pattern", self._watch):
            self._probe.begin_pass(self._watch, len(value), queries, value.shape[1], value.device)
        self._parts, self._shapes, self._read = [], [], {measure.name: [] for measure in self._own}
        plan = self._probe.plan(layer)
        self._on_targets = plan.no_weight(self._probe.shape.n_heads, self._probe.sums[-1].dtype)

    def read_rows(self, layer: int, rows: slice, pattern: Float[Tensor, "batch head row key"]) -> None:
        block = self._probe.plan(layer).block(rows, pattern.shape[-1])
        tile = Tile(pattern, block.context)
        on_targets(block.pairs, block.slot, pattern, self._on_targets)
        shape = self._probe.whole_rows(tile)
        if shape is not tile:
            self._shapes.append(shape.row_statistics(self._walking, total=False))
        self._parts.append(tile.row_statistics(self._walking and shape is tile, self._totals))
        for measure in self._own:
            self._read[measure.name].append(measure(shape))

    def end_layer(self, layer: int, z: Float[Tensor, "batch query head d_head"]) -> None:
        probe, plan = self._probe, self._probe.plan(layer)
        tile = Tile.of_rows(self._parts, plan.context)
        shape = Tile.of_rows(self._shapes, plan.context) if self._shapes else tile
        known = {name: torch.cat(values, -1) for name, values in self._read.items()}
        check_rows(tile, layer)
        statistics = probe.statistics_of(tile, shape, known)
        added = probe.sums_of(plan, plan.by_kind(self._on_targets), statistics, self._on_targets.dtype)
        probe.add(layer, tile, *added)
        self._parts, self._shapes, self._read = [], [], {}


def check_rows(tile: Tile, layer: int) -> None:
    """Raises ActivationError where a row is no number: not above 0 is NaN, or what HookedTransformer makes of it: 0."""
    if not bool((tile.sum_squares > 0).mT[tile.context.counted].all()):
        raise ActivationError(
            f"blocks.{layer}.attn.hook_pattern holds NaN or infinity: the weights or the activations before it "
            "overflow (try a wider dtype), or a sequence has no visible key."
        )
