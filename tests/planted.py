"""A model whose heads are what we say they are: weights set by hand, attention known in advance.

Tokens and positions are one-hot in subspaces of their own; a third subspace receives the previous token, so that
the induction head is the explicit construction of Bietti et al. (2306.00802), exact here since nothing overlaps.
"""

from typing import Any

import torch
from torch import Tensor

VOCAB, LENGTH = 40, 64
D_MODEL, D_HEAD = 2 * VOCAB + LENGTH, VOCAB + LENGTH
SHARP = 20.0
PLANTED = {
    "0.0": "previous_token",
    "0.1": "averaging",
    "0.2": "local",
    "0.3": "sink",
    "0.4": "duplicate_token",
    "1.0": "induction",
}
N_HEADS = 8
TOKEN, POSITION, PREVIOUS = slice(0, VOCAB), slice(VOCAB, VOCAB + LENGTH), slice(VOCAB + LENGTH, D_MODEL)


def planted_model(seed: int = 0) -> Any:
    """Two layers of eight heads: six planted, ten random with scores of standard deviation about 2."""
    from transformer_lens.model_bridge import TransformerBridge

    shape = {"n_layers": 2, "n_heads": N_HEADS, "d_model": D_MODEL, "d_head": D_HEAD, "n_ctx": LENGTH}
    model = TransformerBridge.boot_native(  # pyright: ignore
        {**shape, "d_vocab": VOCAB, "attn_only": True, "normalization_type": None, "act_fn": "relu"}
    )
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    embed, place = (next(n for n in state if n.startswith(part) and n.endswith("weight")) for part in ("embed", "pos"))
    state[embed][:, TOKEN] = torch.eye(VOCAB)
    state[place][:, POSITION] = torch.eye(LENGTH)
    for layer in range(2):
        for head in range(N_HEADS):
            query, key, value, out = _weights(f"{layer}.{head}", generator)
            rows = slice(head * D_HEAD, (head + 1) * D_HEAD)
            for name, matrix in (("q", query), ("k", key), ("v", value)):
                state[f"blocks.{layer}.attn.{name}.weight"][rows] = matrix
            state[f"blocks.{layer}.attn.o.weight"][:, rows] = out
    model.load_state_dict(state)
    return model


def _weights(name: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_Q, W_K, W_V as [d_head, d_model] and W_O as [d_model, d_head] of one head (torch.nn.Linear's orientation)."""
    query, key, value = (torch.zeros(D_HEAD, D_MODEL) for _ in range(3))
    out = torch.zeros(D_MODEL, D_HEAD)
    scale = SHARP * D_HEAD**0.5  # scores are divided by sqrt(d_head)
    at, tokens, places = torch.eye(LENGTH), slice(0, VOCAB), slice(VOCAB, D_HEAD)
    if name == "0.0":
        query[places, POSITION] = scale * at
        key[places, POSITION] = torch.roll(at, 1, 0)  # position j answers the query of position j + 1
        value[tokens, TOKEN] = torch.eye(VOCAB)
        out[PREVIOUS, tokens] = torch.eye(VOCAB)
    elif name == "0.2":
        query[places, POSITION] = scale * at
        key[places, POSITION] = sum(torch.diag(torch.ones(LENGTH - lag), -lag) for lag in range(6))
    elif name == "0.3":
        query[places, POSITION] = scale * torch.nn.functional.one_hot(torch.zeros(LENGTH).long(), LENGTH).T.float()
        key[places, POSITION][0, 0] = 1.0
        key[VOCAB, VOCAB] = 1.0
    elif name == "0.4":
        query[tokens, TOKEN], query[places, POSITION] = scale * torch.eye(VOCAB), -scale * at
        key[tokens, TOKEN], key[places, POSITION] = torch.eye(VOCAB), at
    elif name == "1.0":
        query[tokens, TOKEN] = scale * torch.eye(VOCAB)
        key[tokens, PREVIOUS] = torch.eye(VOCAB)
    elif name not in PLANTED:
        query = torch.randn(D_HEAD, D_MODEL, generator=generator)
        key = torch.randn(D_HEAD, D_MODEL, generator=generator)
    return query, key, value, out
