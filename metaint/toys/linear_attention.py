"""Models that read vectors: linear attention (Sander et al. 2024, von Oswald et al. 2023), and a transformer beside it.

In: sizes, and for two constructions the step they take. Out: a `VectorModel`, a `HookedRootModule` with
TransformerLens's hook names that takes vectors [batch, position, d_in] and predicts vectors [batch, position, d_out].
Sources: 2402.05787 with its code michaelsdr/ical (`augmented.py`), and 2212.07677 with its code
google-research/self-organising-systems (`transformers_learn_icl_by_gd`).
"""

import math

import torch
from torch import Tensor

from metaint.errors import InputError
from metaint.toys.parts import Block, check_sizes
from metaint.toys.vector_model import LinearBlock, VectorModel, vector_config


def linear_attention(
    d: int,
    *,
    n_layers: int = 1,
    n_heads: int = 1,
    as_released: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> "VectorModel":
    """Causal linear attention on augmented tokens, to be trained on sequences of width d (Sander et al. 2024).

    It takes s_1 ... s_T [batch, T, d]. Position t holds e_t = (0, s_t, s_{t-1}), with s_0 = 0, and predicts s_{t+1}: to
    e_t each layer adds the sum over heads and k <= t of <W_Q e_t, W_K e_k> W_V e_k, without softmax, scale, norm or
    bias, and the prediction is the first d coordinates of the last stream. Heads are 3d wide. Complex sequences are
    taken too: weights stay real, and <u, v> is the sum of u conj(v).

    `as_released` is the authors' `augmented.py`: biases, scores over sqrt(3d), LayerNorm on what a layer adds, a linear
    map with bias at the end (of its 3d outputs the d that they use), real sequences; they ran it with one head.
    Weights and biases are drawn as PyTorch's Linear draws them, which is what that code does, from `seed` alone; the
    global random state stays as it was. Raises InputError for sizes below 1.
    """
    check_sizes(d=d, n_layers=n_layers, n_heads=n_heads)
    sizes = {"d_in": d, "d_out": d, "d_model": 3 * d, "n_layers": n_layers, "n_heads": n_heads, "d_head": 3 * d}
    cfg = vector_config("linear-attention", **sizes, augmented=True, seed=seed, device=device, dtype=dtype)
    if not as_released:
        return VectorModel(cfg, LinearBlock, readout=torch.eye(3 * d, d))
    cfg.model_name = "released-linear-attention"
    cfg.attn_scale = math.sqrt(3 * d)
    cfg.biases = True
    cfg.norm = "output"
    cfg.normalization_type = "LN"
    return VectorModel(cfg, LinearBlock)


def gradient_step(
    d: int, eta: float, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> "VectorModel":
    """The `linear_attention` of one gradient step: at position T it predicts eta sum_{t=2}^T s_t <s_T, s_{t-1}>.

    That is a step of size `eta` from W = 0 on 1/2 sum_t ||s_t - W s_{t-1}||², applied to s_T (Sander et al. 2024; the
    layout is ours). Queries read s_T, keys s_{t-1}, values s_t, which go to the first slot. As s_T is a value too, the
    Jacobian in it is eta sum_t s_t s_{t-1}* + eta <s_T, s_{T-1}> I; with `hook_k` and `hook_v` held, the sum alone.
    """
    model = linear_attention(d, device=device, dtype=dtype)
    first, current, previous = (slice(i * d, (i + 1) * d) for i in range(3))
    one = torch.eye(d, dtype=torch.float64)
    _write(model, W_Q=(current, first, one), W_K=(previous, first, one))
    _write(model, W_V=(current, first, one), W_O=(first, first, eta * one))
    return model


def regression_attention(
    d: int,
    context: int,
    *,
    n_layers: int = 1,
    n_heads: int = 1,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> "VectorModel":
    """Linear self-attention for regression in context, to be trained (von Oswald et al. 2023).

    It takes `context` tokens (x_i, y_i) and then the query (x_q, 0), [batch, context + 1, d + 1]. All tokens attend to
    all but the query, without softmax, scale, norm or bias. The prediction of y_q is minus the last coordinate of the
    query's last stream: [:, -1, 0] of what the model gives. (At tokens of the context it means nothing.)
    Weights are uniform with variance .002 / (n_layers fan_in), where the authors' are truncated normals of that
    variance; they depend on `seed` alone. Raises InputError for sizes below 1.
    """
    check_sizes(d=d, context=context, n_layers=n_layers, n_heads=n_heads)
    sizes = {"d_in": d + 1, "d_out": 1, "d_model": d + 1, "n_layers": n_layers, "n_heads": n_heads, "d_head": d + 1}
    cfg = vector_config("regression-attention", **sizes, n_ctx=context + 1, seed=seed, device=device, dtype=dtype)
    cfg.attention_dir = "bidirectional"
    cfg.gain = 0.002 / n_layers
    return VectorModel(cfg, LinearBlock, readout=-torch.eye(d + 1)[:, -1:])


def regression_step(
    d: int, context: int, eta: float, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> "VectorModel":
    """The `regression_attention` that takes one gradient step: it predicts (eta / context) sum_i y_i <x_i, x_q>.

    That is a step of size `eta` from w = 0 on 1/(2 context) sum_i (y_i - <w, x_i>)² (von Oswald et al. 2023, their
    `create_weights`). Queries and keys read x, values are -y, which goes to the last coordinate.
    """
    model = regression_attention(d, context, device=device, dtype=dtype)
    x, y, one = slice(d), slice(d, d + 1), torch.eye(d, dtype=torch.float64)
    _write(model, W_Q=(x, x, one), W_K=(x, x, one), W_V=(y, y, -one[:1, :1]), W_O=(y, y, eta / context * one[:1, :1]))
    return model


def vector_transformer(
    *,
    d_in: int,
    d_out: int,
    n_ctx: int,
    n_layers: int,
    n_heads: int,
    d_model: int,
    d_mlp: int,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> "VectorModel":
    """A pre-norm transformer on vectors: the blocks of `small_transformer`, softmax, ReLU and all, between linear maps.

    The first map, with learned positions, leads from d_in to the stream, the last from its final norm to d_out. (Sander
    et al. mention softmax and MLP and release no code for them: the sizes are yours.) Drawn as PyTorch's Linear, and
    positions with variance 1 / d_model, from `seed` alone. Raises InputError for sizes below 1, or heads that don't
    divide d_model.
    """
    sizes = {"d_in": d_in, "d_out": d_out, "d_model": d_model, "n_layers": n_layers, "n_heads": n_heads}
    sizes |= {"n_ctx": n_ctx, "d_mlp": d_mlp}
    check_sizes(**sizes)
    if d_model % n_heads:
        raise InputError(f"d_model is {d_model}: give a multiple of the {n_heads} heads.")
    cfg = vector_config("vector-transformer", **sizes, seed=seed, device=device, dtype=dtype)
    cfg.d_head = d_model // n_heads
    cfg.attn_scale = math.sqrt(cfg.d_head)
    cfg.attn_only = False
    cfg.positional_embedding_type = "standard"
    cfg.act_fn = "relu"
    cfg.gated_mlp = False
    cfg.biases = True
    cfg.norm = "pre"
    cfg.normalization_type = "LN"
    return VectorModel(cfg, Block)


def _write(model: VectorModel, **blocks: tuple[slice, slice, Tensor]) -> None:
    """Writes one block of each of the only head's matrices, and zeros around it."""
    with torch.no_grad():
        for name, (rows, columns, block) in blocks.items():
            weight = getattr(model.blocks[0].attn, name)
            weight.zero_()[0, rows, columns] = block.to(weight)
