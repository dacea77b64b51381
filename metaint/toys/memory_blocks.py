"""The modules of the memory transformer: positions, one head a layer, feed-forwards, unembedding.

In: the `cfg` that `memory_transformer.py` writes. Out: modules with TransformerLens's hook points.
"""

import math
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from metaint.toys.parts import Hooked


def waves(cfg: Any) -> tuple[Float[Tensor, "position pair"], Float[Tensor, "position pair"]]:
    """Sines and cosines of position over 10000^(2 pair / d)."""
    pair = torch.arange(cfg.d_model // 2, dtype=torch.float64)
    angle = torch.outer(torch.arange(cfg.n_ctx, dtype=torch.float64), 10000 ** (-2 * pair / cfg.d_model))
    return angle.sin(), angle.cos()


class Positions(Hooked):
    """A table of positions that is no parameter; padding is not counted."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg, "")
        self.register_buffer("weight", torch.empty(cfg.n_ctx, cfg.d_model))

    def forward(self, tokens: Tensor, real: Tensor | None) -> Tensor:
        if real is None:
            shown = self.weight[: tokens.shape[1]]
            return repeat(shown, "position d_model -> batch position d_model", batch=len(tokens))
        return self.weight[(real.cumsum(-1) - 1).clamp(min=0)]


class Unembedding(Hooked):
    """Logits, times `cfg.logit_scale`."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg, "", weight="d_vocab d_model")

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.cfg.logit_scale)


class MemoryBlock(Hooked):
    """One head of attention, and the feed-forward that `cfg` has for this layer."""

    def __init__(self, cfg: Any, layer: int) -> None:
        super().__init__(cfg, "resid_pre attn_out resid_post" + " resid_mid mlp_out" * (not cfg.attn_only))
        kind = cfg.feed_forwards[layer]
        self.attn = MemoryAttention(cfg, turned=cfg.positions == "rotary" and layer == 0)
        self.mlp = FeedForward(cfg, kind) if kind else None

    def forward(self, stream: Tensor, attention_mask: Tensor | None) -> Tensor:
        stream = self.hook_resid_pre(stream)
        stream = stream + self.hook_attn_out(self.attn(stream, attention_mask))
        if not self.cfg.attn_only:
            stream = self.hook_resid_mid(stream)
            if self.mlp is not None:
                stream = stream + self.hook_mlp_out(self.mlp(stream))
            elif _is_heard(self.hook_mlp_out):
                stream = stream + self.hook_mlp_out(torch.zeros_like(stream))
        return self.hook_resid_post(stream)


class MemoryAttention(Hooked):
    """One head as wide as the stream, whose queries are the stream itself."""

    def __init__(self, cfg: Any, turned: bool) -> None:
        hooks = "q k v attn_scores pattern z" + " rot_q rot_k" * (cfg.positions == "rotary")
        inwards, outwards = "n_heads d_model d_head", "n_heads d_head d_model"
        super().__init__(cfg, hooks, W_K=inwards, W_V=inwards, W_O=outwards)
        self.turned = turned
        if turned:
            for name, wave in zip(("sine", "cosine"), waves(cfg), strict=True):
                self.register_buffer(name, wave, persistent=False)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        one_head = "batch position d_head -> batch position 1 d_head"
        q = self.hook_q(rearrange(x, one_head))
        k = self.hook_k(rearrange(x @ self.W_K[0], one_head))
        v = self.hook_v(rearrange(x @ self.W_V[0], one_head))
        if self.cfg.positions == "rotary":
            q, k = self.hook_rot_q(self.turn(q)), self.hook_rot_k(self.turn(k))
        head_first = "batch position head d_head -> batch head position d_head"
        q, k, v = (rearrange(x, head_first) for x in (q, k, v))
        mixed = self.mix(q, k, v, real)
        z = self.hook_z(rearrange(mixed, "batch head position d_head -> batch position head d_head"))
        return z[:, :, 0] @ self.W_O[0]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        """What each query [batch, head, position, d_head] takes of the values."""
        if real is None and not _is_heard(self.hook_attn_scores, self.hook_pattern):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / self.cfg.attn_scale)
        visible = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        if real is not None:  # each query sees itself, padding too: a softmax over nothing would be NaN
            itself = torch.eye(len(visible), dtype=torch.bool, device=q.device)
            visible = visible & (rearrange(real, "batch key -> batch 1 1 key") | itself)
        scores = (q @ k.mT / self.cfg.attn_scale).masked_fill(~visible, -math.inf)
        return self.hook_pattern(self.hook_attn_scores(scores).softmax(-1)) @ v

    def turn(self, x: Tensor) -> Tensor:
        """Adjacent pairs of dimensions, turned by the angle of their position; in later layers as they are."""
        if not self.turned:
            return x
        sine, cosine = (wave[: x.shape[1], None] for wave in (self.sine, self.cosine))
        a, b = x[..., ::2], x[..., 1::2]
        turned = torch.stack([a * cosine - b * sine, a * sine + b * cosine])
        return rearrange(turned, "half batch position head pair -> batch position head (pair half)")


class FeedForward(Hooked):
    """A matrix ("linear"), or one hidden layer ("mlp")."""

    def __init__(self, cfg: Any, kind: str) -> None:
        if kind == "linear":
            super().__init__(cfg, "", W_F="d_model d_model")
        else:
            super().__init__(cfg, "pre post", W_in="d_model d_mlp", W_out="d_mlp d_model")
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "linear":
            return x @ self.W_F
        return self.hook_post(self.hook_pre(x @ self.W_in).relu()) @ self.W_out


def _is_heard(*points: Any) -> bool:
    """Whether anything, TransformerLens's or torch's, hangs on these hook points, forward or backward."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(point, kind) for point in points for kind in kinds)
