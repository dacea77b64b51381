"""What should hold between the hooks of a model's attention, one generator a check, and how its layers score.

Each generator takes a Trial and yields one Pair a layer: two tensors that should be equal, and the hook or
weight they speak of. What it needs and can't have is said by raising Unavailable. Weights and the residual stream have
theirs in `projections.py`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from metaint.models.describe import attending_layers, by_layer, sink_scores, window_of
from metaint.models.direction import is_causal
from metaint.models.heads import by_head, repeat_heads
from metaint.models.protocol import Model
from metaint.models.reading import Reading, Unavailable, widen
from metaint.models.readout import setting


class Pair(NamedTuple):
    """Two tensors that should be equal; rounding errors scale with `magnitude` (default: of `expected`)."""

    where: str
    actual: Tensor
    expected: Tensor
    magnitude: float | None = None


class Trial(NamedTuple):
    """A model and what one forward pass on it carried."""

    model: Model
    reading: Reading

    @property
    def layers(self) -> range:
        return range(int(self.model.cfg.n_layers))

    @property
    def attending(self) -> tuple[int, ...]:
        """The layers that attend."""
        return attending_layers(self.model)


def pattern_hook(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_pattern"


def pattern_fires(trial: Trial) -> Iterator[Pair]:
    """The shape of every pattern, which should be [batch, head, query, key]."""
    batch, length = trial.reading.logits.shape[:2]
    expected = torch.tensor([batch, int(trial.model.cfg.n_heads), length, length])
    for layer in trial.attending:
        shape = trial.reading[pattern_hook(layer)].shape
        yield Pair(pattern_hook(layer), torch.tensor(shape), expected)


def pattern_order(trial: Trial) -> Iterator[Pair]:
    """Whether the pattern is there when hook_z fires; BERT's bridge tells of it afterwards."""
    for layer in trial.attending:
        z = f"blocks.{layer}.attn.hook_z"
        if z not in trial.reading:
            raise Unavailable(f"the hook {z} never fired", z)
        early = trial.reading.before(pattern_hook(layer), z)
        yield Pair(z, torch.tensor(float(early)), torch.tensor(1.0))


def pattern_rows(trial: Trial) -> Iterator[Pair]:
    """Sums of rows against one; where a learnt sink takes the rest, at most one."""
    sinks = sink_scores(trial.model) is not None
    for layer in trial.attending:
        rows = trial.reading[pattern_hook(layer)].sum(-1)
        expected = rows.clamp(0, 1) if sinks else torch.ones_like(rows)
        yield Pair(pattern_hook(layer), rows, expected)


def pattern_causal(trial: Trial) -> Iterator[Pair]:
    if not is_causal(trial.model):
        raise Unavailable("queries may attend to later keys, since the model is bidirectional")
    for layer in trial.attending:
        later = trial.reading[pattern_hook(layer)].triu(1)
        yield Pair(pattern_hook(layer), later, torch.zeros_like(later), magnitude=1.0)


def pattern_from_scores(trial: Trial) -> Iterator[Pair]:
    """softmax(q·k) against the pattern. Errors of a softmax scale with the scores, hence the magnitude."""
    rotated = any(name.endswith("hook_rot_q") for name in trial.reading.activations)
    names = score_hooks(trial.model, rotated)
    for layer in trial.attending:
        query, key = (_scored(trial.reading, f"blocks.{layer}.attn", name) for name in names)
        scoring = scoring_of(trial.model, layer)
        scores = scoring.scores(query, key)
        expected = scoring.softmax(scores.masked_fill(scoring.hidden(scores), -math.inf))
        pattern = trial.reading[pattern_hook(layer)]
        yield Pair(pattern_hook(layer), pattern, expected, magnitude=max(1.0, float(scores.abs().max())))


def _scored(reading: Reading, attention: str, name: str) -> Tensor:
    """Queries or keys at a hook, or as a norm after the rotation leaves them (HunYuan), heads third."""
    normed = f"{attention}.hook_{name[-1]}_normed"
    if name.startswith("hook_rot") and reading.before(f"{attention}.{name}", normed):
        return rearrange(reading[normed], "batch head position d_head -> batch position head d_head")
    return reading[f"{attention}.{name}"]


def score_hooks(model: Model, rotated: bool | None = None) -> tuple[str, str]:
    """The hooks that hold queries and keys as they enter the scores; raises Unavailable where a bias is added."""
    positions = str(getattr(model.cfg, "positional_embedding_type", "standard"))
    if positions in ("alibi", "relative_positional_bias"):
        raise Unavailable(f"positions enter the scores as a bias ({positions}) that no hook carries")
    first = f"blocks.{attending_layers(model)[0]}.attn.hook_rot_q"
    rotated = first in model.hook_dict if rotated is None else rotated
    return ("hook_rot_q", "hook_rot_k") if positions == "rotary" or rotated else ("hook_q", "hook_k")


@dataclass(frozen=True)
class Scoring:
    """How a layer makes its pattern of queries and keys [batch, position, head, d_head]: asked of the model once."""

    # What scores are divided by, and what bounds them (0: nothing).
    scale: float
    cap: float
    causal: bool
    # How many keys back a query sees, itself among them; 0 is all.
    window: int
    # A learnt score of each head that stands for no key.
    sink: Float[Tensor, " head"] | None = None

    def scores(self, query: Tensor, key: Tensor) -> Float[Tensor, "batch head query key"]:
        """Scores of every pair, hidden keys too."""
        key = repeat_heads(key, query.shape[2], 2)
        scores = einsum(query, key, "batch query head d_head, batch key head d_head -> batch head query key")
        scores = scores / self.scale
        return self.cap * torch.tanh(scores / self.cap) if self.cap > 0 else scores

    def hidden(self, scores: Tensor) -> Bool[Tensor, "query key"]:
        """True where a query may not see a key: later keys, and those before a sliding window."""
        query = rearrange(torch.arange(scores.shape[-2], device=scores.device), "query -> query 1")
        key = torch.arange(scores.shape[-1], device=scores.device)
        hidden = key > query
        if not self.causal:
            hidden = torch.zeros_like(hidden)
        return hidden | (key <= query - self.window) if self.window else hidden

    def pattern(self, query: Tensor, key: Tensor, real: Tensor | None = None) -> Float[Tensor, "batch head query key"]:
        """The pattern; `real[batch, key]` is False where a key is padding."""
        scores = self.scores(query, key)
        hidden = self.hidden(scores)
        if real is not None:
            hidden = hidden | rearrange(~real, "batch key -> batch 1 1 key")
        return self.softmax(scores.masked_fill(hidden, -math.inf)).masked_fill(hidden, 0)  # NaN where all is hidden

    def softmax(self, scores: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
        """Weights of keys, the sink's weight left out where there is one."""
        if self.sink is None:
            return scores.softmax(-1)
        sink = rearrange(self.sink.to(scores), "head -> 1 head 1 1").expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


def scoring_of(model: Model, layer: int) -> Scoring:
    """How this layer of the model scores, as it is configured."""
    cap = setting(model, "attn_scores_soft_cap") or 0.0
    sinks = sink_scores(model)
    sink = None if sinks is None else sinks[layer]
    return Scoring(score_scale(model, layer), cap, is_causal(model), window_of(model, layer), sink)


def scores_of(model: Model, layer: int, query: Tensor, key: Tensor) -> Tensor:
    """Scores [batch, head, query, key] of every pair, from queries and keys [batch, position, head, d_head]."""
    return scoring_of(model, layer).scores(query, key)


def pattern_of(model: Model, layer: int, query: Tensor, key: Tensor, real: Tensor | None = None) -> Tensor:
    """The pattern that queries and keys make; `real[batch, key]` is False where a key is padding."""
    return scoring_of(model, layer).pattern(query, key, real)


def score_scale(model: Model, layer: int) -> float:
    """What the scores are divided by: as configured, with -1 for the square root of the head's width."""
    cfg = model.cfg
    # GPT-Neo divides by nothing, which its bridge does not say.
    if not getattr(cfg, "use_attn_scale", True) or "GPTNeoFor" in str(getattr(cfg, "architecture", "")):
        scale = 1.0
    elif (getattr(cfg, "attn_scale", None) or -1.0) > 0:
        scale = float(cfg.attn_scale)
    elif scalar := setting(model, "query_pre_attn_scalar"):
        scale = math.sqrt(scalar)
    elif multiplier := setting(model, "attention_multiplier"):
        scale = 1.0 / float(multiplier)
    else:
        scale = math.sqrt(cfg.d_head)
    return scale * (layer + 1) if setting(model, "scale_attn_by_inverse_layer_idx") else scale


def value_hook(model: Model) -> str:
    """The hook in attention that holds values as they are mixed: after a norm of theirs, where there is one."""
    normed = f"blocks.{attending_layers(model)[0]}.attn.v_norm.hook_out"
    return "v_norm.hook_out" if normed in model.hook_dict else "hook_v"


def values_of(model: Model, value: Tensor) -> Tensor:
    """Values as hooks hold them, [batch, key, head, width]: for multi-head latent attention heads come second there."""
    return value.transpose(1, 2) if setting(model, "kv_lora_rank") else value


def value_mix(trial: Trial) -> Iterator[Pair]:
    hook = value_hook(trial.model)
    for layer in trial.attending:
        attention = f"blocks.{layer}.attn"
        pattern = trial.reading[pattern_hook(layer)]
        z = by_head(trial.reading[f"{attention}.hook_z"], pattern.shape[1])
        value = values_of(trial.model, trial.reading[f"{attention}.{hook}"])
        value = repeat_heads(value, pattern.shape[1], 2)
        mixed = einsum(pattern, value, "batch head query key, batch key head d_head -> batch query head d_head")
        yield Pair(f"{attention}.hook_z", z, mixed)


def write_factor_of(model: Model) -> float:
    """What a sublayer's output is multiplied by before it is added to the stream (Granite)."""
    return float(setting(model, "residual_multiplier") or 1)


def bias_of(model: Model, name: str, layer: int, like: Tensor) -> Tensor:
    """The layer's bias, or zeros: of a missing one bridges say AttributeError in 4.x, TypeError in 3.x."""
    try:
        return widen(by_layer(model, name)[layer])
    except (AttributeError, TypeError):
        return torch.zeros(like.shape[2:], device=like.device, dtype=like.dtype)
