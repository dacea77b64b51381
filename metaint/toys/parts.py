"""What toys are put together from: modules with TransformerLens's hook points, and what their models share.

In: a `cfg` with sizes by name. Out: `Hooked`, a module that makes its hook points and weights from their names, the
parts of a pre-, output- or post-norm block, and what every toy asks of its tokens.
"""

import math
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.hook_points import HookPoint

from metaint.errors import InputError

try:
    from transformer_lens import HookedRootModule
except ImportError:  # TransformerLens 2
    from transformer_lens.hook_points import HookedRootModule

__all__ = ["ACTIVATIONS", "MLP", "Attention", "Block", "Hooked", "HookedRootModule", "LayerNorm"]
__all__ += ["check_sizes", "next_token_loss", "out_of_heads", "real_tokens", "stacked"]

ACTIVATIONS = {"relu": torch.relu, "gelu": F.gelu}
# What a projection does to the stream, head by head.
INTO_HEADS = "batch position d_model, head d_model d_head -> batch position head d_head"
# Scores of queries and keys, and what a pattern takes of the values.
SCORES = "batch query head d_head, batch key head d_head -> batch head query key"
MIX = "batch head query key, batch key head d_head -> batch query head d_head"


def stacked(name: str) -> Any:
    """A property of a model: this weight of every layer's attention, [layer, ...]."""
    return property(lambda model: torch.stack([getattr(block.attn, name) for block in model.blocks]))


def out_of_heads(z: Tensor, W_O: Tensor) -> Tensor:
    """What heads write together, [batch, position, d_model].

    Letters, since they say that heads are summed innermost: in another order the last bit differs, and no training run
    would repeat an earlier one.
    """
    return torch.einsum("bqhd,hdm->bqm", z, W_O)


def check_sizes(**sizes: int) -> None:
    """Raises InputError for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} is {size}: give at least 1.")


def real_tokens(tokens: Tensor, attention_mask: Tensor | None, return_type: str | None, n_ctx: int) -> Tensor:
    """Which tokens are no padding, bool [batch, position]; InputError for what no forward pass here takes."""
    if return_type not in ("logits", "loss", None):
        raise InputError(f'return_type is {return_type!r}: choose "logits", "loss" or None.')
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask.to(tokens.device)
    real, shape = mask.bool(), tuple(tokens.shape)
    least = 2 if return_type == "loss" else 1
    if len(shape) != 2 or real.shape != shape or not least <= shape[1] <= n_ctx:
        raise InputError(f"tokens is {shape}, its mask {(*real.shape,)}: give both as [batch, {least} to {n_ctx}].")
    return real


def next_token_loss(logits: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the next token, where both it and the current one are real."""
    targets = tokens[:, 1:].long().masked_fill(~(real[:, 1:] & real[:, :-1]), -100)
    predicted = rearrange(logits[:, :-1], "batch position vocab -> (batch position) vocab")
    return F.cross_entropy(predicted, targets.flatten(), ignore_index=-100)


class Hooked(nn.Module):
    """Hook points, and weights of the sizes named; a bias of a model without biases is zero and no parameter."""

    __getattr__: Any  # what is registered by name is of any type

    def __init__(self, cfg: Any, hooks: str, **weights: str) -> None:
        super().__init__()
        self.cfg = cfg
        for name in hooks.split():
            setattr(self, f"hook_{name}", HookPoint())
        for name, sizes in weights.items():
            value = torch.full([getattr(cfg, size) for size in sizes.split()], float(name == "w"))
            if cfg.biases or not name.startswith("b"):
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value, persistent=False)


class Block(Hooked):
    """The block of `SmallTransformer`: attention and an MLP, with the norms where `cfg.norm` has them."""

    def __init__(self, cfg: Any) -> None:
        middle = "" if cfg.parallel_attn_mlp else "resid_mid"
        super().__init__(cfg, f"resid_pre attn_out {middle} mlp_out resid_post")
        self.ln1, self.attn = LayerNorm(cfg), Attention(cfg)
        self.ln2, self.mlp = LayerNorm(cfg), MLP(cfg)

    def forward(self, stream: Tensor, attention_mask: Tensor) -> Tensor:
        stream = self.hook_resid_pre(stream)
        if self.cfg.parallel_attn_mlp:
            attended = stream + self.hook_attn_out(self.attn(self.ln1(stream), attention_mask))
            return self.hook_resid_post(attended + self.hook_mlp_out(self.mlp(self.ln2(stream))))
        stream = self.add(stream, lambda x: self.attn(x, attention_mask), self.ln1, self.hook_attn_out)
        return self.hook_resid_post(self.add(self.hook_resid_mid(stream), self.mlp, self.ln2, self.hook_mlp_out))

    def add(self, x: Tensor, sublayer: Any, norm: Any, added: Any) -> Tensor:
        if self.cfg.norm == "post":
            return norm(x + added(sublayer(x)))
        if self.cfg.norm == "pre":
            return x + added(sublayer(norm(x)))
        return x + added(norm(sublayer(x)))


class LayerNorm(Hooked):
    """LayerNorm, with the hooks of its length and of what it makes before its gain."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg, "scale normalized", w="d_model", b="d_model")

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        scale = self.hook_scale((x.square().mean(-1, keepdim=True) + self.cfg.eps).sqrt())
        return self.hook_normalized(x / scale) * self.w + self.b


class Attention(Hooked):
    """Causal softmax attention of several heads."""

    def __init__(self, cfg: Any) -> None:
        weights = dict.fromkeys(("W_Q", "W_K", "W_V"), "n_heads d_model d_head") | {"W_O": "n_heads d_head d_model"}
        biases = dict.fromkeys(("b_Q", "b_K", "b_V"), "n_heads d_head") | {"b_O": "d_model"}
        super().__init__(cfg, "q k v attn_scores pattern z out", **weights, **biases)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        q = self.hook_q(einsum(x, self.W_Q, INTO_HEADS) + self.b_Q)
        k = self.hook_k(einsum(x, self.W_K, INTO_HEADS) + self.b_K)
        v = self.hook_v(einsum(x, self.W_V, INTO_HEADS) + self.b_V)
        # Each query sees itself, padding too: a softmax over nothing would be NaN, and so would every gradient.
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        visible = (rearrange(real, "batch key -> batch 1 1 key") | itself).tril()
        scores = einsum(q, k, SCORES) / math.sqrt(self.cfg.d_head)
        pattern = self.hook_pattern(self.hook_attn_scores(scores.masked_fill(~visible, -math.inf)).softmax(-1))
        z = self.hook_z(einsum(pattern, v, MIX))
        return self.hook_out(out_of_heads(z, self.W_O) + self.b_O)


class MLP(Hooked):
    """One hidden layer, gated with `cfg.gated_mlp`."""

    def __init__(self, cfg: Any) -> None:
        weights = {"W_in": "d_model d_mlp", "b_in": "d_mlp", "W_out": "d_mlp d_model", "b_out": "d_model"}
        if cfg.gated_mlp:
            super().__init__(cfg, "pre pre_linear post out", **weights, W_gate="d_model d_mlp")
        else:
            super().__init__(cfg, "pre post out", **weights)

    def forward(self, x: Tensor) -> Tensor:
        act, linear = ACTIVATIONS[self.cfg.act_fn], x @ self.W_in + self.b_in
        if self.cfg.gated_mlp:
            post = act(self.hook_pre(x @ self.W_gate)) * self.hook_pre_linear(linear)
        else:
            post = act(self.hook_pre(linear))
        return self.hook_out(self.hook_post(post) @ self.W_out + self.b_out)
