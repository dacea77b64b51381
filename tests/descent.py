"""A model whose layers are gradient steps on the inner loss, taken by autograd, or steps of that length at random.

Attention takes a step from the stream it reads, then the MLP one from where attention left it. Both look at the next
token, which no honest layer could: the model is there to be read, not to predict.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from metaint.models import direction
from tests.models.handmade import HookedRootModule

N_LAYERS, D_MODEL, D_VOCAB = 4, 24, 60


class Descent(HookedRootModule):
    """`rate` is the learning rate of every step; with `random`, steps point anywhere and are as long."""

    def __init__(self, rate: float = 0.05, random: bool = False, norm: str = "LN", parallel: bool = False) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(
            n_layers=N_LAYERS,
            n_heads=1,
            d_model=D_MODEL,
            d_head=D_MODEL,
            d_vocab=D_VOCAB,
            n_ctx=128,
            attention_dir="causal",
            attn_only=False,
            parallel_attn_mlp=parallel,
            normalization_type=norm,
            eps=1e-5,
        )
        self.rate, self.random = rate, random
        draw = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(D_VOCAB, D_MODEL)
        self.embed.weight.data = torch.randn(D_VOCAB, D_MODEL, generator=draw, dtype=torch.float64)
        self.W_U = nn.Parameter(torch.randn(D_MODEL, D_VOCAB, generator=draw, dtype=torch.float64))
        self.ln_final = _Norm(norm, draw)
        self.blocks = nn.ModuleList(_Block(parallel) for _ in range(N_LAYERS))
        self._noise = torch.Generator().manual_seed(1)
        self.setup()
        # It looks ahead on purpose, and is to pass for a model that predicts.
        direction._measured[self] = True

    def forward(self, tokens: Tensor, **_: Any) -> Tensor:
        """Logits [batch, position, vocabulary]."""
        stream = self.embed(tokens)
        for block in self.blocks:
            stream = block(stream, lambda z: self.step(z, tokens))
        return self.ln_final(stream) @ self.W_U

    def step(self, z: Tensor, tokens: Tensor) -> Tensor:
        """-rate times the gradient of the next token's cross-entropy; nothing at the last position."""
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            logits = (self.ln_final.plain(leaf) @ self.W_U)[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
            step = -self.rate * torch.autograd.grad(loss, leaf)[0]
        if self.random:
            noise = torch.randn(step.shape, generator=self._noise, dtype=step.dtype)
            step = noise / noise.norm(dim=-1, keepdim=True) * step.norm(dim=-1, keepdim=True)
        return step


class _Norm(nn.Module):
    def __init__(self, kind: str, draw: torch.Generator) -> None:
        super().__init__()
        self.kind = kind
        self.w = nn.Parameter(1 + 0.3 * torch.randn(D_MODEL, generator=draw, dtype=torch.float64))
        self.hook_scale = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        self.hook_scale((self._centred(x).square().mean(-1, keepdim=True) + 1e-5).sqrt())
        return self.plain(x)

    def plain(self, x: Tensor) -> Tensor:
        x = self._centred(x)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.w

    def _centred(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.kind == "LN" else x


class _Block(nn.Module):
    def __init__(self, parallel: bool) -> None:
        super().__init__()
        self.parallel = parallel
        for name in ("resid_pre", "attn_out", "mlp_out", "resid_post") + (() if parallel else ("resid_mid",)):
            setattr(self, f"hook_{name}", HookPoint())

    def forward(self, stream: Tensor, step: Any) -> Tensor:
        stream = self.hook_resid_pre(stream)
        attn = self.hook_attn_out(step(stream))
        if self.parallel:
            return self.hook_resid_post(stream + attn + self.hook_mlp_out(step(stream)))
        middle = self.hook_resid_mid(stream + attn)
        return self.hook_resid_post(middle + self.hook_mlp_out(step(middle)))
