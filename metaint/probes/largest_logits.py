"""What `HeadProbe` reads beside the pattern: the largest attention logit of each head, before the softmax.

In: a model, and one layer's queries, keys (or scores) and pattern at a time. Out: what they add to the probe's state.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from metaint.measures.logits import BINS, logit_bin, logit_quantile, row_maxima
from metaint.models.audit import TOKENS
from metaint.models.describe import attending_layers
from metaint.models.heads import repeat_heads
from metaint.models.invariants import Scoring, pattern_hook, score_hooks, scoring_of
from metaint.models.protocol import Model
from metaint.models.reading import Reading, Unavailable, random_tokens, read, tolerance, untouched, widen

NAMES = {
    "max_logit": "the largest score before the softmax, scale and soft cap applied, of all that the mask allows",
    "max_logit_q99": "the 99th percentile over queries of each query's largest score (true to 2 %, or 0.02 near 0)",
}
_QUANTILE = 0.99
_SCORES = "hook_attn_scores"
# What may make a pattern, and the pattern.
_READ = ("hook_rot_q", "hook_rot_k", "hook_q", "hook_k", _SCORES, "hook_pattern")


class ScoreReader(NamedTuple):
    """Where what makes a model's scores is read, and how each layer makes them of queries and keys."""

    hooks: tuple[str, ...]
    scorings: dict[int, Scoring]

    @staticmethod
    def of(model: Model) -> "ScoreReader | None":
        """Queries and keys where they make the pattern as the hooks hold them, else scores that do, else None."""
        names = [f"blocks.{layer}.attn.{hook}" for layer in attending_layers(model) for hook in _READ]
        with untouched(model):
            reading = read(model, random_tokens(model, 2, TOKENS), names)
        for reader in (_of_queries(model), ScoreReader((_SCORES,), {})):
            if reader is not None and _make_patterns(model, reader, reading):
                return reader
        return None

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
        return row_maxima(pattern, first, keys, self.scorings[layer].scale, self.scorings[layer].cap)


def _of_queries(model: Model) -> ScoreReader | None:
    try:
        hooks = score_hooks(model)
    except Unavailable:
        return None
    return ScoreReader(hooks, {layer: scoring_of(model, layer) for layer in attending_layers(model)})


def _make_patterns(model: Model, reader: ScoreReader, reading: Reading) -> bool:
    """Whether the softmax of what is read is the pattern, in every layer: some bridges put the pattern itself where
    scores should be, and some norm queries after the hook that holds them."""
    for layer in attending_layers(model):
        names = [f"blocks.{layer}.attn.{hook}" for hook in reader.hooks]
        if any(name not in reading for name in names):
            return False
        pattern = reading[pattern_hook(layer)]
        try:
            made = _pattern_of(reader, layer, *(reading[name] for name in names))
        except RuntimeError:  # shapes that do not fit, as of latent attention
            return False
        limit = tolerance(next(model.parameters()).dtype)
        if made.shape != pattern.shape or not float((made - pattern).abs().max()) <= limit:
            return False
    return True


def _pattern_of(reader: ScoreReader, layer: int, first: Tensor, *key: Tensor) -> Tensor:
    return reader.scorings[layer].pattern(first, *key) if key else first.softmax(-1)


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
