"""Models that read vectors: linear attention (Sander et al. 2024, von Oswald et al. 2023), and a transformer beside it.

In: sizes, and for two constructions the step they take. Out: a `VectorModel`, a `HookedRootModule` with
TransformerLens's hook names that takes vectors [batch, position, d_in] and predicts vectors [batch, position, d_out].
Sources: 2402.05787 with its code michaelsdr/ical (`augmented.py`), and 2212.07677 with its code
google-research/self-organising-systems (`transformers_learn_icl_by_gd`).
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Inexact, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.hook_points import HookPoint

from metaint.errors import InputError
from metaint.toys.small import HookedRootModule, _Attention, _Block, _LayerNorm, _Part


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
        return VectorModel(cfg, _LinearBlock, readout=torch.eye(3 * d, d))
    cfg.model_name, cfg.attn_scale = "released-linear-attention", math.sqrt(3 * d)
    cfg.biases, cfg.norm, cfg.normalization_type = True, "output", "LN"
    return VectorModel(cfg, _LinearBlock)


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
    cfg.attention_dir, cfg.gain = "bidirectional", 0.002 / n_layers
    return VectorModel(cfg, _LinearBlock, readout=-torch.eye(d + 1)[:, -1:])


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
    cfg.d_head, cfg.attn_scale = d_model // n_heads, math.sqrt(d_model // n_heads)
    cfg.attn_only, cfg.positional_embedding_type, cfg.act_fn, cfg.gated_mlp = False, "standard", "relu", False
    cfg.biases, cfg.norm, cfg.normalization_type = True, "pre", "LN"
    return VectorModel(cfg, _Block)


class VectorModel(HookedRootModule):
    """What the functions of this file make, from the `cfg` that they write.

    `hook_embed` carries the first stream (augmented tokens, where the model augments), and a linear `hook_pattern` its
    scores, 0 at hidden keys, whose rows don't sum to one: the audit says so, and a `HeadProbe` refuses. It reads a
    `vector_transformer`, and a `ResidualProbe` reads every such model. Attach them (`metaint.attach`), since
    `metaint.scan` feeds ids. Ids [batch, position] below `cfg.d_vocab` are taken too, so that the audit, which knows
    nothing else, can run the model: they stand for fixed normal vectors of about unit length. There is no vocabulary,
    and so no `W_E` and no `W_U`, and an `InnerProbe` refuses: predictions are made by `unembed.W_U` and `unembed.b_U`,
    no parameters where they only pick coordinates.
    """

    embed: Any
    blocks: Any
    W_Q, W_K, W_V, W_O, b_Q, b_K, b_V, b_O = (
        property(lambda model, name=name: torch.stack([getattr(block.attn, name) for block in model.blocks]))
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
    )

    def __init__(self, cfg: Any, block: Any, readout: Tensor | None = None) -> None:
        super().__init__()
        self.cfg, self.tokenizer = cfg, None
        self.embed, self.hook_embed = _Table(cfg), HookPoint()
        if not cfg.attn_only:
            self.project = _Part(cfg, "", W_in="d_in d_model", b_in="d_model")
            self.pos_embed, self.hook_pos_embed = _Part(cfg, "", table="n_ctx d_model"), HookPoint()
        self.blocks = nn.ModuleList(block(cfg) for _ in range(cfg.n_layers))
        self.ln_final = _LayerNorm(cfg) if cfg.norm == "pre" else None
        self.unembed = _Part(cfg, "", **({"W_U": "d_model d_out", "b_U": "d_out"} if readout is None else {}))
        if readout is not None:
            self.unembed.register_buffer("W_U", readout, persistent=False)
            self.unembed.register_buffer("b_U", torch.zeros(cfg.d_out), persistent=False)
        _draw(self)
        self.to(device=cfg.device, dtype=cfg.dtype)
        self.setup()

    def forward(
        self,
        inputs: Inexact[Tensor, "batch position d_in"] | Int[Tensor, "batch position"],
        return_type: Any = "logits",
    ) -> Any:
        """The predictions [batch, position, d_out] ("logits", to TransformerLens), or None with `return_type=None`.

        Raises InputError for another `return_type`, and for a shape or dtype that the model doesn't take.
        """
        if return_type not in ("logits", None):
            raise InputError(f'return_type is {return_type!r}: choose "logits" or None.')
        stream = self.start(self.vectors(inputs))
        batch, length, _ = stream.shape
        # The query of a regression, at the end, is no key; nor is it padding, which probes take a mask by name to be.
        n_keys = length - (self.cfg.attention_dir == "bidirectional")
        keys = (torch.arange(length, device=stream.device) < n_keys).expand(batch, -1)
        for block in self.blocks:
            stream = block(stream, keys)
        stream = stream if self.ln_final is None else self.ln_final(stream)
        return None if return_type is None else stream @ self.unembed.W_U.to(stream.dtype) + self.unembed.b_U

    def vectors(self, inputs: Tensor) -> Tensor:
        """Vectors [batch, position, d_in] as they are, ids as the vectors they stand for."""
        cfg, dtype = self.cfg, self.embed.vectors.dtype
        vectors = inputs if inputs.is_floating_point() or inputs.is_complex() else self.embed(inputs)
        shape = tuple(vectors.shape)
        if len(shape) != 3 or shape[2] != cfg.d_in or not 1 <= shape[1] <= cfg.n_ctx:
            raise InputError(f"inputs is {shape}: give vectors [batch, 1 to {cfg.n_ctx} positions, {cfg.d_in}].")
        if vectors.dtype not in ((dtype,) if cfg.norm else (dtype, dtype.to_complex())):
            raise InputError(f"inputs is {vectors.dtype}, and the model computes in {dtype}: convert one of them.")
        return vectors

    def start(self, vectors: Tensor) -> Tensor:
        """The first stream: vectors augmented, projected, or as they are."""
        if self.cfg.augmented:
            before = F.pad(vectors[:, :-1], (0, 0, 1, 0))
            vectors = torch.cat([torch.zeros_like(vectors), vectors, before], -1)
        if self.cfg.attn_only:
            return self.hook_embed(vectors)
        positions = self.pos_embed.table[: vectors.shape[1]].expand(len(vectors), -1, -1)
        return self.hook_embed(vectors @ self.project.W_in + self.project.b_in) + self.hook_pos_embed(positions)


class _Table(nn.Module):
    """The vectors that ids stand for, the same in every model of a width."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        vectors = torch.randn(cfg.d_vocab, cfg.d_in, generator=torch.Generator().manual_seed(0)) / math.sqrt(cfg.d_in)
        self.register_buffer("vectors", vectors, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.get_buffer("vectors"))


class _LinearBlock(_Part):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg, "resid_pre attn_out resid_post")
        self.attn = _LinearAttention(cfg)
        self.ln1 = _LayerNorm(cfg) if cfg.norm else None

    def forward(self, stream: Tensor, attention_mask: Tensor) -> Tensor:
        stream = self.hook_resid_pre(stream)
        write = self.attn(stream, attention_mask)
        return self.hook_resid_post(stream + self.hook_attn_out(write if self.ln1 is None else self.ln1(write)))


class _LinearAttention(_Attention):
    """The attention of `SmallTransformer` without its softmax; its pattern is its scores."""

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        weights = {name: getattr(self, name).to(x.dtype) for name in ("W_Q", "W_K", "W_V", "W_O")}
        q = self.hook_q(torch.einsum("bpm,hmd->bphd", x, weights["W_Q"]) + self.b_Q)
        k = self.hook_k(torch.einsum("bpm,hmd->bphd", x, weights["W_K"]) + self.b_K)
        v = self.hook_v(torch.einsum("bpm,hmd->bphd", x, weights["W_V"]) + self.b_V)
        visible = real[:, None, None].expand(-1, -1, x.shape[1], -1)
        visible = visible.tril() if self.cfg.attention_dir == "causal" else visible
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k.conj()) / self.cfg.attn_scale
        pattern = self.hook_pattern(self.hook_attn_scores(scores.masked_fill(~visible, 0.0)))
        z = self.hook_z(torch.einsum("bhqk,bkhd->bqhd", pattern, v))
        return self.hook_out(torch.einsum("bqhd,hdm->bqm", z, weights["W_O"]) + self.b_O)


def vector_config(name: str, **settings: Any) -> Any:
    """The `cfg` of linear attention: what probes and the hook audit ask for in TransformerLens's words, and our own."""
    # `d_vocab` counts the ids that stand for vectors; without positions any length will do.
    cfg = SimpleNamespace(model_name=name, d_vocab=64, n_ctx=2**20, eps=1e-5, default_prepend_bos=False)
    cfg.attn_only, cfg.parallel_attn_mlp, cfg.attention_dir, cfg.attn_scale = True, False, "causal", 1.0
    cfg.normalization_type, cfg.positional_embedding_type = None, "none"
    cfg.augmented, cfg.biases, cfg.norm, cfg.gain = False, False, None, 1 / 3
    vars(cfg).update(settings)
    return cfg


def check_sizes(**sizes: int) -> None:
    """Raises InputError for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} is {size}: give at least 1.")


def _draw(model: VectorModel) -> None:
    """Draws matrices and their biases uniformly with variance gain / fan_in; a gain of 1/3 is PyTorch's Linear."""
    generator = torch.Generator().manual_seed(model.cfg.seed)
    for part in model.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if name.startswith(("W_", "b_")):
                matrix = getattr(part, f"W_{name[2:]}")
                fan_in = matrix.numel() // matrix.shape[-1] if name.endswith("_O") else matrix.shape[-2]
                bound = math.sqrt(3 * model.cfg.gain / fan_in)
                nn.init.uniform_(parameter, -bound, bound, generator)
            elif name == "table":
                nn.init.normal_(parameter, 0, 1 / math.sqrt(model.cfg.d_model), generator)


def _write(model: VectorModel, **blocks: tuple[slice, slice, Tensor]) -> None:
    """Writes one block of each of the only head's matrices, and zeros around it."""
    with torch.no_grad():
        for name, (rows, columns, block) in blocks.items():
            weight = getattr(model.blocks[0].attn, name)
            weight.zero_()[0, rows, columns] = block.to(weight)
