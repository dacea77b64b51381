"""`RecurrenceProbe`: whether a model of sequences s_{t+1} = W s_t estimates W in context, and how: `/recurrence`.

In: the streams of a pass, and what the pass was about: vectors, the W of each sequence, predictions, and the matrices
that the model applied. Out: losses beside baselines, how near the model is to reference algorithms, and how well W can
be read from each layer. `metaint.recur` makes the passes.

Comparisons after von Oswald et al. 2023 (code: `transformers_learn_icl_by_gd`, train.py), the task after Sander et al.
2024 (2402.05787); effective matrices and decodability are probes of our own. See `measures/recurrence.py`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xarray as xr
from einops import repeat
from jaxtyping import Float, Inexact
from torch import Tensor
from torch.nn.functional import pad
from torchmetrics.utilities import dim_zero_cat

from metaint.errors import ActivationError, InputError, door
from metaint.measures import autoregression, recurrence
from metaint.models.describe import Shape
from metaint.models.inputs import InputWatch
from metaint.models.reading import quietly
from metaint.probes.descents import Descent
from metaint.probes.means import Means, as_dataset
from metaint.probes.probe import Probe
from metaint.probes.recurrence_variables import POSITION, REFERENCE, variables_of
from metaint.probes.stream import precise

_LISTS = ("values", "streams", "contexts", "matrices")


class RecurrenceProbe(Probe):
    """Folds passes on sequences s_1, s_2, ... into how the model predicts what comes next, and what W it goes by.

    Attach it to a pass on vectors, and then tell it what the pass was about:

        with metaint.attach(model, probe):
            predicted = model(vectors[:, :-1])
        probe.read_predictions(vectors, matrices, predicted)

    `metaint.recur` does that, also on models of tokens, and makes the effective matrices (without which the variables
    of that name, `sensitivity_cosine`, `model_difference` and `step_size` are NaN). Positions are context lengths T, at
    which s_{T+1} is predicted. References are "truth" (W itself), the `descents` and "least_squares" (of least norm).
    W is decoded from the stream at T = `decode_at` (default: the last of the pass), from 10 sequences on.

    The null of a cosine is its mean over all pairs of different sequences: the model's matrix beside the reference of
    another context. State: for each sequence some 25 numbers a position, one row of the stream a layer, its context
    and W. Merge probes with the same descents.

    >>> import metaint
    >>> from metaint.probes.descents import tuned_descents
    >>> from metaint.toys.linear_attention import gradient_step
    >>> vectors, matrices = metaint.tasks.autoregressive("haar", d=3, length=7, batch=12)
    >>> model, probe = gradient_step(3, 0.15), metaint.RecurrenceProbe(tuned_descents(vectors, (1,)))
    >>> with metaint.attach(model, probe):
    ...     predicted = model(vectors[:, :-1])
    >>> probe.read_predictions(vectors, matrices, predicted)
    >>> probe.to_scan()["recurrence"]["loss"].dims
    ('position',)
    """

    group = "recurrence"
    audits = ("stream",)

    values: list[Float[Tensor, "sequence slot position"]]
    streams: list[Float[Tensor, "sequence layer feature"]]
    contexts: list[Inexact[Tensor, "sequence position d"]]
    matrices: list[Inexact[Tensor, "sequence d d"]]

    @door
    def __init__(self, descents: Mapping[str, Descent], decode_at: int | None = None, seed: int = 0) -> None:
        super().__init__()
        if decode_at is not None and decode_at < 1:
            raise InputError(f"decode_at is {decode_at}: give the length of a context, at least 1.")
        self.descents, self.decode_at, self.seed = dict(descents), decode_at, seed
        self.references = ("truth", *self.descents, "least_squares")
        for name in _LISTS:
            self.add_state(name, [], dist_reduce_fx="cat")
        for name in ("units", "unit_counts"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")
        self._variables = variables_of(self.references)
        self._means = Means(self._variables)
        self._rows: dict[int, Tensor] = {}
        self._last = 0

    # ---- passes -------------------------------------------------------------------------------------------------

    def hook_names(self, shape: Shape) -> list[str]:
        names = [f"blocks.{layer}.hook_resid_pre" for layer in range(shape.n_layers)]
        return [*names, f"blocks.{shape.n_layers - 1}.hook_resid_post"]

    def update(self, name: str, activation: Float[Tensor, "batch position d_model"], watch: InputWatch) -> None:
        """Keep the row of a stream that W will be decoded from, of the last pass alone."""
        _, number, part = name.split(".")
        rows = activation.shape[1]
        self._last = self.decode_at or rows
        if self._last > rows:
            raise InputError(f"decode_at is {self._last}, and the pass has {rows} positions: give one of them.")
        self._rows[int(number) + (part == "hook_resid_post")] = _features(activation[:, self._last - 1])

    def read_predictions(
        self,
        vectors: Inexact[Tensor, "batch position d"],
        matrices: Inexact[Tensor, "batch d d"],
        predicted: Inexact[Tensor, "batch context d"],
        effective: Inexact[Tensor, "batch chosen d d"] | None = None,
        positions: Sequence[int] | None = None,
    ) -> None:
        """Fold in a batch that the model has just read: its sequences, each W, and what the model predicted.

        `predicted` at index T - 1 is of s_{T+1}, for all T that have one (further ones are left out); `effective`
        are its matrices at contexts of `positions` vectors (by default, all). Raises InputError for shapes that don't
        fit and without a pass, ActivationError for predictions that aren't finite.
        """
        contexts = vectors.detach()[:, :-1]
        self._check(vectors, matrices, predicted)
        index = indices_of(positions, contexts.shape[1])
        with quietly(vectors.device.type):
            predicted = predicted.detach()[:, : contexts.shape[1]].to(vectors.dtype)
            matrices = matrices.detach().to(vectors.dtype)
            values = self._losses(vectors.detach(), predicted)
            if effective is not None:
                effective = effective.detach().to(vectors.dtype)
                scale = recurrence.projection_scale(effective, autoregression.moments(contexts).cross[:, index])
                values["step_size"] = _at(index, scale, contexts.shape[1])
                self._fold_units(0, effective, index, contexts.shape[1])
            for i, (name, reference) in enumerate(self._matrices(contexts, matrices).items()):
                own = autoregression.predictions(reference, contexts)
                values[f"loss_{name}"] = _loss(own, vectors.detach())
                difference = recurrence.prediction_difference(predicted[None], own[None])
                values[f"prediction_difference {name}"] = difference
                if effective is not None:
                    for key, value in _compare(effective, reference[:, index]).items():
                        values[f"{key} {name}"] = _at(index, value, contexts.shape[1])
                    self._fold_units(i + 1, reference[:, index], index, contexts.shape[1])
            self._keep(values, contexts, matrices)
        self._read_something()

    def _check(self, vectors: Tensor, matrices: Tensor, predicted: Tensor) -> None:
        batch, length, d = vectors.shape
        if matrices.shape != (batch, d, d):
            raise InputError(f"matrices is {list(matrices.shape)}: give one W for each sequence, {[batch, d, d]}.")
        if predicted.ndim != 3 or predicted.shape[::2] != (batch, d) or predicted.shape[1] < length - 1:
            raise InputError(
                f"predicted is {list(predicted.shape)}: give a prediction for each context of vectors, "
                f"{[batch, length - 1, d]}."
            )
        if self.values and self.values[0].shape[2] != length - 1:
            raise InputError(
                f"vectors has {length} positions, and earlier ones had {self.values[0].shape[2] + 1}: give as many."
            )
        if any(descent.eta.shape != (length - 1,) for descent in self.descents.values()):
            raise InputError(f"descents isn't made for {length - 1} contexts: give tuned_descents of such vectors.")
        if not predicted[:, : length - 1].isfinite().all():
            raise ActivationError("the predictions hold NaN or infinity: the weights or activations overflow.")
        if not self._rows or len(self._rows) != self.shape.n_layers + 1 or len(self._rows[0]) != batch:
            raise InputError(
                "no pass on these vectors was read: run the model inside metaint.attach, then read_predictions."
            )

    def _matrices(self, contexts: Tensor, matrices: Tensor) -> dict[str, Tensor]:
        """What each reference says W is, after every context [batch, position, d, d]."""
        length = contexts.shape[1]
        says = {"truth": repeat(matrices, "batch out d -> batch position out d", position=length)}
        for name, (steps, eta) in self.descents.items():
            says[name] = autoregression.gradient_descent(contexts, eta.to(contexts.device), steps)
        return {**says, "least_squares": autoregression.least_squares(contexts)}

    def _losses(self, vectors: Tensor, predicted: Tensor) -> dict[str, Tensor]:
        losses = {"loss": _loss(predicted, vectors)}
        for name, guess in autoregression.baselines(vectors[:, :-1]).items():
            losses[f"loss_{name}"] = _loss(guess, vectors)
        return losses

    def _fold_units(self, slot: int, matrices: Tensor, index: list[int], length: int) -> None:
        """Sums of matrices of length 1, from which the mean cosine over pairs of sequences follows."""
        full = precise(matrices.device)
        if self.units.ndim == 0:
            size, d = (1 + len(self.references), length), matrices.shape[-1]
            dtype = full.to_complex() if matrices.is_complex() else full
            self.units = torch.zeros(*size, d, d, dtype=dtype, device=matrices.device)
            self.unit_counts = torch.zeros(*size, dtype=full, device=matrices.device)
        lengths = torch.linalg.matrix_norm(matrices, keepdim=True)
        units = torch.where(lengths > 0, matrices / lengths, 0.0)
        self.units[slot, index] += units.sum(0).to(self.units.dtype)
        self.unit_counts[slot, index] += (lengths > 0).sum((0, 2, 3)).to(full)

    def _keep(self, values: Mapping[str, Tensor], contexts: Tensor, matrices: Tensor) -> None:
        full = precise(contexts.device)
        table = self._means.room(*contexts.shape[:2], dtype=full, device=contexts.device).fill_(math.nan)
        for slot, value in values.items():
            self._means.of(table, slot)[:] = value
        self.values.append(table)
        self.streams.append(torch.stack([self._rows[layer] for layer in sorted(self._rows)], 1))
        self.contexts.append(contexts[:, : self._last].clone())
        self.matrices.append(matrices.clone())
        self._rows = {}

    # ---- results ------------------------------------------------------------------------------------------------

    def compute(self) -> dict[str, Tensor]:
        """Every variable of `/recurrence` by name."""
        if len(self.values) == 0:
            return {}
        table = dim_zero_cat(self.values).cpu()
        values = self._means.compute(table, *POSITION) | self._means.compute(table, *REFERENCE)
        cosines = table[:, self._means.index([f"effective_matrix_cosine {name}" for name in self.references])]
        known = cosines.isfinite()
        null = self._null(cosines.where(known, 0.0).sum(0), known.to(table.dtype).sum(0))
        return values | {"effective_matrix_cosine_null": null} | self._decoded()

    def _null(self, within: Tensor, both: Tensor) -> Float[Tensor, "reference position"]:
        """Mean cosine over pairs of different sequences: all pairs, less those within a sequence."""
        if self.units.ndim == 0:
            return torch.full_like(within, math.nan)
        units, counts = self.units.cpu(), self.unit_counts.cpu()
        total = (units[0].conj() * units[1:]).real.sum((-2, -1))
        pairs = counts[0] * counts[1:] - both
        return (total - within) / torch.where(pairs > 0, pairs, math.nan)

    def _decoded(self) -> dict[str, Tensor]:
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
        return {"decodability": table[0], "decodability_null": table[1], "decodability_raw": torch.tensor(raw)}

    def to_dataset(self) -> xr.Dataset:
        values = self.compute()
        if not values:
            return xr.Dataset(attrs={"tokens_seen": 0, "sequences": 0})
        sequences, length = sum(len(part) for part in self.values), self.values[0].shape[2]
        coords: dict[str, Any] = {
            "position": range(1, length + 1),
            "reference": list(self.references),
            "layer": range(self.streams[0].shape[1]),
        }
        values["eta"] = torch.full((len(self.references), length), math.nan, dtype=torch.float64)
        for row, descent in enumerate(self.descents.values(), 1):
            values["eta"][row] = descent.eta
        data = as_dataset(values, self._variables, coords)
        _, decoded_at, d = self.contexts[0].shape
        seen = {"sequences": sequences, "tokens_seen": sequences * length}
        data.attrs.update(seen, d=d, decoded_at=decoded_at)
        return data


def indices_of(positions: Sequence[int] | None, length: int) -> list[int]:
    """Indices of contexts by their lengths, each once."""
    chosen = list(range(1, length + 1)) if positions is None else [int(position) for position in positions]
    if len(set(chosen)) < len(chosen) or not all(1 <= position <= length for position in chosen):
        raise InputError(f"positions is {chosen}: give lengths of contexts from 1 to {length}, each once.")
    return [position - 1 for position in chosen]


def _at(index: list[int], values: Float[Tensor, "batch chosen"], length: int) -> Float[Tensor, "batch position"]:
    whole = values.new_full((len(values), length), math.nan)
    whole[:, index] = values
    return whole


def _loss(guess: Tensor, vectors: Tensor) -> Float[Tensor, "batch position"]:
    """The error of guesses of s_2, s_3, ..., which are all but those of s_1."""
    return autoregression.squared_error(pad(guess, (0, 0, 0, 1)), vectors)


def _compare(effective: Tensor, reference: Tensor) -> dict[str, Float[Tensor, "batch chosen"]]:
    return {
        "effective_matrix_cosine": recurrence.matrix_cosine(effective, reference),
        "effective_matrix_error": recurrence.relative_error(effective, reference),
        "sensitivity_cosine": recurrence.sensitivity_cosine(effective[None], reference[None]),
        "model_difference": recurrence.model_difference(effective[None], reference[None]),
    }


def _features(values: Tensor) -> Float[Tensor, "*rest feature"]:
    """A copy in float32 or better, as it is now; real and imaginary parts side by side."""
    values = torch.view_as_real(values).flatten(-2) if values.is_complex() else values
    return values.to(torch.promote_types(values.dtype, torch.float32), copy=True)
