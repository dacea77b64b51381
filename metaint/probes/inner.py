"""`InnerProbe`: the loss at every layer and how steps follow its gradient, in one forward pass, folded into `/inner`.

An operational definition inspired by Wu & Varshney (2310.05884), no theorem of theirs: see `measures/inner.py`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from torchmetrics.utilities import dim_zero_cat

from metaint.errors import ActivationError, HookAuditError, InputError
from metaint.measures import norms
from metaint.measures.correlation import partial_spearman
from metaint.measures.inner import PathReadings, Readout, Translator, read_path
from metaint.measures.resampling import bootstrap_interval
from metaint.models.audit import holds
from metaint.models.describe import Shape, shape_of
from metaint.models.inputs import InputWatch
from metaint.models.readout import readout_of
from metaint.models.translators import affine_translators
from metaint.probes.probe import Probe
from metaint.probes.stream import Rows, precise, widened_copy
from metaint.scans.assemble import shaped

PARTS = ("", "_attn", "_mlp")
# Means over sampled tokens, kept as sums for each sequence and layer, with what counts them.
_LAYER = dict.fromkeys(("loss", "target_rank", "top1", "prediction_entropy", "kl_to_final", "gradient_norm"), "samples")
_LAYER |= {"loss_null": "samples_null", "norm_correct": "correct", "norm_wrong": "wrong"}
_STEP = {
    f"{name}{null}{part}": f"steps{null}{part}"
    for name in ("loss_decrease", "improved", "step_gradient_cosine", "descent")
    for null in ("", "_null")
    for part in PARTS
}
_MEANS = {**_LAYER, **_STEP}
_SLOTS = list(dict.fromkeys([*_MEANS, *_MEANS.values()]))
# The scan holds the norm and loss of at most so many tokens, for figures.
MOST_TOKENS = 2000


class InnerProbe(Probe):
    """Reads, at sampled positions, the loss of the next token at every layer and how each step follows its gradient.

    `positions` of each sequence are sampled by `seed`, never position 0 and only those with a next token. Baselines
    (`_null`) put another sampled token's target of the same sequence in the place of the true one. `lens` is a tuned
    lens, or the folder of one (see `metaint.models.translators`; it fits the raw weights it was trained on), for the
    layers before the last; the logit lens otherwise, which is biased in early layers. With a tuned lens, or where
    writes don't add up, the split by attention and MLP is NaN. Passes that continue a cache are left out: their next
    tokens are not there yet.

    Costs four products of [positions, d_model] with the unembedding for each layer, in blocks of at most 64 MB that
    hold all layers. State: sums for each sequence and layer, and norm, loss and learning rates
    of each sampled token, about 30 kB a sequence at 12 layers and 64 positions.
    """

    group = "inner"
    audits = ("stream", "unembedding")

    sums: list[Float[Tensor, "sequence slot layer"]]
    tokens: list[Int[Tensor, "sequence sample field"]]
    values: list[Float[Tensor, "sequence sample field layer"]]
    rates: list[Float[Tensor, "sequence sample part block"]]

    def __init__(self, positions: int = 64, lens: Any = None, seed: int = 0) -> None:
        super().__init__()
        if positions < 1:
            raise InputError(f"positions is {positions}: at least 1 position of each sequence must be sampled.")
        self.positions, self.lens, self.seed = positions, lens, seed
        for name in ("sums", "tokens", "values", "rates"):
            self.add_state(name, [], dist_reduce_fx="cat")
        for name in ("frequency", "tokens_seen"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")
        self._split = False
        self._readout: Readout | None = None
        self._translators: list[Translator] | None = None
        self._rows: Rows | None = None

    def prepare(self, model: Any) -> None:
        if not shape_of(model).causal:
            raise HookAuditError("InnerProbe needs a model that predicts the next token, and this one looks ahead.")
        self._split = self.lens is None and holds(model, "residual")
        super().prepare(model)
        assert self.shape is not None
        self._readout = readout_of(model)
        if self.lens is not None:
            pairs = affine_translators(self.lens, self.shape.n_layers, self.shape.d_model)
            self._translators = [Translator(*pair) for pair in pairs]

    def hook_names(self, shape: Shape) -> list[str]:
        parts = ["hook_resid_pre"]
        if self._split and shape.sublayers != "attention":
            parts += ["hook_attn_out"] if shape.sublayers == "sequential" else ["hook_attn_out", "hook_mlp_out"]
        names = [f"blocks.{layer}.{part}" for layer in range(shape.n_layers) for part in parts]
        return [*names, f"blocks.{shape.n_layers - 1}.hook_resid_post"]

    def read(self, name: str, activation: Tensor, watch: InputWatch) -> None:
        if self.opens_pass(name, watch):
            self._rows = Rows.of(activation, watch, self.positions, self.seed, need_next=True)
            self._kept: dict[str, Tensor] = {}
            if self._rows.tokens is None:
                raise InputError("the model was fed embeddings, and InnerProbe needs the tokens: pass token ids.")
        assert self._rows is not None
        if self._rows.past:
            return
        sample = widened_copy(self._rows.pick(activation)[self._rows.sampled])
        if not bool(sample.isfinite().all()):
            raise ActivationError(
                f"{name} holds NaN or infinity: the weights or the activations before it overflow (try a wider dtype)."
            )
        self._kept[name] = sample
        if name.endswith("hook_resid_post"):
            self.update(self._kept)
            self._kept = {}

    def update(self, kept: Mapping[str, Float[Tensor, "sampled d_model"]]) -> None:
        """Fold the sampled rows of one pass, by the hooks they were read at."""
        rows, shape, readout = self._rows, self.shape, self._readout
        assert rows is not None
        assert shape is not None
        assert readout is not None
        points, steps = path_of(kept, shape.n_layers, shape.sublayers if self._split else "whole")
        streams = [*(start for (_, part), (start, _) in steps.items() if part == ""), len(points) - 1]
        targets, has_null = _targets(rows)
        translators = None
        if self._translators is not None:
            translators = [*(Translator(*(t.to(points[0]) for t in pair)) for pair in self._translators), None]
        found = read_path(readout, points, list(steps.values()), targets, translators)
        lengths = torch.stack([norms.norm(points[i]) for i in streams], 1)
        summands = {**_of_layers(found, streams, lengths, has_null), **_of_steps(found, steps, has_null)}
        slots = lengths.new_zeros(len(targets), len(_SLOTS), shape.n_layers + 1, dtype=precise(lengths.device))
        for name, value in summands.items():
            slots[:, _SLOTS.index(name), : value.shape[1]] = value.to(slots.dtype)
        rates = lengths.new_full((len(targets), len(PARTS), shape.n_layers), math.nan)
        for (block, part), rate in zip(steps, found.rate, strict=True):
            rates[:, PARTS.index(part), block] = rate[:, 0]
        self._keep(rows, slots, torch.stack([lengths, found.loss[streams, :, 0].mT], 1), rates, targets[:, 0])

    def _keep(self, rows: Rows, slots: Tensor, values: Tensor, rates: Tensor, target: Tensor) -> None:
        """Sums by sequence, and what is kept of each token, padded to `positions` a sequence."""
        batch = len(rows.sampled)
        sequence, sample = rows.sampled.nonzero(as_tuple=True)
        sums = torch.zeros(batch, *slots.shape[1:], dtype=slots.dtype, device=slots.device)
        self.sums.append(sums.index_add_(0, sequence, slots))
        assert rows.tokens is not None
        ids = torch.full((batch, self.positions, 3), -1, device=target.device)
        fields = [rows.pick(rows.tokens)[rows.sampled], target, rows.pick(rows.position)[rows.sampled]]
        ids[sequence, sample] = torch.stack(fields, -1)
        self.tokens.append(ids)
        for state, new in ((self.values, values.float()), (self.rates, rates.float())):
            padded = torch.full((batch, self.positions, *new.shape[1:]), math.nan, device=new.device)
            padded[sequence, sample] = new
            state.append(padded)
        assert self._readout is not None
        vocab = self._readout.weight.shape[1]
        seen = torch.bincount(rows.tokens[rows.real], minlength=vocab).to(slots.dtype)
        self.frequency = self.frequency + seen
        self.tokens_seen = self.tokens_seen + rows.real.sum()

    def sequence_sums(self, name: str) -> tuple[Float[Tensor, "sequence layer"], Float[Tensor, "sequence layer"]]:
        """What a mean of `/inner` sums to in each sequence, and its count: for intervals of differences and the like.

        For fidelity, the first-order decreases and the decreases.
        """
        slot, count = name.replace("fidelity", "descent"), _MEANS.get(name) or name.replace("fidelity", "loss_decrease")
        if slot not in _SLOTS or count not in _SLOTS:
            raise InputError(f"name is {name!r}: choose a mean of /inner, such as loss or step_gradient_cosine.")
        sums = dim_zero_cat(self.sums).cpu()
        n_layers = sums.shape[-1] - (slot in _STEP)
        return sums[:, _SLOTS.index(slot), :n_layers], sums[:, _SLOTS.index(count), :n_layers]

    def compute(self) -> dict[str, Tensor]:
        """Every variable of `/inner` that lies along layers or blocks, by name."""
        if len(self.sums) == 0:
            return {}
        sums = dim_zero_cat(self.sums).cpu()
        found: dict[str, Tensor] = {}
        for name, count in _MEANS.items():
            n_layers = sums.shape[-1] - (name in _STEP)
            value, of = (sums[:, _SLOTS.index(slot), :n_layers] for slot in (name, count))
            found |= _ratio(name, value, of)
        for end in ("", "_low", "_high"):
            found[f"target_rank{end}"] = found[f"target_rank{end}"].exp()
        for null in ("", "_null"):
            for part in PARTS:
                for end in ("", "_low", "_high"):
                    del found[f"descent{null}{part}{end}"]
                slots = (f"descent{null}{part}", f"loss_decrease{null}{part}")
                descent, decrease = (sums[:, _SLOTS.index(slot), :-1] for slot in slots)
                found |= _ratio(f"fidelity{null}{part}", descent, decrease)
        rates = dim_zero_cat(self.rates).cpu().flatten(0, 1)
        for i, part in enumerate(PARTS):
            found[f"learning_rate{part}"] = rates[:, i].nanmedian(0).values
        return found | self._norm_against_loss()

    def _norm_against_loss(self) -> dict[str, Float[Tensor, " layer"]]:
        """Spearman of norm and loss over tokens, plain and with frequencies and position partialled out."""
        tokens, values = dim_zero_cat(self.tokens).cpu(), dim_zero_cat(self.values).cpu()
        there = tokens[..., 0] >= 0
        sequence = there.nonzero()[:, 0]
        ids, norm_and_loss = tokens[there], values[there]
        count = self.frequency.cpu()
        covariates = torch.stack([count[ids[:, 0]], count[ids[:, 1]], ids[:, 2].to(count.dtype)])
        found = {}
        for name, taken_out in (("norm_loss_spearman", covariates[:0]), ("norm_loss_spearman_partial", covariates)):
            rows = [partial_spearman(x, y, taken_out, sequence) for x, y in norm_and_loss.permute(2, 1, 0)]
            for end, column in zip(("", "_low", "_high"), zip(*rows, strict=True), strict=True):
                found[name + end] = torch.tensor(column, dtype=torch.float64)
        return found

    def to_dataset(self) -> xr.Dataset:
        variables = self.compute()
        if not variables or self.shape is None:
            return xr.Dataset(attrs={"tokens_seen": 0, "sequences": 0, "samples": 0})
        n_layers = self.shape.n_layers
        coords: dict[str, Any] = {"layer": range(n_layers + 1), "block": range(n_layers)}
        dims = {n_layers + 1: ("layer",), n_layers: ("block",)}
        tokens, values = dim_zero_cat(self.tokens).cpu(), dim_zero_cat(self.values).cpu()
        there = tokens[..., 0] >= 0
        samples = int(there.sum())
        chosen = torch.linspace(0, max(samples - 1, 0), min(samples, MOST_TOKENS)).round().long()
        ids, kept = tokens[there][chosen].numpy(), values[there][chosen].numpy()
        for i, name in enumerate(("token", "target", "token_position")):
            coords[name] = ("sample", ids[:, i])
        data = xr.Dataset({k: shaped(dims[v.numel()], v, coords) for k, v in variables.items()}, coords)
        for i, name in enumerate(("token_norm", "token_loss")):
            data[name] = (("sample", "layer"), kept[:, i])
        for name, words in DESCRIPTIONS.items():
            data[name].attrs["description"] = words
        data.attrs.update(
            tokens_seen=int(self.tokens_seen),
            sequences=sum(len(block) for block in self.sums),
            samples=samples,
            lens="logit lens" if self.lens is None else "tuned lens",
        )
        return data


def _of_layers(
    found: PathReadings, streams: list[int], lengths: Tensor, has_null: Tensor
) -> dict[str, Float[Tensor, "sampled layer"]]:
    """What each token adds to the sums of `_LAYER` and to their counts."""
    rank = found.rank[streams].mT
    hit = (rank == 1).to(lengths.dtype)
    there = has_null[:, None].expand_as(hit)
    return {
        "loss": found.loss[streams, :, 0].mT,
        "loss_null": found.loss[streams, :, 1].mT * there,
        "target_rank": rank.log(),
        "top1": hit,
        "prediction_entropy": found.entropy[streams].mT,
        "kl_to_final": found.kl[streams].mT,
        "gradient_norm": found.gradient_norm[streams].mT,
        "norm_correct": lengths * hit,
        "norm_wrong": lengths * (1 - hit),
        "correct": hit,
        "wrong": 1 - hit,
        "samples": torch.ones_like(hit),
        "samples_null": there,
    }


def _of_steps(
    found: PathReadings, steps: Mapping[tuple[int, str], tuple[int, int]], has_null: Tensor
) -> dict[str, Float[Tensor, "sampled block"]]:
    """What each token adds to the sums of `_STEP` and to their counts."""
    values: dict[str, Tensor] = {}
    for part in dict.fromkeys(part for _, part in steps):
        places = [i for i, (_, p) in enumerate(steps) if p == part]
        ends = [stretch for (_, p), stretch in steps.items() if p == part]
        decrease = found.loss[[start for start, _ in ends]] - found.loss[[stop for _, stop in ends]]
        readings = {
            "loss_decrease": decrease,
            "improved": decrease > 0,
            "step_gradient_cosine": found.agreement[places],
            "descent": found.descent[places],
            "steps": torch.ones_like(decrease),
        }
        for name, reading in readings.items():
            values[name + part] = reading[..., 0].mT
            values[f"{name}_null{part}"] = reading[..., 1].mT * has_null[:, None]
    return values


def path_of(
    kept: Mapping[str, Tensor], n_layers: int, sublayers: str
) -> tuple[list[Tensor], dict[tuple[int, str], tuple[int, int]]]:
    """The points of a pass and its steps {(block, part): (start, stop)}; part "" is the whole block.

    The MLP's step starts after attention's in sequential blocks, and from the same stream in parallel ones. Where
    there is nothing but attention its step is the block's; `sublayers` "whole" asks for no parts.
    """
    points: list[Tensor] = []
    steps: dict[tuple[int, str], tuple[int, int]] = {}
    for block in range(n_layers):
        start = len(points)
        stream = kept[f"blocks.{block}.hook_resid_pre"]
        points.append(stream)
        if sublayers in ("attention", "whole"):
            steps[block, ""] = (start, start + 1)
            if sublayers == "attention":
                steps[block, "_attn"] = (start, start + 1)
            continue
        points.append(stream + kept[f"blocks.{block}.hook_attn_out"])
        steps[block, "_attn"] = (start, start + 1)
        if sublayers == "parallel":
            points.append(stream + kept[f"blocks.{block}.hook_mlp_out"])
            steps[block, "_mlp"] = (start, start + 2)
        else:
            steps[block, "_mlp"] = (start + 1, start + 2)
        steps[block, ""] = (start, len(points))
    points.append(kept[f"blocks.{n_layers - 1}.hook_resid_post"])
    return points, steps


def _targets(rows: Rows) -> tuple[Int[Tensor, "sampled 2"], Tensor]:
    """The next token of each sampled row and, as baseline, that of the row half the sample away in its sequence.

    Second, whether there is another row to take it from.
    """
    assert rows.tokens is not None
    following = rows.pick(pad(rows.tokens[:, 1:], (0, 1)))
    count = rows.sampled.sum(-1, keepdim=True)
    sample = torch.arange(rows.sampled.shape[1], device=count.device).expand_as(rows.sampled)
    other = (sample + count // 2) % count.clamp(min=1)
    both = torch.stack([following, following.gather(1, other)], -1)[rows.sampled]
    return both, (count > 1).expand_as(rows.sampled)[rows.sampled]


def _ratio(name: str, sums: Float[Tensor, "sequence layer"], counts: Float[Tensor, "sequence layer"]) -> dict:
    """A ratio of sums with its interval over sequences."""
    low, high = bootstrap_interval(sums, counts)
    return {name: sums.sum(0) / counts.sum(0), f"{name}_low": low, f"{name}_high": high}


DESCRIPTIONS = {
    "loss": "mean cross-entropy of the next token, in nats, if the stream at this layer were the last",
    "loss_null": "the same for another sampled token's target of the same sequence",
    "target_rank": "geometric mean rank of the next token, 1 is the most likely",
    "top1": "share of positions where the next token is the most likely",
    "prediction_entropy": "mean entropy of the prediction, in nats",
    "kl_to_final": "mean KL(final prediction || prediction at this layer), in nats",
    "gradient_norm": "mean length of the loss's gradient at the stream",
    "norm_correct": "mean length of the stream where the top prediction is right",
    "norm_wrong": "mean length of the stream where it is wrong",
    "norm_loss_spearman": "Spearman over tokens of the stream's length and the loss, both at this layer",
    "norm_loss_spearman_partial": "the same with token and target frequency (in the scanned text) and position "
    "partialled out",
    "loss_decrease": "mean loss before the step less the loss after it, in nats",
    "improved": "share of positions where the step lowers the loss",
    "step_gradient_cosine": "mean cosine of the step with the descent direction -g; 1 is a gradient step",
    "step_gradient_cosine_null": "the same with the gradient for another token's target",
    "learning_rate": "median of -<D, g> / ||g||², the learning rate that the step would have as a gradient step",
    "fidelity": "-<D, g> summed over tokens / loss decrease summed over tokens: 1 where the loss is linear along "
    "steps; it means little where the decrease is near 0",
    "token_norm": "length of the stream of single tokens",
    "token_loss": "loss of single tokens, in nats",
}
