"""`RecurrenceProbe`: whether a model of sequences s_{t+1} = W s_t estimates W in context, and how: `/recurrence`.

In: the streams of a pass, and what the pass was about: vectors, the W of each sequence, predictions, and the matrices
that the model applied. Out: losses beside baselines, how near the model is to reference algorithms, and how well W can
be read from each layer. `metaint.recur` makes the passes.

Comparisons after von Oswald et al. 2023 (code: `transformers_learn_icl_by_gd`, train.py), the task after Sander et al.
2024 (2402.05787); effective matrices and decodability are probes of our own. See `measures/recurrence.py`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import xarray as xr
from jaxtyping import Float, Inexact
from torch import Tensor
from torch.nn.functional import pad
from torchmetrics.utilities import dim_zero_cat

from metaint.errors import ActivationError, InputError
from metaint.measures import autoregression, recurrence
from metaint.measures.resampling import bootstrap_interval
from metaint.models.describe import Shape
from metaint.models.inputs import InputWatch
from metaint.probes.probe import Probe, quietly
from metaint.probes.stream import precise
from metaint.scans.assemble import shaped

Variables = dict[str, tuple[tuple[str, ...], Tensor]]

# With each reference; all but the first need the matrices that the model applied.
_COMPARED = ("prediction_difference", "effective_matrix_cosine", "effective_matrix_error")
_COMPARED += ("sensitivity_cosine", "model_difference")
# Under these names with one gradient step alone, as von Oswald et al. compare, and as "reference_" with each reference.
_TO_ONE_STEP = ("prediction_difference", "sensitivity_cosine", "model_difference")
_BASELINES = ("zero", "persistence", "extrapolation")
_LISTS = ("values", "streams", "contexts", "matrices")
# Sequences that the step of several steps is tuned on, at most: its optimum is flat.
_TUNED_ON = 256
# Steps to try, in units of 1 / the mean square of a coordinate, and then the neighbours of the best.
_COARSE = tuple(2 ** (i / 2) for i in range(-10, 5))
_FINE = tuple(2 ** (i / 8) for i in range(-3, 4))


class Descent(NamedTuple):
    """Gradient descent from 0 on the inner loss of a context, as a reference (`autoregression.gradient_descent`)."""

    steps: int
    eta: Float[Tensor, " position"]
    """For contexts of T = 1, 2, ... vectors."""


def tuned_descents(
    vectors: Inexact[Tensor, "batch position d"], steps: Sequence[int] = (1,), eta: float | None = None
) -> dict[str, Descent]:
    """The descents that a model is compared with, with the steps that predict these sequences best.

    "gradient_step" is one step with the same eta (or the one given) in every context, as one layer of linear attention
    on augmented tokens takes. "gradient_steps_k", for each k of `steps`, is k steps with eta = c / (T - 1), steps on
    the mean of the inner loss over transitions: with one eta for all contexts, several steps blow up in long ones. Its
    c is found on a grid, from the first 256 sequences. Raises InputError for a number of steps below 1 and for vectors
    of fewer than 3 positions.
    """
    length = vectors.shape[1] - 1
    if length < 2:
        raise InputError(f"vectors has {length + 1} positions; give at least 3: a transition, and what comes next.")
    shared = _best_step(vectors) if eta is None else eta
    found = {"gradient_step": Descent(1, torch.full((length,), float(shared), dtype=torch.float64))}
    for k in steps:
        found[f"gradient_steps_{k}"] = Descent(k, autoregression.step_sizes(_best_scale(vectors, k), length))
    return found


def _best_step(vectors: Tensor) -> float:
    """The one eta whose single step has the least squared error: in closed form, since that is quadratic in eta."""
    along = square = 0.0
    for part in vectors.split(_TUNED_ON):
        contexts = part[:, :-1]
        step = autoregression.predictions(autoregression.gradient_descent(contexts, 1.0), contexts)
        along += float((step.conj() * part[:, 1:]).real.sum(dtype=precise(part.device)))
        square += float(step.abs().square().sum(dtype=precise(part.device)))
    return along / square if square else 0.0


def _best_scale(vectors: Tensor, steps: int) -> float:
    some = vectors[:_TUNED_ON]
    unit = 1 / max(float(some.abs().square().mean()), torch.finfo(torch.float32).tiny)
    coarse = autoregression.tuned_scale(some, steps, [unit * factor for factor in _COARSE])
    return autoregression.tuned_scale(some, steps, [coarse * factor for factor in _FINE])


class RecurrenceProbe(Probe):
    """Folds passes on sequences s_1, s_2, ... into how the model predicts what comes next, and what W it goes by.

    Attach it to a pass on vectors, and then tell it what the pass was about:

        with metaint.attach(model, probe):
            predicted = model(vectors[:, :-1])
        probe.update(vectors, matrices, predicted)

    `metaint.recur` does that, also on models of tokens, and makes the effective matrices (without which the variables
    of that name, `sensitivity_cosine`, `model_difference` and `step_size` are NaN). Positions are context lengths T, at
    which s_{T+1} is predicted. References are "truth" (W itself), the `descents` and "least_squares" (of least norm).
    W is decoded from the stream at T = `decode_at` (default: the last of the pass), from 10 sequences on.

    The null of a cosine is its mean over all pairs of different sequences: the model's matrix beside the reference of
    another context. State: for each sequence some 25 numbers a position, one row of the stream a layer, its context
    and W. Merge probes with the same descents.
    """

    group = "recurrence"
    audits = ("stream",)

    values: list[Float[Tensor, "sequence slot position"]]
    streams: list[Float[Tensor, "sequence layer feature"]]
    contexts: list[Inexact[Tensor, "sequence position d"]]
    matrices: list[Inexact[Tensor, "sequence d d"]]

    def __init__(self, descents: Mapping[str, Descent], decode_at: int | None = None, seed: int = 0) -> None:
        super().__init__()
        if decode_at is not None and decode_at < 1:
            raise InputError(f"decode_at is {decode_at}; give the length of a context, at least 1.")
        self.descents, self.decode_at, self.seed = dict(descents), decode_at, seed
        self.references = ("truth", *self.descents, "least_squares")
        for name in _LISTS:
            self.add_state(name, [], dist_reduce_fx="cat")
        for name in ("units", "unit_counts"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")
        self._slots = ["loss", *(f"loss_{name}" for name in (*_BASELINES, *self.references)), "step_size"]
        self._slots += [f"{name} {reference}" for name in _COMPARED for reference in self.references]
        self._rows: dict[int, Tensor] = {}
        self._last = 0

    # ---- passes -------------------------------------------------------------------------------------------------

    def hook_names(self, shape: Shape) -> list[str]:
        names = [f"blocks.{layer}.hook_resid_pre" for layer in range(shape.n_layers)]
        return [*names, f"blocks.{shape.n_layers - 1}.hook_resid_post"]

    def read(self, name: str, activation: Tensor, watch: InputWatch) -> None:
        """Keep the row of a stream that W will be decoded from, of the last pass alone."""
        _, number, part = name.split(".")
        rows = activation.shape[1]
        self._last = self.decode_at or rows
        if self._last > rows:
            raise InputError(f"decode_at is {self._last}, and the pass has {rows} positions; give one of them.")
        self._rows[int(number) + (part == "hook_resid_post")] = _features(activation[:, self._last - 1])

    def update(
        self,
        vectors: Inexact[Tensor, "batch position d"],
        matrices: Inexact[Tensor, "batch d d"],
        predicted: Inexact[Tensor, "batch context d"],
        found: Inexact[Tensor, "batch chosen d d"] | None = None,
        positions: Sequence[int] | None = None,
    ) -> None:
        """Fold in a batch that the model has just read: its sequences, each W, and what the model predicted.

        `predicted` at index T - 1 is of s_{T+1}, for all T that have one (further ones are left out); `found` are
        effective matrices at contexts of `positions` vectors (by default, all). Raises InputError for shapes that don't
        fit and without a pass, ActivationError for predictions that aren't finite.
        """
        contexts = vectors.detach()[:, :-1]
        self._check(vectors, matrices, predicted)
        index = indices_of(positions, contexts.shape[1])
        with quietly(vectors.device.type):
            predicted = predicted.detach()[:, : contexts.shape[1]].to(vectors.dtype)
            matrices = matrices.detach().to(vectors.dtype)
            values = self._losses(vectors.detach(), predicted)
            if found is not None:
                found = found.detach().to(vectors.dtype)
                scale = recurrence.projection_scale(found, autoregression.moments(contexts).cross[:, index])
                values["step_size"] = _at(index, scale, contexts.shape[1])
                self._fold_units(0, found, index, contexts.shape[1])
            for i, (name, reference) in enumerate(self._matrices(contexts, matrices).items()):
                own = autoregression.predictions(reference, contexts)
                values[f"loss_{name}"] = _loss(own, vectors.detach())
                compared = {"prediction_difference": recurrence.prediction_difference(predicted[None], own[None])}
                if found is not None:
                    there = _compare(found, reference[:, index])
                    compared |= {key: _at(index, value, contexts.shape[1]) for key, value in there.items()}
                    self._fold_units(i + 1, reference[:, index], index, contexts.shape[1])
                values |= {f"{key} {name}": value for key, value in compared.items()}
            self._keep(values, contexts, matrices)

    def _check(self, vectors: Tensor, matrices: Tensor, predicted: Tensor) -> None:
        batch, length, d = vectors.shape
        if matrices.shape != (batch, d, d):
            raise InputError(f"matrices is {list(matrices.shape)}; give one W for each sequence, {[batch, d, d]}.")
        if predicted.ndim != 3 or predicted.shape[::2] != (batch, d) or predicted.shape[1] < length - 1:
            raise InputError(
                f"predicted is {list(predicted.shape)}; give a prediction for each context of vectors, "
                f"{[batch, length - 1, d]}."
            )
        if self.values and self.values[0].shape[2] != length - 1:
            raise InputError(
                f"vectors has {length} positions, and earlier ones had {self.values[0].shape[2] + 1}; give as many."
            )
        if any(descent.eta.shape != (length - 1,) for descent in self.descents.values()):
            raise InputError(f"descents isn't made for {length - 1} contexts; give tuned_descents of such vectors.")
        if not predicted[:, : length - 1].isfinite().all():
            raise ActivationError("the predictions hold NaN or infinity: the weights or activations overflow.")
        if len(self._rows) != (self.shape.n_layers + 1 if self.shape else -1) or len(self._rows[0]) != batch:
            raise InputError("no pass on these vectors was read; run the model inside metaint.attach, then update.")

    def _matrices(self, contexts: Tensor, matrices: Tensor) -> dict[str, Tensor]:
        """What each reference says W is, after every context [batch, position, d, d]."""
        found = {"truth": matrices[:, None].expand(-1, contexts.shape[1], -1, -1)}
        for name, (steps, eta) in self.descents.items():
            found[name] = autoregression.gradient_descent(contexts, eta.to(contexts.device), steps)
        return {**found, "least_squares": autoregression.least_squares(contexts)}

    def _losses(self, vectors: Tensor, predicted: Tensor) -> dict[str, Tensor]:
        guesses = autoregression.baselines(vectors[:, :-1])
        return {"loss": _loss(predicted, vectors)} | {f"loss_{n}": _loss(g, vectors) for n, g in guesses.items()}

    def _fold_units(self, slot: int, matrices: Tensor, index: list[int], length: int) -> None:
        """Sums of matrices of length 1, from which the mean cosine over pairs of sequences follows."""
        full = precise(matrices.device)
        if self.units.ndim == 0:
            size, d = (1 + len(self.references), length), matrices.shape[-1]
            dtype = full.to_complex() if matrices.is_complex() else full
            self.units = torch.zeros(*size, d, d, dtype=dtype, device=matrices.device)
            self.unit_counts = torch.zeros(*size, dtype=full, device=matrices.device)
        norms = torch.linalg.matrix_norm(matrices)
        units = torch.where(norms[..., None, None] > 0, matrices / norms[..., None, None], 0.0)
        self.units[slot, index] += units.sum(0).to(self.units.dtype)
        self.unit_counts[slot, index] += (norms > 0).sum(0).to(full)

    def _keep(self, values: Mapping[str, Tensor], contexts: Tensor, matrices: Tensor) -> None:
        full = precise(contexts.device)
        nothing = torch.full(contexts.shape[:2], math.nan, device=contexts.device)
        self.values.append(torch.stack([values.get(slot, nothing).to(full) for slot in self._slots], 1))
        self.streams.append(torch.stack([self._rows[layer] for layer in sorted(self._rows)], 1))
        self.contexts.append(contexts[:, : self._last].clone())
        self.matrices.append(matrices.clone())
        self._rows = {}

    # ---- results ------------------------------------------------------------------------------------------------

    def compute(self) -> Variables:
        """Every variable of `/recurrence` by name, with its dimensions."""
        if len(self.values) == 0:
            return {}
        values = dim_zero_cat(self.values).cpu()
        known = values.isfinite()
        sums, counts = values.where(known, 0.0), known.to(values.dtype)
        bounds = dict(zip(("_low", "_high"), bootstrap_interval(sums, counts), strict=True))
        found: Variables = {}
        for end, table in {"": sums.sum(0) / counts.sum(0), **bounds}.items():
            of_slot = dict(zip(self._slots, table, strict=True))
            found |= {f"{slot}{end}": (("position",), row) for slot, row in of_slot.items() if " " not in slot}
            for name in _COMPARED:
                rows = {reference: of_slot[f"{name} {reference}"] for reference in self.references}
                if name in _TO_ONE_STEP:
                    step = rows.get("gradient_step", torch.full_like(rows["truth"], math.nan))
                    found[f"{name}{end}"] = (("position",), step)
                    name = f"reference_{name}"
                found[f"{name}{end}"] = (("reference", "position"), torch.stack(list(rows.values())))
        slots = [self._slots.index(f"effective_matrix_cosine {reference}") for reference in self.references]
        null = self._null(sums[:, slots].sum(0), counts[:, slots].sum(0))
        found["effective_matrix_cosine_null"] = (("reference", "position"), null)
        return found | self._decoded()

    def _null(self, within: Tensor, both: Tensor) -> Float[Tensor, "reference position"]:
        """Mean cosine over pairs of different sequences: all pairs, less those within a sequence."""
        if self.units.ndim == 0:
            return torch.full_like(within, math.nan)
        units, counts = self.units.cpu(), self.unit_counts.cpu()
        total = (units[0].conj() * units[1:]).real.sum((-2, -1))
        pairs = counts[0] * counts[1:] - both
        return (total - within) / torch.where(pairs > 0, pairs, math.nan)

    def _decoded(self) -> Variables:
        """R² of W from the stream at each layer, of the W of another sequence, and from the raw context."""
        streams, contexts, matrices = (dim_zero_cat(getattr(self, name)).cpu() for name in _LISTS[1:])
        table = torch.full((2, streams.shape[1]), math.nan, dtype=torch.float64)
        raw = math.nan
        if len(matrices) >= recurrence.FEWEST:
            targets = _features(matrices.flatten(1))
            for layer, features in enumerate(streams.unbind(1)):
                own = recurrence.decodability(features, targets, seed=self.seed)
                other = recurrence.decodability(features, targets.roll(1, 0), own.penalty, self.seed)
                table[:, layer] = torch.tensor([own.r2, other.r2])
            raw = recurrence.decodability(_features(contexts.flatten(1)), targets, seed=self.seed).r2
        found: Variables = {"decodability": (("layer",), table[0]), "decodability_null": (("layer",), table[1])}
        return found | {"decodability_raw": ((), torch.tensor(raw))}

    def to_dataset(self) -> xr.Dataset:
        variables = self.compute()
        if not variables:
            return xr.Dataset(attrs={"tokens_seen": 0, "sequences": 0})
        sequences, length = sum(len(part) for part in self.values), self.values[0].shape[2]
        coords: dict[str, Any] = {
            "position": range(1, length + 1),
            "reference": list(self.references),
            "layer": range(self.streams[0].shape[1]),
        }
        etas = torch.full((len(self.references), length), math.nan, dtype=torch.float64)
        for row, descent in enumerate(self.descents.values(), 1):
            etas[row] = descent.eta
        variables["eta"] = (("reference", "position"), etas)
        data = xr.Dataset({k: shaped(dims, value, coords) for k, (dims, value) in variables.items()}, coords)
        for name in data.data_vars:
            if str(name) in DESCRIPTIONS or str(name).startswith("loss_"):
                data[name].attrs["description"] = DESCRIPTIONS.get(str(name)) or _of_loss(str(name))
        _, decoded_at, d = self.contexts[0].shape
        seen = {"sequences": sequences, "tokens_seen": sequences * length}
        data.attrs.update(seen, d=d, decoded_at=decoded_at)
        return data


def indices_of(positions: Sequence[int] | None, length: int) -> list[int]:
    """Indices of contexts by their lengths, each once."""
    chosen = list(range(1, length + 1)) if positions is None else [int(position) for position in positions]
    if len(set(chosen)) < len(chosen) or not all(1 <= position <= length for position in chosen):
        raise InputError(f"positions is {chosen}; give lengths of contexts from 1 to {length}, each once.")
    return [position - 1 for position in chosen]


def _at(index: list[int], values: Float[Tensor, "batch chosen"], length: int) -> Float[Tensor, "batch position"]:
    found = values.new_full((len(values), length), math.nan)
    found[:, index] = values
    return found


def _loss(guess: Tensor, vectors: Tensor) -> Float[Tensor, "batch position"]:
    """Of guesses of s_2, s_3, ..., all but those of s_1."""
    return autoregression.squared_error(pad(guess, (0, 0, 0, 1)), vectors)


def _compare(found: Tensor, reference: Tensor) -> dict[str, Float[Tensor, "batch chosen"]]:
    return {
        "effective_matrix_cosine": recurrence.matrix_cosine(found, reference),
        "effective_matrix_error": recurrence.relative_error(found, reference),
        "sensitivity_cosine": recurrence.sensitivity_cosine(found[None], reference[None]),
        "model_difference": recurrence.model_difference(found[None], reference[None]),
    }


def _features(values: Tensor) -> Float[Tensor, "*rest feature"]:
    """A copy in float32 or better, as it is now; real and imaginary parts side by side."""
    values = torch.view_as_real(values).flatten(-2) if values.is_complex() else values
    return values.to(torch.promote_types(values.dtype, torch.float32), copy=True)


def _of_loss(name: str) -> str:
    return f"the same of {name.removeprefix('loss_').replace('_', ' ')}, on the same sequences"


_REFERENCE = "with W itself (truth), gradient descent, or least squares of least norm, from the same context"
_NEEDS = "NaN at contexts whose effective matrix wasn't read"
DESCRIPTIONS = {
    "loss": "mean squared error of the prediction of s_{T+1} from s_1..s_T, averaged over coordinates",
    "loss_zero": "the same of a prediction of 0",
    "loss_persistence": "the same of the prediction s_T",
    "loss_extrapolation": "the same of the prediction 2 s_T - s_{T-1}",
    "loss_truth": "the same of W s_T: what noise leaves",
    "loss_gradient_step": "the same of one gradient step from 0 on the inner loss, with one eta for all contexts",
    "prediction_difference": "mean absolute difference of the prediction from that of one gradient step (one eta for "
    "all contexts), over coordinates",
    "sensitivity_cosine": "mean cosine of each output's gradient in s_T, a row of the effective matrix, with that of "
    f"one gradient step; {_NEEDS}",
    "model_difference": f"mean length of the difference of these gradients; {_NEEDS}",
    "reference_prediction_difference": f"mean absolute difference of the prediction, over coordinates, {_REFERENCE}",
    "reference_sensitivity_cosine": f"mean cosine of each output's gradient in s_T with the reference's; {_NEEDS}",
    "reference_model_difference": f"mean length of the difference of these gradients; {_NEEDS}",
    "effective_matrix_cosine": "mean cosine of d prediction / d s_T with the matrix of the reference, both as long "
    f"vectors; {_NEEDS}",
    "effective_matrix_cosine_null": "mean cosine with the reference's matrix for another sequence, over all pairs",
    "effective_matrix_error": "mean of ||d prediction / d s_T - the reference's matrix|| / ||the reference's matrix||; "
    f"{_NEEDS}",
    "step_size": "mean of the eta for which eta sum_t s_t s_{t-1}* is nearest to the effective matrix: the step that a "
    "gradient step would have",
    "eta": "step sizes of the descents at each context length",
    "decodability": "R² of W, entry by entry, read by ridge regression from the stream at T = decoded_at (layer 0 is "
    "the embedding), on sequences that weren't fitted; NaN below 10 sequences",
    "decodability_null": "the same for the W of another sequence: 0 or a little below, but for chance",
    "decodability_raw": "the same from the raw context s_1..s_T: what a linear map tells before any model; near 1 "
    "where the W commute and sequences start alike, since s_2 then tells W",
}
