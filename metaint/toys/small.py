"""A small decoder-only language model for training experiments, its norms before or after sublayers or additions.

In: sizes and the place of the norms. Out: a `HookedRootModule` with TransformerLens's hook names. It exists because no
config of TransformerLens makes a decoder whose norms follow the sublayer (Merrill et al. 2021, 2010.09697; OLMo-2) or
the addition (the original Transformer), and how parameters grow and saturate hangs on that place.
"""

import math
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init
from transformer_lens.hook_points import HookPoint

from metaint.errors import InputError

try:
    from transformer_lens import HookedRootModule
except ImportError:  # TransformerLens 2
    from transformer_lens.hook_points import HookedRootModule

_ACTIVATIONS = {"relu": torch.relu, "gelu": F.gelu}


def small_transformer(
    *,
    norm: Literal["pre", "output", "post"],
    n_layers: int,
    n_heads: int,
    d_model: int,
    d_mlp: int,
    d_vocab: int,
    n_ctx: int,
    act: Literal["relu", "gelu"] = "relu",
    gated: bool = False,
    biases: bool = True,
    final_norm: bool | None = None,
    parallel: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> "SmallTransformer":
    """A new `SmallTransformer`, to be trained: LayerNorm, learned positions, an untied unembedding without bias.

    `norm` says what a sublayer does to the stream x: "pre" x + sublayer(LN(x)) (GPT-2), "output" x + LN(sublayer(x))
    (what Merrill et al. 2021 call pre-norm, and OLMo-2), "post" LN(x + sublayer(x)) (the original Transformer).
    `final_norm` puts another LayerNorm before the unembedding: by default with "pre" and "output", not with "post".
    `parallel` ("pre" alone) has the MLP read what attention reads, x + attn(LN1(x)) + mlp(LN2(x)), as GPT-NeoX does and
    the full model of Bietti et al. 2023 (transformer-birth `ihead_full_model.py`). A `gated` MLP is
    (act(x W_gate) * (x W_in + b_in)) W_out + b_out. Without `biases` norms have none either.
    Weights are normal with std 0.02 (W_O and W_out: over sqrt(2 n_layers)), biases 0, gains 1; they depend on `seed`
    alone, and the global random state stays as it was. Raises InputError for what can't be built.
    """
    for name, value, known in (("norm", norm, ("pre", "output", "post")), ("act", act, _ACTIVATIONS)):
        if value not in known:
            raise InputError(f"{name} is {value!r}: choose one of {', '.join(known)}.")
    sizes = {"n_layers": n_layers, "n_heads": n_heads, "d_mlp": d_mlp, "d_vocab": d_vocab, "n_ctx": n_ctx}
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} is {size}: give at least 1.")
    if d_model < 1 or d_model % n_heads:
        raise InputError(f"d_model is {d_model}: give a multiple of the {n_heads} heads.")
    if parallel and norm != "pre":
        raise InputError(f'parallel is True, and norm is {norm!r}: only "pre" has a parallel form.')
    cfg = SimpleNamespace(**sizes, d_model=d_model, act_fn=act, gated_mlp=gated, seed=seed, device=device, dtype=dtype)
    cfg.norm, cfg.biases, cfg.final_norm = norm, biases, norm != "post" if final_norm is None else final_norm
    cfg.model_name, cfg.d_head, cfg.eps, cfg.default_prepend_bos = f"small-{norm}", d_model // n_heads, 1e-5, False
    # The kind of model in TransformerLens's words, which probes and the hook audit ask for.
    cfg.attn_only, cfg.parallel_attn_mlp, cfg.attention_dir = False, parallel, "causal"
    cfg.normalization_type, cfg.positional_embedding_type = "LN", "standard"
    return SmallTransformer(cfg)


class SmallTransformer(HookedRootModule):
    """The model that `small_transformer` makes, from the `cfg` that it writes.

    `hook_attn_out` and `hook_mlp_out` are what is added to the stream (with "output" after the norm), `attn.hook_out`
    and `mlp.hook_out` what the sublayers give. With "post", `hook_resid_mid` and `hook_resid_post` come after the norm.
    `ln_final` is None without a final norm; biases that the model hasn't (`b_U` among them) are zeros, not parameters.
    """

    W_Q, W_K, W_V, W_O, b_Q, b_K, b_V, b_O = (
        property(lambda model, name=name: torch.stack([getattr(block.attn, name) for block in model.blocks]))
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
    )
    W_E, W_pos = (property(lambda model, name=name: getattr(model, name).weight) for name in ("embed", "pos_embed"))
    W_U: Any = property(lambda model: model.unembed.weight.T)
    b_U: Any = property(lambda model: model.W_U.new_zeros(model.cfg.d_vocab))

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg, self.tokenizer = cfg, None
        self.embed, self.pos_embed = (skip_init(nn.Embedding, n, cfg.d_model) for n in (cfg.d_vocab, cfg.n_ctx))
        self.hook_embed, self.hook_pos_embed = HookPoint(), HookPoint()
        self.blocks = nn.ModuleList(_Block(cfg) for _ in range(cfg.n_layers))
        self.ln_final = _LayerNorm(cfg) if cfg.final_norm else None
        self.unembed = skip_init(nn.Linear, cfg.d_model, cfg.d_vocab, bias=False)
        generator = torch.Generator().manual_seed(cfg.seed)
        for name, parameter in self.named_parameters():
            if name.endswith("weight") or ".W_" in name:
                n_written = 2 * cfg.n_layers if name.endswith(("W_O", "W_out")) else 1
                nn.init.normal_(parameter, 0, 0.02 / math.sqrt(n_written), generator)
        self.to(device=cfg.device, dtype=cfg.dtype)
        self.setup()

    def forward(self, tokens: Tensor, return_type: str | None = "logits", attention_mask: Tensor | None = None) -> Any:
        """The "logits" [batch, position, d_vocab], or None, or the "loss": the next token's mean cross-entropy in nats.

        `attention_mask` [batch, position], as tokens, is 0 at padding, left or right: others don't attend to it, and
        positions and loss leave it out. Raises InputError for an unknown `return_type` and shapes that don't fit.
        """
        real = real_tokens(tokens, attention_mask, return_type, self.cfg.n_ctx)
        positions = (real.cumsum(-1) - 1).clamp(min=0)
        stream = self.hook_embed(self.embed(tokens)) + self.hook_pos_embed(self.pos_embed(positions))
        for block in self.blocks:
            stream = block(stream, attention_mask=real)
        stream = stream if self.ln_final is None else self.ln_final(stream)
        if return_type is None:
            return None
        logits = self.unembed(stream)
        return logits if return_type == "logits" else next_token_loss(logits, tokens, real)


def real_tokens(tokens: Tensor, attention_mask: Tensor | None, return_type: str | None, n_ctx: int) -> Tensor:
    """Which tokens are no padding, bool [batch, position]; InputError for what no forward pass here takes."""
    if return_type not in ("logits", "loss", None):
        raise InputError(f'return_type is {return_type!r}: choose "logits", "loss" or None.')
    real = (torch.ones_like(tokens) if attention_mask is None else attention_mask.to(tokens.device)).bool()
    shape, least = tuple(tokens.shape), 2 if return_type == "loss" else 1
    if len(shape) != 2 or real.shape != shape or not least <= shape[1] <= n_ctx:
        raise InputError(f"tokens is {shape}, its mask {(*real.shape,)}: give both as [batch, {least} to {n_ctx}].")
    return real


def next_token_loss(logits: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the next token, where both it and the current one are real."""
    targets = tokens[:, 1:].long().masked_fill(~(real[:, 1:] & real[:, :-1]), -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)


class _Part(nn.Module):
    """Hook points, and weights of the sizes named; a bias of a model without biases is zero and no parameter."""

    __getattr__: Any  # what is registered by name is of any type

    def __init__(self, cfg: Any, hooks: str, **weights: str) -> None:
        super().__init__()
        self.cfg = cfg
        for name in hooks.split():
            setattr(self, f"hook_{name}", HookPoint())
        for name, sizes in weights.items():
            value = torch.full([getattr(cfg, size) for size in sizes.split()], float(name == "w"))
            if cfg.biases or not name.startswith("b"):
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value, persistent=False)


class _Block(_Part):
    def __init__(self, cfg: Any) -> None:
        middle = "" if cfg.parallel_attn_mlp else "resid_mid"
        super().__init__(cfg, f"resid_pre attn_out {middle} mlp_out resid_post")
        self.ln1, self.attn, self.ln2, self.mlp = _LayerNorm(cfg), _Attention(cfg), _LayerNorm(cfg), _MLP(cfg)

    def forward(self, stream: Tensor, attention_mask: Tensor) -> Tensor:
        stream = self.hook_resid_pre(stream)
        if self.cfg.parallel_attn_mlp:
            attended = stream + self.hook_attn_out(self.attn(self.ln1(stream), attention_mask))
            return self.hook_resid_post(attended + self.hook_mlp_out(self.mlp(self.ln2(stream))))
        stream = self.add(stream, lambda x: self.attn(x, attention_mask), self.ln1, self.hook_attn_out)
        return self.hook_resid_post(self.add(self.hook_resid_mid(stream), self.mlp, self.ln2, self.hook_mlp_out))

    def add(self, x: Tensor, sublayer: Any, norm: Any, added: Any) -> Tensor:
        if self.cfg.norm == "post":
            return norm(x + added(sublayer(x)))
        return x + added(sublayer(norm(x)) if self.cfg.norm == "pre" else norm(sublayer(x)))


class _LayerNorm(_Part):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg, "scale normalized", w="d_model", b="d_model")

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        scale = self.hook_scale((x.square().mean(-1, keepdim=True) + self.cfg.eps).sqrt())
        return self.hook_normalized(x / scale) * self.w + self.b


class _Attention(_Part):
    def __init__(self, cfg: Any) -> None:
        weights = dict.fromkeys(("W_Q", "W_K", "W_V"), "n_heads d_model d_head") | {"W_O": "n_heads d_head d_model"}
        biases = dict.fromkeys(("b_Q", "b_K", "b_V"), "n_heads d_head") | {"b_O": "d_model"}
        super().__init__(cfg, "q k v attn_scores pattern z out", **weights, **biases)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        q = self.hook_q(torch.einsum("bpm,hmd->bphd", x, self.W_Q) + self.b_Q)
        k = self.hook_k(torch.einsum("bpm,hmd->bphd", x, self.W_K) + self.b_K)
        v = self.hook_v(torch.einsum("bpm,hmd->bphd", x, self.W_V) + self.b_V)
        # Each query sees itself, padding too: a softmax over nothing would be NaN, and so would every gradient.
        visible = (real[:, None, None] | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)).tril()
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(self.cfg.d_head)
        pattern = self.hook_pattern(self.hook_attn_scores(scores.masked_fill(~visible, -math.inf)).softmax(-1))
        z = self.hook_z(torch.einsum("bhqk,bkhd->bqhd", pattern, v))
        return self.hook_out(torch.einsum("bqhd,hdm->bqm", z, self.W_O) + self.b_O)


class _MLP(_Part):
    def __init__(self, cfg: Any) -> None:
        weights = {"W_in": "d_model d_mlp", "b_in": "d_mlp", "W_out": "d_mlp d_model", "b_out": "d_model"}
        gate = {"W_gate": "d_model d_mlp"} if cfg.gated_mlp else {}
        super().__init__(cfg, "pre pre_linear post out" if gate else "pre post out", **weights, **gate)

    def forward(self, x: Tensor) -> Tensor:
        act, linear = _ACTIVATIONS[self.cfg.act_fn], x @ self.W_in + self.b_in
        post = act(self.hook_pre(x @ self.W_gate if self.cfg.gated_mlp else linear))
        post = post * self.hook_pre_linear(linear) if self.cfg.gated_mlp else post
        return self.hook_out(self.hook_post(post) @ self.W_out + self.b_out)
