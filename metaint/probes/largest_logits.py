"""What `HeadProbe` reads beside the pattern: the largest attention logit of each head, before the softmax.

In: a model, and one layer's queries, keys (or scores) and pattern at a time. Out: what they add to the probe's state.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from metaint.measures.logits import BINS, logit_bin, logit_quantile, row_maxima
from metaint.models.audit import TOKENS, holds
from metaint.models.heads import repeat_heads
from metaint.models.invariants import score_hooks, scoring_of
from metaint.models.protocol import Model
from metaint.models.reading import random_tokens, read, tolerance, untouched, widen

NAMES = {
    "max_logit": "the largest score before the softmax, scale and soft cap applied, of all that the mask allows",
    "max_logit_q99": "the 99th percentile over queries of each query's largest score (true to 2 %, or 0.02 near 0)",
}
_QUANTILE = 0.99
_SCORES = "hook_attn_scores"


class ScoreReader(NamedTuple):
    """Where what makes a model's scores is read, and what they are divided and capped by, for each layer."""

    hooks: tuple[str, ...]
    scales: list[float]
    caps: list[float]

    @staticmethod
    def of(model: Model) -> "ScoreReader | None":
        """Queries and keys where the audit finds that they make the pattern, else scores that do, else None."""
        if holds(model, "pattern_from_scores"):
            scorings = [scoring_of(model, layer) for layer in range(int(model.cfg.n_layers))]
            return ScoreReader(score_hooks(model), [s.scale for s in scorings], [s.cap for s in scorings])
        return ScoreReader((_SCORES,), [], []) if _scores_make_pattern(model) else None

    def row_maxima(
        self, layer: int, pattern: Float[Tensor, "batch head query key"], held: dict[str, Tensor]
    ) -> Float[Tensor, "batch head query"] | None:
        """The largest logit of each row; None for a step that continues a cache, whose earlier keys no hook tells."""
        first, *key = (widen(held[name]) for name in self.hooks)
        if not key:
            return first.gather(-1, pattern.argmax(-1, keepdim=True))[..., 0]
        if key[0].shape[1] != pattern.shape[-1]:
            return None
        keys = repeat_heads(key[0], pattern.shape[1], 2)
        return row_maxima(pattern, first, keys, self.scales[layer], self.caps[layer])


def _scores_make_pattern(model: Model) -> bool:
    """Whether the softmax of `hook_attn_scores` is the pattern; some bridges put the pattern itself there."""
    layers = range(int(model.cfg.n_layers))
    names = [f"blocks.{layer}.attn.{part}" for layer in layers for part in (_SCORES, "hook_pattern")]
    with untouched(model):
        found = read(model, random_tokens(model, 2, TOKENS), names)
    for scores, pattern in zip(names[::2], names[1::2], strict=True):
        if scores not in found or found[scores].shape != found[pattern].shape:
            return False
        difference = (found[scores].softmax(-1) - found[pattern]).abs().max()
        if not float(difference) <= tolerance(next(model.parameters()).dtype):
            return False
    return True


def fold_logits(probe: Any, reader: ScoreReader, layer: int, pattern: Float[Tensor, "batch head query key"]) -> None:
    """Add a layer's rows to a probe's `largest_logit` and `logit_histogram`, whatever it `held` of them; padding and
    its queries are left out."""
    logits = reader.row_maxima(layer, pattern, probe.held)
    probe.held = {}
    if probe.logit_histogram.ndim == 0:
        size = (probe.shape.n_layers, probe.shape.n_heads)
        probe.largest_logit = torch.full(size, -torch.inf, device=pattern.device)
        probe.logit_histogram = torch.zeros(*size, BINS, device=pattern.device)
    if logits is None:
        return
    rows = logits.float().transpose(0, 1)[:, probe.context.mask[:, probe.context.queries]]
    probe.largest_logit[layer] = torch.maximum(probe.largest_logit[layer], rows.amax(-1))
    probe.logit_histogram[layer].scatter_add_(1, logit_bin(rows), torch.ones_like(rows))


def logit_variables(probe: Any) -> dict[str, Float[Tensor, "layer head"]]:
    """`max_logit` and `max_logit_q99` of a probe; NaN where no row was read."""
    size = (probe.shape.n_layers, probe.shape.n_heads)
    histogram = probe.logit_histogram.cpu().expand(*size, BINS)
    largest = probe.largest_logit.cpu().expand(size).where(histogram.sum(-1) > 0, torch.nan)
    return dict(zip(NAMES, (largest, logit_quantile(histogram, _QUANTILE)), strict=True))
