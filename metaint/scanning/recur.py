"""Does a model estimate W in context? `recur` feeds it sequences s_{t+1} = W s_t and reads what it makes of them.

In: a model and sequences with their W: a model of `metaint.models` that takes vectors, or any causal TransformerLens
model, whose embeddings are replaced at `hook_embed`. Out: `/recurrence`. After Sander et al. 2024 (2402.05787).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Inexact
from torch import Tensor
from tqdm.auto import tqdm

from metaint.errors import InputError, door
from metaint.measures import recurrence
from metaint.models.describe import check_open, is_causal
from metaint.models.reading import quietly, steady
from metaint.probes.descents import tuned_descents
from metaint.probes.recurrence import RecurrenceProbe, indices_of
from metaint.scanning.feeding import Predict, predictor, takes_vectors
from metaint.scanning.given import check_batch_size, check_seed
from metaint.scanning.scan import attach
from metaint.scans.assemble import assemble

# Contexts whose effective matrices are read by default, at most: each costs d further passes.
_CHOSEN = 12


@door
def recur(
    model: Any,
    vectors: Inexact[Tensor, "batch position d"],
    matrices: Inexact[Tensor, "batch d d"],
    *,
    positions: Sequence[int] | None = None,
    steps: Sequence[int] = (1,),
    eta: float | None = None,
    hold_values: bool | None = None,
    decode_at: int | None = None,
    embedding: Float[Tensor, "d d_model"] | None = None,
    readout: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
    attributes: Mapping[str, Any] | None = None,
) -> xr.DataTree:
    """Compare a model's predictions of s_{T+1}, and the matrix it goes by, with gradient descent and least squares.

    - `vectors` [batch, position, d], `matrices` [batch, d, d]: those of `tasks.autoregressive`.
    - `positions`: lengths of contexts whose effective matrices are read (default: up to 12, evenly from 2 on; `()` for
      none, which saves d passes each).
    - `steps`: numbers k of gradient steps to compare with (`tuned_descents`).
    - `eta`: the size of one gradient step; by default the best on these sequences.
    - `hold_values`: hold keys and values of all layers while s_T changes, so that it acts as a query alone: the matrix
      that linear attention applies. Otherwise s_T is also a value, which adds eta <s_{T-1}, s_T> I to one gradient
      step's matrix. Default: True for linear attention on augmented tokens, False for others, where s_T reaches the
      prediction by other ways, or (diagonal heads, whose query is s_{T-1}) by values alone. For models that take
      vectors.
    - `decode_at`: the context length at which W is decoded from the stream (default: the last).
    - `embedding` [d, d_model]: how vectors are fed to a model that takes tokens, in place of its token embeddings, with
      positions, norms and scales as it adds them (default: a random map with orthonormal rows).
    - `readout`: a torch function of its last stream [batch, position, d_model] that predicts. Without one, the first
      half of the sequences fits one by ridge regression, the same affine map at all T, of the last stream divided by
      its root mean square, and the other half alone is reported. That tells what is linearly there, not what the model
      would say.

    `/recurrence` gets, at every context length T below the number of vectors (position): `loss` and that of each
    baseline, and `prediction_difference` to one gradient step. At `positions`, where the effective matrix
    d prediction / d s_T is made: `sensitivity_cosine` and `model_difference` with one gradient step; with each
    reference (reference, position) `effective_matrix_cosine` and its null, `effective_matrix_error`, and all three as
    `reference_<name>`. And `decodability` (layer) of W. References: "truth" (W), "gradient_step", "gradient_steps_k"
    for each k of `steps`, "least_squares".

    Matrices are made by forward derivatives, or by backward ones where an operation of the model has no forward one:
    `derivative` in the attributes says which. The model runs in evaluation mode and is left as it was.

    Raises InputError for vectors, matrices, positions and maps that don't fit each other or the model, and for a model
    that can't be fed; HookAuditError for hooks that aren't what they should be; ActivationError for predictions that
    aren't finite.

    Source: Sander et al. 2024 (2402.05787).

    >>> import metaint
    >>> from metaint.toys.linear_attention import gradient_step
    >>> sample = metaint.tasks.autoregressive("haar", d=3, length=7, batch=12)
    >>> scan = metaint.recur(gradient_step(3, 0.15), *sample, eta=0.15)
    >>> bool(scan["recurrence"]["prediction_difference"].max() < 1e-5)  # it is one gradient step
    True
    """
    _check(model, vectors, matrices, batch_size)
    check_seed(seed)
    index = _chosen(positions, vectors.shape[1] - 1)
    held = _is_held(model, hold_values)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    vectors, matrices = vectors.detach().to(device), matrices.detach().to(device)
    facts: dict[str, Any] = {"values_held": int(held), "fed": "vectors" if takes_vectors(model) else "embeddings"}
    with steady(model), quietly(device.type):
        predict, fitted = predictor(model, vectors, embedding, readout, batch_size, seed)
        vectors, matrices = vectors[fitted:], matrices[fitted:]
        descents = tuned_descents(vectors, steps, eta)
        probe, derive = RecurrenceProbe(descents, decode_at, seed), recurrence.effective_matrix
        for start in tqdm(range(0, len(vectors), batch_size), desc="recur", disable=not progress, leave=False):
            rows = slice(start, start + batch_size)
            contexts, matrices_made = vectors[rows, :-1], None
            with attach(model, probe):
                predicted = predict(contexts)
            if index:
                differentiated = _holding(model, contexts) if held else predict
                matrices_made, derive = _derive(derive, differentiated, contexts, index)
            probe.read_predictions(vectors[rows], matrices[rows], predicted, matrices_made, [i + 1 for i in index])
    facts |= {"derivative": "backward" if derive is _backward else "forward", "fitted_sequences": fitted}
    facts |= {"task": "autoregressive", "d": vectors.shape[2], "vectors_shape": list(vectors.shape), "seed": seed}
    return assemble([probe], {**facts, "eta": float(descents["gradient_step"].eta[-1]), **(attributes or {})})


def _check(model: Any, vectors: Tensor, matrices: Tensor, batch_size: int) -> None:
    """One sentence on what can't be fed, to this model or at all."""
    check_open(model)
    if not all(hasattr(model, name) for name in ("cfg", "hook_dict", "hooks")):
        raise InputError(f"model is a {type(model).__name__}: give one with TransformerLens's hooks.")
    if (
        not isinstance(vectors, Tensor)
        or vectors.ndim != 3
        or not (vectors.is_floating_point() or vectors.is_complex())
    ):
        what = f"{list(vectors.shape)} of {vectors.dtype}" if isinstance(vectors, Tensor) else type(vectors).__name__
        raise InputError(f"vectors is {what}: give numbers [batch, position, d].")
    batch, length, d = vectors.shape
    if not batch or not vectors.isfinite().all():
        raise InputError(f"vectors {'is empty' if not batch else 'hold NaN or infinity'}: give finite sequences.")
    if length < d + 2:
        raise InputError(
            f"vectors has {length} positions, and d is {d}: give at least {d + 2}, since least squares needs d + 1 to "
            "tell W, and one must follow."
        )
    if matrices.shape != (batch, d, d) or matrices.is_complex() != vectors.is_complex():
        raise InputError(
            f"matrices is {list(matrices.shape)} of {matrices.dtype}: give the W of each sequence, {[batch, d, d]} of "
            f"{vectors.dtype}."
        )
    check_batch_size(batch_size)
    if not is_causal(model):
        raise InputError("model is bidirectional, and sees what it should predict: give a causal one.")
    _check_widths(model, vectors)


def _check_widths(model: Any, vectors: Tensor) -> None:
    cfg, (_, length, d) = model.cfg, vectors.shape
    if takes_vectors(model):
        if (cfg.d_in, cfg.d_out) != (d, d):
            raise InputError(f"vectors have d = {d}, and the model leads from {cfg.d_in} to {cfg.d_out}: give its own.")
    elif "hook_embed" not in model.hook_dict:
        raise InputError("model takes no vectors and has no hook_embed, where they could be fed: give another model.")
    elif vectors.is_complex():
        raise InputError("vectors are complex, and the model is real: give the real form, such as kind 'orthogonal'.")
    elif length - 1 > cfg.n_ctx:
        raise InputError(f"vectors has {length} positions, and the model reads {cfg.n_ctx}: give at most one more.")
    elif d > cfg.d_model:
        raise InputError(f"vectors have d = {d}, and the stream of the model is {cfg.d_model} wide: give a smaller d.")


def _chosen(positions: Sequence[int] | None, longest: int) -> list[int]:
    """Indices of the contexts whose effective matrices are read."""
    if positions is None:
        positions = np.unique(np.linspace(2, longest, min(_CHOSEN, longest - 1)).round()).astype(int).tolist()
    return indices_of(positions, longest)


def _is_held(model: Any, hold_values: bool | None) -> bool:
    if hold_values and not takes_vectors(model):
        raise InputError("hold_values is True, and the model takes no vectors: leave it out, for the whole derivative.")
    return bool(getattr(model.cfg, "augmented", False)) if hold_values is None else hold_values


# ---- derivatives ------------------------------------------------------------------------------------------------


def _holding(model: Any, vectors: Tensor) -> Predict:
    """The model's prediction, with the keys and values that it has on these vectors whatever it is given."""
    carried: dict[str, Tensor] = {}
    names = [name for name in model.hook_dict if name.endswith((".attn.hook_k", ".attn.hook_v"))]
    with model.hooks(fwd_hooks=[(name, lambda x, hook: carried.update({hook.name: x.detach()})) for name in names]):
        model(vectors)

    def predict(changed: Tensor) -> Tensor:
        length = changed.shape[1]
        with model.hooks(fwd_hooks=[(name, lambda _, hook: carried[hook.name][:, :length]) for name in names]):
            return model(changed)

    return predict


def _derive(derive: Callable[..., Tensor], predict: Predict, vectors: Tensor, index: list[int]) -> tuple[Tensor, Any]:
    """Effective matrices, and how they were made: backwards, once something has no forward derivative."""
    try:
        # A causal model needs no more than the context, so passes are as short as they can be.
        return torch.cat([derive(predict, vectors[:, : i + 1], [i]) for i in index], 1), derive
    except RuntimeError:
        if derive is _backward or vectors.is_complex():
            raise
        return _derive(_backward, predict, vectors, index)


def _backward(predict: Predict, vectors: Tensor, index: list[int]) -> Float[Tensor, "batch chosen out d"]:
    """`recurrence.effective_matrix` by backward derivatives, one output at a time."""
    with torch.enable_grad():
        leaf = vectors.clone().requires_grad_()
        out = predict(leaf)
        # Sequences are independent, so that one sum serves all of them.
        sums = out[:, index].sum(0)
        rows = [torch.stack([torch.autograd.grad(o, leaf, retain_graph=True)[0] for o in row], 2) for row in sums]
    return torch.stack([row[:, i] for i, row in zip(index, rows, strict=True)], 1)
