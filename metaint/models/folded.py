"""Per-head weights as they meet the stream: with the gains of the norms around attention multiplied in.

In: a model, raw or folded. Out: W_Q, W_K, W_V and W_O of a layer, the unembedding, and what a norm makes of a vector
before its gain. Where the norms stand is measured, in one short pass, by what their `hook_scale` is the length of; the
audit's `attention_input` then tells whether these weights give the model's own queries, keys and values.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from metaint.measures.inner import Norm
from metaint.models.describe import by_layer
from metaint.models.heads import INTO_HEADS, OUT_OF_HEADS, repeat_heads, thin_heads
from metaint.models.invariants import Pair, Trial, bias_of, write_factor_of
from metaint.models.protocol import Model
from metaint.models.reading import Unavailable, random_tokens, read, tolerance, untouched, widen
from metaint.models.readout import norm_of

_HOOKS = ("hook_resid_pre", "ln1.hook_scale", "attn.hook_z", "ln1_post.hook_scale")
_TOKENS = 4


class FoldedWeights(NamedTuple):
    """The weights of one layer's heads, at least float32; grouped key and value heads stand once for each query head.

    The scores, biases and rotation aside, are n(x) W_Q (n(y) W_K)^T over the usual scale, with n = `normalised`; and
    for a stream x that it attends to, a head adds n(x) W_V W_O to the stream, but for the mean over d_model where the
    layer reads through a LayerNorm, and up to the length and bias of a norm that follows attention.
    """

    W_Q: Float[Tensor, "head d_model d_head"]
    W_K: Float[Tensor, "head d_model d_head"]
    W_V: Float[Tensor, "head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]


class _Norms(NamedTuple):
    """The modules of a block that normalise what attention reads, and what it wrote; None for none."""

    before: str | None
    after: str | None


_places: WeakKeyDictionary[Any, tuple[_Norms, ...]] = WeakKeyDictionary()


def folded_layers(model: Model) -> Iterator[FoldedWeights]:
    """The `folded_weights` of each layer in turn, reading each stack of weights once (a bridge makes them anew).

    Those of a layer that doesn't attend are NaN.
    """
    norms = norms_of(model)
    stacks = [by_layer(model, name) for name in FoldedWeights._fields]
    for layer in range(int(model.cfg.n_layers)):
        if layer in stacks[0]:
            yield _folded(model, layer, norms[layer], *(stack[layer].detach() for stack in stacks))
        else:
            yield _no_weights(model)


def folded_weights(model: Model, layer: int) -> FoldedWeights:
    """The weights of one layer; for all of them `folded_layers` is cheaper.

    W_Q, W_K and W_V are diag(g) W with the gain g of the norm that attention reads through (Gemma's is 1 + w), and
    for a LayerNorm without the mean over d_model of each column, which meets no centred vector. A LayerNorm's reader
    sees nothing of the mean of W_O over d_model, so it is taken out as well. This is TransformerLens's `fold_ln` with
    `center_writing_weights`: a raw model and a folded one give the same numbers. A norm between attention and the
    addition (Gemma-2, OLMo-2) puts its gain, and the centring of a LayerNorm, on W_O. Without norms all is as it is.

    Raises Unavailable where a norm follows the addition (post-norm, as in BERT), so that a later layer reads what a
    head writes through the gains of every norm in between; and where `hook_scale` doesn't tell what a norm reads.
    """
    stacks = (by_layer(model, name)[layer].detach() for name in FoldedWeights._fields)
    return _folded(model, layer, norms_of(model)[layer], *stacks)


def normaliser(model: Model, layer: int) -> Callable[[Float[Tensor, "*rest d_model"]], Float[Tensor, "*rest d_model"]]:
    """What the norm before a layer's attention does to vectors of the stream, its gain and bias left out.

    LayerNorm centres and divides, RMSNorm divides; without a norm there they come back as they are. Raises
    Unavailable as `folded_weights` does.
    """
    return partial(_normalise, _norm(model, layer, norms_of(model)[layer].before))


def normalised(model: Model, layer: int, vectors: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest d_model"]:
    """What a layer's `normaliser` makes of vectors."""
    return normaliser(model, layer)(vectors)


def norm_after(model: Model, layer: int) -> Norm | None:
    """The norm between a layer's attention and the addition to the stream; raises Unavailable as `folded_weights`."""
    return _norm(model, layer, norms_of(model)[layer].after)


def attention_input(trial: Trial) -> Iterator[Pair]:
    """hook_q, hook_k and hook_v against the normalised stream times folded weights, and what biases add."""
    model, reading = trial.model, trial.reading
    norms = norms_of(model, trial)
    stacks = [by_layer(model, name) for name in FoldedWeights._fields]
    shortformer = getattr(model.cfg, "positional_embedding_type", None) == "shortformer"
    for layer in trial.attending:
        weights = [stack[layer].detach() for stack in stacks]
        norm = _norm(model, layer, norms[layer].before)
        vectors = _normalise(norm, reading[f"blocks.{layer}.hook_resid_pre"])
        folded = _folded(model, layer, norms[layer], *weights)
        for letter, raw, weight in zip("QKV", weights, folded, strict=False):
            name = f"blocks.{layer}.attn.hook_{letter.lower()}"
            actual = reading[name]
            heads = actual.shape[2]
            expected = einsum(vectors, thin_heads(weight, heads), INTO_HEADS)
            expected = expected + thin_heads(bias_of(model, f"b_{letter}", layer, actual), heads)
            # What is added after the norm's gain meets the weight as it is.
            added = [norm.bias] if norm is not None and norm.bias is not None else []
            added += [reading["hook_pos_embed"]] if shortformer and letter != "V" else []
            for term in added:
                through = "... d_model, head d_model d_head -> ... head d_head"
                expected = expected + einsum(widen(term), thin_heads(widen(raw), heads), through)
            yield Pair(name, actual, expected)


def _no_weights(model: Model) -> FoldedWeights:
    cfg = model.cfg
    into = torch.full((int(cfg.n_heads), int(cfg.d_model), int(cfg.d_head)), torch.nan, device=model.W_E.device)
    return FoldedWeights(into, into, into, into.mT)


def _folded(
    model: Model, layer: int, norms: _Norms, query: Tensor, key: Tensor, value: Tensor, out: Tensor
) -> FoldedWeights:
    before, after = (_norm(model, layer, name) for name in norms)
    query, key, value = (repeat_heads(_through(before, weight), len(query), 0) for weight in (query, key, value))
    # The norm after acts on each row that heads write; of what then lies in the stream a LayerNorm reads no mean.
    out = widen(out) * write_factor_of(model)
    if after is not None:
        out = out - out.mean(-1, keepdim=True) if after.kind == "layer" else out
        out = out if after.gain is None else out * widen(after.gain)
    if before is not None and before.kind == "layer":
        out = out - out.mean(-1, keepdim=True)
    return FoldedWeights(query, key, value, out)


def _normalise(norm: Norm | None, vectors: Tensor) -> Tensor:
    return vectors if norm is None else Norm(norm.kind, norm.eps)(vectors)


def _through(norm: Norm | None, weight: Tensor) -> Tensor:
    """A weight [..., d_model, out] that reads what the norm makes, as one that reads it before gain and centring."""
    weight = widen(weight)
    if norm is not None and norm.gain is not None:
        weight = weight * rearrange(widen(norm.gain), "d_model -> d_model 1").to(weight.device)
    return weight - weight.mean(-2, keepdim=True) if norm is not None and norm.kind == "layer" else weight


def _norm(model: Model, layer: int, name: str | None) -> Norm | None:
    return None if name is None else norm_of(model, getattr(model.blocks[layer], name), f"blocks.{layer}.{name}")


@torch.no_grad()
def norms_of(model: Model, trial: Trial | None = None) -> tuple[_Norms, ...]:
    """Where each layer's norms stand, remembered for as long as the model lives: weights change, their places don't."""
    if model not in _places:
        if trial is None:
            names = [f"blocks.{layer}.{hook}" for layer in range(int(model.cfg.n_layers)) for hook in _HOOKS]
            with untouched(model):
                trial = Trial(model, read(model, random_tokens(model, 1, _TOKENS), names))
        outs, none = by_layer(model, "W_O"), _Norms(None, None)
        attending = trial.attending
        norms = (_norms_at(trial, i, outs[i].detach()) if i in attending else none for i in trial.layers)
        _places[model] = tuple(norms)
    return _places[model]


def _norms_at(trial: Trial, layer: int, out: Tensor) -> _Norms:
    """The norms of a block by what they are found to normalise: the stream, attention's output, or their sum."""
    places: dict[str, str] = {}
    for name in ("ln1", "ln1_post"):
        if f"blocks.{layer}.{name}.hook_scale" in trial.reading:
            places[_reads(trial, layer, name, out)] = name
    if "sum" in places:
        reason = "a norm follows each addition (post-norm), so that heads don't read what earlier ones write"
        raise Unavailable(reason, f"blocks.{layer}.{places['sum']}")
    return _Norms(places.get("stream"), places.get("output"))


def _reads(trial: Trial, layer: int, name: str, out: Tensor) -> str:
    """What a norm normalises, told by its length: "stream", or after attention its "output" or the "sum" of both."""
    reading, hook, z = trial.reading, f"blocks.{layer}.{name}.hook_scale", f"blocks.{layer}.attn.hook_z"
    stream, norm = reading[f"blocks.{layer}.hook_resid_pre"], _norm(trial.model, layer, name)
    candidates = {"stream": stream}
    if not reading.before(hook, z):
        written = einsum(reading[z], widen(out), OUT_OF_HEADS)
        written = written + bias_of(trial.model, "b_O", layer, written)
        candidates = {"output": written, "sum": stream + written}
    scale = reading[hook].reshape(*stream.shape[:-1], 1)
    for place, vectors in candidates.items():
        if norm is not None and float((scale / norm.scale(vectors) - 1).abs().max()) <= _tolerance(trial.model):
            return place
    raise Unavailable(f"{hook} is not the length of {' or '.join(candidates)} at attention", hook)


def _tolerance(model: Model) -> float:
    return tolerance(next(p.dtype for p in model.parameters() if p.is_floating_point()))
