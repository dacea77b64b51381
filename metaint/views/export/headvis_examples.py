"""HeadVis's metrics and examples of heads, read from the patterns of a model on its tokens.

In: a causal model and the tokens. Out: the six metrics of Neuronpedia's pipeline for every head, and for each head the
JSON object that HeadVis's frontend shows it by. Definitions, numbers of examples and bins are Neuronpedia's
(github.com/hijohnnylin/neuronpedia at 171aa95, `utils/neuronpedia-utils/neuronpedia_utils/headvis/
compute-head-metrics.py`), the form HeadVis's (github.com/anthropics/headvis, `data_pipeline.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaint.errors import ActivationError
from metaint.models.protocol import Model
from metaint.models.reading import steady, widen

# Intervals of the largest weight, examples in each and in the highest, how sparse patterns are kept.
INTERVALS, EXAMPLES, TOP_EXAMPLES = 5, 3, 10
MOST_KEYS, LEAST_WEIGHT = 8, 0.005
_BINS, _TOKENS = 50, 50
_DISTANCES = [0, *(2**i for i in range(13))]

METRICS = {
    "self_attention_score": "Mean weight of a query on its own position, position 0 included.",
    "prev_token_score": "Mean weight on the token before.",
    "pattern_entropy": "Mean entropy of a query's weights, in nats, position 0 included.",
    "qk_distance": "Mean distance from query to key, weighted by attention, in tokens.",
    "qk_distance_variance": "Variance of the distance from query to key, over all queries together.",
    "induction_score": "Mean weight on tokens that followed an earlier occurrence of the query's token, over the "
    "queries that have one; small weights count too.",
}

Numbers = dict[str, Float[np.ndarray, "layer head"]]
Examples = Callable[[int, int], dict[str, Any]]
_Visit = Callable[[int, int, Float[Tensor, "head query key"]], None]


def measured(
    model: Model,
    tokens: Int[Tensor, "sequence position"],
    real: Bool[Tensor, "sequence position"],
    batch_size: int,
    same: Callable[[Numbers], None],
) -> tuple[Numbers, Examples]:
    """The metrics of all heads, and a function from layer and head to its examples; two passes over the tokens.

    `real` is False for padding; `same` is shown the metrics after the first pass, and may raise. Raises
    ActivationError where a pattern holds NaN.
    """
    size = (int(model.cfg.n_layers), int(model.cfg.n_heads))
    sums, counts = np.zeros((len(METRICS), *size)), np.zeros(len(METRICS))
    largest = np.zeros((len(tokens), *size))

    def measure(layer: int, row: int, pattern: Float[Tensor, "head query key"]) -> None:
        added, queries = pattern_sums(pattern, tokens[row, real[row]])
        if not np.isfinite(added).all():
            raise ActivationError(f"blocks.{layer}.attn.hook_pattern holds NaN or infinity: the model overflows.")
        sums[:, layer] += added
        counts[:] += queries if layer == 0 else 0
        if pattern.shape[-1] > 1:
            largest[row, layer] = pattern[:, 1:, 1:].flatten(1).amax(-1).cpu().numpy()

    _visit(model, tokens, real, range(len(tokens)), batch_size, measure)
    with np.errstate(invalid="ignore"):  # tokens that never repeat have no induction
        metrics = dict(zip(METRICS, sums / counts[:, None, None], strict=True))
    metrics["qk_distance_variance"] -= metrics["qk_distance"] ** 2
    same(metrics)
    chosen = {(i, j): sampled(largest[:, i, j], seed=[i, j]) for i, j in np.ndindex(*size)}
    shown: dict[tuple[int, int, int], tuple[list[int], list[float]]] = {}

    def keep(layer: int, row: int, pattern: Float[Tensor, "head query key"]) -> None:
        for head in range(size[1]):
            if any(row == other for _, other in chosen[layer, head]):
                shown[layer, head, row] = sparse(pattern[head])

    rows = sorted({row for pairs in chosen.values() for _, row in pairs})
    _visit(model, tokens, real, rows, batch_size, keep)
    texts = {row: _texts(model, tokens[row, real[row]].tolist()) for row in rows}

    def examples(layer: int, head: int) -> dict[str, Any]:
        sequences = [(n, row, texts[row], *shown[layer, head, row]) for n, row in chosen[layer, head]]
        return _payload(sequences, largest[:, layer, head])

    return metrics, examples


def _visit(
    model: Model, tokens: Tensor, real: Bool[Tensor, "sequence position"], rows: Sequence[int], size: int, see: _Visit
) -> None:
    """Show the pattern of each of these sequences, without its padding, layer by layer."""
    for start in range(0, len(rows), size):
        chosen = list(rows[start : start + size])

        def read(pattern: Tensor, hook: Any, chosen: list[int] = chosen) -> None:
            layer = int(hook.name.split(".")[1])
            for heads, row in zip(pattern.detach(), chosen, strict=True):
                see(layer, row, widen(heads[:, real[row]][:, :, real[row]]))

        hooks = [(f"blocks.{layer}.attn.hook_pattern", read) for layer in range(int(model.cfg.n_layers))]
        padding = {} if bool(real.all()) else {"attention_mask": real[chosen].long()}
        with steady(model), model.hooks(fwd_hooks=hooks):
            model(tokens[chosen], return_type=None, **padding)


def pattern_sums(
    pattern: Float[Tensor, "head query key"], tokens: Int[Tensor, " query"]
) -> tuple[Float[np.ndarray, "metric head"], Float[np.ndarray, " metric"]]:
    """What each of `METRICS` sums to over the queries of a sequence, and over how many queries.

    In place of the variance stands the squared distance.
    """
    position = torch.arange(len(tokens), device=pattern.device)
    distance = (position[:, None] - position).abs().to(pattern.dtype)
    follows = (tokens[:, None] == tokens.roll(1)) & (position >= 1) & (position <= position[:, None])
    sums = [
        pattern.diagonal(dim1=-2, dim2=-1).sum(-1),
        pattern.diagonal(-1, dim1=-2, dim2=-1).sum(-1),
        torch.special.entr(pattern).sum((-2, -1)),
        (pattern * distance).sum((-2, -1)),
        (pattern * distance.square()).sum((-2, -1)),
        (pattern * follows).sum((-2, -1)),
    ]
    n = len(tokens)
    counts = [n, n - 1, n, n, n, int(follows.any(-1).sum())]
    return torch.stack(sums).cpu().double().numpy(), np.array(counts, dtype=float)


def sampled(largest: Float[np.ndarray, " sequence"], seed: Sequence[int]) -> list[tuple[int, int]]:
    """Examples as (interval, sequence): of each interval, which hold about as many sequences, some at random, and of
    the highest those with the largest weights."""
    ordered, n = np.sort(largest), len(largest)
    bounds = [ordered[min(round(i * n / INTERVALS), n - 1)] for i in range(1, INTERVALS)]
    intervals = np.searchsorted(bounds, largest, side="right") + 1
    rng, examples = np.random.default_rng(seed), []
    for interval in range(1, INTERVALS + 1):
        inside = np.flatnonzero(intervals == interval)
        if interval == INTERVALS:
            inside = inside[np.argsort(-largest[inside], kind="stable")][:TOP_EXAMPLES]
        elif len(inside) > EXAMPLES:
            inside = np.sort(rng.choice(inside, EXAMPLES, replace=False))
        examples += [(interval, int(row)) for row in inside]
    return examples


def sparse(pattern: Float[Tensor, "query key"]) -> tuple[list[int], list[float]]:
    """The largest weights of each query that aren't small: places (query * length + key), rising, and values."""
    n = len(pattern)
    values, keys = pattern.topk(min(MOST_KEYS, n))
    places = torch.arange(n, device=keys.device)[:, None] * n + keys
    enough = values >= LEAST_WEIGHT
    order = places[enough].argsort()
    return places[enough][order].tolist(), values[enough][order].cpu().double().numpy().round(4).tolist()


def _texts(model: Model, ids: list[int]) -> list[str]:
    tokenizer = getattr(model, "tokenizer", None)
    return [str(i) if tokenizer is None else tokenizer.decode([i]) for i in ids]


def _payload(
    examples: Sequence[tuple[int, int, list[str], list[int], list[float]]], largest: Float[np.ndarray, " sequence"]
) -> dict[str, Any]:
    """What the frontend shows a head by: examples, and what they and all sequences tell together."""
    sequences: list[dict[str, Any]] = []
    distances, queries, keys = np.zeros(len(_DISTANCES) - 1), dict[str, float](), dict[str, float]()
    for interval, row, tokens, places, values in examples:
        about = {"sequence_id": row, "interval": interval, "tokens": tokens, "attention_indices": places}
        last = {"seq_len": len(tokens), "max_activation": round(float(largest[row]), 4)}
        sequences.append({**about, "attention_values": values, **last})
        query, key = np.divmod(np.array(places, dtype=int), len(tokens))
        bins = np.searchsorted(_DISTANCES, abs(query - key), side="right") - 1
        distances += np.bincount(bins, values, len(_DISTANCES))[:-1]
        for side, at in ((queries, query), (keys, key)):
            for token, weight in zip(tokens, np.bincount(at, values, len(tokens)).tolist(), strict=True):
                side[token] = side.get(token, 0.0) + weight
    counts = np.bincount(np.minimum((largest * _BINS).astype(int), _BINS - 1), minlength=_BINS)
    edges = np.linspace(0, 1, _BINS + 1).round(4)
    return {
        "sequences": sequences,
        "qk_distance_histogram": {"bin_edges": _DISTANCES, "bin_values": distances.round(4).tolist()},
        "top_query_tokens": _ranked(queries),
        "top_key_tokens": _ranked(keys),
        "histogram": {"bin_edges": edges.tolist(), "bin_values": counts.tolist()},
        "statistics": {"n_samples": len(sequences), "mean_max_activation": round(float(largest.mean()), 4)},
    }


def _ranked(weights: dict[str, float]) -> list[dict[str, Any]]:
    ranked = sorted((pair for pair in weights.items() if pair[1] > 0), key=lambda pair: -pair[1])
    return [{"token": token, "weight": round(weight, 4)} for token, weight in ranked[:_TOKENS]]
