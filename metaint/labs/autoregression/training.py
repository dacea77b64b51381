"""What the autoregression lab trains, and on what: models, their losses, and sequences.

In: `Settings`. Out: modules to train, losses to descend on, samples, and of regression what a scan is of sequences.
Sources: michaelsdr/ical (Sander et al. 2024, 2402.05787) for all settings but "icl-regression", which is
`transformers_learn_icl_by_gd` (von Oswald et al. 2023); where we differ, a docstring says so.
"""

import math
from functools import lru_cache
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn

from metaint.labs.autoregression.settings import Settings
from metaint.measures import autoregression, closed_forms, recurrence
from metaint.tasks.autoregressive import AutoregressiveSample, RegressionSample, autoregressive, regression
from metaint.toys.diagonal_attention import DiagonalAttention, diagonal_attention
from metaint.toys.linear_attention import linear_attention, regression_attention, vector_transformer
from metaint.toys.vector_model import VectorModel

# Steps of gradient descent that models are compared with.
DESCENTS = (1, 2, 3, 5)
# The source of "positional" stops below this loss.
REACHED = 1e-3
# Sequences of a held-out sample while training, and for what is compared with a prediction; how many at once.
SOME, MANY, _CHUNK = 2048, 2**15, 512
# Width of the transformer's stream, and of its MLP.
_D_MODEL, _D_MLP = 32, 128


# ---- what is trained --------------------------------------------------------------------------------------------


class Starts(nn.Module):
    """Diagonal models side by side: `a` and `b` [start, head, d], and `P` [start, position, position]."""

    a: Tensor
    b: Tensor
    P: Tensor

    def __init__(self, s: Settings) -> None:
        super().__init__()
        if s.setting == "positional":
            one = torch.ones(1, 1, 1)
            self.register_buffer("a", one)
            self.register_buffer("b", one.clone())
            self.P = nn.Parameter(torch.zeros(1, s.length, s.length))
            return
        drawn = [diagonal_attention(s.d, s.heads, s.length, seed=(s.seed << 16) + i) for i in range(s.starts)]
        for name in ("a", "b", "P"):
            setattr(self, name, nn.Parameter(torch.stack([getattr(model, name).detach() for model in drawn])))

    def one(self, index: int) -> DiagonalAttention:
        """One of them as a model."""
        model = diagonal_attention(self.a.shape[2], self.a.shape[1], self.P.shape[1])
        with torch.no_grad():
            for name in ("a", "b", "P"):
                getattr(model, name).copy_(getattr(self, name)[index])
        return model


def expected_losses(s: Settings, starts: Starts) -> Float[Tensor, " start"]:
    """Expected squared error of each start, summed over coordinates and averaged over contexts T = 2..length; for
    "positional" that of its `batch` sequences."""
    rows = recurrence.positional_rows(starts.P)
    if s.setting == "positional":
        # |sum_j p_{T-j} lambda^{-2j} - 1|², with the means of lambda^{-2j}: all that descent sees of the sequences.
        gap = rows - torch.eye(s.length)[-1]
        return torch.einsum("rti,ij,rtj->r", gap, _gram(s), gap) / (s.length - 1)
    of_one = closed_forms.unitary_loss if s.setting == "unitary" else closed_forms.orthogonal_loss
    return torch.func.vmap(of_one)(starts.b.mT @ starts.a, rows).mean(-1)


def positional_descent(s: Settings, steps: int) -> tuple[Float[Tensor, "T-1 T"], float]:
    """Where `steps` steps lead "positional" from P = 0 on the expected loss: rows of weights with p_T the last, and
    that loss, averaged over contexts.

    With G = E cos(2 (i - j) theta / mu), which is sin x / x at x = 4 pi (i - j) / mu, the loss of a row is gap^T G gap,
    where gap = p - (0, ..., 0, 1), and the gap becomes (I - 2 rate G)^steps gap; each of the T - 1 rows has
    rate = learning_rate / (T - 1). Derived.
    """
    lags = torch.arange(s.length, dtype=torch.float64)
    G = torch.sinc(4 * (lags[:, None] - lags) / s.mu)
    rows, losses = torch.zeros(s.length - 1, s.length, dtype=torch.float64), []
    for seen in range(2, s.length + 1):
        variances, axes = torch.linalg.eigh(G[-seen:, -seen:])
        left = (1 - 2 * s.learning_rate / (s.length - 1) * variances) ** steps * axes[-1]
        rows[seen - 2, -seen:] = axes @ (axes[-1] - left)
        losses.append((variances * left.square()).sum())
    return rows, torch.stack(losses).mean().item()


def _phases(s: Settings, count: int, seed: int) -> Float[Tensor, " sequence"]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64) * (2 * math.pi / s.mu)


@lru_cache(maxsize=8)
def _gram(s: Settings) -> Float[Tensor, "T T"]:
    """Of the sequences that "positional" is trained on."""
    lags = torch.arange(s.length)
    means = (2 * lags[:, None] * _phases(s, s.batch, s.seed)).cos().mean(1).float()
    return means[(lags[:, None] - lags).abs()]


def build(s: Settings) -> Any:
    """What is trained, untrained."""
    if s.setting in ("unitary", "orthogonal", "positional"):
        return Starts(s)
    if s.setting == "icl-regression":
        return regression_attention(s.d, s.length, n_layers=s.layers, n_heads=s.heads, seed=s.seed)
    if s.setting == "augmented":
        return _restrict(linear_attention(s.d, seed=s.seed), s)
    if s.model == "transformer":
        sizes: Any = {"n_ctx": s.length, "n_layers": s.layers, "n_heads": s.heads, "d_model": _D_MODEL, "d_mlp": _D_MLP}
        return vector_transformer(d_in=s.d, d_out=s.d, **sizes, seed=s.seed)
    return linear_attention(s.d, n_layers=s.layers, as_released=s.model == "released", seed=s.seed)


def _restrict(model: VectorModel, s: Settings) -> VectorModel:
    """Leave only the blocks of `gradient_step` free, and of them (but for "blocks") only the diagonals.

    Diagonals begin positive, since the loss tells their products alone and not their signs; with "signed" they don't.
    """
    if s.model == "free":
        return model
    first, current, previous = (slice(i * s.d, (i + 1) * s.d) for i in range(3))
    block = torch.ones(s.d, s.d) if s.model == "blocks" else torch.eye(s.d)
    for name, rows, columns in (
        ("W_Q", current, first),
        ("W_K", previous, first),
        ("W_V", current, first),
        ("W_O", first, first),
    ):
        weight = getattr(model.blocks[0].attn, name)
        mask = torch.zeros_like(weight)
        mask[0, rows, columns] = block
        with torch.no_grad():
            weight.copy_(mask * (weight.abs() if s.model in ("diagonal", "shared") else weight))
        weight.register_hook(lambda gradient, mask=mask: gradient * mask)
    return model


def trained(s: Settings, module: Any) -> VectorModel:
    """The model; of several starts the one with the least expected loss."""
    if not isinstance(module, Starts):
        return module
    with torch.no_grad():
        return module.one(int(expected_losses(s, module).nan_to_num(math.inf).argmin()))


# ---- what it is trained on --------------------------------------------------------------------------------------


def draw(
    s: Settings, count: int, seed: int | torch.Generator, length: int | None = None
) -> AutoregressiveSample | RegressionSample:
    """Fresh sequences of the run's task, of one vector more than its contexts have (or of `length`)."""
    if s.setting == "icl-regression":
        return regression(s.d, s.length, count, seed=seed)
    length = length or s.length + 1
    if s.setting == "positional":
        own = seed if isinstance(seed, int) else s.seed
        phases = _phases(s, count, own)
        vectors = torch.polar(torch.ones(count, length), (phases[:, None] * torch.arange(length)).float())
        return AutoregressiveSample(vectors[..., None], vectors[:, 1, None, None])
    kind: Any = "unitary" if s.setting == "augmented" else s.setting
    dtype = None if s.setting == "haar" else torch.complex64
    first: Any = "unit" if s.setting == "haar" else "ones"
    return autoregressive(kind, s.d, length, count, first=first, dtype=dtype, seed=seed)


def objective(s: Settings, model: Any, sample: Any) -> Float[Tensor, " batch"]:
    """What is trained on, for each sequence.

    "augmented": squared error per coordinate at context T ("shared": averaged over contexts 2..T). "haar": the same
    averaged over all contexts 1..T. Diagonal models: summed over coordinates, averaged over contexts 2..T.
    "icl-regression": half the squared error of the answer.
    """
    if s.setting == "icl-regression":
        return 0.5 * (model(sample.tokens)[:, -1, 0] - sample.answers).square()
    vectors = sample.vectors[:, : s.length + 1]
    errors = (model(vectors[:, :-1]) - vectors[:, 1:]).abs().square()
    if s.setting == "haar":
        return errors.mean((1, 2))
    if s.setting == "augmented":
        return errors[:, 1 if s.model == "shared" else -1 :].mean((1, 2))
    return errors[:, 1:].sum(-1).mean(1)


def held_out(s: Settings) -> int:
    """The seed of what no step is trained on."""
    return (s.seed + 1) << 40


@torch.no_grad()
def held_out_loss(s: Settings, model: Any, count: int = SOME) -> float:
    """Mean `objective` of `count` fresh sequences, the same at each call; of diagonal heads, `even_sequences`."""
    sample: Any = even_sequences(s, SOME // 2) if s.diagonal else draw(s, count, held_out(s))
    chunks = zip(*(part.split(_CHUNK) for part in sample), strict=True)
    losses = [objective(s, model, type(sample)(*chunk)) for chunk in chunks]
    return torch.cat(losses).double().mean().item()


def even_sequences(s: Settings, count: int) -> AutoregressiveSample:
    """Sequences of diagonal W whose phases are spread evenly (a scrambled Sobol sequence), in place of random ones.

    Of these losses, low polynomials of e^{i theta}, 1024 give the mean to a thousandth, where as many random ones are
    off by some hundredths.
    """
    free = s.d if s.setting == "unitary" else s.d // 2
    theta = 2 * math.pi * torch.quasirandom.SobolEngine(free, scramble=True, seed=s.seed).draw(count).double()
    theta = theta if s.setting == "unitary" else torch.stack([theta, -theta], -1).flatten(1)
    phases = theta[:, None] * torch.arange(s.length + 1)[:, None]
    vectors = torch.polar(torch.ones_like(phases), phases).to(torch.complex64)
    return AutoregressiveSample(vectors, torch.diag_embed(vectors[:, 1]))


def regression_scan(s: Settings, model: Any) -> xr.Dataset:
    """A model of regression beside one gradient step of the best size, as von Oswald et al. compare them.

    `loss` and those of references on the same sequences ("gradient_steps_k" each with its best step), and against one
    step `prediction_difference`, `sensitivity_cosine`, `model_difference`; `step_size` is the step whose gradient in
    the query is nearest to the model's.
    """
    sample: Any = draw(s, 4 * SOME, held_out(s))
    tokens = sample.tokens.clone().requires_grad_()
    with torch.enable_grad():
        predicted = model(tokens)[:, -1, 0]
        (gradient,) = torch.autograd.grad(predicted.sum(), tokens)
    own = gradient[:, -1, : s.d]
    predicted = predicted.detach()
    guesses = {"loss": predicted, "loss_zero": torch.zeros_like(predicted)}
    weights = {f"gradient_steps_{k}": best_descent(sample, k) for k in DESCENTS}
    weights["least_squares"] = autoregression.regression_least_squares(sample.inputs, sample.outputs)
    for name, w in weights.items():
        guesses[f"loss_{name}"] = (w * sample.queries).sum(-1)
    values = {name: 0.5 * (guess - sample.answers).square().mean().item() for name, guess in guesses.items()}
    eta = closed_forms.regression_optimum(s.length, s.d).eta
    step = autoregression.regression_descent(sample.inputs, sample.outputs, eta)
    f, g = predicted[:, None], (step * sample.queries).sum(-1, keepdim=True)
    values["prediction_difference"] = recurrence.prediction_difference(f, g).item()
    values["sensitivity_cosine"] = recurrence.sensitivity_cosine(own[:, None], step[:, None]).item()
    values["model_difference"] = recurrence.model_difference(own[:, None], step[:, None]).item()
    values["step_size"] = eta * recurrence.projection_scale(own[None], step[None]).item()
    return xr.Dataset(values, attrs={"sequences": len(tokens), "d": s.d, "points": s.length})


def best_descent(sample: RegressionSample, steps: int) -> Float[Tensor, "batch d"]:
    """The w of `steps` gradient steps of the one size that predicts the first answers best."""
    some = RegressionSample(*(part[:SOME] for part in sample))
    errors = []
    sizes = torch.linspace(0.25, 16, 64).tolist()
    for eta in sizes:
        w = autoregression.regression_descent(some.inputs, some.outputs, eta, steps)
        errors.append(((w * some.queries).sum(-1) - some.answers).square().mean().nan_to_num(math.inf))
    best = sizes[int(torch.stack(errors).argmin())]
    return autoregression.regression_descent(sample.inputs, sample.outputs, best, steps)
