"""`InnerProbe`: the loss at every layer and how steps follow its gradient, in one forward pass, folded into `/inner`.

An operational definition inspired by Wu & Varshney (2310.05884), no theorem of theirs: see `measures/inner.py`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import xarray as xr
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from metaint.errors import ActivationError, HookAuditError, InputError, door
from metaint.measures import norms
from metaint.measures.correlation import partial_spearman
from metaint.measures.inner import Readout, Translator, read_path
from metaint.models.audit import holds
from metaint.models.describe import Shape, shape_of
from metaint.models.inputs import InputWatch
from metaint.models.protocol import Model
from metaint.models.readout import readout_of
from metaint.models.translators import affine_translators
from metaint.probes.inner_path import of_layers, of_steps, path_of, targets_of
from metaint.probes.inner_variables import BLOCK, LAYER, PARTS, VARIABLES
from metaint.probes.means import BOUNDS, Means, as_dataset
from metaint.probes.probe import Probe
from metaint.probes.stream import Rows, precise, widened_copy

_MEANS = Means(VARIABLES)
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

    >>> import metaint
    >>> from metaint.toys.small import small_transformer
    >>> sizes = {"n_layers": 2, "n_heads": 2, "d_model": 8, "d_mlp": 16, "d_vocab": 30, "n_ctx": 20}
    >>> model = small_transformer(norm="pre", **sizes)
    >>> scan = metaint.scan(model, probes=[metaint.InnerProbe(positions=8)])
    >>> scan["inner"]["loss"].shape, scan["inner"]["step_gradient_cosine"].dims
    ((3,), ('block',))
    """

    group = "inner"
    audits = ("stream", "unembedding")

    sums: list[Float[Tensor, "sequence slot layer"]]
    tokens: list[Int[Tensor, "sequence sample field"]]
    values: list[Float[Tensor, "sequence sample field layer"]]
    rates: list[Float[Tensor, "sequence sample part block"]]
    _readout: Readout
    # Of the pass that is being read: its rows, and the sampled ones by the hooks they were read at.
    _rows: Rows
    _activations: dict[str, Float[Tensor, "sampled d_model"]]

    @door
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
        self._translators: list[Translator] | None = None

    def prepare(self, model: Model) -> None:
        if not shape_of(model).causal:
            raise HookAuditError("InnerProbe needs a model that predicts the next token, and this one looks ahead.")
        self._split = self.lens is None and holds(model, "residual")
        super().prepare(model)
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

    def update(self, name: str, activation: Float[Tensor, "batch row d_model"], watch: InputWatch) -> None:
        """Keep the sampled rows, and fold them in with the last stream of the pass."""
        if self.opens_pass(name, watch):
            self._rows = Rows.of(activation, watch, self.positions, self.seed, need_next=True)
            self._activations = {}
            if self._rows.tokens is None:
                raise InputError("the model was fed embeddings, and InnerProbe needs the tokens: pass token ids.")
        if self._rows.past:
            return
        sample = widened_copy(self._rows.pick(activation)[self._rows.sampled])
        if not bool(sample.isfinite().all()):
            raise ActivationError(
                f"{name} holds NaN or infinity: the weights or the activations before it overflow (try a wider dtype)."
            )
        self._activations[name] = sample
        if name.endswith("hook_resid_post"):
            self._fold(self._activations)
            self._activations = {}

    def _fold(self, activations: Mapping[str, Float[Tensor, "sampled d_model"]]) -> None:
        """Fold in the sampled rows of a whole pass."""
        rows, n_layers = self._rows, self.shape.n_layers
        points, steps = path_of(activations, n_layers, self.shape.sublayers if self._split else "whole")
        streams = [*(start for (_, part), (start, _) in steps.items() if part == ""), len(points) - 1]
        targets, has_null = targets_of(rows)
        readings = read_path(self._readout, points, list(steps.values()), targets, self._translators_like(points[0]))
        lengths = torch.stack([norms.norm(points[i]) for i in streams], 1)
        summands = {**of_layers(readings, streams, lengths, has_null), **of_steps(readings, steps, has_null)}
        sums = _MEANS.room(len(targets), n_layers + 1, dtype=precise(lengths.device), device=lengths.device)
        for name, value in summands.items():
            _MEANS.of(sums, name)[:, : value.shape[1]] = value.to(sums.dtype)
        rates = lengths.new_full((len(targets), len(PARTS), n_layers), math.nan)
        for (block, part), rate in zip(steps, readings.rate, strict=True):
            rates[:, PARTS.index(part), block] = rate[:, 0]
        values = torch.stack([lengths, readings.loss[streams, :, 0].mT], 1)
        self._keep(rows, sums, values, rates, targets[:, 0])

    def _translators_like(self, point: Tensor) -> list[Translator | None] | None:
        """The lens in a stream's dtype and on its device; None for the logit lens, and for the last layer."""
        if self._translators is None:
            return None
        return [*(Translator(*(part.to(point) for part in pair)) for pair in self._translators), None]

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
        vocab = self._readout.weight.shape[1]
        seen = torch.bincount(rows.tokens[rows.real], minlength=vocab).to(slots.dtype)
        self.frequency = self.frequency + seen
        self.tokens_seen = self.tokens_seen + rows.real.sum()

    def sequence_sums(self, name: str) -> tuple[Float[Tensor, "sequence layer"], Float[Tensor, "sequence layer"]]:
        """What a mean of `/inner` sums to in each sequence, and its count: for intervals of differences and the like.

        For fidelity, the first-order decreases and the decreases.
        """
        variable = next((variable for variable in _MEANS.variables if variable.name == name), None)
        if variable is None:
            raise InputError(f"name is {name!r}: choose a mean of /inner, such as loss or step_gradient_cosine.")
        sums = dim_zero_cat(self.sums).cpu()
        if variable.dims == BLOCK:
            sums = sums[..., :-1]
        return _MEANS.of(sums, variable.of), _MEANS.of(sums, variable.count)

    def compute(self) -> dict[str, Tensor]:
        """Every variable of `/inner` that lies along layers or blocks, by name."""
        if len(self.sums) == 0:
            return {}
        sums = dim_zero_cat(self.sums).cpu()
        values = _MEANS.compute(sums, *LAYER) | _MEANS.compute(sums[..., :-1], *BLOCK)
        rates = dim_zero_cat(self.rates).cpu().flatten(0, 1)
        for i, part in enumerate(PARTS):
            values[f"learning_rate{part}"] = rates[:, i].nanmedian(0).values
        return values | self._norm_against_loss()

    def _norm_against_loss(self) -> dict[str, Float[Tensor, " layer"]]:
        """Spearman of norm and loss over tokens, plain and with frequencies and position partialled out."""
        ids, norm_and_loss, sequence = self._sampled_tokens()
        count = self.frequency.cpu()
        covariates = torch.stack([count[ids[:, 0]], count[ids[:, 1]], ids[:, 2].to(count.dtype)])
        results = {}
        for name, taken_out in (("norm_loss_spearman", covariates[:0]), ("norm_loss_spearman_partial", covariates)):
            of_layers = rearrange(norm_and_loss, "token field layer -> layer field token")
            rows = [partial_spearman(length, loss, taken_out, sequence) for length, loss in of_layers]
            for end, column in zip(("", *BOUNDS), zip(*rows, strict=True), strict=True):
                results[name + end] = torch.tensor(column, dtype=torch.float64)
        return results

    def _sampled_tokens(self) -> tuple[Int[Tensor, "token field"], Float[Tensor, "token field layer"], Tensor]:
        """Of every sampled token: its id, target and position, its norms and losses, and its sequence."""
        tokens, values = dim_zero_cat(self.tokens).cpu(), dim_zero_cat(self.values).cpu()
        was_sampled = tokens[..., 0] >= 0
        return tokens[was_sampled], values[was_sampled], was_sampled.nonzero()[:, 0]

    def to_dataset(self) -> xr.Dataset:
        values = self.compute()
        if not values:
            return xr.Dataset(attrs={"tokens_seen": 0, "sequences": 0, "samples": 0})
        ids, norm_and_loss, _ = self._sampled_tokens()
        samples = len(ids)
        chosen = torch.linspace(0, max(samples - 1, 0), min(samples, MOST_TOKENS)).round().long()
        values |= {"token_norm": norm_and_loss[chosen, 0], "token_loss": norm_and_loss[chosen, 1]}
        n_layers = self.shape.n_layers
        coords: dict[str, Any] = {"layer": range(n_layers + 1), "block": range(n_layers)}
        for i, name in enumerate(("token", "target", "token_position")):
            coords[name] = ("sample", ids[chosen, i].numpy())
        data = as_dataset(values, VARIABLES, coords)
        data.attrs.update(
            tokens_seen=int(self.tokens_seen),
            sequences=sum(len(block) for block in self.sums),
            samples=samples,
            lens="logit lens" if self.lens is None else "tuned lens",
        )
        return data
