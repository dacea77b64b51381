"""What a run of the autoregression lab shows: measured against the closed-form optimum, and how the model does it.

In: settings, a recording and the trained model. Out: rows of (quantity, measured, predicted), and numbers of a run.
Predictions are those of `measures/autoregression.py`, which are derived, and of the authors' code where it says so.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from metaint.labs.autoregression.settings import Settings
from metaint.labs.autoregression.training import (
    DESCENTS,
    MANY,
    REACHED,
    draw,
    held_out,
    held_out_loss,
    positional_descent,
)
from metaint.measures import autoregression, recurrence
from metaint.toys.linear_attention import linear_attention, regression_attention, regression_step

# What predictors of Haar sequences with d = 5 and 50 vectors of length 1 lose, computed once from 4000 sequences of the
# authors' task with the loss of their `augmented.py`.
HAAR_REFERENCES = {
    "zero": 0.2, "persistence": 0.398, "extrapolation": 1.271, "gradient_steps_1": 0.0627, "gradient_steps_2": 0.0407,
    "gradient_steps_3": 0.0299, "gradient_steps_5": 0.0213, "least_squares": 0.012,
}  # fmt: skip
# p_{T-1}, p_{T-2}, p_{T-3} of the last row that `pe_only.py` saved (it drops p_T), at 30 positions.
SAVED_POSITIONS = {50.0: (0.334, 0.223, 0.129), 300.0: (0.132, 0.123, 0.114)}

Row = dict[str, Any]
# Quantity, measured, predicted, and whether it is key.
Found = tuple[str, Any, float, bool]


def compare(s: Settings, recording: xr.DataTree, model: Any) -> list[Row]:
    """Rows with `run` (a label without the seed), `seed`, `quantity`, `measured`, `predicted` and `key`, whether the
    row is about the optimum that the setting is about."""
    of_setting = {
        "augmented": _augmented, "unitary": _diagonal, "orthogonal": _diagonal, "haar": _haar,
        "positional": _positional, "icl-regression": _regression,
    }[s.setting]  # fmt: skip
    found = of_setting(s, recording, model)
    return [
        {"run": label(s), "seed": s.seed, "quantity": q, "measured": float(m), "predicted": float(p), "key": bool(key)}
        for q, m, p, key in found
    ]


def label(s: Settings) -> str:
    """What tells a run from others of its setting, but for the seed."""
    words = {
        "augmented": f"{s.model}, T = {s.length}",
        "unitary": f"H = {s.heads}",
        "orthogonal": f"H = {s.heads}",
        "haar": f"{s.model}, {s.layers} layer{'s' * (s.layers > 1)}",
        "positional": f"mu = {s.mu:g}",
        "icl-regression": f"{s.layers} layer{'s' * (s.layers > 1)}",
    }[s.setting]
    return f"{words}, {s.heads} head{'s' * (s.heads > 1)}" if s.model == "transformer" else words


def steps_of(recording: xr.DataTree) -> int:
    """The last recorded step."""
    return int(recording["training"].to_dataset()["step"][-1])


def final(recording: xr.DataTree, group: str) -> xr.Dataset:
    """A group at the last record."""
    return recording[group].to_dataset().isel(step=-1)


# ---- augmented tokens -------------------------------------------------------------------------------------------


def _augmented(s: Settings, recording: xr.DataTree, model: Any) -> list[Found]:
    shared = s.model == "shared"
    best = (autoregression.augmented_shared_optimum if shared else autoregression.augmented_optimum)(s.length, s.d)
    key = s.model == "diagonal"
    loss = held_out_loss(s, model, MANY)
    found: list[Found] = [("loss", loss, best.loss, key), ("step", step_of(s, model)[0], best.eta, key)]
    if s.model in ("blocks", "free"):
        found.append(("loss, against coupled values", loss, coupled_loss(s.length, s.d), False))
    return found


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


def _use(s: Settings, model: Any) -> dict[str, float]:
    """Where the weights are: shares of squared norms on the diagonals of the construction's blocks, beside them
    ("coupling" coordinates), and in other blocks; and the loss without either."""
    QK, OV = products(s, model)
    one = torch.eye(s.d)
    masks = {"diagonal": one, "coupling": 1 - one}
    QKs = {name: _placed(QK, mask, s.d) for name, mask in masks.items()}
    OVs = {name: _placed(OV, mask, 0) for name, mask in masks.items()}
    shares = {}
    for product, parts in (("QK", (QK, QKs)), ("OV", (OV, OVs))):
        for name, part in parts[1].items():
            shares[f"{product}_{name}"] = float(part.square().sum() / parts[0].square().sum())
        rest = parts[0] - sum(parts[1].values())
        shares[f"{product}_other"] = float(rest.square().sum() / parts[0].square().sum())
    without = {
        "loss_without_coupling": (QK - QKs["coupling"], OV - OVs["coupling"]),
        "loss_without_other": (QKs["diagonal"] + QKs["coupling"], OVs["diagonal"] + OVs["coupling"]),
    }
    return {**shares, **{name: held_out_loss(s, _with_products(s, *parts), MANY) for name, parts in without.items()}}


def _placed(product: Tensor, mask: Tensor, column: int) -> Tensor:
    """A product with zeros but for these entries of the block in its first d rows."""
    d = len(mask)
    out = torch.zeros_like(product)
    out[:d, column : column + d] = mask * product[:d, column : column + d]
    return out


def _with_products(s: Settings, QK: Tensor, OV: Tensor) -> Any:
    """A model with these products: what a head reads and writes is in its values and queries alone."""
    model = linear_attention(s.d)
    attn = model.blocks[0].attn
    with torch.no_grad():
        for weight in (attn.W_Q, attn.W_K, attn.W_V, attn.W_O):
            weight.zero_()
        attn.W_Q[0, s.d :, s.d :], attn.W_V[0, s.d :, : s.d] = QK, OV
        attn.W_K[0], attn.W_O[0] = torch.eye(3 * s.d), torch.eye(3 * s.d)
    return model


# ---- diagonal heads ---------------------------------------------------------------------------------------------


def enough_heads(s: Settings) -> int:
    """How many diagonal heads a loss of 0 takes."""
    return s.d if s.setting == "unitary" else s.d // 2


def _diagonal(s: Settings, recording: xr.DataTree, model: Any) -> list[Found]:
    """Of each number of heads the loss, and of as many as a loss of 0 takes what their weights are."""
    kind: Any = s.setting
    least = autoregression.diagonal_minimum(kind, s.d, s.heads)
    enough = enough_heads(s)
    found = [("loss", float(final(recording, "training")["held_out_loss"]), least, True)]
    if s.heads < enough:
        return found
    data = final(recording, "structure")
    ratios, ideal = data["positional_ratio"].values[1:], 0.0 if kind == "unitary" else -0.5
    found.append(("p_{T-1} / p_T, farthest", ratios[np.argmax(np.abs(ratios - ideal))], ideal, s.heads == enough))
    concentration = data["positional_concentration"].values.min()
    found.append(("weight of the last two positions, least", concentration, 1, False))
    found.append(("error of p_T C, largest", data["block_error"].sel(kind=kind).values.max(), 0, False))
    orthogonality = float(data["head_orthogonality"].values[0])
    # With more heads than the minimum takes, nothing makes them orthogonal.
    found.append(("head orthogonality", orthogonality, 0 if s.heads == enough else math.nan, s.heads == enough))
    return [*found, ("effective rank of C", float(data["effective_rank"].values[0]), enough, False)]


# ---- sequences that don't commute -------------------------------------------------------------------------------


def _haar(s: Settings, recording: xr.DataTree, model: Any) -> list[Found]:
    """Mean losses over contexts of the recorded sequences, beside as many gradient steps as there are layers."""
    data = final(recording, "recurrence")
    one_step = s.model == "linear" and s.layers == 1
    reference = "gradient_step" if one_step else f"gradient_steps_{s.layers}"
    if s.layers not in DESCENTS:
        return [("loss", float(data["loss"].mean()), math.nan, False)]
    words = "1 step, one eta" if one_step else f"{s.layers} step{'s' * (s.layers > 1)}"
    after = data["position"] > s.d
    measured, predicted = data["loss"], data[f"loss_{reference}"]
    return [
        (f"loss, against {words}", float(measured.mean()), float(predicted.mean()), True),
        (f"the same at T > {s.d}", float(measured.where(after).mean()), float(predicted.where(after).mean()), False),
    ]


def _unit_step(s: Settings) -> float:
    """Loss of one gradient step made as long as predicts best at each T: what a LayerNorm at the end can add."""
    vectors = draw(s, 2048, held_out(s))[0]
    contexts, targets = vectors[:, :-1], vectors[:, 1:]
    step = autoregression.predictions(autoregression.gradient_descent(contexts, 1.0), contexts)
    unit = torch.nn.functional.normalize(step, dim=-1)
    length = (unit * targets).sum((0, 2)) / unit.square().sum((0, 2)).clamp(min=1e-9)
    return (length[:, None] * unit - targets).square().mean().item()


# ---- positions alone --------------------------------------------------------------------------------------------


def _positional(s: Settings, recording: xr.DataTree, model: Any) -> list[Found]:
    steps = steps_of(recording)
    rows = recurrence.positional_rows(model.P.detach()).double()
    there, predicted = positional_descent(s, steps)
    last, expected = rows[-1], there[-1]
    loss = float(final(recording, "training")["held_out_loss"])
    found: list[Found] = [] if steps == s.steps else [("steps until it stopped", steps, _steps_needed(s), True)]
    found += [
        ("loss there", loss, predicted, False),
        ("p_T of the last row", last[-1], expected[-1], True),
        ("p_{T-1} of the last row", last[-2], expected[-2], False),
        ("distance of P", (rows - there).norm() / there.norm(), 0, False),
    ]
    if s.length == 30 and s.learning_rate == 0.5:
        saved = SAVED_POSITIONS.get(s.mu, ())
        found += [(f"p_{{T-{i}}}, as saved by authors", last[-1 - i], value, False) for i, value in enumerate(saved, 1)]
        found += [("sum of the row but p_T, as saved", last[:-1].sum(), 0.526, False)] * (s.mu == 50)
    return found


def _steps_needed(s: Settings) -> int:
    """How many steps take the expected loss of "positional" below where training stops; at most twice its steps."""
    return bisect_left(range(2 * s.steps), True, key=lambda steps: positional_descent(s, steps)[1] < REACHED)


# ---- regression -------------------------------------------------------------------------------------------------


def _regression(s: Settings, recording: xr.DataTree, model: Any) -> list[Found]:
    data, best = final(recording, "recurrence"), autoregression.regression_optimum(s.length, s.d)
    if s.layers > 1:
        predicted = float(data[f"loss_gradient_steps_{s.layers}"]) if s.layers in DESCENTS else math.nan
        return [(f"loss, against {s.layers} steps of one size", float(data["loss"]), predicted, False)]
    loss = held_out_loss(s, model, MANY)
    construction = held_out_loss(s, regression_step(s.d, s.length, best.eta), MANY)
    found = [
        ("loss of the construction", construction, best.loss, True),
        ("loss", loss, best.loss, True),
        ("step", float(data["step_size"]), best.eta, True),
        ("difference of predictions", float(data["prediction_difference"]), 0, False),
        ("cosine of sensitivities", float(data["sensitivity_cosine"]), 1, False),
        ("difference of sensitivities", float(data["model_difference"]), 0, False),
    ]
    found.append(("loss half-way to the construction", held_out_loss(s, _half_way(s, model), MANY), best.loss, False))
    return found


def _half_way(s: Settings, model: Any) -> Any:
    """The mean of the model's products and the construction's, once both queries and keys have the same scale."""
    construction = regression_step(s.d, s.length, autoregression.regression_optimum(s.length, s.d).eta)
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


# ---- numbers of a run -----------------------------------------------------------------------------------------


def describe(s: Settings, recording: xr.DataTree, model: Any, rows: Sequence[Row]) -> Row:
    """Settings and numbers of one run, `rows` being those of `compare`: its loss, those of the references and its own
    on the same sequences (`same_loss`), how near the matrix it applies is to theirs at its longest context, and what is
    particular to a setting."""
    training, data = final(recording, "training"), final(recording, "recurrence")
    row: Row = {"run": s.name, "label": label(s), "seed": s.seed, "setting": s.setting, "model": s.model}
    row |= {name: getattr(s, name) for name in ("d", "length", "heads", "layers", "mu")}
    row |= {"steps": steps_of(recording), "loss": float(training["held_out_loss"])}
    for compared in rows:
        if compared["quantity"] == "loss":
            row["loss"] = compared["measured"]
    row["same_loss"] = float(data["loss"].mean())
    losses = [str(name) for name in data if str(name).startswith("loss_") and not str(name).endswith(("_low", "_high"))]
    row |= {name: float(data[name].mean()) for name in losses}
    if s.setting == "haar":
        row["loss_unit_step"] = _unit_step(s)
    if s.setting != "icl-regression":
        at = data.sel(position=s.length)
        for reference in ("gradient_step", "least_squares"):
            row[f"cosine_{reference}"] = float(at["effective_matrix_cosine"].sel(reference=reference))
        row |= {"decodability": float(data["decodability"][-1]), "decodability_raw": float(data["decodability_raw"])}
    if s.setting == "augmented":
        mean, spread = step_of(s, model)
        signs = products(s, model)[1][: s.d].diagonal().sign().sum().abs()
        row |= {"step": mean, "step_spread": spread, "flipped": int((s.d - signs) / 2)}
        row |= _use(s, model) if s.model in ("blocks", "free") else {}
    if s.diagonal:
        row["reached"] = float(training["reached"])
    return row
