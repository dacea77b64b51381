"""What a run of the autoregression lab shows: measured against the closed-form optimum, and how the model does it.

In: settings, a recording and the trained model. Out: rows of (quantity, measured, predicted), and numbers of a run.
Predictions are those of `measures/closed_forms.py`, which are derived, and of the authors' code where it says so.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr

from metaint.labs.autoregression.products import coupled_loss, half_way, products, step_of, use_of
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
from metaint.measures import autoregression, closed_forms, recurrence
from metaint.toys.linear_attention import regression_step

# What predictors of Haar sequences with d = 5 and 50 vectors of length 1 lose, computed once from 4000 sequences of the
# authors' task with the loss of their `augmented.py`.
HAAR_REFERENCES = {
    "zero": 0.2, "persistence": 0.398, "extrapolation": 1.271, "gradient_steps_1": 0.0627, "gradient_steps_2": 0.0407,
    "gradient_steps_3": 0.0299, "gradient_steps_5": 0.0213, "least_squares": 0.012,
}  # fmt: skip
# p_{T-1}, p_{T-2}, p_{T-3} of the last row that `pe_only.py` saved (it drops p_T), at 30 positions.
SAVED_POSITIONS = {50.0: (0.334, 0.223, 0.129), 300.0: (0.132, 0.123, 0.114)}

Row = dict[str, Any]


class Entry(NamedTuple):
    """One line of a comparison."""

    quantity: str
    measured: Any
    predicted: float
    key: bool = False
    """Whether it is about the optimum that the setting is about."""


def compare(s: Settings, recording: xr.DataTree, model: Any) -> list[Row]:
    """Rows with `run` (a label without the seed), `seed`, `quantity`, `measured`, `predicted` and `key`, whether the
    row is about the optimum that the setting is about."""
    of_setting = {
        "augmented": _augmented, "unitary": _diagonal, "orthogonal": _diagonal, "haar": _haar,
        "positional": _positional, "icl-regression": _regression,
    }[s.setting]  # fmt: skip
    rows = []
    for entry in of_setting(s, recording, model):
        numbers = {"measured": float(entry.measured), "predicted": float(entry.predicted)}
        rows.append({"run": label(s), "seed": s.seed, "quantity": entry.quantity, **numbers, "key": bool(entry.key)})
    return rows


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


def _augmented(s: Settings, recording: xr.DataTree, model: Any) -> list[Entry]:
    optimum = closed_forms.augmented_optimum
    if s.model == "shared":
        optimum = closed_forms.augmented_shared_optimum
    best = optimum(s.length, s.d)
    key = s.model == "diagonal"
    loss = held_out_loss(s, model, MANY)
    entries = [Entry("loss", loss, best.loss, key), Entry("step", step_of(s, model)[0], best.eta, key)]
    if s.model in ("blocks", "free"):
        entries.append(Entry("loss, against coupled values", loss, coupled_loss(s.length, s.d)))
    return entries


# ---- diagonal heads ---------------------------------------------------------------------------------------------


def enough_heads(s: Settings) -> int:
    """How many diagonal heads a loss of 0 takes."""
    return s.d if s.setting == "unitary" else s.d // 2


def _diagonal(s: Settings, recording: xr.DataTree, model: Any) -> list[Entry]:
    """The loss with each number of heads, and with as many as a loss of 0 takes, what their weights are."""
    kind: Any = s.setting
    least = closed_forms.diagonal_minimum(kind, s.d, s.heads)
    enough = enough_heads(s)
    entries = [Entry("loss", float(final(recording, "training")["held_out_loss"]), least, key=True)]
    if s.heads < enough:
        return entries
    data = final(recording, "structure")
    ideal = 0.0 if kind == "unitary" else -0.5
    ratios = data["positional_ratio"].values[1:]
    farthest = ratios[np.argmax(np.abs(ratios - ideal))]
    # With more heads than the minimum takes, nothing makes them orthogonal.
    just_enough = s.heads == enough
    orthogonal = 0.0 if just_enough else math.nan
    return [
        *entries,
        Entry("p_{T-1} / p_T, farthest", farthest, ideal, just_enough),
        Entry("weight of the last two positions, least", data["positional_concentration"].values.min(), 1),
        Entry("error of p_T C, largest", data["block_error"].sel(kind=kind).values.max(), 0),
        Entry("head orthogonality", float(data["head_orthogonality"].values[0]), orthogonal, just_enough),
        Entry("effective rank of C", float(data["effective_rank"].values[0]), enough),
    ]


# ---- sequences that don't commute -------------------------------------------------------------------------------


def _haar(s: Settings, recording: xr.DataTree, model: Any) -> list[Entry]:
    """Mean losses over contexts of the recorded sequences, beside as many gradient steps as there are layers."""
    data = final(recording, "recurrence")
    if s.layers not in DESCENTS:
        return [Entry("loss", float(data["loss"].mean()), math.nan)]
    reference, words = f"gradient_steps_{s.layers}", f"{s.layers} step{'s' * (s.layers > 1)}"
    if s.model == "linear" and s.layers == 1:
        reference, words = "gradient_step", "1 step, one eta"
    measured, predicted = data["loss"], data[f"loss_{reference}"]
    after = data["position"] > s.d
    later = float(measured.where(after).mean()), float(predicted.where(after).mean())
    return [
        Entry(f"loss, against {words}", float(measured.mean()), float(predicted.mean()), key=True),
        Entry(f"the same at T > {s.d}", *later),
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


def _positional(s: Settings, recording: xr.DataTree, model: Any) -> list[Entry]:
    steps = steps_of(recording)
    rows = recurrence.positional_rows(model.P.detach()).double()
    descended, predicted = positional_descent(s, steps)
    last, expected = rows[-1], descended[-1]
    loss = float(final(recording, "training")["held_out_loss"])
    entries = []
    if steps != s.steps:
        entries.append(Entry("steps until it stopped", steps, _steps_needed(s), key=True))
    entries += [
        Entry("loss there", loss, predicted),
        Entry("p_T of the last row", last[-1], float(expected[-1]), key=True),
        Entry("p_{T-1} of the last row", last[-2], float(expected[-2])),
        Entry("distance of P", (rows - descended).norm() / descended.norm(), 0),
    ]
    if s.length == 30 and s.learning_rate == 0.5:
        for i, value in enumerate(SAVED_POSITIONS.get(s.mu, ()), 1):
            entries.append(Entry(f"p_{{T-{i}}}, as saved by authors", last[-1 - i], value))
        if s.mu == 50:
            entries.append(Entry("sum of the row but p_T, as saved", last[:-1].sum(), 0.526))
    return entries


def _steps_needed(s: Settings) -> int:
    """How many steps take the expected loss of "positional" below where training stops; at most twice its steps."""
    return bisect_left(range(2 * s.steps), True, key=lambda steps: positional_descent(s, steps)[1] < REACHED)


# ---- regression -------------------------------------------------------------------------------------------------


def _regression(s: Settings, recording: xr.DataTree, model: Any) -> list[Entry]:
    data, best = final(recording, "recurrence"), closed_forms.regression_optimum(s.length, s.d)
    if s.layers > 1:
        predicted = math.nan
        if s.layers in DESCENTS:
            predicted = float(data[f"loss_gradient_steps_{s.layers}"])
        return [Entry(f"loss, against {s.layers} steps of one size", float(data["loss"]), predicted)]
    construction = held_out_loss(s, regression_step(s.d, s.length, best.eta), MANY)
    return [
        Entry("loss of the construction", construction, best.loss, key=True),
        Entry("loss", held_out_loss(s, model, MANY), best.loss, key=True),
        Entry("step", float(data["step_size"]), best.eta, key=True),
        Entry("difference of predictions", float(data["prediction_difference"]), 0),
        Entry("cosine of sensitivities", float(data["sensitivity_cosine"]), 1),
        Entry("difference of sensitivities", float(data["model_difference"]), 0),
        Entry("loss half-way to the construction", held_out_loss(s, half_way(s, model), MANY), best.loss),
    ]


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
        if s.model in ("blocks", "free"):
            row |= use_of(s, model)
    if s.diagonal:
        row["reached"] = float(training["reached"])
    return row
