"""`MemoryProbe`: what each head's weights recall, and beside it what behaviour shows of them, in `/memory`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from metaint.errors import HookAuditError, InputError, door
from metaint.measures import in_context, memory
from metaint.models.audit import holds
from metaint.models.describe import Shape
from metaint.models.inputs import InputWatch
from metaint.models.memory import LAGS, TOKENS, Embedding, Memories
from metaint.models.protocol import Model
from metaint.models.reading import Unavailable, quietly
from metaint.models.readout import readout_of
from metaint.probes.probe import Probe
from metaint.probes.stream import precise, widened_copy
from metaint.scans.assemble import shaped

EARLY, TOP = 64, 5
# Pairs of heads grow with the square of the heads: a model of more has no key_composition_recall.
MOST_HEADS = 512
_HEADS = (
    "previous_position_recall", "previous_position_recall_early", "previous_position_recall_causal",
    "previous_position_mass", "ov_recall", "ov_recall_top5",
)  # fmt: skip
_PAIRS = ("key_composition_recall", "key_composition_recall_top5", "key_composition_recall_triggers")
_CHANCES = tuple(f"{name}_chance" for name in (*_HEADS, *_PAIRS))
_BEHAVIOUR = ("in_context_accuracy", "in_context_accuracy_without_copies", "first_occurrence_accuracy")
# Rows of the stream whose logits are made at once, times the vocabulary: 64 MB.
_LOGITS = 2**24

Variables = dict[str, tuple[tuple[str, ...], Tensor]]


class MemoryProbe(Probe):
    """Reads the weights of a model as memories before the passes of each `metaint.attach` or `metaint.scan`, the last
    reading counting, and from the passes how often it predicts what it can only know from the context.

    `tokens` are ids or how many to draw, `embedding` what stands for a token, both as in `Memories`; `triggers` are
    ids of their own for another `key_composition_recall` (the paper's, with fixed triggers, is over those alone).
    `bigram` [vocab, vocab] are a task's true next-token probabilities, for the paper's toy, whose last layer has a
    linear W_F: then `bigram_kl` tells what that knows of them, triggers left out. What the audit doesn't find to be
    what a head does is NaN, and so are pairs of heads where there are more than 512 of them.

    Raises InputError for tokens out of range, and for a `bigram` of another vocabulary or without a W_F to read. State:
    twelve numbers a head and three a pair of heads, in float64, and six sums.

    >>> import metaint
    >>> from metaint.toys.small import small_transformer
    >>> sizes = {"n_layers": 2, "n_heads": 2, "d_model": 8, "d_mlp": 16, "d_vocab": 30, "n_ctx": 20}
    >>> model = small_transformer(norm="pre", **sizes)
    >>> scan = metaint.scan(model, probes=[metaint.MemoryProbe()])
    >>> scan["memory"]["ov_recall"].dims
    ('layer', 'head')
    """

    group = "memory"

    heads: list[Float[Tensor, "reading score layer head"]]
    pairs: list[Float[Tensor, "reading score layer head layer head"]]
    chances: list[Float[Tensor, "reading score"]]
    kl: list[Float[Tensor, " reading"]]
    hits: Float[Tensor, " kind"]
    counts: Float[Tensor, " kind"]
    tokens_read: Float[Tensor, ""]

    @door
    def __init__(
        self,
        tokens: int | Sequence[int] = TOKENS,
        *,
        embedding: Embedding = "token",
        triggers: Sequence[int] | None = None,
        bigram: Float[Tensor, "vocab vocab"] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokens, self.seed = tokens, seed
        self.embedding: Embedding = embedding
        self.triggers, self.bigram = None if triggers is None else [int(i) for i in triggers], bigram
        for name in ("heads", "pairs", "chances", "kl"):
            self.add_state(name, [], dist_reduce_fx="cat")
        for name in ("hits", "counts"):
            self.add_state(name, torch.zeros(len(_BEHAVIOUR)), dist_reduce_fx="sum")
        self._readout: Any = None
        self.add_state("tokens_read", torch.zeros(()), dist_reduce_fx="max")

    def hook_names(self, shape: Shape) -> list[str]:
        return [f"blocks.{shape.n_layers - 1}.hook_resid_post"]

    def prepare(self, model: Model) -> None:
        if not isinstance(getattr(model, "W_E", None), Tensor):
            raise HookAuditError("MemoryProbe reads token embeddings (W_E), and this model has none.")
        super().prepare(model)
        predicts = self.shape.causal and holds(model, "unembedding")
        self._readout = readout_of(model) if predicts else None

    # ---- weights ----

    def read_weights(self, model: Model) -> None:
        """Read the weights as memories, in place of what was read of them before."""
        with quietly(model.W_E.device.type):
            memories = Memories(model, self.tokens, self.embedding, self.seed)
            self.tokens_read = torch.tensor(len(memories.tokens), dtype=torch.float32, device=self.device)
            n_layers, n_heads = self.shape.n_layers, self.shape.n_heads
            heads = torch.full((len(_HEADS), n_layers, n_heads), math.nan, dtype=torch.float64)
            paired = n_layers * n_heads <= MOST_HEADS
            pairs = torch.full((len(_PAIRS), *(n_layers, n_heads) * (2 if paired else 0)), math.nan).double()
            chances = dict.fromkeys(_CHANCES, math.nan)
            reads = holds(model, "attention_input")
            if reads:
                self._read_positions(memories, heads, chances)
            linear = holds(model, "output_sum") and holds(model, "value_mix")  # no gate or norm of what heads write
            narrow = model.W_E.shape[-1] != int(model.cfg.d_model)  # projected into the stream
            if reads and linear and not narrow:
                if holds(model, "unembedding"):
                    self._read_outputs(memories, heads, chances)
                if paired:
                    self._read_pairs(memories, pairs, chances)
            divergence = self._divergence(model)
        # The last reading takes the place of earlier ones: a model read twice is still one model.
        self.heads, self.pairs = [heads[None].to(self.device)], [pairs[None].to(self.device)]
        self.chances = [torch.tensor([list(chances.values())], dtype=torch.float64, device=self.device)]
        self.kl = [torch.tensor([divergence], dtype=torch.float64, device=self.device)]
        self._read_something()

    def _read_positions(self, memories: Memories, heads: Tensor, chances: dict[str, float]) -> None:
        whole, early, causal, mass = (heads[_HEADS.index(name)] for name in _HEADS[:4])
        if memories.positions is None:
            try:
                relative = list(memories.relative())
            except Unavailable:  # more than a rotation: left NaN
                return
            for layer, recalls in enumerate(relative):
                for head, found in enumerate(recalls or ()):
                    whole[layer, head] = found.share()
                    chances["previous_position_recall_chance"] = found.chance
            return
        for layer in self.shape.attending:
            positions = memories.layer_positions(layer)
            assert positions is not None
            weights = memories.layers[layer]
            for head in range(self.shape.n_heads):
                W_Q, W_K = weights.W_Q[head], weights.W_K[head]
                for name, slot, rows, past in (
                    ("previous_position_recall", whole, len(positions), False),
                    ("previous_position_recall_early", early, EARLY, False),
                    ("previous_position_recall_causal", causal, len(positions), True),
                ):
                    found = memory.previous_position_recall(positions[:rows], W_Q, W_K, past)
                    slot[layer, head], chances[f"{name}_chance"] = found.share(), found.chance
                scale = memories.score_scale(layer)
                found = memory.previous_position_mass(positions, W_Q, W_K, scale)
                mass[layer, head], chances["previous_position_mass_chance"] = found

    def _read_outputs(self, memories: Memories, heads: Tensor, chances: dict[str, float]) -> None:
        first, five = (heads[_HEADS.index(name)] for name in ("ov_recall", "ov_recall_top5"))
        for layer in self.shape.attending:
            for head in range(self.shape.n_heads):
                found = memories.ov([(layer, head)])
                first[layer, head], five[layer, head] = found.share(), found.share(TOP)
                chances["ov_recall_chance"], chances["ov_recall_top5_chance"] = found.chance, TOP * found.chance

    def _read_pairs(self, memories: Memories, pairs: Tensor, chances: dict[str, float]) -> None:
        first, five, few = pairs
        slots = [(memories, [(_PAIRS[0], first, 1), (_PAIRS[1], five, TOP)])]
        if self.triggers is not None:
            slots.append((Memories(memories.model, self.triggers, self.embedding), [(_PAIRS[2], few, 1)]))
        for reading, wanted in slots:
            for later in self.shape.attending:
                for layer in (earlier for earlier in self.shape.attending if earlier < later):
                    for i, j, found in reading.key_compositions(layer, later):
                        for name, slot, top in wanted:
                            slot[layer, i, later, j] = found.share(top)
                            chances[f"{name}_chance"] = min(1.0, top * found.chance)

    def _divergence(self, model: Model) -> float:
        """Mean KL of the task's bigrams from what W_F alone predicts, in nats; NaN without a task's bigrams."""
        if self.bigram is None:
            return math.nan
        W_F = getattr(getattr(model.blocks[-1], "mlp", None), "W_F", None)
        if W_F is None or self.bigram.shape != (model.cfg.d_vocab, model.cfg.d_vocab):
            raise InputError(
                f"bigram is {list(self.bigram.shape)}, for a model of {model.cfg.d_vocab} tokens "
                f"{'with' if W_F is not None else 'without'} a linear W_F: leave it out, or give both."
            )
        rows = [i for i in range(model.cfg.d_vocab) if i not in (self.triggers or ())]
        logits = model.W_E.detach()[rows] @ W_F.detach() @ model.W_U.detach()
        return memory.bigram_divergence(logits, self.bigram.to(logits.device)[rows]).mean().item()

    # ---- behaviour ----

    def update(self, name: str, activation: Float[Tensor, "batch position d_model"], watch: InputWatch) -> None:
        """Count how often the last stream predicts what followed the current token the last time."""
        self.opens_pass(name, watch)
        inputs = watch.resolve(activation.shape[0], activation.shape[1], None, activation.device)
        if self._readout is None or inputs.tokens is None or inputs.past:
            return
        tokens = inputs.tokens.to(activation.device)
        real = inputs.mask[:, 1:] & inputs.mask[:, :-1]
        now, target = tokens[:, :-1], tokens[:, 1:]
        known = in_context.follower(tokens)[:, :-1]
        kinds = torch.stack([known == target, (known == target) & (now != target), known == -1]) & real
        right = torch.zeros_like(real)
        where = kinds.any(0).nonzero(as_tuple=True)
        size = max(1, _LOGITS // self._readout.weight.shape[1])
        for start in range(0, len(where[0]), size):
            rows = tuple(index[start : start + size] for index in where)
            logits = self._readout.logits(widened_copy(activation[rows]))
            right[rows] = logits.argmax(-1) == target[rows]
        dtype = precise(activation.device)
        self.hits = self.hits + (kinds & right).sum((1, 2)).to(dtype)
        self.counts = self.counts + kinds.sum((1, 2)).to(dtype)

    # ---- results ----

    def compute(self) -> Variables:
        """Every variable of `/memory` by name, with its dimensions."""
        if len(self.heads) == 0:
            return {}
        heads, pairs, chances, kl = (dim_zero_cat(s)[-1].cpu() for s in (self.heads, self.pairs, self.chances, self.kl))
        found: Variables = {n: (("layer", "head"), v) for n, v in zip(_HEADS, heads, strict=True)}
        if pairs.ndim > 1:
            across = ("layer", "head", "layer_to", "head_to")
            found.update({n: (across, v) for n, v in zip(_PAIRS, pairs, strict=True)})
        found.update({n: ((), v) for n, v in zip(_CHANCES, chances, strict=True)})
        if self.triggers is None:
            found = {name: v for name, v in found.items() if "triggers" not in name}
        if self.bigram is not None:
            found["bigram_kl"] = ((), kl)
        share = (self.hits / self.counts).cpu()
        for i, name in enumerate(_BEHAVIOUR):
            found[name], found[f"{name}_count"] = ((), share[i]), ((), self.counts[i].cpu())
        return found

    def to_dataset(self) -> xr.Dataset:
        variables = self.compute()
        if not variables:
            return xr.Dataset(attrs={"tokens_read": 0})
        layers, heads = range(self.shape.n_layers), range(self.shape.n_heads)
        coords: dict[str, Any] = {"layer": layers, "head": heads}
        if "key_composition_recall" in variables:
            coords |= {"layer_to": layers, "head_to": heads}
        data = xr.Dataset({name: shaped(dims, value, coords) for name, (dims, value) in variables.items()}, coords)
        for name in data.data_vars:
            data[name].attrs["description"] = DESCRIPTIONS[str(name)]
        data.attrs.update(tokens_read=int(self.tokens_read), embedding=self.embedding)
        return data


_READ = "over the tokens read (NaN where the audit doesn't find the weights to be what a head does)"
_LEARNT = "(NaN without learned positions)"
DESCRIPTIONS = {
    "previous_position_recall": "share of positions whose query scores the position before it highest: of all learned "
    f"positions, earlier and later; with rotary ones share of random-token queries that score lag 1 of {LAGS} highest",
    "previous_position_recall_early": f"the same of the first {EARLY} learned positions {_LEARNT}",
    "previous_position_recall_causal": f"the same among earlier positions alone {_LEARNT}",
    "previous_position_mass": f"mean weight that positions alone would put on the one before {_LEARNT}",
    "ov_recall": f"share of tokens whose own logit the head's OV circuit raises most of the vocabulary, {_READ}",
    "ov_recall_top5": f"share of tokens whose own logit is among the {TOP} that the OV circuit raises most, {_READ}",
    "key_composition_recall": "share of tokens for which a query of head_to scores highest, of all tokens as head's OV "
    f"circuit writes them, its own, {_READ}",
    "key_composition_recall_top5": f"the same among the {TOP} highest, {_READ}",
    "key_composition_recall_triggers": "key_composition_recall among the trigger tokens alone",
    "bigram_kl": "KL in nats of the task's bigrams from softmax(W_E W_F W_U), mean over tokens but the triggers",
    "in_context_accuracy": "share right of the next tokens that are what followed the current token the last time: "
    "behaviour, to read beside the recalls",
    "in_context_accuracy_without_copies": "the same where the next token is not the current one again",
    "first_occurrence_accuracy": "share right where the current token is new to the sequence: what is known without an "
    "earlier occurrence, beside which in_context_accuracy is to be read",
}
DESCRIPTIONS |= {f"{name}_chance": f"{name} of candidates that score alike" for name in (*_HEADS, *_PAIRS)}
DESCRIPTIONS["previous_position_mass_chance"] = "what uniform attention puts there"
DESCRIPTIONS |= {f"{name}_count": f"positions that {name} is of" for name in _BEHAVIOUR}
