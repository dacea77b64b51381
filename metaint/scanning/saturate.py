"""What a model becomes as its norms grow: `saturate` sweeps over factors of all its parameters.

In: a model and tokens. Out: `/saturation` with a `scale` dimension. All parameters times c is the estimator of Merrill
et al. 2021 (2010.09697); on pre-norm models of today's kind it measures more than attention (see `saturate`).
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import xarray as xr
from einops import reduce
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from metaint.errors import InputError, door
from metaint.measures import norms, saturation
from metaint.measures.positions import sample_positions
from metaint.measures.resampling import bootstrap_interval
from metaint.models.audit import holds, require
from metaint.models.describe import facts_of, is_causal
from metaint.models.invariants import score_hooks
from metaint.models.parameters import chosen
from metaint.models.protocol import Model
from metaint.models.reading import steady
from metaint.models.scaled_pass import Batch, ScaledPass, published_pass, scaled_pass
from metaint.scanning.given import given_inputs, whole
from metaint.scans.assemble import as_scan

SCALES = tuple(2.0**i for i in range(11))
PUBLISHED = 1000.0


@door
def saturate(
    model: Model,
    tokens: Tensor | str | None = None,
    scales: Sequence[float] = SCALES,
    *,
    faithful: bool = False,
    attention_mask: Tensor | None = None,
    positions: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    allow_folded: bool = False,
    progress: bool = False,
    attributes: Mapping[str, Any] | None = None,
) -> xr.DataTree:
    """Compare a model with itself when all its parameters are multiplied by each of `scales` (`metaint.scaled`).

    What changes where attention alone is scaled is another question: `metaint.scan` with a `SaturationProbe`.

    - `tokens`, `attention_mask`, `batch_size`, `attributes`: as in `metaint.scan`.
    - `scales`: the factors c, finite and above 0; 1 is always among them.
    - `positions`: how many positions of each sequence are read, drawn by `seed`.
    - `faithful`: run the published estimator beside it (see below).
    - `allow_folded`: scale folded weights too, whose slopes are other ones.

    `/saturation` gets, at these positions:

    - (scale, layer): `similarity` of the stream after each block with the unscaled one, `similarity_null`,
      `similarity_centred`; `similarity_to_limit`, with the stream at the largest scale.
    - (scale): `kl`, `top1_agreement`, `loss_change`.
    - (scale, layer): `stream_norm`, `attn_write_norm`, `mlp_write_norm`, `score_norm` (geometric means), and the slope
      of each, `stream_slope` ..., from this scale to the next: the k of a k-homogeneous activation
      (`measures.saturation.EXPECTED_SLOPES`); `embedding_share`, ||x_0|| / ||x||: near 0, the token embedding has
      dropped out of the stream.
    - with `faithful`, at c = 1000 and with the mask of the published script, which multiplies scores by 0 where it
      should hide them: (layer) `similarity_published` over all tokens, (layer, head) `attended_mean`, `attended_std`,
      `attended_split`, the counts of positions with a weight above 1e-5 that Figure 3 shows, and the same with
      `_causal` under a true mask.

    Read it with care: through a norm before each sublayer, as in GPT-2 and Llama, embeddings grow as c and sublayers
    as c³ or c⁵, so that at large c the embedding is gone and similarity measures that as much as saturation. The
    paper's models have the norm on a sublayer's output. Its c is 1000; 1024 is as good.

    Raises InputError for scales or weights (folded, quantised, half precision) that can't be swept, ActivationError,
    naming the hook and c, where a scaled model overflows, HookAuditError for unusable hooks.

    Source: Merrill et al. 2021 (2010.09697).

    >>> import metaint
    >>> from metaint.toys.small import small_transformer
    >>> sizes = {"n_layers": 2, "n_heads": 2, "d_model": 8, "d_mlp": 16, "d_vocab": 30, "n_ctx": 20}
    >>> scan = metaint.saturate(small_transformer(norm="output", **sizes), scales=[2, 4])
    >>> scan["saturation"]["similarity"].sizes
    Frozen({'scale': 3, 'layer': 2})
    """
    given = given_inputs(model, tokens, attention_mask=attention_mask, batch_size=batch_size, seed=seed)
    if whole(positions, "positions") < 1:
        raise InputError(f"positions is {positions}: it must be at least 1.")
    sweep = _Sweep(model, _check_scales(model, scales, allow_folded), positions, seed, faithful, allow_folded)
    starts = range(0, len(given.tokens), batch_size)
    with steady(model):
        for start in tqdm(starts, desc="saturate", disable=not progress, leave=False):
            rows = slice(start, start + batch_size)
            mask = None if given.mask is None else given.mask[rows]
            sweep.add(given.tokens[rows], mask)
    return as_scan({"saturation": sweep.to_dataset()}, facts_of(model), {**given.facts, **(attributes or {})})


def _check_scales(model: Model, scales: Sequence[float], allow_folded: bool) -> tuple[float, ...]:
    """The scales in rising order, 1 among them; InputError for what can't be swept with this model."""
    rising = tuple(sorted({1.0, *(float(scale) for scale in scales)}))
    for scale in rising:
        if not 0 < scale < math.inf:
            raise InputError(f"scales has {scale:g}: parameters can be multiplied by finite numbers above 0.")
    if len(rising) < 2:
        raise InputError("scales holds no factor other than 1: give some, such as 1, 2, 4 ... 1024.")
    for name, parameter in chosen(model, "all", allow_folded=allow_folded).items():
        if parameter.dtype.itemsize < 4:
            raise InputError(f"model computes in half precision ({name}), which scaling overflows: open it in float32.")
    return rising


class _Sweep:
    """Sums over batches of what `saturate` reports: each batch at every scale in turn, nothing kept of it."""

    def __init__(
        self, model: Model, scales: tuple[float, ...], positions: int, seed: int, faithful: bool, allow_folded: bool
    ) -> None:
        self.model, self.scales, self.positions, self.seed = model, scales, positions, seed
        require(model, ["stream"])
        self.allow_folded, self.writes, self.causal = allow_folded, holds(model, "residual"), is_causal(model)
        self.score_names = score_hooks(model) if faithful or holds(model, "pattern_from_scores") else ()
        if faithful:
            require(model, ["pattern_from_scores", "pattern_causal", "value_mix", "edit_z"])
        self.faithful = faithful
        self.sums: dict[float, list[dict[str, Tensor]]] = {scale: [] for scale in scales}
        self.published: list[dict[str, Tensor]] = []

    def add(self, tokens: Tensor, mask: Tensor | None) -> None:
        """One batch: the model itself, the largest scale, then the others, each compared with these two."""
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        position = real.long().cumsum(-1) - real.long()
        eligible = real & (position > 0)
        if self.causal:
            eligible = eligible & torch.nn.functional.pad(real[:, 1:], (0, 1))
        batch = Batch(tokens, mask, *sample_positions(position, eligible, self.positions, self.seed))
        options = {"writes": self.writes, "score_names": self.score_names, "allow_folded": self.allow_folded}
        read = partial(scaled_pass, self.model, batch=batch, **options)
        base, limit = read(1.0), read(self.scales[-1])
        for scale in self.scales:
            now = {1.0: base, self.scales[-1]: limit}.get(scale) or read(scale)
            self.sums[scale].append(_compare(batch, base, limit, now, self.causal))
        if self.faithful:
            self.published.append(self._publish(batch))

    def _publish(self, batch: Batch) -> dict[str, Tensor]:
        """The published estimator on one batch: cosines over all real tokens, and counts under either mask."""
        read = partial(published_pass, self.model, batch=batch, score_names=self.score_names)
        read = partial(read, allow_folded=self.allow_folded)
        before, after = read(1.0, multiply=True), read(PUBLISHED, multiply=True)
        dot = norms.dot(before.stream, after.stream)
        cosine = dot / (norms.norm(before.stream) * norms.norm(after.stream) + 1e-9)
        real = batch.real.to(cosine.device)
        sums = torch.stack([(cosine * real).sum((1, 2)), real.sum().double().expand(len(cosine))])
        return {"cosine": sums, "counts": after.counts, "causal": read(PUBLISHED, multiply=False).counts}

    def to_dataset(self) -> xr.Dataset:
        """`/saturation` of everything added so far."""
        whole = {scale: _gather(parts) for scale, parts in self.sums.items()}
        base = whole[1.0]
        at_scales = [_at_scale(base, sums) for sums in whole.values()]
        variables = {}
        for name, value in sorted(at_scales[0].items()):
            stacked = torch.stack([variables_there[name] for variables_there in at_scales]).cpu().numpy()
            variables[name] = (("scale", "layer")[: 1 + value.ndim], stacked)
        coordinates = {"scale": list(self.scales), "layer": range(int(self.model.cfg.n_layers))}
        data = xr.Dataset(variables, coordinates)
        for name in [name for name in variables if name.endswith("_norm")]:
            data[name.replace("_norm", "_slope")] = _slopes(data[name])
        data = data.assign(self._published_variables())
        for name, words in DESCRIPTIONS.items():
            if name in data:
                data[name].attrs["description"] = words
        data.attrs.update(sequences=len(base["count"]), tokens_seen=int(base["count"].sum()), scaled="all parameters")
        return data

    def _published_variables(self) -> dict[str, Any]:
        if not self.published:
            return {}
        sums = {name: torch.stack([part[name] for part in self.published]).sum(0).cpu() for name in self.published[0]}
        cosine, tokens = sums["cosine"]
        variables: dict[str, Any] = {"similarity_published": (("layer",), (cosine / tokens).numpy())}
        for suffix, counts in (("", sums["counts"]), ("_causal", sums["causal"])):
            total, squares, split, rows = counts
            mean = total / rows
            deviation = (squares / rows - mean.square()).clamp(min=0).sqrt()
            for name, value in (("mean", mean), ("std", deviation), ("split", split / rows)):
                variables[f"attended_{name}{suffix}"] = (("layer", "head"), value.numpy())
        return variables


def _compare(batch: Batch, base: ScaledPass, limit: ScaledPass, now: ScaledPass, causal: bool) -> dict[str, Tensor]:
    """Sums over one batch's samples, by sequence (first dimension) but for `total` and `within`."""
    sampled = batch.sampled.to(now.stream.device)

    def over_samples(values: Float[Tensor, "layer batch sample"]) -> Float[Tensor, "batch layer"]:
        return reduce(values * sampled, "layer batch sample -> batch layer", "sum")

    base_unit, limit_unit, now_unit = (
        part.stream / norms.norm(part.stream).clamp(min=1e-300)[..., None] for part in (base, limit, now)
    )
    base_sum, now_sum = ((unit * sampled[..., None]).sum(2) for unit in (base_unit, now_unit))
    log_p, log_q = (part.logits.log_softmax(-1) for part in (base, now))
    same_top = log_p.argmax(-1) == log_q.argmax(-1)
    sums = {
        "similarity": over_samples(norms.dot(base_unit, now_unit)),
        "similarity_to_limit": over_samples(norms.dot(limit_unit, now_unit)),
        "count": sampled.sum(-1).double(),
        "kl": ((log_p.exp() * (log_p - log_q)).sum(-1) * sampled).sum(-1).double(),
        "top1_agreement": (same_top * sampled).sum(-1).double(),
        "loss_change": torch.full_like(sampled.sum(-1).double(), math.nan),
        "total": now_sum.sum(1)[None],
        "within": (base_sum * now_sum).sum((1, 2))[None],
    }
    if causal:
        following = (batch.index + 1).clamp(max=batch.tokens.shape[1] - 1)
        target = batch.tokens.gather(1, following)[..., None].to(log_p.device)
        sums["loss_change"] = ((log_p - log_q).gather(-1, target).squeeze(-1) * sampled).sum(-1).double()
    for name, logs in now.log_norms.items():
        sums[f"log {name}"] = over_samples(logs)
    sums["log share"] = over_samples(now.log_norms["embedding"] - now.log_norms["stream"])
    return sums


def _gather(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The batches of one scale together: sequences side by side, sums over all of them added."""
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return whole | {name: whole[name].sum(0) for name in ("total", "within")}


def _at_scale(base: dict[str, Tensor], sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The variables of one scale, each (layer) or a single number."""
    count = sums["count"]
    n = count.sum()
    out: dict[str, Tensor] = {}
    for name in ("similarity", "similarity_to_limit", "kl", "top1_agreement", "loss_change"):
        values, counts = sums[name], count
        if values.ndim == 2:
            counts = count[:, None].expand_as(values)
        out[name] = values.sum(0) / n
        out[f"{name}_low"], out[f"{name}_high"] = bootstrap_interval(values.cpu(), counts.cpu())
    within, pairs = sums["within"], n.square() - count.square().sum()
    if len(count) == 1:  # no other sequence: other positions of the same one
        within, pairs = sums["similarity"].sum(0), n.square() - n
    out["similarity_null"] = saturation.mismatched_cosine(base["total"], sums["total"], within, pairs)
    out["similarity_centred"] = saturation.centred_similarity(out["similarity"], base["total"] / n, sums["total"] / n)
    for name in [name for name in sums if name.startswith("log ")]:
        out[f"{name.removeprefix('log ')}_norm"] = (sums[name].sum(0) / n).exp()
    out["embedding_share"] = out.pop("share_norm")
    out["embedding_norm"] = out["embedding_norm"].squeeze(0)
    return {name: value.cpu() for name, value in out.items()}


def _slopes(norm: xr.DataArray) -> xr.DataArray:
    """The slope of a length from each scale to the next, by logarithms; NaN at the last."""
    scales = torch.tensor(norm["scale"].values)
    values = torch.tensor(norm.values)
    rise = [
        saturation.homogeneity_slope(values[i], values[i + 1], float(scales[i]), float(scales[i + 1]))
        for i in range(len(scales) - 1)
    ]
    slopes = torch.stack([*rise, torch.full_like(values[0], math.nan)])
    return norm.copy(data=slopes.numpy())


DESCRIPTIONS = {
    "similarity": "mean cosine of the stream after each block with that of the model with all parameters times scale",
    "similarity_null": "the same for a token of another sequence: what a collapsed stream scores anyway",
    "similarity_centred": "correlation of the two streams' unit vectors: their mean directions taken out",
    "similarity_to_limit": "mean cosine of the stream at this scale with that at the largest scale",
    "kl": "mean KL divergence of the scaled model's predictions from the model's own, in nats",
    "top1_agreement": "share of sampled positions where the most likely token stays the same",
    "loss_change": "mean change of the next token's loss, in nats (NaN for a bidirectional model)",
    "embedding_share": "geometric mean of ||x_0|| / ||x||: near 0, the embedding has dropped out of the stream",
    "embedding_norm": "geometric mean length of the stream before the first block",
    "stream_norm": "geometric mean length of the stream after each block",
    "attn_write_norm": "geometric mean length of what attention adds to the stream",
    "mlp_write_norm": "geometric mean length of what the MLP adds to the stream",
    "score_norm": "geometric mean length of a query's scores, over all heads and visible keys",
    "stream_slope": "the k of c^k: growth of the stream from this scale to the next; so for the other slopes",
    "similarity_published": "cosine at c = 1000 over all tokens, under the published script's mask",
    "attended_mean": "mean count of weights above 1e-5 at c = 1000 under the published mask, which multiplies by 0",
    "attended_split": "share of queries with more than one such weight",
    "attended_mean_causal": "the same count under the model's own mask",
}
