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
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import skip_init
from transformer_lens.hook_points import HookPoint

from metaint.errors import InputError
from metaint.toys.memory_blocks import MemoryBlock, Positions, Unembedding, waves
from metaint.toys.parts import HookedRootModule, check_sizes, next_token_loss, real_tokens, stacked

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
    check_sizes(**sizes)
    if positions != "random" and d_model % 2:
        raise InputError(f"d_model is {d_model}: {positions} positions need an even number.")
    if first_feed_forward and n_layers == 1:
        raise InputError("n_layers is 1, and first_feed_forward was given: the only layer's is feed_forward.")
    if tied and train_unembedding:
        raise InputError("train_unembedding and tied are both True: a tied unembedding is never trained, choose one.")
    feed_forwards = [first_feed_forward, *[None] * (n_layers - 2), feed_forward][-n_layers:]
    cfg = SimpleNamespace(
        **sizes,
        n_heads=1,
        d_head=d_model,
        d_mlp=4 * d_model,
        positions=positions,
        scaled_embeddings=scaled_embeddings,
        tied=tied,
        train_embeddings=train_embeddings,
        train_unembedding=train_unembedding,
        feed_forwards=feed_forwards,
        biases=False,
        seed=seed,
        device=device,
        dtype=dtype,
        # The kind of model in TransformerLens's words, which probes and the hook audit ask for.
        model_name="memory-transformer",
        default_prepend_bos=False,
        attention_dir="causal",
        attn_only=not any(feed_forwards),
        parallel_attn_mlp=False,
        act_fn="relu",
        use_attn_scale=scaled_scores,
        attn_scale=1.0,
        logit_scale=1.0,
        normalization_type=None,
        positional_embedding_type="standard",
    )
    if scaled_scores:
        cfg.attn_scale = math.sqrt(d_model)
    if tied:
        cfg.logit_scale = 1 / math.sqrt(d_model)
    if positions == "rotary":
        cfg.positional_embedding_type = "rotary"
    return MemoryTransformer(cfg)


class MemoryTransformer(HookedRootModule):
    """The model that `memory_transformer` makes, from the `cfg` that it writes.

    Weights stand as in TransformerLens, x W: the transposes of the paper's. W_Q is the identity by construction and no
    parameter; nor are positions, which lie in the state dict. In a model with feed-forwards, `hook_mlp_out` is zero
    where a layer has none; with "rotary", `hook_rot_q` and `hook_rot_k` are what enters the scores of every layer.

    Attention is fused, and so can't be differentiated twice, until something listens at `hook_attn_scores` or
    `hook_pattern`, or a mask is given.
    """

    W_K, W_V, W_O = map(stacked, ("W_K", "W_V", "W_O"))
    W_E: Any = property(lambda model: model.embed.weight)
    W_pos: Any = property(lambda model: model.pos_embed.weight)
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
            self.pos_embed, self.hook_pos_embed = Positions(cfg), HookPoint()
        self.blocks = nn.ModuleList(MemoryBlock(cfg, layer) for layer in range(cfg.n_layers))
        self.unembed = Unembedding(cfg)
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
    embeddings = scale * torch.randn(cfg.d_vocab, d, generator=generator)
    unembedding = uniform(d, cfg.d_vocab, d)
    if cfg.tied:
        unembedding = embeddings / math.sqrt(d)
    state = {"embed.weight": embeddings, "unembed.weight": unembedding}
    for layer, name in itertools.product(range(cfg.n_layers), ("W_K", "W_V", "W_O")):
        state[f"blocks.{layer}.attn.{name}"] = uniform(d, 1, d, d)
    positions = torch.randn(cfg.n_ctx, d, generator=generator)
    if cfg.positions == "sinusoidal":
        positions = rearrange([*waves(cfg)], "half position pair -> position (pair half)")
    if cfg.positions != "rotary":
        state["pos_embed.weight"] = scale * positions
    for layer, kind in reversed([*enumerate(cfg.feed_forwards)]):  # the last layer's first, which the first's leaves
        if kind == "linear":
            state[f"blocks.{layer}.mlp.W_F"] = uniform(d, d, d)
        elif kind == "mlp":
            state[f"blocks.{layer}.mlp.W_in"] = uniform(d, d, 4 * d)
            state[f"blocks.{layer}.mlp.W_out"] = uniform(4 * d, 4 * d, d)
    return state


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
    InputError for another number of layers, for a model without added positions, and for ids it does not know.
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
