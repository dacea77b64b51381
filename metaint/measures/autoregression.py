"""In-context autoregression, s_{t+1} = W s_t: reference algorithms that estimate W in the context.

In: vectors `[batch, position, d]`, real or complex. Out: the matrices and predictions of these algorithms
(`closed_forms.py` says which losses a model can reach).

Index T - 1 of a position dimension is about the context s_1..s_T: what is predicted there is s_{T+1}, and a matrix
there was made from the transitions (s_{t-1}, s_t), t = 2..T, of which T = 1 has none. For complex vectors <a, b> is
a* b.

Sources: Sander et al. 2024 (2402.05787) and its code, michaelsdr/ical; von Oswald et al. 2023 and its code,
`transformers_learn_icl_by_gd` in google-research/self-organising-systems.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Inexact
from torch import Tensor
from torch.nn.functional import pad

from metaint.errors import InputError

# The kinds of W that are all diagonal in one basis, so that they commute.
Commuting = Literal["unitary", "orthogonal"]


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
        raise InputError("scales is empty: give at least one number.")
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
        raise InputError(f"steps is {steps}: give at least 1.")
    W = eta * cross
    for _ in range(steps - 1):
        W = W + eta * (cross - W @ gram)
    return W


def _check_finite(vectors: Tensor) -> None:
    if not vectors.isfinite().all():
        raise InputError("vectors hold NaN or infinity, to which nothing can be fitted: give finite ones.")
