"""What a trained model of sequences s_{t+1} = W s_t does: beside reference algorithms, and in its heads.

In: predictions, gradients and matrices of two algorithms; or a model as a callable; or the diagonals of a model's
heads. Out: how near they are, the matrix that a model applies to the last vector, and how far heads have the structure
of the known minima. (`autoregression.py` has the algorithms, `closed_forms.py` the minima, and `decodability.py`
tells how well W can be read linearly.)

Sources: von Oswald et al. 2023, code `transformers_learn_icl_by_gd/src/train.py` in
google-research/self-organising-systems, for the three comparisons; Sander et al. 2024 (2402.05787), whose findings on
heads and positions the structure measures turn into numbers. The effective matrix is a probe of our own.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from metaint.errors import InputError
from metaint.measures.autoregression import Commuting
from metaint.measures.closed_forms import ideal_interaction
from metaint.measures.decodability import (  # those who read it from here still do
    FEWEST as FEWEST,
    PENALTIES as PENALTIES,
    VALIDATION as VALIDATION,
    Decoding as Decoding,
    decodability as decodability,
)
from metaint.measures.norms import participation_ratio

# ---- comparisons of two algorithms ------------------------------------------------------------------------------
# Of a scalar task, out is 1. The source has scalar tasks alone; for vectors each coordinate counts as one output.


def prediction_difference(
    f: Inexact[Tensor, "batch *position out"], g: Inexact[Tensor, "batch *position out"]
) -> Float[Tensor, "*position"]:
    """Mean of |f - g| over sequences and outputs, at least 0 ("preds diff"; von Oswald et al. 2023, train.py)."""
    return (f - g).abs().mean((0, -1))


def sensitivity_cosine(
    f_gradient: Inexact[Tensor, "batch *position out d"], g_gradient: Inexact[Tensor, "batch *position out d"]
) -> Float[Tensor, "*position"]:
    """Mean of <grad f, grad g> / ((||grad f|| + 1e-8) (||grad g|| + 1e-8)), in [-1, 1], over sequences and outputs.

    Gradients are those at the query: rows of an effective matrix, or the w of a regression. A zero gradient counts as
    0, and one near 1e-8 as less than its cosine. "model cos" in the source (von Oswald et al. 2023, train.py).
    """
    lengths = [torch.linalg.vector_norm(gradient, dim=-1) + 1e-8 for gradient in (f_gradient, g_gradient)]
    return (_inner(f_gradient, g_gradient, (-1,)) / (lengths[0] * lengths[1])).mean((0, -1))


def model_difference(
    f_gradient: Inexact[Tensor, "batch *position out d"], g_gradient: Inexact[Tensor, "batch *position out d"]
) -> Float[Tensor, "*position"]:
    """Mean of ||grad f - grad g|| over sequences and outputs, at least 0; gradients as in `sensitivity_cosine`.

    "model diff" in the source (von Oswald et al. 2023, train.py).
    """
    return torch.linalg.vector_norm(f_gradient - g_gradient, dim=-1).mean((0, -1))


def relative_error(
    matrix: Inexact[Tensor, "*rest out d"], reference: Inexact[Tensor, "*rest out d"]
) -> Float[Tensor, "*rest"]:
    """||matrix - reference||_F / ||reference||_F, at least 0; NaN or infinite where the reference is zero."""
    return torch.linalg.matrix_norm(matrix - reference) / torch.linalg.matrix_norm(reference)


def matrix_cosine(
    matrix: Inexact[Tensor, "*rest out d"], reference: Inexact[Tensor, "*rest out d"]
) -> Float[Tensor, "*rest"]:
    """<matrix, reference>_F / (||matrix||_F ||reference||_F) in [-1, 1]; its real part; NaN where either is zero."""
    lengths = torch.linalg.matrix_norm(matrix) * torch.linalg.matrix_norm(reference)
    return (_inner(matrix, reference, (-2, -1)) / lengths).clamp(-1, 1)


def projection_scale(
    matrix: Inexact[Tensor, "*rest out d"], direction: Inexact[Tensor, "*rest out d"]
) -> Float[Tensor, "*rest"]:
    """The real eta for which eta · direction is nearest to the matrix; NaN where the direction is zero.

    Of an effective matrix along `moments(vectors).cross`, it is the step that a step of gradient descent would have.
    """
    return _inner(direction, matrix, (-2, -1)) / torch.linalg.matrix_norm(direction).square()


def _inner(a: Tensor, b: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The real part of <a, b> summed over `dims`."""
    product = a.conj() * b
    return (product.real if product.is_complex() else product).sum(dims)


# ---- the matrix that a model applies ----------------------------------------------------------------------------


def effective_matrix(
    predict: Callable[[Tensor], Tensor],
    vectors: Inexact[Tensor, "batch position d"],
    positions: Sequence[int] | None = None,
) -> Inexact[Tensor, "batch chosen out d"]:
    """J(T) = d prediction(T) / d s_T for chosen indices T - 1 (all, by default), the rest of the sequence held fixed.

    `predict` takes `[batch, position, d]` to `[batch, position, out]`, each sequence on its own; it may be any model
    whose operations have a forward derivative. d forward derivatives are made for each position, at once.

    All ways from s_T to the prediction count. In one layer of linear attention on augmented tokens s_T is the query,
    but also the value at t = T, so that J = eta sum_{t=2}^T s_t s_{t-1}* + eta <s_{T-1}, s_T> I: the second part is no
    estimate of W, and falls off as 1/T beside the first. Where queries can be given apart from keys and values, a
    `predict` that takes its argument as queries alone has the applied matrix as its J, exactly the first part. Read J
    as an estimate of W only where T > d.

    Raises InputError if predictions are of another shape, and for a complex model that isn't complex-differentiable in
    s_T (one that reads the conjugate of s_T, say), which no matrix describes.
    """
    length = vectors.shape[1]
    chosen = range(length) if positions is None else positions
    with torch.no_grad():
        return torch.stack([_derivative(predict, vectors, position) for position in chosen], 1)


def _derivative(predict: Callable[[Tensor], Tensor], vectors: Tensor, position: int) -> Tensor:
    d = vectors.shape[-1]
    tangents = vectors.new_zeros(d, *vectors.shape)
    tangents[:, :, position] = torch.eye(d, dtype=vectors.dtype, device=vectors.device)[:, None]

    def at_position(sequence: Tensor) -> Tensor:
        out = predict(sequence)
        if out.ndim != 3 or out.shape[:2] != vectors.shape[:2]:
            raise InputError(
                f"predict returned {list(out.shape)} for vectors of {list(vectors.shape)}: "
                "it must return one vector for each of these positions."
            )
        return out[:, position]

    def push(tangent: Tensor) -> Tensor:
        return torch.func.jvp(at_position, (vectors,), (tangent,))[1]

    columns = torch.func.vmap(push)(tangents)
    if vectors.is_complex():
        turned = torch.func.vmap(push)(1j * tangents)
        size = columns.abs().amax() * torch.finfo(columns.dtype).eps ** 0.5
        if (turned - 1j * columns).abs().amax() > size:
            raise InputError(
                f"predict isn't complex-differentiable in the vector at index {position}, so no matrix describes it: "
                "give a model that doesn't conjugate that vector, or real vectors."
            )
    return columns.movedim(0, -1)


# ---- the structure of heads -------------------------------------------------------------------------------------


class Diagonals(NamedTuple):
    """Heads seen in a basis in which W is diagonal."""

    A: Inexact[Tensor, "head d"]
    B: Inexact[Tensor, "head d"]
    outside_QK: Float[Tensor, " head"]
    """Share of the squared Frobenius norm that is off the diagonal in this basis, 0 to 1: what A leaves out."""
    outside_OV: Float[Tensor, " head"]


def rotation_basis(d: int) -> Inexact[Tensor, "d d"]:
    """The unitary U, by columns, in which rotations of coordinates (2k, 2k+1) are diagonal; complex128.

    U* W U = diag(e^{i theta}, e^{-i theta}, ...), so that U* s for a real process of kind "orthogonal" is the complex
    one. Columns are (1, -i) / sqrt(2) and (1, i) / sqrt(2). Raises InputError for an odd d.
    """
    if d % 2 or d < 1:
        raise InputError(f"d is {d}: give an even number of at least 2.")
    block = torch.tensor([[1, 1], [-1j, 1j]], dtype=torch.complex128) / 2**0.5
    return torch.block_diag(*[block] * (d // 2))


def diagonals_in(
    basis: Inexact[Tensor, "d d"], W_QK: Inexact[Tensor, "head d d"], W_OV: Inexact[Tensor, "head d d"]
) -> Diagonals:
    """The diagonals of trained heads in a unitary basis U (columns), and how much of each head lies outside of them.

    Matrices are in TransformerLens's row convention, score = s_q W_QK s_k^T and output = s_k W_OV for real s, so with
    z = U* s, A_h = diag(U* W_QK U) weighs conj(z_q) z_k and B_h = diag(U* W_OV^T U) weighs z_k. With the identity as
    basis they are plain diagonals. Those of a real head are conjugate within each conjugate pair; take `.real` only
    where the imaginary part is small.
    """
    dtype = torch.promote_types(basis.dtype, W_QK.dtype)
    U = basis.to(dtype)
    QK, OV = U.mH @ W_QK.to(dtype) @ U, U.mH @ W_OV.mT.to(dtype) @ U
    A, B = (matrix.diagonal(dim1=-2, dim2=-1) for matrix in (QK, OV))
    outside = (_outside(QK, A), _outside(OV, B))
    return Diagonals(A, B, *outside)


def _outside(matrix: Tensor, diagonal: Tensor) -> Tensor:
    return (1 - diagonal.abs().square().sum(-1) / matrix.abs().square().sum((-2, -1))).clamp(0, 1)


def interaction(A: Inexact[Tensor, "head d"], B: Inexact[Tensor, "head d"]) -> Inexact[Tensor, "d d"]:
    """C = B^T A: C_ij is how much coordinate j of the queries and keys decides what is read of coordinate i."""
    return B.mT @ A


def off_diagonal_mass(C: Inexact[Tensor, "*rest d d"]) -> Float[Tensor, "*rest"]:
    """||C - diag(C)||_F / ||C||_F, 0 to 1: 0 at the unitary minimum, sqrt(1/2) at the orthogonal one; NaN for zero."""
    diagonal = torch.diag_embed(C.diagonal(dim1=-2, dim2=-1))
    return torch.linalg.matrix_norm(C - diagonal) / torch.linalg.matrix_norm(C)


def block_error(
    C: Inexact[Tensor, "*rest d d"], last: float | int | Float[Tensor, "*rest"], kind: Commuting
) -> Float[Tensor, "*rest"]:
    """||p_T C - J||_F / ||J||_F, at least 0, with `last` = p_T and J the `ideal_interaction`: 0 at the minimum.

    With too few heads for a loss of 0 it stays above sqrt(1 - H / d), or sqrt(1 - 2H / d) for "orthogonal".
    Raises InputError for an unknown kind and an odd d in "orthogonal".
    """
    ideal = ideal_interaction(kind, C.shape[-1]).to(C)
    scale = torch.as_tensor(last, device=C.device)[..., None, None]
    return torch.linalg.matrix_norm(scale * C - ideal) / torch.linalg.matrix_norm(ideal)


def head_orthogonality(A: Inexact[Tensor, "head d"], B: Inexact[Tensor, "head d"]) -> Float[Tensor, ""]:
    """max_{h != h'} |<a_h, b_h'>| / max_h |<a_h, b_h>|, at least 0: 0 where no head reads what another asks for.

    That is a property of the unitary minimum with d heads, where A B^T is a multiple of the identity, and not of the
    orthogonal one with more than d / 2. 0 for one head; NaN or infinite where all <a_h, b_h> are zero.
    """
    products = (A @ B.mT).abs()
    own = products.diagonal()
    return (products - torch.diag(own)).amax() / own.amax()


def effective_rank(C: Inexact[Tensor, "*rest d d"]) -> Float[Tensor, "*rest"]:
    """(sum sigma²)² / sum sigma⁴ over the singular values of C, 1 to d; H at a minimum of H heads; NaN for zero."""
    return participation_ratio(torch.diag_embed(torch.linalg.svdvals(C).square()))


def positional_rows(P: Float[Tensor, "*start T T"]) -> Float[Tensor, "*start T-1 T"]:
    """The weights p_1..p_T of each context of T = 2, 3, ... vectors, with zeros in front, so that p_T is the last.

    `P` is laid out as in the code of Sander et al. 2024: row t, from 0, has the keys up to t + 1.
    """
    n = P.shape[-1]
    places = torch.arange(n, device=P.device) - torch.arange(n - 2, -1, -1, device=P.device)[:, None]
    rows = P[..., :-1, :].gather(-1, places.clamp(min=0).expand(*P.shape[:-2], -1, -1))
    return torch.where(places >= 0, rows, 0.0)


def positional_concentration(p: Float[Tensor, "*row position"]) -> Float[Tensor, "*row"]:
    """(p_T² + p_{T-1}²) / ||p||², 0 to 1: the share of the last two positions; 1 at both minima; NaN for zero."""
    return p[..., -2:].square().sum(-1) / p.square().sum(-1)


def positional_ratio(p: Float[Tensor, "*row position"]) -> Float[Tensor, "*row"]:
    """p_{T-1} / p_T: 0 at the unitary minimum, -1/2 at the orthogonal one. Raises InputError for one position."""
    if p.shape[-1] < 2:
        raise InputError(f"p has {p.shape[-1]} positions: give at least 2.")
    return p[..., -2] / p[..., -1]
