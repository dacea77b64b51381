"""Diagonal multi-head linear attention on plain tokens, with a matrix of positions (Sander et al. 2024).

In: width, heads and length. Out: a `DiagonalAttention`, whose weights are small random numbers to be trained, or such
as minimise the expected loss. Sources: 2402.05787, and its code michaelsdr/ical (`unitary.py`, `orthogonal.py` and the
tensors saved there).
"""

from typing import Any

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from metaint.measures.closed_forms import DiagonalModel, diagonal_solution
from metaint.toys.parts import MIX, SCORES, Hooked, check_sizes
from metaint.toys.vector_model import VectorModel, vector_config


def diagonal_attention(
    d: int,
    heads: int,
    length: int,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> "DiagonalAttention":
    """A `DiagonalAttention` to be trained: `a`, `b` and `P` are 0.1 times standard normal numbers, as in their code.

    They depend on `seed` alone, and the global random state stays as it was. Weights are real, of this `dtype`;
    sequences have it too, or its complex counterpart. Raises InputError for sizes below 1.
    """
    check_sizes(d=d, heads=heads, length=length)
    sizes = {"d_in": d, "d_out": d, "d_model": d, "n_layers": 1, "n_heads": heads, "d_head": d, "n_ctx": length}
    cfg = vector_config("diagonal-attention", **sizes, seed=seed, device=device, dtype=dtype)
    cfg.biases = True  # without biases a part would keep what is called b as zeros
    model = DiagonalAttention(cfg, _DiagonalBlock, readout=torch.eye(d))
    generator = torch.Generator().manual_seed(seed)
    _write(model, *(0.1 * torch.randn(weight.shape, generator=generator) for weight in (model.a, model.b, model.P)))
    return model


def unitary_minimum(
    d: int, heads: int, length: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> "DiagonalAttention":
    """A global minimum on s_t = lambda^{t-1} for d independent phases, uniform on the circle: C = I, p_T = 1, else 0.

    It works since conj(s_{T-1}) s_T is lambda, and lambda s_T is s_{T+1}. The tensors that the authors saved have this
    form. With fewer heads than d, each serves one coordinate, and the expected squared error, summed over coordinates,
    is d - heads (derived, not the paper's). Raises InputError for sizes below 1.
    """
    model = diagonal_attention(d, heads, length, device=device, dtype=dtype)
    _write_minimum(model, diagonal_solution("unitary", d, heads, length))
    return model


def orthogonal_minimum(
    d: int, heads: int, length: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> "DiagonalAttention":
    """A global minimum where coordinates 2k, 2k + 1 have conjugate phases: 2x2 blocks of ones, p_T = 1, p_{T-1} = -1/2.

    C has those blocks on its diagonal; what is predicted is 2 cos(theta) s_T - s_{T-1}, which is s_{T+1}. The tensors
    that the authors saved have this form. On rotations of real pairs of length sqrt(2) it is as exact. With fewer heads
    than d/2, each serves one pair, and the expected squared error, summed over coordinates, is d - 2 heads (derived,
    not the paper's). Raises InputError for sizes below 1 and for an odd d.
    """
    model = diagonal_attention(d, heads, length, device=device, dtype=dtype)
    _write_minimum(model, diagonal_solution("orthogonal", d, heads, length))
    return model


class DiagonalAttention(VectorModel):
    """What the functions of this file make: one layer of diagonal heads, without residual connection.

    From s_1 ... s_T [batch, T, d] it predicts s_{T+1} at each position T, with s_{T-1} as the query:
    prediction_i = sum_{t <= T} p_t s_{t,i} sum_j C_ij conj(s_{T-1,j}) s_{t,j}, with C = b^T a. Position 1 has no query
    and predicts 0. `P` is laid out as in the authors' code: row t (from 0) belongs to the query at position t and has
    the keys up to t + 1, so that p is P[T-2, :T]; what lies further right, and the last row, counts for nothing.

    Hooks are aligned with predictions: at position T `hook_q` carries a conj(s_{T-1}) and `hook_pattern` the scores
    times p, so that no position depends on a later one. `hook_resid_post` is `hook_attn_out`, and the audit finds that
    nothing adds up to it; of weights in TransformerLens's sense there are none. Probes read real activations: attach
    them to passes on real sequences alone.
    """

    a: Any = property(lambda model: model.blocks[0].attn.a)
    b: Any = property(lambda model: model.blocks[0].attn.b)
    P: Any = property(lambda model: model.blocks[0].attn.P)


class _DiagonalBlock(Hooked):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg, "resid_pre attn_out resid_post")
        self.attn = _DiagonalHeads(cfg)

    def forward(self, stream: Tensor, attention_mask: Tensor) -> Tensor:
        return self.hook_resid_post(self.hook_attn_out(self.attn(self.hook_resid_pre(stream))))


class _DiagonalHeads(Hooked):
    def __init__(self, cfg: Any) -> None:
        weights = {"a": "n_heads d_head", "b": "n_heads d_head", "P": "n_ctx n_ctx"}
        super().__init__(cfg, "q k v attn_scores pattern z out", **weights)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        q = self.hook_q(rearrange(before.conj(), "batch position d -> batch position 1 d") * self.a)
        k = self.hook_k(repeat(x, "batch position d -> batch position head d", head=len(self.a)))
        v = self.hook_v(rearrange(x, "batch position d -> batch position 1 d") * self.b)
        scores = self.hook_attn_scores(einsum(q, k, SCORES).tril())
        weights = F.pad(self.P, (0, 0, 1, 0))[:length, :length]
        pattern = self.hook_pattern(scores * weights)
        return self.hook_out(self.hook_z(einsum(pattern, v, MIX)).sum(2))


def _write(model: DiagonalAttention, a: Tensor, b: Tensor, P: Tensor) -> None:
    with torch.no_grad():
        for weight, value in ((model.a, a), (model.b, b), (model.P, P)):
            weight.copy_(value)


def _write_minimum(model: DiagonalAttention, solution: DiagonalModel) -> None:
    """In all rows of P that count p_T and p_{T-1} are the same, as the solution has them, and the rest is 0."""
    length, (before, last) = len(model.P), solution.p[-2:].tolist()
    P = last * torch.ones(length - 1).diag(1) + before * torch.eye(length)
    P[-1] = 0
    _write(model, solution.A, solution.B, P)
