"""What linear attention of one head applies: its products W_Q W_K^T and W_V W_O, all that its predictions tell.

In: settings and a trained model. Out: the products, the step they take, where their weights are, and models with other
products, whose losses say what the weights are for. In the layout of Sander et al. 2024 (2402.05787).
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metaint.labs.autoregression.settings import Settings
from metaint.labs.autoregression.training import MANY, held_out_loss
from metaint.measures import closed_forms
from metaint.toys.linear_attention import linear_attention, regression_attention, regression_step


def coupled_loss(context: int, d: int) -> float:
    """Least expected loss of one gradient step from whose estimate of a coordinate eps of every other is taken off.

    With n = T - 1 the noise in a coordinate's estimate is eta² (A (1 - eps)² + B eps²), where A = n (d - 1) is that of
    a plain step and B = n² (d - 1) + 2 n (d - 1) (d - 2). At the best eps it is eta² N with N = A B / (A + B), and at
    the best eta the loss is N / (n² + N). Derived, for W of kind "unitary" and s_1 = 1_d; .3467 at d = 5 and T = 8,
    where a plain step has .3636.
    """
    n = context - 1
    own, others = n * (d - 1), n * n * (d - 1) + 2 * n * (d - 1) * (d - 2)
    noise = own * others / max(own + others, 1)
    return noise / (n * n + noise)


def products(s: Settings, model: Any) -> tuple[Float[Tensor, "2*d 2*d"], Float[Tensor, "2*d d"]]:
    """W_Q W_K^T and W_V W_O of the one head, of (s_t, s_{t-1}) and into the first slot: all that predictions tell."""
    QK, OV = model.W_Q[0, 0] @ model.W_K[0, 0].mT, model.W_V[0, 0] @ model.W_O[0, 0]
    return QK[s.d :, s.d :].detach(), OV[s.d :, : s.d].detach()


def step_of(s: Settings, model: Any) -> tuple[float, float]:
    """Mean and standard deviation over coordinates of the step: the diagonal of the construction's block of W_V W_O
    times that of its block of W_Q W_K^T."""
    QK, OV = products(s, model)
    steps = OV[: s.d].diagonal() * QK[: s.d, s.d :].diagonal()
    return steps.mean().item(), steps.std(correction=0).item()


def use_of(s: Settings, model: Any) -> dict[str, float]:
    """Where the weights are: shares of squared norms on the diagonals of the construction's blocks, beside them
    ("coupling" coordinates), and in other blocks; and the loss without either."""
    QK, OV = products(s, model)
    one = torch.eye(s.d)
    masks = {"diagonal": one, "coupling": 1 - one}
    QKs = {name: _placed(QK, mask, s.d) for name, mask in masks.items()}
    OVs = {name: _placed(OV, mask, 0) for name, mask in masks.items()}
    numbers = _shares("QK", QK, QKs) | _shares("OV", OV, OVs)
    uncoupled = with_products(s, QK - QKs["coupling"], OV - OVs["coupling"])
    blocks_alone = with_products(s, QKs["diagonal"] + QKs["coupling"], OVs["diagonal"] + OVs["coupling"])
    numbers["loss_without_coupling"] = held_out_loss(s, uncoupled, MANY)
    numbers["loss_without_other"] = held_out_loss(s, blocks_alone, MANY)
    return numbers


def _shares(name: str, product: Tensor, parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Shares of a product's squared norm, of each part and of what is in none."""
    whole = product.square().sum()
    shares = {f"{name}_{kind}": float(part.square().sum() / whole) for kind, part in parts.items()}
    rest = product - sum(parts.values())
    return {**shares, f"{name}_other": float(rest.square().sum() / whole)}


def _placed(product: Tensor, mask: Tensor, column: int) -> Tensor:
    """A product with zeros but for these entries of the block in its first d rows."""
    d = len(mask)
    out = torch.zeros_like(product)
    out[:d, column : column + d] = mask * product[:d, column : column + d]
    return out


def with_products(s: Settings, QK: Tensor, OV: Tensor) -> Any:
    """A model with these products: what a head reads and writes is in its values and queries alone."""
    model = linear_attention(s.d)
    attn = model.blocks[0].attn
    with torch.no_grad():
        for weight in (attn.W_Q, attn.W_K, attn.W_V, attn.W_O):
            weight.zero_()
        attn.W_Q[0, s.d :, s.d :], attn.W_V[0, s.d :, : s.d] = QK, OV
        attn.W_K[0], attn.W_O[0] = torch.eye(3 * s.d), torch.eye(3 * s.d)
    return model


def half_way(s: Settings, model: Any) -> Any:
    """The mean of the model's products and the construction's, once both queries and keys have the same scale."""
    construction = regression_step(s.d, s.length, closed_forms.regression_optimum(s.length, s.d).eta)
    QKs, OVs = [], []
    for one in (model, construction):
        QK, OV = one.W_Q[0, 0] @ one.W_K[0, 0].mT, one.W_V[0, 0] @ one.W_O[0, 0]
        scale = QK.diagonal()[: s.d].mean()
        QKs.append(QK / scale)
        OVs.append(OV * scale)
    mixed = regression_attention(s.d, s.length)
    attn = mixed.blocks[0].attn
    with torch.no_grad():
        attn.W_Q[0], attn.W_V[0] = (torch.stack(parts).mean(0) for parts in (QKs, OVs))
        attn.W_K[0], attn.W_O[0] = torch.eye(s.d + 1), torch.eye(s.d + 1)
    return mixed
