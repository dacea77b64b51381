"""A model whose circuit is known: a previous-token head, an induction head that reads it, and heads that do neither.

The heads of `tests.planted`, given something to write and an unembedding: 1.0 moves the token that it attends to, and
so predicts what followed the current token before; all but 0.0 and 1.0 write a little noise.
"""

from typing import Any

import pytest
import torch

from metaint.toys.memory_transformer import memory_transformer, write_induction_head
from tests.planted import D_HEAD, D_MODEL, N_HEADS, TOKEN, VOCAB, planted_model

CIRCUIT = ("0.0", "1.0")


@torch.no_grad()
def circuit_model(noise: float = 0.02, strength: float = 20.0, seed: int = 0) -> Any:
    """Two layers of eight heads, of which 0.0 and 1.0 predict in context; skips where TransformerLens has no bridge."""
    pytest.importorskip("transformer_lens.model_bridge", reason="TransformerBridge came with version 3")
    model = planted_model(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    state = dict(model.state_dict())
    state["unembed.weight"] = torch.zeros_like(state["unembed.weight"])
    state["unembed.weight"][:, TOKEN] = torch.eye(VOCAB)
    for layer in range(2):
        value, out = state[f"blocks.{layer}.attn.v.weight"], state[f"blocks.{layer}.attn.o.weight"]
        for head in range(N_HEADS):
            rows = slice(head * D_HEAD, (head + 1) * D_HEAD)
            if f"{layer}.{head}" not in CIRCUIT:
                value[rows] = noise * torch.randn(D_HEAD, D_MODEL, generator=generator)
                out[:, rows] = torch.randn(D_MODEL, D_HEAD, generator=generator) / D_HEAD**0.5
        if layer == 1:
            value[:VOCAB, TOKEN] = torch.eye(VOCAB)
            out[TOKEN, :VOCAB] = strength * torch.eye(VOCAB)
    model.load_state_dict(state)
    return model


def doubled_model(strength: float) -> Any:
    """The same with a second induction head, 1.3, that does what 1.0 does."""
    model = circuit_model(strength=strength)
    state = dict(model.state_dict())
    first, other = slice(0, D_HEAD), slice(3 * D_HEAD, 4 * D_HEAD)
    for name in "qkv":
        for end in ("weight", "bias"):
            if (full := f"blocks.1.attn.{name}.{end}") in state:
                state[full][other] = state[full][first]
    state["blocks.1.attn.o.weight"][:, other] = state["blocks.1.attn.o.weight"][:, first]
    model.load_state_dict(state)
    return model


@torch.no_grad()
def written_model(vocab: int = 16, length: int = 32, d: int = 96) -> Any:
    """The paper's two layers of one head with an induction head written in, exact: all vectors are orthonormal."""
    model = memory_transformer(d_vocab=vocab, n_ctx=length, d_model=d)
    basis = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0))).Q
    tokens, places, moved, answers = basis[: 3 * vocab + length].split([vocab, length, vocab, vocab])
    state = dict(model.state_dict())
    state |= {"embed.weight": tokens, "pos_embed.weight": places, "unembed.weight": answers}
    state |= {f"blocks.{layer}.attn.W_V": torch.eye(d)[None] for layer in range(2)}
    state["blocks.0.attn.W_O"] = (tokens.mT @ moved)[None]
    model.load_state_dict(state)
    write_induction_head(model, 30.0)
    return model


def traces(model: Any) -> list[tuple[Any, ...]]:
    """Everything that a pass could leave on a model's modules."""
    roots = [root for root in (model, getattr(model, "original_model", None)) if root is not None]
    modules = {id(module): module for root in roots for module in root.modules()}.values()
    return [
        (list(m._forward_hooks.items()), list(m._forward_pre_hooks), m.__dict__.get("forward"), m.training)
        for m in modules
    ]


def own_choice(model: Any, tokens: torch.Tensor) -> Any:
    """A metric that any model is best at: how often it holds most likely what it holds most likely as it is."""
    with torch.no_grad():
        best = {tuple(row.tolist()): logits.argmax(-1) for row, logits in zip(tokens, model(tokens), strict=True)}

    def metric(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        target = torch.stack([best[tuple(row.tolist())] for row in tokens])
        return (logits.argmax(-1) == target).double().mean(1)

    return metric
