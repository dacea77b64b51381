"""A model that reads vectors, with TransformerLens's hook names: `VectorModel`, and the blocks of linear attention.

In: the `cfg` that `linear_attention.py` or `diagonal_attention.py` writes, and a kind of block. Out: a model that takes
vectors [batch, position, d_in] and predicts vectors [batch, position, d_out].
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
from einops import einsum, repeat
from jaxtyping import Inexact, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.hook_points import HookPoint

from metaint.errors import InputError
from metaint.toys.parts import (
    INTO_HEADS,
    MIX,
    SCORES,
    Attention,
    Hooked,
    HookedRootModule,
    LayerNorm,
    out_of_heads,
    stacked,
)


def vector_config(name: str, **settings: Any) -> Any:
    """The `cfg` of linear attention: what probes and the hook audit ask for in TransformerLens's words, and our own."""
    usual = SimpleNamespace(
        model_name=name,
        d_vocab=64,  # the ids that stand for vectors
        n_ctx=2**20,  # without positions any length will do
        eps=1e-5,
        default_prepend_bos=False,
        attn_only=True,
        parallel_attn_mlp=False,
        attention_dir="causal",
        attn_scale=1.0,
        normalization_type=None,
        positional_embedding_type="none",
        augmented=False,
        biases=False,
        norm=None,
        gain=1 / 3,  # times 1 / fan_in, the variance that weights are drawn with
    )
    vars(usual).update(settings)
    return usual


class VectorModel(HookedRootModule):
    """What the functions of `linear_attention.py` make, from the `cfg` that they write.

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
    W_Q, W_K, W_V, W_O = map(stacked, ("W_Q", "W_K", "W_V", "W_O"))
    b_Q, b_K, b_V, b_O = map(stacked, ("b_Q", "b_K", "b_V", "b_O"))

    def __init__(self, cfg: Any, block: Any, readout: Tensor | None = None) -> None:
        super().__init__()
        self.cfg, self.tokenizer = cfg, None
        self.embed, self.hook_embed = _Table(cfg), HookPoint()
        if not cfg.attn_only:
            self.project = Hooked(cfg, "", W_in="d_in d_model", b_in="d_model")
            self.pos_embed, self.hook_pos_embed = Hooked(cfg, "", table="n_ctx d_model"), HookPoint()
        self.blocks = nn.ModuleList(block(cfg) for _ in range(cfg.n_layers))
        self.ln_final = LayerNorm(cfg) if cfg.norm == "pre" else None
        if readout is None:
            self.unembed = Hooked(cfg, "", W_U="d_model d_out", b_U="d_out")
        else:
            self.unembed = Hooked(cfg, "")
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
        keys = repeat(torch.arange(length, device=stream.device) < n_keys, "key -> batch key", batch=batch)
        for block in self.blocks:
            stream = block(stream, keys)
        if self.ln_final is not None:
            stream = self.ln_final(stream)
        if return_type is None:
            return None
        return stream @ self.unembed.W_U.to(stream.dtype) + self.unembed.b_U

    def vectors(self, inputs: Tensor) -> Tensor:
        """Vectors [batch, position, d_in] as they are, ids as the vectors they stand for."""
        cfg, dtype = self.cfg, self.embed.vectors.dtype
        vectors = inputs if inputs.is_floating_point() or inputs.is_complex() else self.embed(inputs)
        shape = tuple(vectors.shape)
        if len(shape) != 3 or shape[2] != cfg.d_in or not 1 <= shape[1] <= cfg.n_ctx:
            raise InputError(f"inputs is {shape}: give vectors [batch, 1 to {cfg.n_ctx} positions, {cfg.d_in}].")
        complex_too = not cfg.norm and vectors.dtype == dtype.to_complex()
        if vectors.dtype != dtype and not complex_too:
            raise InputError(f"inputs is {vectors.dtype}, and the model computes in {dtype}: convert one of them.")
        return vectors

    def start(self, vectors: Tensor) -> Tensor:
        """The first stream: vectors augmented, projected, or as they are."""
        if self.cfg.augmented:
            before = F.pad(vectors[:, :-1], (0, 0, 1, 0))
            vectors = torch.cat([torch.zeros_like(vectors), vectors, before], -1)
        if self.cfg.attn_only:
            return self.hook_embed(vectors)
        positions = repeat(
            self.pos_embed.table[: vectors.shape[1]], "position d_model -> batch position d_model", batch=len(vectors)
        )
        return self.hook_embed(vectors @ self.project.W_in + self.project.b_in) + self.hook_pos_embed(positions)


class _Table(nn.Module):
    """The vectors that ids stand for, the same in every model of a width."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        vectors = torch.randn(cfg.d_vocab, cfg.d_in, generator=torch.Generator().manual_seed(0)) / math.sqrt(cfg.d_in)
        self.register_buffer("vectors", vectors, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.get_buffer("vectors"))


class LinearBlock(Hooked):
    """Linear attention alone, with a LayerNorm on what it adds where `cfg.norm` asks for one."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg, "resid_pre attn_out resid_post")
        self.attn = _LinearAttention(cfg)
        self.ln1 = LayerNorm(cfg) if cfg.norm else None

    def forward(self, stream: Tensor, attention_mask: Tensor) -> Tensor:
        stream = self.hook_resid_pre(stream)
        write = self.attn(stream, attention_mask)
        if self.ln1 is not None:
            write = self.ln1(write)
        return self.hook_resid_post(stream + self.hook_attn_out(write))


class _LinearAttention(Attention):
    """The attention of `SmallTransformer` without its softmax; its pattern is its scores."""

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        W_Q, W_K, W_V, W_O = (weight.to(x.dtype) for weight in (self.W_Q, self.W_K, self.W_V, self.W_O))
        q = self.hook_q(einsum(x, W_Q, INTO_HEADS) + self.b_Q)
        k = self.hook_k(einsum(x, W_K, INTO_HEADS) + self.b_K)
        v = self.hook_v(einsum(x, W_V, INTO_HEADS) + self.b_V)
        visible = repeat(real, "batch key -> batch 1 query key", query=x.shape[1])
        if self.cfg.attention_dir == "causal":
            visible = visible.tril()
        scores = einsum(q, k.conj(), SCORES) / self.cfg.attn_scale
        pattern = self.hook_pattern(self.hook_attn_scores(scores.masked_fill(~visible, 0.0)))
        z = self.hook_z(einsum(pattern, v, MIX))
        return self.hook_out(out_of_heads(z, W_O) + self.b_O)


def _draw(model: VectorModel) -> None:
    """Draws matrices and their biases uniformly with variance gain / fan_in; a gain of 1/3 is PyTorch's Linear."""
    generator = torch.Generator().manual_seed(model.cfg.seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name.startswith(("W_", "b_")):
                matrix = getattr(module, f"W_{name[2:]}")
                fan_in = matrix.shape[-2]
                if name.endswith("_O"):  # which sums over heads too
                    fan_in = matrix.numel() // matrix.shape[-1]
                bound = math.sqrt(3 * model.cfg.gain / fan_in)
                nn.init.uniform_(parameter, -bound, bound, generator)
            elif name == "table":
                nn.init.normal_(parameter, 0, 1 / math.sqrt(model.cfg.d_model), generator)
