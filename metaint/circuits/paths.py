"""Direct paths: what one part of a model does to another without anything in between.

In: an experiment and parts of its subject. Out: for each pair the metric with the path between them cut, by sequence.

A writer (the embedding, a head, an MLP) adds a vector c to the stream, beyond what stands in for it when it is ablated.
Its direct path to a reader is cut where the reader alone reads x - c in place of the stream x, through its own norm
computed anew, and everything later follows. Nothing is linearised (path patching: Wang et al. 2022, "Interpretability
in the Wild"; exact as in `transformer_lens.patching.get_act_patch_direct_path`, which serves bridges that fork the
stream for q, k and v, one pass a pair). A head reads three times, so its queries, keys and values are cut one by one or
together; what that makes of its z is computed from folded weights and put at hook_z, which every model heeds, and which
is a query head's own under grouped-query attention.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from metaint.circuits.clean import Clean, read_out
from metaint.circuits.experiment import CLEAN, Experiment, batches, measured, stretches, variants_measured
from metaint.circuits.parts import Part, part_name
from metaint.circuits.passes import read_by_mlp
from metaint.circuits.stand import Stand
from metaint.circuits.subject import Subject
from metaint.circuits.variants import Variant, at_places
from metaint.models.audit import holds
from metaint.models.folded import FoldedWeights, normaliser, norms_of
from metaint.models.invariants import Scoring, score_hooks, scoring_of
from metaint.models.reading import Unavailable, steady, tolerance, widen
from metaint.models.rotation import rotations
from metaint.scanning.progress import progress_of

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

    subject: Subject
    # By layer: the weights of its heads, what its attention makes of the stream it reads, and how it makes its pattern.
    layers: list[FoldedWeights]
    norms: list[Callable[[Tensor], Tensor]]
    scoring: list[Scoring]
    # By layer, the hook on the length of a norm between attention and the addition, where there is one.
    lengths: dict[int, str]
    # What turns queries and keys at each position, where they are turned.
    rotation: dict[int, Float[Tensor, "position d_head d_head"]]
    # Why queries and keys do not tell the pattern, "" where they do: paths by q and k are followed then.
    opaque: str = ""


def wiring_of(subject: Subject, positions: int) -> Wiring:
    """What the audit trusts of a model; raises Unavailable where its weights are not what its heads do."""
    model, layers = subject.model, subject.layers
    for check in ("attention_input", "output_sum", "value_mix", "unembedding"):
        if not holds(model, check):
            raise Unavailable(f"the audit's {check} does not hold")
    norms, scoring = [normaliser(model, layer) for layer in layers], [scoring_of(model, layer) for layer in layers]
    after = {layer: norm.after for layer, norm in enumerate(norms_of(model)) if norm.after}
    lengths = {layer: f"blocks.{layer}.{name}.hook_scale" for layer, name in after.items()}
    wiring = Wiring(subject, subject.folded, norms, scoring, lengths, {})
    try:
        rotary = "hook_rot_q" in score_hooks(model)
        if not rotary and not holds(model, "pattern_from_scores"):
            raise Unavailable("the audit's pattern_from_scores does not hold")
        turned = rotations(model, positions) if rotary else ()
        wiring.rotation = {layer: turn.rotations for layer, turn in enumerate(turned) if turn is not None}
    except Unavailable as reason:
        wiring.opaque = str(reason)
    return wiring


def is_head(node: Node) -> bool:
    return not isinstance(node, str) and node[1] is not None


def writers_of(subject: Subject, reader: Node, nodes: Sequence[Node]) -> list[Node]:
    """Those of `nodes` whose output a reader reads directly."""
    sequential = subject.shape.sublayers == "sequential"
    depth = _depth(sequential, reader, True)
    return [node for node in nodes if node not in (reader, LOGITS) and _depth(sequential, node) < depth]


def _depth(sequential: bool, node: Node, reads: bool = False) -> float:
    """Where in the model a node writes, or reads: two places in each layer, one for attention and one for the MLP."""
    if isinstance(node, str):
        return -1.0 if node == EMBEDDING else float("inf")
    layer, head = node
    sublayer = 0.0 if head is not None else 1.0
    if not sequential:  # both read the stream before the block, and write after it
        return 2.0 * layer if reads else 2.0 * layer + 1
    return 2.0 * layer + sublayer if reads else 2.0 * layer + sublayer + 0.5


_READ = ("hook_q", "hook_k", "hook_v", "hook_pattern")


def cut(
    experiment: Experiment, wiring: Wiring, paths: Sequence[Path], upto: int | None = None, what: str = "cut paths"
) -> Float[Tensor, "1+path sequence"]:
    """The metric of each sequence as the model is, and with each path cut, in float64; NaN for what cannot be cut.

    Of the first `upto` sequences, or of all; what the experiment's ledger holds is not run again.
    """
    upto = len(experiment.tokens) if upto is None else upto
    ledger, names = experiment.ledger, [CLEAN, *map(name_of_path, paths)]
    missing = stretches(experiment, names, upto)
    layers = sorted({path.reader[0] for path in paths if is_head(path.reader)})
    also = [f"blocks.{layer}.attn.{name}" for layer in layers for name in _READ]
    also += wiring.lengths.values()
    subject, rows = experiment.subject, [some for some, _ in missing]
    total = sum((some.stop - some.start) * len(numbers) for some, numbers in missing)
    with steady(subject.model), progress_of(what, total, experiment.progress and total > 0) as advance:
        for (some, numbers), (clean, stand) in zip(
            missing, batches(experiment, rows, mlps=subject.has_mlps, also=also), strict=True
        ):
            if 0 in numbers:
                ledger.add(names[0], some.start, measured(experiment, clean, clean.logits))
            written = _Written(wiring, clean, stand)
            for i, value in _cut_each(experiment, written, paths, [i - 1 for i in numbers if i]):
                ledger.add(names[1 + i], some.start, value)
                advance(len(value))
    return ledger.table(names, upto)


def _cut_each(
    experiment: Experiment, written: "_Written", paths: Sequence[Path], numbers: Sequence[int]
) -> Iterator[tuple[int, Float[Tensor, " batch"]]]:
    """The metric of one batch with each of these paths cut, reader by reader."""
    wiring, clean = written.wiring, written.clean
    to_reader: dict[Node, list[int]] = {}
    for i in numbers:
        to_reader.setdefault(paths[i].reader, []).append(i)
    for reader, of_reader in to_reader.items():
        if is_head(reader) and not _makes_its_pattern(wiring, clean, *reader):
            for i in (i for i in of_reader if paths[i].by != "v"):
                yield i, torch.full((len(clean.tokens),), torch.nan, dtype=torch.float64)
            of_reader = [i for i in of_reader if paths[i].by == "v"]
        for i, value in _cut_from(experiment, wiring, written, reader, [paths[i] for i in of_reader]):
            yield of_reader[i], value


def name_of_path(path: Path) -> str:
    """What a path is called in the ledger."""
    return f"cut {node_name(path.writer)} to {node_name(path.reader)} {path.by}".strip()


def node_name(node: Node) -> str:
    """A node's name: "5.1" for a head, "mlp 3" for the MLP of a layer, "embedding" and "logits"."""
    return node if isinstance(node, str) else part_name(node)


@dataclass
class _Written:
    """What each part adds to the stream, beyond what stands in for it; made when asked for."""

    wiring: Wiring
    clean: Clean
    stand: Stand

    def by(self, node: Node) -> Float[Tensor, "batch position d_model"]:
        clean, lengths = self.clean, self.wiring.lengths
        if isinstance(node, str):
            return widen(clean.streams[0]) - widen(self.stand.of_embedding())
        layer, head = node
        if head is None:
            return widen(clean.mlp[layer]) - widen(self.stand.of(node))
        change = widen(clean.z[layer][:, :, head]) - widen(self.stand.of(node))
        added = change @ self.wiring.layers[layer].W_O[head].to(change.dtype)
        # The norm that follows divides by the length of the whole of what attention wrote, which stays as it was.
        return added / widen(clean.read[lengths[layer]]) if layer in lengths else added


def _cut_from(
    experiment: Experiment, wiring: Wiring, written: _Written, reader: Node, paths: Sequence[Path]
) -> Iterator[tuple[int, Float[Tensor, " batch"]]]:
    """The metric with each path to one reader cut."""
    clean = written.clean
    if isinstance(reader, str):
        last = widen(clean.streams[wiring.subject.shape.n_layers])
        for i, path in enumerate(paths):
            stream = at_places(last - written.by(path.writer), clean.places)
            yield i, measured(experiment, clean, read_out(wiring.subject, stream))
        return
    layer, head = reader
    if head is None:
        variants = _without_mlp_input(experiment, written, layer, paths)
    else:
        variants = _without_head_input(wiring, written, layer, head, paths)
    yield from variants_measured(experiment, clean, variants)


def _without_mlp_input(experiment: Experiment, written: _Written, layer: int, paths: Sequence[Path]) -> list[Variant]:
    """What an MLP writes when it reads the stream without each writer."""
    clean = written.clean
    size, variants = max(1, experiment.batch_size // len(clean.tokens)), []
    stream = clean.streams[layer]
    for start in range(0, len(paths), size):
        streams = [(stream - written.by(path.writer)).to(stream.dtype) for path in paths[start : start + size]]
        variants += [Variant({}, {layer: new}) for new in read_by_mlp(clean, layer, streams)]
    return variants


def _without_head_input(
    wiring: Wiring, written: _Written, layer: int, head: int, paths: Sequence[Path]
) -> list[Variant]:
    """z of a head that reads the stream without each writer, by queries, keys, values or all of them."""
    clean, norm, weights = written.clean, wiring.norms[layer], wiring.layers[layer]
    stream = widen(clean.streams[layer])
    seen = norm(stream)
    read = {letter: _of_one(wiring, clean.read[f"blocks.{layer}.attn.hook_{letter}"], head) for letter in "qkv"}
    by_letter = {"q": weights.W_Q[head], "k": weights.W_K[head], "v": weights.W_V[head]}
    pattern = widen(clean.read[f"blocks.{layer}.attn.hook_pattern"])[:, head]
    variants, changes = [], {}
    for path in paths:
        if path.writer not in changes:
            changes = {path.writer: norm(stream - written.by(path.writer)) - seen}  # paths come writer by writer
        change = changes[path.writer]
        new = dict(read)
        for letter in path.by:
            new[letter] = read[letter] + change @ by_letter[letter].to(change.dtype)
        attends = pattern if path.by == "v" else _pattern(wiring, layer, new["q"], new["k"])
        variants.append(Variant({layer: {head: attends @ new["v"]}}))
    return variants


def _of_one(wiring: Wiring, activation: Tensor, head: int) -> Float[Tensor, "batch position d_head"]:
    """Queries, keys or values of one query head, which may share the latter with others."""
    return widen(activation)[:, :, head * activation.shape[2] // wiring.subject.shape.n_heads]


def _pattern(wiring: Wiring, layer: int, query: Tensor, key: Tensor) -> Float[Tensor, "batch query key"]:
    """The pattern of one head from its queries and keys as they are before they are turned."""
    turn = wiring.rotation.get(layer)
    if turn is not None:
        turn = turn[: query.shape[1]].to(query)
        turned = "batch position d_head, position d_head d_to -> batch position d_to"
        query, key = einsum(query, turn, turned), einsum(key, turn, turned)
    one_head = "batch position d_head -> batch position 1 d_head"
    return wiring.scoring[layer].pattern(rearrange(query, one_head), rearrange(key, one_head))[:, 0]


def _makes_its_pattern(wiring: Wiring, clean: Clean, layer: Any, head: Any) -> bool:
    """Whether a head's queries and keys give its pattern, as paths by them need it."""
    if wiring.opaque:
        return False
    query, key, _, pattern = (clean.read[f"blocks.{layer}.attn.{name}"] for name in _READ)
    query, key = _of_one(wiring, query, head), _of_one(wiring, key, head)
    difference = _pattern(wiring, layer, query, key) - widen(pattern[:, head])
    return bool(difference.abs().max() <= 10 * tolerance(query.dtype))
