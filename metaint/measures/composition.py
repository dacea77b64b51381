"""How much of what one head writes a later head reads, from their weights alone.

In: the weights of two layers' heads, with the gains of norms multiplied in (`models/folded.py`). Out: a score for each
pair of heads, and how far it lies from chance. Source: Elhage et al. 2021, "A Mathematical Framework for Transformer
Circuits", for the score. The null and its z-score are derived here.

A head writes W_V W_O, M1, and a later one reads M2: W_Q W_K^T for its queries, W_K W_Q^T for its keys, W_V W_O for its
values. Both are products of thin matrices, and the norm of M1 M2 needs of each only one thin factor: P with P^T P =
M1^T M1, and Q with Q Q^T = M2 M2^T. Then ||M1 M2|| = ||P Q||, ||M1|| = ||P|| and ||M2|| = ||Q||.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# Numbers of heads' matrices that are held at once.
_CHUNK = 2**22
# Below this part of tr A² the traceless part of A is rounding.
_FLAT = 1e-12


class Composition(NamedTuple):
    """The score of each pair of heads, in [0, 1], and its z-score: the standard deviations that its square is above
    the mean under rotation; NaN where weights are zero or not finite, z also where rotation changes nothing."""

    score: Float[Tensor, "head head_to"]
    z: Float[Tensor, "head head_to"]


def write_factor(
    W_V: Float[Tensor, "*rest d_model d_head"], W_O: Float[Tensor, "*rest d_head d_model"]
) -> Float[Tensor, "*rest rank d_model"]:
    """P of what heads write: P^T P = M1^T M1 for M1 = W_V W_O, in float64.

    W_V is replaced by the triangle of its QR, which leaves all lengths as they are; rank is the smaller of d_model and
    d_head. W_V S with S^-1 W_O gives the same P up to a rotation of its rows.
    """
    return _triangle(W_V) @ _wide(W_O)


def read_factor(
    left: Float[Tensor, "*rest d_model d_head"], right: Float[Tensor, "*rest d_head d_model"]
) -> Float[Tensor, "*rest d_model rank"]:
    """Q of what heads read: Q Q^T = M2 M2^T for M2 = left @ right, in float64.

    For queries W_Q and W_K^T, for keys W_K and W_Q^T, for values W_V and W_O.
    """
    return _wide(left) @ _triangle(right.mT).mT


def composition(
    write: Float[Tensor, "head rank d_model"], read: Float[Tensor, "head_to d_model rank_to"]
) -> Composition:
    """||M1 M2|| / (||M1|| ||M2||) in Frobenius norms for each writing and each reading head (Elhage et al. 2021).

    1 needs heads of one and the same direction; two that share r directions evenly score 1 / sqrt(r), and 0 (which may
    read as 1e-8) is a head that reads nothing of what the other writes. Some code elsewhere gives the square.

    The null, derived here, is M2 turned by a rotation R of the stream, Haar in O(d) with d = d_model, which keeps all
    singular values. With A = M1^T M1 and B = M2 M2^T the squared norm is then tr(A R B R^T). E R B R^T commutes with
    every rotation, so it is (tr B / d) I: the mean is tr A tr B / d, and the mean squared score 1 / d whatever the
    heads. What varies is <A0, R B0 R^T> of the traceless parts, tr A0² = tr A² - (tr A)² / d. Its mean square is a
    quadratic form in A0 that no rotation changes, on the traceless symmetric matrices, which are irreducible: c tr A0².
    Summed over an orthonormal basis of these, N = (d - 1)(d + 2) / 2 matrices, it is tr B0² whatever R is, so c = tr
    B0² / N and the variance is 2 tr A0² tr B0² / ((d - 1)(d + 2)). The distribution is near to normal for heads that
    use many directions, and has a long right tail for those that use one or two.
    """
    d = write.shape[-1]
    write, read = _wide(write), _wide(read).to(_place(write))
    (a, a_free), (b, b_free) = _traces(write, d), _traces(read.mT, d)
    square = _products(write, read) / (a[:, None] * b)
    variance = 2 * a_free[:, None] * b_free / max((d - 1) * (d + 2), 1)
    std = variance.sqrt().masked_fill(variance == 0, torch.nan)
    return Composition(square.sqrt().clamp(max=1), (square - 1 / d) / std)


def composition_chance(d_model: int) -> float:
    """The root of the mean squared score under a rotation of one head, 1 / sqrt(d_model), for any pair of heads."""
    return 1 / math.sqrt(d_model)


def _traces(factor: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """tr A, and tr A0² / (tr A)², of A = P^T P for each P [head, rank, d_model]."""
    gram = factor @ factor.mT
    trace, square = gram.diagonal(dim1=-2, dim2=-1).sum(-1), gram.square().sum((-2, -1))
    free = square - trace.square() / d
    return trace, free.masked_fill(free <= _FLAT * square, 0) / trace.square()


def _products(write: Tensor, read: Tensor) -> Tensor:
    """||P Q||² = tr(P^T P Q Q^T) for each writing and each reading head, [head, head_to].

    The sum over the entries of two symmetric matrices takes d² / 2 products a pair where P Q would take rank² d. Some
    rows of all matrices are made at a time, from the diagonal on.
    """
    d = write.shape[-1]
    total = write.new_zeros(len(write), len(read))
    size = max(1, _CHUNK // max(1, d * (len(write) + len(read))))
    for start in range(0, d, size):
        rows = slice(start, start + size)
        first, second = write[..., rows].mT @ write[..., start:], read[:, rows] @ read[:, start:].mT
        second[..., size:] *= 2  # right of the rows' own square, for what lies below it too
        total.addmm_(first.flatten(1), second.flatten(1).mT)
    return total.clamp_(min=0)


def _triangle(tall: Tensor) -> Tensor:
    """R of the QR of [..., d_model, d_head]."""
    return torch.linalg.qr(_wide(tall), mode="r").R


def _wide(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where there is none on its device."""
    return tensor.detach().to(_place(tensor)).double()


def _place(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device
