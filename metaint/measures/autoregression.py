"""In-context autoregression, s_{t+1} = W s_t: algorithms that estimate W in the context, and what losses to expect.

In: vectors `[batch, position, d]`, real or complex, or the numbers of a model. Out: matrices and predictions of
reference algorithms; expected losses and their minima in closed form.

Index T - 1 of a position dimension is about the context s_1..s_T: what is predicted there is s_{T+1}, and a matrix
there was made from the transitions (s_{t-1}, s_t), t = 2..T, of which T = 1 has none. For complex vectors <a, b> is
a* b.

Sources: Sander et al. 2024 (2402.05787) and its code, michaelsdr/ical; von Oswald et al. 2023 and its code,
`transformers_learn_icl_by_gd` in google-research/self-organising-systems. Where a docstring says "derived", the formula
is ours and holds as far as it was checked by exact quadrature and by simulation; it is not quoted from the papers.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Inexact, Int
from torch import Tensor
from torch.nn.functional import pad

from metaint.errors import InputError

Commuting = Literal["unitary", "orthogonal"]

# ---- reference algorithms ---------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """All that gradient descent sees of a context: L(W) = const - Re tr(W* cross) + 1/2 tr(W gram W*)."""

    cross: Inexact[Tensor, "batch position d d"]
    """sum of s_t s_{t-1}*, which is minus the gradient of L at W = 0."""
    gram: Inexact[Tensor, "batch position d d"]
    """sum of s_{t-1} s_{t-1}*."""


def moments(vectors: Inexact[Tensor, "batch position d"]) -> Moments:
    """Sums over the transitions t = 2..T of every context; zero at T = 1."""
    past, later = vectors[:, :-1], vectors[:, 1:]
    cross = torch.einsum("bti,btj->btij", later, past.conj()).cumsum(1)
    gram = torch.einsum("bti,btj->btij", past, past.conj()).cumsum(1)
    return Moments(*(pad(total, (0, 0, 0, 0, 1, 0)) for total in (cross, gram)))


def step_sizes(scale: float | int, length: int) -> Float[Tensor, " length"]:
    """eta(T) = scale / (T - 1) for T = 1..length, and 0 at T = 1, where there is no gradient; float64."""
    transitions = torch.arange(length, dtype=torch.float64)
    return torch.where(transitions > 0, scale / transitions.clamp(min=1), 0.0)


def gradient_descent(
    vectors: Inexact[Tensor, "batch position d"], eta: float | int | Float[Tensor, " position"], steps: int = 1
) -> Inexact[Tensor, "batch position d d"]:
    """W after `steps` steps from 0 on L(W) = 1/2 sum_{t=2}^T ||s_t - W s_{t-1}||², for every context.

    W <- W + eta (cross - W gram), with `eta` one number, or one for each T. One step is eta sum_t s_t s_{t-1}*, what
    one layer of linear attention on augmented tokens can do. Differentiable in `eta`. Raises InputError for steps < 1.
    """
    cross, gram = moments(vectors)
    if isinstance(eta, Tensor):
        eta = eta.to(cross)[:, None, None]
    return _descend(cross, gram, eta, steps)


def least_squares(vectors: Inexact[Tensor, "batch position d"]) -> Inexact[Tensor, "batch position d d"]:
    """The W of least norm among those that minimise sum_{t=2}^T ||s_t - W s_{t-1}||², for every context.

    Where s_1..s_{T-1} don't span the space (always so for T - 1 < d) there are many minimisers, and this one sends all
    that is orthogonal to them to 0: nothing is singular. A direction counts as spanned where its singular value is
    above max(d, T - 1) · machine epsilon of the largest. Raises InputError for vectors that aren't finite.
    """
    _check_finite(vectors)
    batch, length, d = vectors.shape
    out = vectors.new_zeros(batch, length, d, d)
    for count in range(1, length):  # of transitions
        past, later = vectors[:, :count].mT, vectors[:, 1 : count + 1].mT
        out[:, count] = later @ torch.linalg.pinv(past)
    return out


def predictions(
    matrices: Inexact[Tensor, "batch position d d"], vectors: Inexact[Tensor, "batch position d"]
) -> Inexact[Tensor, "batch position d"]:
    """W(T) s_T for every T: what each estimate says s_{T+1} is."""
    return torch.einsum("btij,btj->bti", matrices, vectors)


def baselines(vectors: Inexact[Tensor, "batch position d"]) -> dict[str, Inexact[Tensor, "batch position d"]]:
    """Predictions that estimate nothing: "zero", "persistence" (s_T) and "extrapolation" (2 s_T - s_{T-1}, s_0 = 0)."""
    before = pad(vectors, (0, 0, 1, 0))[:, :-1]
    return {"zero": torch.zeros_like(vectors), "persistence": vectors.clone(), "extrapolation": 2 * vectors - before}


def squared_error(
    predicted: Inexact[Tensor, "batch position d"], vectors: Inexact[Tensor, "batch position d"]
) -> Float[Tensor, "batch position-1"]:
    """|prediction - s_{T+1}|², averaged over coordinates, for T = 1..length-1, where the target is known."""
    return (predicted[:, :-1] - vectors[:, 1:]).abs().square().mean(-1)


def tuned_scale(vectors: Inexact[Tensor, "batch position d"], steps: int, scales: Sequence[float | int]) -> float:
    """The c among `scales` for which `steps` steps with eta = c / (T - 1) have the least squared error on average.

    Over sequences and over all T whose target is known. Raises InputError for steps < 1 and without scales.
    """
    if not len(scales):
        raise InputError("scales is empty; give at least one number.")
    etas = [step_sizes(scale, vectors.shape[1]) for scale in scales]
    errors = [squared_error(predictions(gradient_descent(vectors, eta, steps), vectors), vectors) for eta in etas]
    best = torch.stack([error.mean() for error in errors]).nan_to_num(torch.inf).argmin()
    return float(scales[int(best)])


def regression_descent(
    inputs: Float[Tensor, "batch point d"], outputs: Float[Tensor, "batch point"], eta: float | int, steps: int = 1
) -> Float[Tensor, "batch d"]:
    """w after `steps` steps of size `eta` from 0 on L(w) = 1/(2N) sum_i (<w, x_i> - y_i)².

    Its prediction at a query is <w, x_q>, and w is also that prediction's gradient at x_q. One step is what the linear
    attention that von Oswald et al. construct does. Raises InputError for steps < 1.
    """
    count = inputs.shape[1]
    cross = torch.einsum("bp,bpd->bd", outputs, inputs)[:, None] / count
    gram = inputs.mT @ inputs / count
    return _descend(cross, gram, eta, steps)[:, 0]


def regression_least_squares(
    inputs: Float[Tensor, "batch point d"], outputs: Float[Tensor, "batch point"]
) -> Float[Tensor, "batch d"]:
    """The w of least norm that minimises sum_i (<w, x_i> - y_i)², with no ridge; it is exact from N = d points on.

    Raises InputError for inputs or outputs that aren't finite.
    """
    _check_finite(inputs)
    _check_finite(outputs)
    return (torch.linalg.pinv(inputs) @ outputs[..., None])[..., 0]


def rollout_error(windows: Inexact[Tensor, "window position d"]) -> Float[Tensor, " window"]:
    """How far s_1, W s_1, W² s_1, ... is from a window, with W its own least-squares fit of least norm.

    The squared difference, averaged over positions and coordinates. It is 0 but for rounding where s_1..s_{T-1} are
    linearly independent, as different token embeddings mostly are: windows with a token twice are the ones that tell
    text from shuffled text. Raises InputError for vectors that aren't finite.

    Source: ical `validation_token_encoding.py`, which counts windows above 1e-12.
    """
    _check_finite(windows)
    inverse = torch.linalg.pinv(windows[:, :-1].mT)
    rolled = [windows[:, 0]]
    for _ in range(windows.shape[1] - 1):
        # W = S_{2..T} S_{1..T-1}^+ is d x d of rank T - 1: never made.
        weights = torch.einsum("wtj,wj->wt", inverse, rolled[-1])
        rolled.append(torch.einsum("wt,wtd->wd", weights, windows[:, 1:]))
    return (torch.stack(rolled, 1) - windows).abs().square().mean((1, 2))


def _descend(cross: Tensor, gram: Tensor, eta: float | int | Tensor, steps: int) -> Tensor:
    if steps < 1:
        raise InputError(f"steps is {steps}; give at least 1.")
    found = eta * cross
    for _ in range(steps - 1):
        found = found + eta * (cross - found @ gram)
    return found


def _check_finite(vectors: Tensor) -> None:
    if not vectors.isfinite().all():
        raise InputError("vectors hold NaN or infinity, to which nothing can be fitted; give finite ones.")


# ---- expected losses: one step of gradient descent --------------------------------------------------------------


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
        raise InputError(f"context is {context} and d is {d}; give numbers of at least 1.")
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


# ---- expected losses: diagonal multi-head attention on tokens e_t = s_t -----------------------------------------
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
        raise InputError(f"p has {p.shape[-1]} positions; give at least 2, since the query is the one before the last.")
    return p[..., -1], p[..., -2]


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{name} is {value}; give at least {least}.")


def _check_pairs(d: int) -> None:
    if d % 2:
        raise InputError(f"d is {d}; give an even number, since eigenvalues come in conjugate pairs.")


def _check_diagonal(kind: str, d: int, heads: int) -> None:
    if kind not in ("unitary", "orthogonal"):
        raise InputError(f"kind is {kind!r}; give 'unitary' or 'orthogonal', for which W is diagonal in one basis.")
    _check_least("d", d, 1)
    _check_least("heads", heads, 1)
    if kind == "orthogonal":
        _check_pairs(d)
