"""The heads of any model as associative memories: embeddings and folded weights, put before `measures/memory.py`.

In: a model and some of its tokens. Out: for heads and pairs of heads, what they recall. After Bietti et al. 2023
(2306.00802), whose probes read one layer each of a toy without norms; here every vector is normalised as the head that
reads it would see it, gains are folded into the weights, biases are left out, and a raw model and a folded one give the
same numbers. Elhage et al. 2021 ask the same of pairs of heads as the "full" circuits.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from metaint.errors import InputError, door
from metaint.measures import memory
from metaint.measures.inner import Norm
from metaint.measures.memory import Recall
from metaint.models.audit import require
from metaint.models.folded import FoldedWeights, folded_layers, normalised
from metaint.models.heads import head_of
from metaint.models.invariants import score_scale
from metaint.models.protocol import Model
from metaint.models.reading import Unavailable, untouched, widen
from metaint.models.readout import readout_of
from metaint.models.rotation import rotations

# Tokens that a recall is asked of by default.
TOKENS = 512
# Lags at which a rotation is looked at.
LAGS = 64
Embedding = Literal["token", "mlp0"]


class Memories:
    """Reads the recalls of a model's heads, and holds what several of them share.

    `tokens` are ids, or how many of the model's ordinary ones to draw by `seed` (all, where there are no more).
    `embedding` stands for a token in the stream: "token" its embedding, or "mlp0" what block 0 makes of it with its
    attention off, which says more of models whose first MLP rewrites tokens (GPT-2). `layers` are the folded weights
    of every layer, where they are at hand. Without gradients, and no trace left. Raises InputError for tokens out of
    range, Unavailable (on reading) where weights are not what a head does.
    """

    def __init__(
        self,
        model: Model,
        tokens: int | Sequence[int] = TOKENS,
        embedding: Embedding = "token",
        seed: int = 0,
        layers: Sequence[FoldedWeights] = (),
    ) -> None:
        if embedding not in ("token", "mlp0"):
            raise InputError(f'embedding is {embedding!r}: choose "token" or "mlp0".')
        self.model, self.embedding = model, embedding
        self.tokens = _chosen(model, tokens, seed)
        self._layers = list(layers)

    @property
    def layers(self) -> list[FoldedWeights]:
        """The folded weights of every layer."""
        if not self._layers:
            with torch.no_grad():
                self._layers = list(folded_layers(self.model))
        return self._layers

    @cached_property
    def embedded(self) -> Float[Tensor, "token d_model"]:
        """What stands for each token in the stream."""
        with torch.no_grad():
            rows = widen(_in_stream(self.model, self.model.W_E.detach()[self.tokens]))
            return rows if self.embedding == "token" else _after_first_mlp(self.model, self.tokens)

    @torch.no_grad()
    def seen(self, layer: int) -> Float[Tensor, "token d_model"]:
        """The tokens as a layer's heads see them."""
        return normalised(self.model, layer, self.embedded)

    @torch.no_grad()
    def ov(self, heads: Sequence[tuple[int, int]]) -> Recall:
        """W_O^2 as a memory of w_E(k) -> w_U(k), of one head or several added up: is a token's own logit the highest
        of the whole vocabulary, where the heads attend to it?

        Top 1 is `wo1_acc` of the reference, and the accuracy of the full OV circuit. With the gain and centring of
        the final norm, without biases.
        """
        readout = readout_of(self.model)
        queries, writes = [], []
        for layer, head in heads:
            weights = self.layers[layer]
            queries.append(self.seen(layer) @ weights.W_V[head])
            write = weights.W_O[head]
            if readout.norm is not None and readout.norm.kind == "layer":
                write = write - write.mean(-1, keepdim=True)
            if readout.norm is not None and readout.norm.gain is not None:
                write = write * widen(readout.norm.gain)
            writes.append(write)
        candidates = (torch.cat(writes) @ widen(readout.weight)).mT  # [vocab, the heads' widths]
        return memory.recall(torch.cat(queries, 1), candidates, self.tokens)

    @torch.no_grad()
    def key_composition(self, head: tuple[int, int], head_to: tuple[int, int]) -> Recall:
        """W_K^2 as a memory of w_E(k) -> w_1(k): of all the tokens that `head` may have written, does a query token
        of `head_to` score its own highest?

        `wk1_acc` of the reference. The candidates are the same tokens, as `head`'s OV circuit moves them.
        """
        (layer, i), (later, j) = head, head_to
        if layer >= later:
            raise InputError(f"head is in layer {layer} and head_to in layer {later}: it must be in a later layer.")
        reader, writer = self.layers[later], self.layers[layer]
        written = self.seen(layer) @ writer.W_V[i] @ writer.W_O[i]
        return memory.recall(self.seen(later) @ reader.W_Q[j], written @ reader.W_K[j])

    @torch.no_grad()
    def key_compositions(self, layer: int, later: int) -> Iterator[tuple[int, int, Recall]]:
        """`key_composition` for every pair of heads of two layers, sharing what they share."""
        reader, writer = self.layers[later], self.layers[layer]
        into_heads = "token d_model, head d_model d_head -> head token d_head"
        queries = einsum(self.seen(later), reader.W_Q, into_heads)
        values = einsum(self.seen(layer), writer.W_V, into_heads)
        for i, value in enumerate(values):
            keys = value @ (writer.W_O[i] @ reader.W_K)
            for j, (query, key) in enumerate(zip(queries, keys, strict=True)):
                yield i, j, memory.recall(query, key)

    @cached_property
    def positions(self) -> Float[Tensor, "position d_model"] | None:
        """Learned positions beside the mean token embedding, as they stand in the stream; None without any."""
        table = getattr(self.model, "W_pos", None)
        if table is None:  # a bridge of TransformerLens 3
            table = getattr(getattr(self.model, "pos_embed", None), "W_pos", None)
        kind = getattr(self.model.cfg, "positional_embedding_type", "standard")
        if kind not in ("standard", "shortformer") or not isinstance(table, Tensor):
            return None
        table = widen(table.detach())
        # A norm sees positions beside a token; where there is none, as in the paper, they are read alone.
        alone = kind == "shortformer" or getattr(self.model.cfg, "normalization_type", None) is None
        return table if alone else table + widen(self.model.W_E.detach()).mean(0)

    @torch.no_grad()
    def layer_positions(self, layer: int) -> Float[Tensor, "position d_model"] | None:
        """The positions as a layer's queries and keys see them."""
        if self.positions is None or getattr(self.model.cfg, "positional_embedding_type", "") == "shortformer":
            return self.positions
        return normalised(self.model, layer, self.positions)

    def relative(self) -> Iterator[list[Recall] | None]:
        """For each head of each layer, which of its random-token queries score the mean key highest at lag 1, of the
        lags 0 to `LAGS` - 1 (fewer in a shorter context); None for a layer that doesn't rotate queries and keys."""
        for turn in rotations(self.model, LAGS):
            if turn is None:
                yield None
                continue
            queries = rearrange(turn.queries, "sample head d_head -> head sample d_head")
            pairs = zip(queries, turn.key, strict=True)
            yield [memory.relative_recall(query, key, turn.rotations) for query, key in pairs]

    def score_scale(self, layer: int) -> float:
        """What a layer's scores are divided by."""
        return score_scale(self.model, layer)


@door
def previous_position_recall(model: Model, head: str, causal: bool = False) -> Recall:
    """Whether a head finds the position before it by learned positions, or by the rotation of its queries and keys.

    `measures.memory.previous_position_recall` of all positions, or `relative_recall` of up to 64 lags, causal as it is.
    Raises InputError for a head that the model does not have and for a model with neither; HookAuditError where the
    audit does not find the weights to be what a head does.

    >>> import metaint
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> round(metaint.previous_position_recall(model, "0.1").chance, 4)
    0.0323
    """
    layer, number = head_of(model, head)
    require(model, ["attention_input"])
    memories = Memories(model, 2)
    positions = memories.layer_positions(layer)
    if positions is not None:
        weights = memories.layers[layer]
        return memory.previous_position_recall(positions, weights.W_Q[number], weights.W_K[number], causal)
    relative = next(islice(memories.relative(), layer, None))
    if relative is None:
        raise InputError("model has neither learned positions nor rotated queries in this layer: name another head.")
    return relative[number]


@door
def ov_recall(
    model: Model,
    heads: Sequence[str],
    *,
    tokens: int | Sequence[int] = TOKENS,
    embedding: Embedding = "token",
    seed: int = 0,
) -> Recall:
    """What several heads together recall of tokens they attend to: `Memories.ov`.

    `heads` are names such as "5.1"; `tokens`, `embedding` and `seed` are those of `Memories`. Raises InputError for a
    head that the model does not have, HookAuditError where the audit does not find the weights to be what a head does.

    >>> import metaint
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> metaint.ov_recall(model, ["0.1", "1.0"]).chance
    0.02
    """
    if isinstance(heads, str) or not heads:
        raise InputError(f'heads is {heads!r}: give a list of heads, such as ["5.1", "5.5"].')
    chosen = [head_of(model, name) for name in heads]
    require(model, ["attention_input", "value_mix", "output_sum", "unembedding"])
    return Memories(model, tokens, embedding, seed).ov(chosen)


@door
def key_composition_recall(
    model: Model,
    head: str,
    head_to: str,
    *,
    tokens: int | Sequence[int] = TOKENS,
    embedding: Embedding = "token",
    seed: int = 0,
) -> Recall:
    """Whether `head_to` finds by its keys what `head` wrote: `Memories.key_composition`.

    `tokens`, `embedding` and `seed` are those of `Memories`. Raises InputError for a head that the model does not have,
    or in the wrong order; HookAuditError where the audit does not find the weights to be what a head does.

    >>> import metaint
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> metaint.key_composition_recall(model, "0.1", "1.0").chance
    0.02
    """
    pair = head_of(model, head), head_of(model, head_to)
    require(model, ["attention_input", "value_mix", "output_sum"])
    return Memories(model, tokens, embedding, seed).key_composition(*pair)


def _chosen(model: Model, tokens: int | Sequence[int], seed: int) -> Int[Tensor, " token"]:
    device, vocab = model.W_E.device, int(model.cfg.d_vocab)
    if isinstance(tokens, int):
        if tokens < 2:
            raise InputError(f"tokens is {tokens}: a recall needs at least 2 tokens.")
        known = getattr(model, "tokenizer", None)
        special = set(getattr(known, "all_special_ids", None) or ())
        size = min(vocab, len(known)) if known is not None and len(known) >= 2 else vocab
        ordinary = torch.tensor([i for i in range(size) if i not in special] or list(range(size)))
        if tokens < len(ordinary):
            order = torch.randperm(len(ordinary), generator=torch.Generator().manual_seed(seed))
            ordinary = ordinary[order[:tokens]].sort().values
        return ordinary.to(device)
    ids = torch.as_tensor(tokens).long()
    if ids.ndim != 1 or len(ids) < 2 or len(ids.unique()) < len(ids) or int(ids.min()) < 0 or int(ids.max()) >= vocab:
        raise InputError(f"tokens must be at least 2 different ids from 0 to {vocab - 1}.")
    return ids.to(device)


def _in_stream(model: Model, rows: Tensor) -> Tensor:
    """Embeddings as they stand in the stream: through the norm that some models have on them (BLOOM)."""
    if rows.shape[-1] != int(model.cfg.d_model):
        raise Unavailable(f"embeddings have width {rows.shape[-1]} and are projected into the stream", "W_E")
    norm = getattr(model, "embed_ln", None)
    if norm is None:
        return rows
    gain, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
    kind = "rms" if str(getattr(model.cfg, "normalization_type", "")).startswith("RMS") else "layer"
    return Norm(kind, float(model.cfg.eps), gain, bias)(rows)


def _after_first_mlp(model: Model, tokens: Tensor) -> Float[Tensor, "token d_model"]:
    """The stream after block 0 of each token alone, its position and what block 0's attention mixes taken out."""
    streams: list[Tensor] = []

    def nothing(activation: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(activation)

    def keep(activation: Tensor, hook: Any) -> None:
        streams.append(widen(activation.detach().clone()))

    silent = [name for name in ("hook_pos_embed", "blocks.0.attn.hook_z") if name in model.hook_dict]
    hooks = [*((name, nothing) for name in silent), ("blocks.0.hook_resid_post", keep)]
    if getattr(model.cfg, "attn_only", False):
        raise Unavailable("the model has no MLP to read tokens after", "blocks.0.hook_mlp_out")
    with untouched(model), model.hooks(fwd_hooks=hooks):
        model(tokens[:, None])
    return streams[-1][:, 0]
