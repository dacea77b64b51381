"""In-context autoregression: vectors s_{t+1} = W s_t with a fresh W each sequence, and its two neighbours.

In: sizes and a seed, or an embedding matrix and token ids. Out: vectors `[batch, position, d]`, where index t - 1 holds
s_t. The neighbours are linear regression in context (von Oswald et al. 2023) and the embeddings of real text.

Sources: Sander et al. 2024 (2402.05787) and its code, michaelsdr/ical: `augmented.py` and `non_augmented.py` draw W
from the Haar measure and start at ones / sqrt(d), `unitary.py` and `orthogonal.py` are about the two families of W that
commute, `validation_token_encoding.py` takes embeddings. Regression: google-research/self-organising-systems,
`transformers_learn_icl_by_gd/src/data.py`.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from einops import einsum
from jaxtyping import Float, Inexact, Int
from torch import Tensor
from torch.nn.functional import normalize, pad

from metaint.errors import InputError

Kind = Literal["unitary", "orthogonal", "haar"]
First = Literal["ones", "unit"]


class AutoregressiveSample(NamedTuple):
    """What `autoregressive` draws."""

    vectors: Inexact[Tensor, "batch position d"]
    """s_1, s_2, ... at indices 0, 1, ...; a context s_1..s_T is `vectors[:, :T]` and its target `vectors[:, T]`."""
    matrices: Inexact[Tensor, "batch d d"]
    """W of each sequence, so that s_{t+1} = W s_t for columns."""


class RegressionSample(NamedTuple):
    """What `regression` draws; inputs, outputs and queries are views of the tokens."""

    tokens: Float[Tensor, "batch point+1 d+1"]
    """(x_i, y_i) for each point, and last the query token (x_q, 0)."""
    inputs: Float[Tensor, "batch point d"]
    outputs: Float[Tensor, "batch point"]
    queries: Float[Tensor, "batch d"]
    answers: Float[Tensor, " batch"]
    """<w, x_q>. The model of the source predicts it as minus the last coordinate of the query token."""
    weights: Float[Tensor, "batch d"]


def autoregressive(
    kind: Kind,
    d: int,
    length: int,
    batch: int = 1,
    *,
    first: First = "ones",
    noise: float = 0.0,
    dtype: torch.dtype | None = None,
    seed: int | torch.Generator = 0,
    device: torch.device | str | None = None,
) -> AutoregressiveSample:
    """`batch` sequences of `length` vectors s_1, ..., s_length, each with its own W.

    Kinds:
    - "unitary": W = diag(e^{i theta_1}, ..., e^{i theta_d}) with independent uniform phases; complex.
    - "orthogonal": d / 2 independent uniform phases, so d is even. In a real dtype W is the rotations
      [[cos, -sin], [sin, cos]] of coordinates (2k, 2k+1), in a complex one the same in its eigenbasis, the diagonal
      e^{i theta}, e^{-i theta}: one seed gives the same phases in both. `rotation_basis` leads from one to the other.
    - "haar": W uniform on O(d), by QR with the signs of R's diagonal taken out; real. These don't commute.

    The first vector is 1_d ("ones": the closed forms) or 1_d / sqrt(d) ("unit": the released code, where all have
    length 1). Our addition: `noise` is the standard deviation of what is added to each coordinate at each step (of a
    complex number as a whole), and goes through W from there on.

    All is drawn in float64 on the CPU and depends on `seed` alone; a Generator (on the CPU) is advanced, so that the
    next call goes on. Without `dtype` it is float32, or complex64 where W is complex. Raises InputError for an unknown
    kind or first vector, an odd d where it must be even, sizes below 1 (length: 2), a dtype that the kind has no form
    in, and noise that is negative or not finite.
    """
    _check_process(kind, d, length, batch, first, noise)
    dtype = _dtype_of(kind, dtype)
    generator = _generator(seed)
    matrices = _matrices(kind, d, batch, dtype.is_complex, generator)
    start = 1 / math.sqrt(d) if first == "unit" else 1.0
    steps = [matrices.new_full((batch, d), start)]
    for _ in range(length - 1):
        step = einsum(matrices, steps[-1], "batch to d, batch d -> batch to")
        if noise:
            step = step + noise * torch.randn(batch, d, generator=generator, dtype=matrices.dtype)
        steps.append(step)
    return AutoregressiveSample(torch.stack(steps, 1).to(device, dtype), matrices.to(device, dtype))


def augmented(vectors: Inexact[Tensor, "*batch position d"]) -> Inexact[Tensor, "*batch position 3*d"]:
    """Augmented tokens e_t = (0_d, s_t, s_{t-1}), with s_0 = 0, in the layout of the released code."""
    return torch.cat([torch.zeros_like(vectors), vectors, pad(vectors, (0, 0, 1, 0))[..., :-1, :]], dim=-1)


def regression(
    d: int,
    points: int,
    batch: int = 1,
    *,
    input_range: float = 1.0,
    weight_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int | torch.Generator = 0,
    device: torch.device | str | None = None,
) -> RegressionSample:
    """Linear regression in context: y = <w, x> at `points` inputs, and a query to answer; a fresh w each sequence.

    w ~ N(0, I_d) · weight_scale, x uniform on [-input_range / 2, input_range / 2]^d. That is what the source's code
    draws with its input range of 1; its docstrings speak of [-1, 1]. Drawn in float64 on the CPU; a Generator is
    advanced. Raises InputError for sizes below 1 and for scales that aren't positive.
    """
    for name, value in (("d", d), ("points", points), ("batch", batch)):
        _check_whole(name, value, 1)
    for name, scale in (("input_range", input_range), ("weight_scale", weight_scale)):
        if not 0 < scale < math.inf:
            raise InputError(f"{name} is {scale}: give a positive number.")
    generator = _generator(seed)
    weights = torch.randn(batch, d, generator=generator, dtype=torch.float64) * weight_scale
    inputs = (torch.rand(batch, points + 1, d, generator=generator, dtype=torch.float64) - 0.5) * input_range
    outputs = einsum(inputs, weights, "batch position d, batch d -> batch position")
    answers = outputs[:, -1].clone()
    outputs[:, -1] = 0
    tokens = torch.cat([inputs, outputs[..., None]], dim=-1).to(device, dtype)
    inputs, outputs, queries = tokens[:, :-1, :-1], tokens[:, :-1, -1], tokens[:, -1, :-1]
    return RegressionSample(tokens, inputs, outputs, queries, answers.to(device, dtype), weights.to(device, dtype))


def embedding_windows(
    embeddings: Float[Tensor, "vocab d"],
    tokens: Int[Tensor, " token"],
    length: int = 5,
    *,
    shuffled: bool = False,
    seed: int | torch.Generator = 0,
) -> Float[Tensor, "window length d"]:
    """Rows of an embedding matrix along a text, divided by their length, in windows of `length` that don't overlap.

    `shuffled` is the control: the same tokens in a random order of the whole text, then cut. What is left over at the
    end falls away; a row of zeros stays zero. Is text closer to s_{t+1} = W s_t than its tokens in any order are? In
    fewer than d + 1 different tokens there is always a W that fits: only windows in which a token comes twice can tell
    (`recurrence.rollout_error`).

    Raises InputError for a length below 2, tokens that aren't one row of ids within the vocabulary, and fewer tokens
    than one window. Source: ical `validation_token_encoding.py` (GPT-2 large, Moby-Dick, windows of 5).
    """
    _check_whole("length", length, 2)
    if tokens.ndim != 1 or tokens.is_floating_point() or len(tokens) < length:
        raise InputError(
            f"tokens is {list(tokens.shape)} of {tokens.dtype}: give one row of at least {length} ids, one window."
        )
    vocab = len(embeddings)
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise InputError(
            f"tokens reach from {int(tokens.min())} to {int(tokens.max())}, outside the vocabulary 0..{vocab - 1}: "
            "give ids inside it."
        )
    if shuffled:
        tokens = tokens[torch.randperm(len(tokens), generator=_generator(seed)).to(tokens.device)]
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    return normalize(embeddings[windows.to(embeddings.device)], dim=-1)


def _check_process(kind: str, d: int, length: int, batch: int, first: str, noise: float) -> None:
    if kind not in get_args(Kind):
        raise InputError(f"kind is {kind!r}: give 'unitary', 'orthogonal' or 'haar'.")
    if first not in get_args(First):
        raise InputError(f"first is {first!r}: give 'ones' or 'unit'.")
    _check_whole("d", d, 1)
    _check_whole("length", length, 2)
    _check_whole("batch", batch, 1)
    if kind == "orthogonal" and d % 2:
        raise InputError(f"d is {d}: give an even number, since eigenvalues come in conjugate pairs.")
    if not 0 <= noise < math.inf:
        raise InputError(f"noise is {noise}: give a standard deviation of 0 or more.")


def _check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} is {value!r}: give a whole number of at least {least}.")


def _dtype_of(kind: str, dtype: torch.dtype | None) -> torch.dtype:
    real, complex_ = (torch.float32, torch.float64), (torch.complex64, torch.complex128)
    allowed = {"unitary": complex_, "haar": real, "orthogonal": real + complex_}[kind]
    if dtype is not None and dtype not in allowed:
        names = " or ".join(str(choice) for choice in allowed)
        raise InputError(f"dtype is {dtype}, which kind {kind!r} has no form in: give {names}.")
    return dtype or allowed[0]


def _matrices(
    kind: str, d: int, batch: int, is_complex: bool, generator: torch.Generator
) -> Inexact[Tensor, "batch d d"]:
    if kind == "haar":
        gaussian = torch.randn(batch, d, d, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        # LAPACK leaves the signs of R's diagonal as they come; only with all of them positive is Q uniform.
        return q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    phases = d if kind == "unitary" else d // 2
    theta = torch.rand(batch, phases, generator=generator, dtype=torch.float64) * (2 * math.pi)
    if kind == "orthogonal" and not is_complex:
        return _rotations(theta)
    if kind == "orthogonal":
        theta = torch.stack([theta, -theta], -1).flatten(1)
    return torch.diag_embed(torch.polar(torch.ones_like(theta), theta))


def _rotations(theta: Float[Tensor, "batch pair"]) -> Float[Tensor, "batch d d"]:
    cos, sin = theta.cos(), theta.sin()
    out = theta.new_zeros(len(theta), 2 * theta.shape[1], 2 * theta.shape[1])
    even = torch.arange(0, out.shape[1], 2)
    out[:, even, even] = out[:, even + 1, even + 1] = cos
    out[:, even, even + 1] = -sin
    out[:, even + 1, even] = sin
    return out


def _generator(seed: int | torch.Generator) -> torch.Generator:
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
