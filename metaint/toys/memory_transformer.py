"""The simplified transformer of "Birth of a Transformer" (Bietti et al. 2023, 2306.00802), and its induction head.

In: sizes and the switches of the paper's code. Out: a `HookedRootModule` with TransformerLens's hook names, whose
matrices can be read as associative memories between random embeddings; and `write_induction_head`, which writes such
memories into it. Source: transformer-birth `ihead_basic_model.py`.
"""

import itertools
import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init
from transformer_lens.hook_points import HookPoint

from metaint.errors import InputError
from metaint.toys.small import _Part, next_token_loss, real_tokens

try:
    from transformer_lens import HookedRootModule
except ImportError:  # TransformerLens 2
    from transformer_lens.hook_points import HookedRootModule

_CHOICES = {
    "positions": ("random", "sinusoidal", "rotary"),
    "feed_forward": (None, "linear", "mlp"),
    "first_feed_forward": (None, "linear", "mlp"),
}


def memory_transformer(
    *,
    d_vocab: int,
    n_ctx: int,
    d_model: int,
    n_layers: int = 2,
    positions: Literal["random", "sinusoidal", "rotary"] = "random",
    scaled_embeddings: bool = False,
    scaled_scores: bool = True,
    tied: bool = False,
    feed_forward: Literal["linear", "mlp"] | None = None,
    first_feed_forward: Literal["linear", "mlp"] | None = None,
    train_embeddings: bool = False,
    train_unembedding: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> "MemoryTransformer":
    """A new `MemoryTransformer`: one head a layer, as wide as the stream, W_Q = 1, no norms and no biases.

    Embeddings and positions are standard normal, every other matrix is uniform in ±1/√(its inputs). Gradients are
    required by W_K of every layer, W_O of the last, feed-forwards, and, if asked, embeddings and unembedding; never by
    positions. One layer is the baseline that has no previous-token head to build on.

    `positions` are added, but for "rotary", which turns queries and keys of the first layer by their place, in adjacent
    pairs of dimensions. `scaled_embeddings` divides embeddings and positions by √d; scores are over √d with
    `scaled_scores`. `tied` makes W_U a copy of the embeddings over √d, which training leaves as it is, and divides
    logits by √d again, as the paper's code does. The `feed_forward` of the last layer and the `first_feed_forward` of
    the first read the stream after attention: "linear" is h W_F, "mlp" relu(h W_in) W_out of width 4 d.

    Weights depend on `seed` alone: a switch changes only what it names, another dtype holds the same numbers rounded,
    and the global random state stays as it was. Raises InputError for what can't be built.
    """
    given = {"positions": positions, "feed_forward": feed_forward, "first_feed_forward": first_feed_forward}
    for name, value in given.items():
        if value not in _CHOICES[name]:
            raise InputError(f"{name} is {value!r}: choose one of {', '.join(map(str, _CHOICES[name]))}.")
    sizes = {"d_vocab": d_vocab, "n_ctx": n_ctx, "d_model": d_model, "n_layers": n_layers}
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} is {size}: give at least 1.")
    if positions != "random" and d_model % 2:
        raise InputError(f"d_model is {d_model}: {positions} positions need an even number.")
    if first_feed_forward and n_layers == 1:
        raise InputError("n_layers is 1, and first_feed_forward was given: the only layer's is feed_forward.")
    if tied and train_unembedding:
        raise InputError("train_unembedding and tied are both True: a tied unembedding is never trained, choose one.")
    cfg = SimpleNamespace(**sizes, n_heads=1, d_head=d_model, d_mlp=4 * d_model, seed=seed, device=device, dtype=dtype)
    cfg.positions, cfg.scaled_embeddings, cfg.tied = positions, scaled_embeddings, tied
    cfg.train_embeddings, cfg.train_unembedding, cfg.biases = train_embeddings, train_unembedding, False
    cfg.feed_forwards = [first_feed_forward, *[None] * (n_layers - 2), feed_forward][-n_layers:]
    # The kind of model in TransformerLens's words, which probes and the hook audit ask for.
    cfg.model_name, cfg.default_prepend_bos, cfg.attention_dir = "memory-transformer", False, "causal"
    cfg.attn_only, cfg.parallel_attn_mlp, cfg.act_fn = not any(cfg.feed_forwards), False, "relu"
    cfg.use_attn_scale, cfg.attn_scale = scaled_scores, math.sqrt(d_model) if scaled_scores else 1.0
    cfg.normalization_type, cfg.logit_scale = None, 1 / math.sqrt(d_model) if tied else 1.0
    cfg.positional_embedding_type = "rotary" if positions == "rotary" else "standard"
    return MemoryTransformer(cfg)


class MemoryTransformer(HookedRootModule):
    """The model that `memory_transformer` makes, from the `cfg` that it writes.

    Weights stand as in TransformerLens, x W: the transposes of the paper's. W_Q is the identity by construction and no
    parameter; nor are positions, which lie in the state dict. In a model with feed-forwards, `hook_mlp_out` is zero
    where a layer has none; with "rotary", `hook_rot_q` and `hook_rot_k` are what enters the scores of every layer.

    Attention is fused, and so can't be differentiated twice, until something listens at `hook_attn_scores` or
    `hook_pattern`, or a mask is given.
    """

    W_K, W_V, W_O = (
        property(lambda model, name=name: torch.stack([getattr(block.attn, name) for block in model.blocks]))
        for name in ("W_K", "W_V", "W_O")
    )
    W_E, W_pos = (property(lambda model, name=name: getattr(model, name).weight) for name in ("embed", "pos_embed"))
    W_Q: Any = property(lambda model: torch.eye(model.cfg.d_model).to(model.W_E).expand(model.cfg.n_layers, 1, -1, -1))
    W_U: Any = property(lambda model: model.unembed.weight.T)
    b_Q, b_K, b_V = (property(lambda model: model.b_O[:, None]) for _ in "QKV")
    b_O: Any = property(lambda model: model.W_E.new_zeros(model.cfg.n_layers, model.cfg.d_model))
    b_U: Any = property(lambda model: model.W_E.new_zeros(model.cfg.d_vocab))

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg, self.tokenizer = cfg, None
        self.embed, self.hook_embed = skip_init(nn.Embedding, cfg.d_vocab, cfg.d_model), HookPoint()
        if cfg.positions != "rotary":
            self.pos_embed, self.hook_pos_embed = _Positions(cfg), HookPoint()
        self.blocks = nn.ModuleList(_Block(cfg, layer) for layer in range(cfg.n_layers))
        self.unembed = _Unembedding(cfg)
        asked = {"embed.weight": cfg.train_embeddings, "unembed.weight": cfg.train_unembedding}
        last = f"blocks.{cfg.n_layers - 1}.attn.W_O"
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(asked.get(name, name.endswith("W_K") or ".mlp." in name or name == last))
        self.to(device=cfg.device, dtype=cfg.dtype)
        self.load_state_dict(_draw(cfg))
        self.setup()

    def forward(
        self,
        tokens: Int[Tensor, "batch position"],
        return_type: str | None = "logits",
        attention_mask: Tensor | None = None,
    ) -> Any:
        """The "logits" [batch, position, d_vocab], or None, or the "loss": the next token's mean cross-entropy in nats.

        `attention_mask` [batch, position], as tokens, is 0 at padding, left or right: others don't attend to it, and
        positions and loss leave it out. Raises InputError for an unknown `return_type` and shapes that don't fit.
        """
        real = real_tokens(tokens, attention_mask, return_type, self.cfg.n_ctx)
        padded = None if attention_mask is None else real
        stream = self.hook_embed(self.embed(tokens))
        if self.cfg.positions != "rotary":
            stream = stream + self.hook_pos_embed(self.pos_embed(tokens, padded))
        for block in self.blocks:
            stream = block(stream, attention_mask=padded)
        if return_type is None:
            return None
        logits = self.unembed(stream)
        return logits if return_type == "logits" else next_token_loss(logits, tokens, real)


def _draw(cfg: Any) -> dict[str, Tensor]:
    """The state of a new model by name, always drawn in one order: what another switch would need is passed over."""
    d, generator = cfg.d_model, torch.Generator().manual_seed(cfg.seed)

    def uniform(n_in: int, *shape: int) -> Tensor:
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(n_in)

    scale = 1 / math.sqrt(d) if cfg.scaled_embeddings else 1.0
    embeddings, unembedding = scale * torch.randn(cfg.d_vocab, d, generator=generator), uniform(d, cfg.d_vocab, d)
    state = {"embed.weight": embeddings, "unembed.weight": embeddings / math.sqrt(d) if cfg.tied else unembedding}
    for layer, name in itertools.product(range(cfg.n_layers), ("W_K", "W_V", "W_O")):
        state[f"blocks.{layer}.attn.{name}"] = uniform(d, 1, d, d)
    positions = torch.randn(cfg.n_ctx, d, generator=generator)
    if cfg.positions != "rotary":
        waves = cfg.positions == "sinusoidal"
        state["pos_embed.weight"] = scale * (torch.stack(_waves(cfg), -1).flatten(1) if waves else positions)
    for layer, kind in reversed([*enumerate(cfg.feed_forwards)]):  # the last layer's first, which the first's leaves
        if kind == "linear":
            state[f"blocks.{layer}.mlp.W_F"] = uniform(d, d, d)
        elif kind == "mlp":
            state[f"blocks.{layer}.mlp.W_in"] = uniform(d, d, 4 * d)
            state[f"blocks.{layer}.mlp.W_out"] = uniform(4 * d, 4 * d, d)
    return state


def _waves(cfg: Any) -> tuple[Float[Tensor, "position pair"], Float[Tensor, "position pair"]]:
    """Sines and cosines of position over 10000^(2 pair / d)."""
    pair = torch.arange(cfg.d_model // 2, dtype=torch.float64)
    angle = torch.outer(torch.arange(cfg.n_ctx, dtype=torch.float64), 10000 ** (-2 * pair / cfg.d_model))
    return angle.sin(), angle.cos()


class _Positions(_Part):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg, "")
        self.register_buffer("weight", torch.empty(cfg.n_ctx, cfg.d_model))

    def forward(self, tokens: Tensor, real: Tensor | None) -> Tensor:
        if real is None:
            return self.weight[: tokens.shape[1]].expand(len(tokens), -1, -1)
        return self.weight[(real.cumsum(-1) - 1).clamp(min=0)]


class _Unembedding(_Part):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg, "", weight="d_vocab d_model")

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.cfg.logit_scale)


class _Block(_Part):
    def __init__(self, cfg: Any, layer: int) -> None:
        super().__init__(cfg, "resid_pre attn_out resid_post" + " resid_mid mlp_out" * (not cfg.attn_only))
        self.attn = _Attention(cfg, turned=cfg.positions == "rotary" and layer == 0)
        self.mlp = _FeedForward(cfg, cfg.feed_forwards[layer]) if cfg.feed_forwards[layer] else None

    def forward(self, stream: Tensor, attention_mask: Tensor | None) -> Tensor:
        stream = self.hook_resid_pre(stream)
        stream = stream + self.hook_attn_out(self.attn(stream, attention_mask))
        if not self.cfg.attn_only:
            stream = self.hook_resid_mid(stream)
            if self.mlp is not None or _is_heard(self.hook_mlp_out):
                stream = stream + self.hook_mlp_out(torch.zeros_like(stream) if self.mlp is None else self.mlp(stream))
        return self.hook_resid_post(stream)


class _Attention(_Part):
    def __init__(self, cfg: Any, turned: bool) -> None:
        hooks = "q k v attn_scores pattern z" + " rot_q rot_k" * (cfg.positions == "rotary")
        inwards, outwards = "n_heads d_model d_head", "n_heads d_head d_model"
        super().__init__(cfg, hooks, W_K=inwards, W_V=inwards, W_O=outwards)
        self.turned = turned
        if turned:
            for name, wave in zip(("sine", "cosine"), _waves(cfg), strict=True):
                self.register_buffer(name, wave, persistent=False)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        q = self.hook_q(x[:, :, None])
        k = self.hook_k((x @ self.W_K[0])[:, :, None])
        v = self.hook_v((x @ self.W_V[0])[:, :, None])
        if self.cfg.positions == "rotary":
            q, k = self.hook_rot_q(self.turn(q)), self.hook_rot_k(self.turn(k))
        z = self.hook_z(self.mix(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), real).transpose(1, 2))
        return z[:, :, 0] @ self.W_O[0]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        """What each query [batch, head, position, d_head] takes of the values."""
        if real is None and not _is_heard(self.hook_attn_scores, self.hook_pattern):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / self.cfg.attn_scale)
        visible = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        if real is not None:  # each query sees itself, padding too: a softmax over nothing would be NaN
            visible = visible & (real[:, None, None] | torch.eye(len(visible), dtype=torch.bool, device=q.device))
        scores = (q @ k.mT / self.cfg.attn_scale).masked_fill(~visible, -math.inf)
        return self.hook_pattern(self.hook_attn_scores(scores).softmax(-1)) @ v

    def turn(self, x: Tensor) -> Tensor:
        """Adjacent pairs of dimensions, turned by the angle of their position; in later layers as they are."""
        if not self.turned:
            return x
        sine, cosine = (wave[: x.shape[1], None] for wave in (self.sine, self.cosine))
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cosine - b * sine, a * sine + b * cosine], -1).flatten(-2)


class _FeedForward(_Part):
    def __init__(self, cfg: Any, kind: str) -> None:
        if kind == "linear":
            super().__init__(cfg, "", W_F="d_model d_model")
        else:
            super().__init__(cfg, "pre post", W_in="d_model d_mlp", W_out="d_mlp d_model")
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "linear":
            return x @ self.W_F
        return self.hook_post(self.hook_pre(x @ self.W_in).relu()) @ self.W_out


def _is_heard(*points: Any) -> bool:
    """Whether anything, TransformerLens's or torch's, hangs on these hook points, forward or backward."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(point, kind) for point in points for kind in kinds)


@torch.no_grad()
def write_induction_head(
    model: MemoryTransformer, scale: float | int = 30.0, triggers: Iterable[int] | Int[Tensor, " trigger"] | None = None
) -> None:
    """Writes an induction head into a model of two layers, as sums of outer products of what it is to associate.

    With E, P and U the rows of embeddings, positions and unembedding: in layer 0 the query P[t] finds the key P[t-1];
    in layer 1 the query E[k] finds what layer 0 makes of E[k], for k in `triggers` (None: all tokens); and what layer 1
    takes of E[k] makes the logit of U[k]. Each sum is over mean squared lengths, so that matching scores, and logits,
    are `scale` on average, crosstalk aside. All else stays as it is, a feed-forward too.

    The form is the one that the recall probes of transformer-birth test for; the paper's text was not at hand. Raises
    InputError for another number of layers, for a model without added positions, and for ids it doesn't know.
    """
    cfg = model.cfg
    if cfg.n_layers != 2 or cfg.positions == "rotary":
        raise InputError(
            f"model has n_layers {cfg.n_layers} and {cfg.positions} positions: an induction head is written into two "
            "layers, with positions that are added."
        )
    chosen = list(range(cfg.d_vocab)) if triggers is None else [int(token) for token in triggers]
    if wrong := [token for token in chosen if not 0 <= token < cfg.d_vocab]:
        raise InputError(f"triggers has the id {wrong[0]}, and the model's vocabulary is 0 to {cfg.d_vocab - 1}.")
    blocks: Any = model.blocks
    first, second = (block.attn for block in blocks)
    tokens, places, answers = (table.double() for table in (model.W_E, model.W_pos, model.W_U.mT))
    asked = tokens[chosen]
    moved = asked @ first.W_V[0].double() @ first.W_O[0].double()
    first.W_K[0] = _memory(places[:-1], places[1:], scale * cfg.attn_scale)
    second.W_K[0] = _memory(moved, asked, scale * cfg.attn_scale)
    second.W_O[0] = _memory(tokens @ second.W_V[0].double(), answers, scale / cfg.logit_scale)


def _memory(keys: Float[Tensor, "pair d"], values: Float[Tensor, "pair d"], scale: float) -> Float[Tensor, "d d"]:
    """The matrix M, as x M, that is the sum of key^T value, with `scale` the mean of |key|² |value|² in it."""
    matches = keys.square().sum(-1) * values.square().sum(-1)
    return keys.mT @ values * (scale / matches.mean().nan_to_num(1.0))  # no pairs: zeros
