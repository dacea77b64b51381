"""A small attention-only transformer written out by hand, which can be broken in one place on purpose."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

try:
    from transformer_lens import HookedRootModule
except ImportError:  # TransformerLens 2
    from transformer_lens.hook_points import HookedRootModule

N_LAYERS, N_HEADS, D_MODEL, D_VOCAB = 2, 4, 16, 30


class HandMade(HookedRootModule):
    """Attention only, an RMSNorm at the end, no biases; `fault` is in the second layer alone.

    "silent_X" never calls the hook X (pattern, z or value); "late_X" calls it with a copy, so that an edit does
    nothing; "flat_pattern" has rows that sum to more than one; "leaky_mask" lets queries see later keys;
    "not_a_number" puts NaN in z.
    """

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.cfg = SimpleNamespace(
            n_layers=N_LAYERS,
            n_heads=N_HEADS,
            d_model=D_MODEL,
            d_head=D_MODEL // N_HEADS,
            d_vocab=D_VOCAB,
            n_ctx=64,
            attention_dir="causal",
            attn_only=True,
            normalization_type="RMS",
            eps=1e-5,
        )
        generator = torch.Generator().manual_seed(0)
        shape = (N_LAYERS, N_HEADS, D_MODEL, D_MODEL // N_HEADS)
        for name in ("W_Q", "W_K", "W_V"):
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator) * 0.4))
        self.W_O = nn.Parameter(torch.randn(shape, generator=generator).transpose(2, 3).contiguous() * 0.4)
        self.W_E = nn.Parameter(torch.randn(D_VOCAB, D_MODEL, generator=generator))
        self.ln_final = _FinalNorm()
        self.blocks = nn.ModuleList(_Block(self, i, fault if i else "") for i in range(N_LAYERS))
        self.setup()

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, position, vocabulary]."""
        stream = self.W_E[tokens]
        for block in self.blocks:
            stream = block(stream)
        return self.ln_final(stream) @ self.W_U

    @property
    def W_U(self) -> Tensor:
        return self.W_E.T


class _FinalNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(0.5, 1.5, D_MODEL))
        self.hook_scale = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        return x / self.hook_scale((x.square().mean(-1, keepdim=True) + 1e-5).sqrt()) * self.w


class _Attention(nn.Module):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        for name in ("q", "k", "v", "z", "pattern"):
            setattr(self, f"hook_{name}", HookPoint())

    def forward(self, x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor) -> Tensor:
        q = self.hook_q(torch.einsum("bqm,hmd->bqhd", x, w_q))
        k = self.hook_k(torch.einsum("bqm,hmd->bqhd", x, w_k))
        v = self._show("value", self.hook_v, torch.einsum("bqm,hmd->bqhd", x, w_v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        if self.fault != "leaky_mask":
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
        pattern = scores.softmax(-1) * (1.3 if self.fault == "flat_pattern" else 1.0)
        pattern = self._show("pattern", self.hook_pattern, pattern)
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
        z = self._show("z", self.hook_z, z * (torch.nan if self.fault == "not_a_number" else 1.0))
        return torch.einsum("bqhd,hdm->bqm", z, w_o)

    def _show(self, name: str, hook: Any, tensor: Tensor) -> Tensor:
        if self.fault == f"silent_{name}":
            return tensor
        shown = hook(tensor)
        return tensor if self.fault == f"late_{name}" else shown


class _Block(nn.Module):
    def __init__(self, model: HandMade, layer: int, fault: str) -> None:
        super().__init__()
        self.attn = _Attention(fault)
        self.weights = lambda: (model.W_Q[layer], model.W_K[layer], model.W_V[layer], model.W_O[layer])
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()

    def forward(self, stream: Tensor) -> Tensor:
        stream = self.hook_resid_pre(stream)
        return self.hook_resid_post(stream + self.hook_attn_out(self.attn(stream, *self.weights())))
