"""What losses to expect of models that learn s_{t+1} = W s_t in context, and their minima, in closed form.

In: step sizes and sizes, or the numbers of a diagonal model. Out: expected losses, the least of them, and models that
reach it. A context of T vectors is s_1..s_T, after which s_{T+1} is predicted; for complex vectors <a, b> is a* b.

Sources: Sander et al. 2024 (2402.05787) and its code, michaelsdr/ical; von Oswald et al. 2023 and its code,
`transformers_learn_icl_by_gd` in google-research/self-organising-systems. Where a docstring says "derived", the formula
is ours and holds as far as it was checked by exact quadrature and by simulation; it is not quoted from the papers.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaint.errors import InputError
from metaint.measures.autoregression import Commuting

# ---- one step of gradient descent -------------------------------------------------------------------------------


class Optimum(NamedTuple):
    """The step size with the least expected loss, and that loss."""

    eta: float
    loss: float


def augmented_loss(
    eta: float | int | Float[Tensor, "*#rest"], context: int | Int[Tensor, "*#rest"], d: int
) -> Float[Tensor, "..."]:
    """Expected |eta sum_{t=2}^T s_t <s_{t-1}, s_T> - s_{T+1}|² per coordinate, for a context of T = `context` vectors.

    (eta (T-1) - 1)² + eta² (T-1) (d-1), for W of kind "unitary" or "orthogonal" and s_1 = 1_d. Where all vectors have
    length 1 the same loss, divided by d, is had at d · eta. Derived. Raises InputError for a context or d below 1.
    """
    transitions = torch.as_tensor(context, dtype=torch.float64) - 1
    if d < 1 or (transitions < 0).any():
        raise InputError(f"context is {context} and d is {d}: give numbers of at least 1.")
    rate = torch.as_tensor(eta, dtype=torch.float64)
    return (rate * transitions - 1) ** 2 + rate**2 * transitions * (d - 1)


def augmented_optimum(context: int, d: int) -> Optimum:
    """eta = 1 / (T + d - 2), at which `augmented_loss` is (d - 1) / (T + d - 2). Derived.

    Raises InputError for a context below 2, which has no transition, and a d below 1.
    """
    _check_least("context", context, 2)
    _check_least("d", d, 1)
    return Optimum(1 / (context + d - 2), (d - 1) / (context + d - 2))


def augmented_shared_optimum(longest: int, d: int) -> Optimum:
    """The one eta that is best for all contexts T = 2..`longest` together, and the mean `augmented_loss` over them.

    eta = sum (T-1) / sum [(T-1)² + (T-1) (d-1)], since every loss is quadratic in eta. Derived. Raises InputError as
    `augmented_optimum` does.
    """
    _check_least("longest", longest, 2)
    _check_least("d", d, 1)
    transitions = range(1, longest)
    linear, square = sum(transitions), sum(n * n + n * (d - 1) for n in transitions)
    return Optimum(linear / square, 1 - linear**2 / square / len(transitions))


def regression_loss(
    eta: float | int | Float[Tensor, "*rest"],
    points: int,
    d: int,
    input_range: float | int = 1.0,
    weight_scale: float | int = 1.0,
) -> Float[Tensor, "*rest"]:
    """Expected 1/2 (prediction - answer)² of one step of size `eta` in the regression task of von Oswald et al.

    1/2 w² s² (d - 2 eta tr1 + eta² tr2) with s² = r²/12 and k = r⁴/80 the moments of the inputs, tr1 = d s² and
    tr2 = (d k + d (d-1) s⁴) / N + (N-1) d s⁴ / N; N points, r the input range, w the weight scale. Derived. At
    d = N = 10 and r = 1 its minimum is .20623, and at eta = 0 it is .41667. Raises InputError for points or d below 1.
    """
    variance, linear, square = _regression_traces(points, d, input_range)
    rate = torch.as_tensor(eta, dtype=torch.float64)
    return 0.5 * weight_scale**2 * variance * (d - 2 * rate * linear + rate**2 * square)


def regression_optimum(points: int, d: int, input_range: float | int = 1.0, weight_scale: float | int = 1.0) -> Optimum:
    """eta = tr1 / tr2 and its `regression_loss`; the weight scale does not move eta. Derived. Raises as that does."""
    _, linear, square = _regression_traces(points, d, input_range)
    eta = linear / square
    return Optimum(eta, float(regression_loss(eta, points, d, input_range, weight_scale)))


def _regression_traces(points: int, d: int, input_range: float | int) -> tuple[float, float, float]:
    """The inputs' variance, E tr G and E tr G² of G = 1/N sum x x^T."""
    _check_least("points", points, 1)
    _check_least("d", d, 1)
    variance, fourth = input_range**2 / 12, input_range**4 / 80
    within = d * fourth + d * (d - 1) * variance**2
    return variance, d * variance, (within + (points - 1) * d * variance**2) / points


# ---- diagonal multi-head attention on tokens e_t = s_t ----------------------------------------------------------
# Head h has queries-and-keys a_h and values b_h; C = B^T A. With positional weights p_1..p_T the prediction of s_{T+1}
# is sum_{t<=T} p_t s_{t,i} sum_j C_ij conj(s_{T-1,j}) s_{t,j}: the query is the vector before the last.


class DiagonalModel(NamedTuple):
    """One layer of diagonal heads, for one context length."""

    A: Float[Tensor, "head d"]
    B: Float[Tensor, "head d"]
    p: Float[Tensor, " position"]


def unitary_loss(C: Float[Tensor, "d d"], p: Float[Tensor, "*rest position"]) -> Float[Tensor, "*rest"]:
    """Expected squared error, summed over coordinates, of a diagonal model for W of kind "unitary" and s_1 = 1_d.

    (||p||² - p_{T-1}²) ||C||² + p_{T-1}² ||C 1||² - 2 p_T tr C + d, with p_T the last entry of p, so that rows of
    different lengths can stand together with zeros in front. Differentiable: descent on it is the training of
    `unitary.py`. Derived; the code of the source counts p_{T-1}² ||C||² twice, which moves no minimum. Raises
    InputError for fewer than two positions.
    """
    last, query = _last_two(p)
    rows = C.sum(1)
    mass = p.square().sum(-1) - query.square()
    return mass * C.square().sum() + query.square() * rows.square().sum() - 2 * last * C.trace() + len(C)


def orthogonal_loss(C: Float[Tensor, "d d"], p: Float[Tensor, "*rest position"]) -> Float[Tensor, "*rest"]:
    """Expected squared error, summed over coordinates, of a diagonal model for W of kind "orthogonal" and s_1 = 1_d.

    Coordinates (2k, 2k+1) are the conjugate pairs, as in `tasks.autoregressive` with a complex dtype. With q = p_{T-1},
    m = ||p||² - q², s = sum_{t != T-1} p_t, r = C 1, t3 = sum_k r_2k C_{2k,2k+1} + r_{2k+1} C_{2k+1,2k} and
    t4 = sum_k C_{2k,2k+1}² + C_{2k+1,2k}², it is

        q² ||r||² + m ||C||² + 2 q s t3 + (s² - m) t4 - 2 p_T tr C + d.

    Differentiable; p as in `unitary_loss`. Source: ical `orthogonal.py`. Raises InputError for an odd d and for fewer
    than two positions.
    """
    _check_pairs(len(C))
    last, query = _last_two(p)
    rows = C.sum(1)
    pairs = torch.arange(len(C), device=C.device)
    partner = C[pairs, pairs ^ 1]  # C_ij for the conjugate j of i
    mass, others = p.square().sum(-1) - query.square(), p.sum(-1) - query
    loss = query.square() * rows.square().sum() + mass * C.square().sum()
    loss = loss + 2 * query * others * (rows * partner).sum() + (others.square() - mass) * partner.square().sum()
    return loss - 2 * last * C.trace() + len(C)


def diagonal_minimum(kind: Commuting, d: int, heads: int) -> float:
    """The least expected loss of `heads` diagonal heads: d - H for "unitary", d - 2H for "orthogonal", at least 0.

    Derived, and found again by optimisation. Raises InputError as `diagonal_solution` does.
    """
    _check_diagonal(kind, d, heads)
    return float(max(d - heads * (1 if kind == "unitary" else 2), 0))


def diagonal_solution(kind: Commuting, d: int, heads: int, length: int) -> DiagonalModel:
    """A model that reaches `diagonal_minimum`, for a context of `length` vectors; float64.

    "unitary": p_T = 1, and head h copies coordinate h, since conj(s_{T-1}) s_T = lambda. "orthogonal": p_T = 1 and
    p_{T-1} = -1/2, and head h has ones on its conjugate pair, since s_{T+1} = 2 cos(theta) s_T - s_{T-1}. Heads that
    are one too many stay zero. All scales of A, B and p with the same p_t C are as good, and so is any A, B with the
    same C. Raises InputError for an unknown kind, an odd d in "orthogonal", sizes below 1 and a length below 2.
    """
    _check_diagonal(kind, d, heads)
    _check_least("length", length, 2)
    width = 1 if kind == "unitary" else 2
    heads_of = torch.arange(d) // width == torch.arange(heads)[:, None]
    p = torch.zeros(length, dtype=torch.float64)
    p[-1] = 1
    if kind == "orthogonal":
        p[-2] = -0.5
    return DiagonalModel(heads_of.double(), heads_of.double(), p)


def ideal_interaction(kind: Commuting, d: int) -> Float[Tensor, "d d"]:
    """p_T C of a model without error: the identity ("unitary"), or blocks [[1, 1], [1, 1]] ("orthogonal"); float64."""
    _check_diagonal(kind, d, 1)
    if kind == "unitary":
        return torch.eye(d, dtype=torch.float64)
    return torch.block_diag(*[torch.ones(2, 2, dtype=torch.float64)] * (d // 2))


def _last_two(p: Tensor) -> tuple[Tensor, Tensor]:
    if p.shape[-1] < 2:
        raise InputError(f"p has {p.shape[-1]} positions: give at least 2, since the query is the one before the last.")
    return p[..., -1], p[..., -2]


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{name} is {value}: give at least {least}.")


def _check_pairs(d: int) -> None:
    if d % 2:
        raise InputError(f"d is {d}: give an even number, since eigenvalues come in conjugate pairs.")


def _check_diagonal(kind: str, d: int, heads: int) -> None:
    if kind not in ("unitary", "orthogonal"):
        raise InputError(f"kind is {kind!r}: give 'unitary' or 'orthogonal', for which W is diagonal in one basis.")
    _check_least("d", d, 1)
    _check_least("heads", heads, 1)
    if kind == "orthogonal":
        _check_pairs(d)
