"""Direct paths: what one part of a model does to another without anything in between.

In: an experiment and parts of its model. Out: for each pair the metric with the path between them cut, by sequence.

A writer (the embedding, a head, an MLP) adds a vector c to the stream, beyond what stands in for it when it is ablated.
Its direct path to a reader is cut where the reader alone reads x - c in place of the stream x, through its own norm
computed anew, and everything later follows. Nothing is linearised (path patching: Wang et al. 2022, "Interpretability
in the Wild"; exact as in `transformer_lens.patching.get_act_patch_direct_path`, which serves bridges that fork the
stream for q, k and v, one pass a pair). A head reads three times, so its queries, keys and values are cut one by one or
together; what that makes of its z is computed from folded weights and put at hook_z, which every model heeds, and which
is a query head's own under grouped-query attention.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from metaint.circuits.clean import Clean, read_out
from metaint.circuits.experiment import Experiment, Stand, batches, measured, variants_measured
from metaint.circuits.parts import Part
from metaint.circuits.passes import Variant, read_by_mlp
from metaint.models.audit import holds
from metaint.models.describe import sublayers_of
from metaint.models.folded import FoldedWeights, folded_layers, normalised, norms_of
from metaint.models.invariants import pattern_of, score_hooks
from metaint.models.reading import Unavailable, steady, tolerance, widen
from metaint.models.rotation import rotations

EMBEDDING, LOGITS = "embedding", "logits"
COMPONENTS = ("q", "k", "v", "qkv")
# A head, the MLP of a layer (its head is None), the embedding or the logits.
Node = Part | str


class Path(NamedTuple):
    """A writer, a reader, and by what of a reading head: "q", "k", "v" or all of them, "qkv" (elsewhere "")."""

    writer: Node
    reader: Node
    by: str = ""


@dataclass
class Wiring:
    """What is needed of a model to follow direct paths in it."""

    layers: list[FoldedWeights]
    mlps: bool
    # What turns queries and keys at each position, where they are turned.
    rotation: dict[int, Float[Tensor, "position d_head d_head"]]
    # Why queries and keys don't tell the pattern, "" where they do: paths by q and k are followed then.
    opaque: str = ""


def wiring_of(model: Any, positions: int) -> Wiring:
    """What the audit trusts of a model; raises Unavailable where its weights are not what its heads do."""
    for check in ("attention_input", "output_sum", "value_mix", "unembedding"):
        if not holds(model, check):
            raise Unavailable(f"the audit's {check} does not hold")
    with torch.no_grad():
        found = Wiring(list(folded_layers(model)), has_mlps(model), {})
    try:
        rotary = "hook_rot_q" in score_hooks(model)
        if not rotary and not holds(model, "pattern_from_scores"):
            raise Unavailable("the audit's pattern_from_scores does not hold")
        turned = rotations(model, positions) if rotary else ()
        found.rotation = {layer: turn.rotations for layer, turn in enumerate(turned) if turn is not None}
    except Unavailable as reason:
        found.opaque = str(reason)
    return found


def has_mlps(model: Any) -> bool:
    """Whether the model has MLPs, and what they write adds to the stream."""
    return sublayers_of(model) != "attention" and holds(model, "residual")


def is_head(node: Node) -> bool:
    return not isinstance(node, str) and node[1] is not None


def writers_of(model: Any, reader: Node, nodes: Sequence[Node]) -> list[Node]:
    """Those of `nodes` whose output a reader reads directly."""
    return [
        node for node in nodes if node not in (reader, LOGITS) and _depth(model, node) < _depth(model, reader, True)
    ]


def _depth(model: Any, node: Node, reads: bool = False) -> float:
    """Where in the model a node writes, or reads: two places in each layer, one for attention and one for the MLP."""
    if isinstance(node, str):
        return -1.0 if node == EMBEDDING else float("inf")
    layer, head = node
    if sublayers_of(model) != "sequential":  # both read the stream before the block, and write after it
        return 2.0 * layer + (0 if reads else 1)
    return 2.0 * layer + (0 if head is not None else 1) + (0.0 if reads else 0.5)


def cut(experiment: Experiment, wiring: Wiring, paths: Sequence[Path]) -> Float[Tensor, "1+path sequence"]:
    """The metric of each sequence as the model is, and with each path cut, in float64; NaN for what can't be cut."""
    found = torch.full((1 + len(paths), len(experiment.tokens)), torch.nan, dtype=torch.float64)
    readers = list(dict.fromkeys(path.reader for path in paths))
    model = experiment.model
    layers = {reader[0] for reader in readers if not isinstance(reader, str) and reader[1] is not None}
    also = [f"blocks.{layer}.attn.{name}" for layer in sorted(layers) for name in _READ]
    also += list(_lengths(model).values())
    with steady(model):
        for rows, clean, stand in batches(experiment, mlps=wiring.mlps, also=also):
            found[0, rows] = measured(experiment, clean, clean.logits)
            written = _Written(model, wiring, clean, stand)
            for reader in readers:
                some = [i for i, path in enumerate(paths) if path.reader == reader]
                if is_head(reader) and not _makes_its_pattern(model, wiring, clean, *reader):
                    some = [i for i in some if paths[i].by == "v"]
                for i, value in _cut_from(experiment, wiring, clean, written, reader, [paths[i] for i in some]):
                    found[1 + some[i], rows] = value
    return found


_READ = ("hook_q", "hook_k", "hook_v", "hook_pattern")


def _lengths(model: Any) -> dict[int, str]:
    """By layer, the hook on the length of a norm between attention and the addition, where there is one."""
    norms = enumerate(norms_of(model))
    return {layer: f"blocks.{layer}.{norm.after}.hook_scale" for layer, norm in norms if norm.after}


class _Written:
    """What each part adds to the stream, beyond what stands in for it; made when asked for."""

    def __init__(self, model: Any, wiring: Wiring, clean: Clean, stand: Stand) -> None:
        self.wiring, self.clean, self.stand, self.lengths = wiring, clean, stand, _lengths(model)

    def by(self, node: Node) -> Float[Tensor, "batch position d_model"]:
        clean = self.clean
        if isinstance(node, str):
            return widen(clean.streams[0]) - widen(self.stand.of_embedding())
        layer, head = node
        if head is None:
            return widen(clean.mlp[layer]) - widen(self.stand.of(node))
        change = widen(clean.z[layer][:, :, head]) - widen(self.stand.of(node))
        added = change @ self.wiring.layers[layer].W_O[head].to(change.dtype)
        # The norm that follows divides by the length of the whole of what attention wrote, which stays as it was.
        return added / widen(clean.read[self.lengths[layer]]) if layer in self.lengths else added


def _cut_from(
    experiment: Experiment, wiring: Wiring, clean: Clean, written: _Written, reader: Node, paths: Sequence[Path]
) -> Iterator[tuple[int, Float[Tensor, " batch"]]]:
    """The metric with each path to one reader cut."""
    if isinstance(reader, str):
        last = widen(clean.streams[len(wiring.layers)])
        for i, path in enumerate(paths):
            stream = last - written.by(path.writer)
            logits = read_out(experiment.model, stream if clean.places is None else stream[clean.places])
            yield i, measured(experiment, clean, logits)
        return
    layer, head = reader
    if head is None:
        made = _of_mlp(experiment, clean, written, layer, paths)
    else:
        made = _of_head(experiment.model, wiring, clean, written, layer, head, paths)
    yield from variants_measured(experiment, clean, made)


def _of_mlp(
    experiment: Experiment, clean: Clean, written: _Written, layer: int, paths: Sequence[Path]
) -> list[Variant]:
    """What an MLP writes when it reads the stream without each writer."""
    size, made = max(1, experiment.batch_size // len(clean.tokens)), []
    stream = clean.streams[layer]
    for start in range(0, len(paths), size):
        some = [(stream - written.by(path.writer)).to(stream.dtype) for path in paths[start : start + size]]
        made += [Variant({}, {layer: new}) for new in read_by_mlp(experiment.model, clean, layer, some)]
    return made


def _of_head(
    model: Any, wiring: Wiring, clean: Clean, written: _Written, layer: int, head: int, paths: Sequence[Path]
) -> list[Variant]:
    """z of a head that reads the stream without each writer, by queries, keys, values or all of them."""
    stream, weights = widen(clean.streams[layer]), wiring.layers[layer]
    seen = normalised(model, layer, stream)
    read = {letter: _of_one(clean.read[f"blocks.{layer}.attn.hook_{letter}"], head, model) for letter in "qkv"}
    turn = wiring.rotation.get(layer)
    pattern = widen(clean.read[f"blocks.{layer}.attn.hook_pattern"])[:, head]
    made, changes = [], {}
    for path in paths:
        if path.writer not in changes:
            change = normalised(model, layer, stream - written.by(path.writer)) - seen
            changes = {path.writer: change}  # paths come writer by writer
        change = changes[path.writer]
        new = {
            letter: read[letter] + change @ getattr(weights, f"W_{letter.upper()}")[head].to(change.dtype)
            if letter in path.by
            else read[letter]
            for letter in "qkv"
        }
        attends = pattern if path.by == "v" else _pattern(model, layer, new["q"], new["k"], turn)
        made.append(Variant({layer: {head: attends @ new["v"]}}))
    return made


def _of_one(activation: Tensor, head: int, model: Any) -> Float[Tensor, "batch position d_head"]:
    """Queries, keys or values of one query head, which may share the latter with others."""
    return widen(activation)[:, :, head * activation.shape[2] // int(model.cfg.n_heads)]


def _pattern(
    model: Any, layer: int, query: Tensor, key: Tensor, turn: Tensor | None
) -> Float[Tensor, "batch query key"]:
    """The pattern of one head from its queries and keys as they are before they are turned."""
    if turn is not None:
        turn = turn[: query.shape[1]].to(query)
        query, key = (torch.einsum("bpd,pde->bpe", x, turn) for x in (query, key))
    return pattern_of(model, layer, query[:, :, None], key[:, :, None])[:, 0]


def _makes_its_pattern(model: Any, wiring: Wiring, clean: Clean, layer: Any, head: Any) -> bool:
    """Whether a head's queries and keys give its pattern, as paths by them need it."""
    if wiring.opaque:
        return False
    query, key, _, pattern = (clean.read[f"blocks.{layer}.attn.{name}"] for name in _READ)
    query, key = (_of_one(x, head, model) for x in (query, key))
    made = _pattern(model, layer, query, key, wiring.rotation.get(layer))
    return bool((made - widen(pattern[:, head])).abs().max() <= 10 * tolerance(query.dtype))
