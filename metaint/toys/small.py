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
from torch.nn.utils import skip_init
from transformer_lens.hook_points import HookPoint

from metaint.errors import InputError
from metaint.toys.parts import (
    ACTIVATIONS,
    Block,
    HookedRootModule,
    LayerNorm,
    check_sizes,
    next_token_loss,
    real_tokens,
    stacked,
)


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

    - `norm`: what a sublayer does to the stream x. "pre": x + sublayer(LN(x)) (GPT-2); "output": x + LN(sublayer(x))
      (what Merrill et al. 2021 call pre-norm, and OLMo-2); "post": LN(x + sublayer(x)) (the original Transformer).
    - `gated`: the MLP is (act(x W_gate) * (x W_in + b_in)) W_out + b_out.
    - `biases`: without them norms have none either.
    - `final_norm`: another LayerNorm before the unembedding; by default with "pre" and "output", not with "post".
    - `parallel` ("pre" alone): the MLP reads what attention reads, x + attn(LN1(x)) + mlp(LN2(x)), as in GPT-NeoX and
      the full model of Bietti et al. 2023 (transformer-birth `ihead_full_model.py`).

    Weights are normal with std 0.02 (W_O and W_out: over sqrt(2 n_layers)), biases 0, gains 1; they depend on `seed`
    alone, and the global random state stays as it was. Raises InputError for what can't be built.

    >>> import torch
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> model(torch.arange(10)[None]).shape, model.W_Q.shape
    (torch.Size([1, 10, 50]), torch.Size([2, 2, 16, 8]))
    """
    if norm not in ("pre", "output", "post"):
        raise InputError(f"norm is {norm!r}: choose one of pre, output, post.")
    if act not in ACTIVATIONS:
        raise InputError(f"act is {act!r}: choose one of {', '.join(ACTIVATIONS)}.")
    sizes = {"n_layers": n_layers, "n_heads": n_heads, "d_mlp": d_mlp, "d_vocab": d_vocab, "n_ctx": n_ctx}
    check_sizes(**sizes)
    if d_model < 1 or d_model % n_heads:
        raise InputError(f"d_model is {d_model}: give a multiple of the {n_heads} heads.")
    if parallel and norm != "pre":
        raise InputError(f'parallel is True, and norm is {norm!r}: only "pre" has a parallel form.')
    if final_norm is None:
        final_norm = norm != "post"
    cfg = SimpleNamespace(
        **sizes,
        d_model=d_model,
        d_head=d_model // n_heads,
        norm=norm,
        final_norm=final_norm,
        act_fn=act,
        gated_mlp=gated,
        biases=biases,
        eps=1e-5,
        seed=seed,
        device=device,
        dtype=dtype,
        # The kind of model in TransformerLens's words, which probes and the hook audit ask for.
        model_name=f"small-{norm}",
        default_prepend_bos=False,
        attn_only=False,
        parallel_attn_mlp=parallel,
        attention_dir="causal",
        normalization_type="LN",
        positional_embedding_type="standard",
    )
    return SmallTransformer(cfg)


class SmallTransformer(HookedRootModule):
    """The model that `small_transformer` makes, from the `cfg` that it writes.

    `hook_attn_out` and `hook_mlp_out` are what is added to the stream (with "output" after the norm), `attn.hook_out`
    and `mlp.hook_out` what the sublayers give. With "post", `hook_resid_mid` and `hook_resid_post` come after the norm.
    `ln_final` is None without a final norm; biases that the model does not have (`b_U` among them) are zeros, and no
    parameters.
    """

    W_Q, W_K, W_V, W_O = map(stacked, ("W_Q", "W_K", "W_V", "W_O"))
    b_Q, b_K, b_V, b_O = map(stacked, ("b_Q", "b_K", "b_V", "b_O"))
    W_E: Any = property(lambda model: model.embed.weight)
    W_pos: Any = property(lambda model: model.pos_embed.weight)
    W_U: Any = property(lambda model: model.unembed.weight.T)
    b_U: Any = property(lambda model: model.W_U.new_zeros(model.cfg.d_vocab))

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg, self.tokenizer = cfg, None
        self.embed = skip_init(nn.Embedding, cfg.d_vocab, cfg.d_model)
        self.pos_embed = skip_init(nn.Embedding, cfg.n_ctx, cfg.d_model)
        self.hook_embed, self.hook_pos_embed = HookPoint(), HookPoint()
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.ln_final = LayerNorm(cfg) if cfg.final_norm else None
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
        if self.ln_final is not None:
            stream = self.ln_final(stream)
        if return_type is None:
            return None
        logits = self.unembed(stream)
        return logits if return_type == "logits" else next_token_loss(logits, tokens, real)
