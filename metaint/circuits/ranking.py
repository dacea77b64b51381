"""Heads in the order of a score: of a variable of a scan, or of how much they write.

In: a scan, or an experiment. Out: a score for each head, and heads with the highest first.
"""

from collections.abc import Mapping

import numpy as np
import torch
import xarray as xr
from einops import einsum

from metaint.circuits.clean import Clean, clean_pass
from metaint.circuits.experiment import Experiment
from metaint.circuits.parts import Head
from metaint.circuits.subject import Subject
from metaint.errors import InputError
from metaint.models.reading import steady, widen

Scores = Mapping[Head, float]
NORM = "output_norm"


def scores_of(scan: xr.DataTree | xr.Dataset, score: str, subject: Subject) -> Scores:
    """A variable (layer, head) of a scan by head, those left out that the scan knows nothing of.

    Raises InputError for a scan that has no such variable, or is of another model, and where it is known of no head.
    """
    known = head_variables(scan)
    if score not in known:
        names = ", ".join(known)
        raise InputError(
            f"score is {score!r}: choose a variable (layer, head) of the scan ({names or 'which has none'})."
        )
    values, shape = known[score], subject.shape
    sizes = (values.sizes["layer"], values.sizes["head"])
    if sizes != (shape.n_layers, shape.n_heads):
        raise InputError(
            f"scan holds {sizes[0]} layers x {sizes[1]} heads, and the model has {shape.n_layers} x {shape.n_heads}: "
            "give a scan of this model."
        )
    by_place = values.transpose("layer", "head").values
    scores = {head: float(by_place[head]) for head in subject.heads if not np.isnan(by_place[head])}
    if not scores:
        raise InputError(f"score is {score!r}, which this scan knows of no head: scan tokens on which it is defined.")
    return scores


def head_variables(scan: xr.DataTree | xr.Dataset) -> dict[str, xr.DataArray]:
    """The variables (layer, head) of a scan or of a group of it, by name; /heads and /outputs come first.

    Raises InputError for what is no scan, and for a recording over several steps.
    """
    if not isinstance(scan, xr.DataTree | xr.Dataset):
        raise InputError(f"scan is a {type(scan).__name__}: give a scan of the model, or a group of it.")
    groups = [scan]
    if isinstance(scan, xr.DataTree) and not scan.data_vars:
        names = sorted(scan.children, key=lambda name: ("heads", "outputs").count(name), reverse=True)
        groups = [scan.children[name] for name in names]
    known: dict[str, xr.DataArray] = {}
    for group in groups:
        if "step" in group.dims:
            raise InputError("scan is a recording over steps: give one of them, such as scan.isel(step=-1).")
        for name, values in group.data_vars.items():
            if set(values.dims) == {"layer", "head"}:
                known.setdefault(str(name), values)
    return known


def ranked(scores: Scores) -> list[Head]:
    """Heads with the highest score first, ties in the order of layers and heads."""
    return sorted(scores, key=lambda head: (-scores[head], head))


def output_norms(experiment: Experiment) -> Scores:
    """The mean length of what each head writes, z W_O, at all positions of the experiment's tokens but the first, as
    `/outputs` has it."""
    subject, sums = experiment.subject, dict[Head, float]()
    with steady(subject.model):
        for tokens in experiment.tokens.split(experiment.batch_size):
            clean = clean_pass(subject, tokens, torch.zeros_like(tokens, dtype=torch.bool))
            for head, total in _lengths(clean).items():
                sums[head] = sums.get(head, 0.0) + total
    count = experiment.tokens[:, 1:].numel()
    return {head: total / count for head, total in sums.items()}


def _lengths(clean: Clean) -> Scores:
    """The sum of lengths over a batch, by head."""
    totals: dict[Head, float] = {}
    for layer in clean.subject.shape.attending:
        z, weight = widen(clean.z[layer][:, 1:]), widen(clean.subject.output_weights(layer))
        # ||z W||^2 = z W W^T z^T, which is as wide as a head and not as the stream.
        gram = einsum(weight, weight, "head d d_model, head e d_model -> head d e")
        mixed = einsum(z, gram, "batch position head d, head d e -> batch position head e")
        lengths = (mixed * z).sum(-1).clamp(min=0).sqrt().sum((0, 1))
        totals |= {(layer, head): float(length) for head, length in enumerate(lengths)}
    return totals
