"""Reading a model: in one call (`scan`), inside the owner's own passes (`attach`), or from a cache (`read_cache`)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import xarray as xr
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from metaint.errors import InputError, door
from metaint.models.inputs import InputWatch
from metaint.models.protocol import Model
from metaint.models.reading import quietly, steady
from metaint.models.streamed import ROWS
from metaint.models.tokens import check_tokens
from metaint.probes.heads import HeadProbe
from metaint.probes.probe import Probe
from metaint.probes.recurrence import RecurrenceProbe
from metaint.scanning.attached import attached
from metaint.scanning.given import given_inputs
from metaint.scanning.way import way_of
from metaint.scans.assemble import assemble

# Tokens in a streamed pass: more make it no faster, and its blocks of rows would leave a CPU's cache.
STREAMED_TOKENS = 2048


@contextmanager
def attach(model: Model, *probes: Probe) -> Iterator[Any]:
    """Let probes read every forward pass inside the `with` block, whoever runs it and whatever it is fed.

    Token ids, the padding of an `attention_mask` and the length of a key-value cache are learnt from the passes
    themselves. Yields the probe (a tuple if there are several). A hook sees what those before it left: a pattern that
    you edit is read as edited where your hooks were on the model before this block, else as it was; either way the
    scan's attribute `owner_hooks` names the hook points that had hooks of yours in any pass. On the way out, also by an
    exception, every hook is gone and what was read stays in the probes.

    >>> import metaint
    >>> from metaint.toys.small import small_transformer
    >>> sizes = {"n_layers": 2, "n_heads": 2, "d_model": 8, "d_mlp": 16, "d_vocab": 30, "n_ctx": 20}
    >>> model = small_transformer(norm="pre", **sizes)
    >>> with metaint.attach(model, metaint.HeadProbe()) as probe:
    ...     logits = model(metaint.tasks.repeated_tokens(30, 8, batch=3))
    >>> probe.to_scan()["heads"].attrs["sequences"]
    3
    """
    with attached(model, probes, private=False):
        yield probes[0] if len(probes) == 1 else probes


@door
def scan(
    model: Model,
    tokens: Int[Tensor, "batch position"] | str | None = None,
    probes: Sequence[Probe] | None = None,
    *,
    attention_mask: Tensor | None = None,
    batch_size: int = 8,
    seed: int = 0,
    attention: str = "eager",
    progress: bool = False,
    attributes: Mapping[str, Any] | None = None,
) -> xr.DataTree:
    """Scan a model in evaluation mode: one forward pass for each batch feeds every probe.

    - `tokens`: token ids [batch, position], a text, or None for 10 sequences of 50 random tokens repeated twice
      (`metaint.default_tokens`).
    - `probes`: by default `[HeadProbe()]`.
    - `attention_mask`: [batch, position], 0 where a token is padding; padding never counts.
    - `batch_size`: sequences in a pass, at most; a streamed one takes fewer long ones. With a `SaturationProbe` each
      takes the place of several.
    - `attention`: "eager" reads the patterns that the model makes. "streamed" has each layer's attention computed by
      rows, through transformers' AttentionInterface, with the same numbers: in a fraction of the time, and in memory
      that grows with the length and not with its square. "auto" streams where that can be and says in the scan's
      `attention_reason` why not. A model's first streamed scan checks that a short one equals its eager one.
    - `attributes`: recorded at the root of the scan, beside model, seed, BOS and shape.

    Returns a `DataTree` with one group for each probe. Hooks of yours that are on the model stay on and work: the
    attribute `owner_hooks` names their hook points. Raises InputError for tokens that the model can't take and for
    "streamed" attention that can't be had,
    HookAuditError for a model whose hooks are not what a probe needs.

    >>> import metaint
    >>> from metaint.toys.small import small_transformer
    >>> sizes = {"n_layers": 2, "n_heads": 2, "d_model": 8, "d_mlp": 16, "d_vocab": 30, "n_ctx": 20}
    >>> scan = metaint.scan(small_transformer(norm="pre", **sizes), probes=[metaint.HeadProbe(), metaint.WeightProbe()])
    >>> list(scan), scan["heads"]["induction"].shape
    (['heads', 'weights'], (2, 2))
    """
    probes = chosen_probes(probes)
    given = given_inputs(model, tokens, attention_mask=attention_mask, batch_size=batch_size, seed=seed)
    copies = max((probe.copies for probe in probes), default=1)
    size = max(1, batch_size // copies)
    wanted = "logits" if any(probe.reads_logits for probe in probes) else None
    way = way_of(model, probes, attention)
    if way.streamed:
        size = min(size, max(1, STREAMED_TOKENS // given.tokens.shape[1]))
    starts = range(0, len(given.tokens), size)
    options: dict[str, Any] = {"use_cache": False} if way.streamed else {}
    with steady(model), attached(model, probes, private=True, rows=ROWS if way.streamed else 0):
        # A probe of the weights alone needs no pass.
        if not any(probe.hook_names(probe.shape) for probe in probes):
            starts = range(0)
        for start in tqdm(starts, desc="scan", disable=not progress, leave=False):
            rows = slice(start, start + size)
            padding = {} if given.mask is None else {"attention_mask": given.mask[rows].repeat(copies, 1)}
            model(given.tokens[rows].repeat(copies, 1), return_type=wanted, **padding, **options)
    return assemble(probes, {**given.facts, **way.facts, **(attributes or {})})


def chosen_probes(probes: Sequence[Probe] | None) -> list[Probe]:
    """The probes, a `HeadProbe` without any; InputError for one that tokens alone don't feed."""
    chosen: list[Probe] = [HeadProbe()]
    if probes is not None:
        chosen = list(probes)
    if any(isinstance(probe, RecurrenceProbe) for probe in chosen):
        raise InputError(
            "probes holds a RecurrenceProbe, which compares with sequences whose matrix is known: use "
            "metaint.recur(model, vectors, matrices), which makes its own."
        )
    groups = [probe.group for probe in chosen]
    for group in groups:
        if groups.count(group) > 1:
            raise InputError(
                f"probes holds {groups.count(group)} probes of /{group}, and a scan holds one: choose one."
            )
    return chosen


@door
def read_cache(
    cache: Any,
    tokens: Int[Tensor, "batch position"] | None = None,
    probes: Sequence[Probe] | None = None,
    *,
    attention_mask: Tensor | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> xr.DataTree:
    """Scan an `ActivationCache` after the fact: nothing is run, and nothing in the cache is changed.

    - `tokens`: token ids [batch, position]. A bridge's cache has them (`embed.hook_in`); for `HookedTransformer` pass
      them. Without them the measures that match tokens are not a number.
    - `probes`, `attention_mask`, `attributes`: as in `scan`.

    Raises InputError for a cache that lacks what a probe reads.

    >>> import metaint
    >>> from transformer_lens import ActivationCache
    >>> from metaint.toys.small import small_transformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_mlp": 16, "d_vocab": 30, "n_ctx": 20}
    >>> model, tokens = small_transformer(norm="pre", **sizes), metaint.tasks.repeated_tokens(30, 8, batch=3)
    >>> cache = ActivationCache(model.run_with_cache(tokens)[1], model)
    >>> metaint.read_cache(cache, tokens)["heads"].equals(metaint.scan(model, tokens)["heads"])
    True
    """
    probes = chosen_probes(probes)
    if not hasattr(cache, "model"):
        raise InputError(
            f"cache is a {type(cache).__name__}: pass a model's ActivationCache (for a plain dict, "
            "ActivationCache(dict, model))."
        )
    watch = InputWatch()
    if tokens is None and "embed.hook_in" in cache:
        tokens = cache["embed.hook_in"]
    if tokens is not None:
        tokens, attention_mask = check_tokens(cache.model, tokens, attention_mask)
    watch.begin(tokens, attention_mask)
    for probe in probes:
        probe.prepare(cache.model)
        for name in probe.hook_names(probe.shape):
            if name not in cache:
                raise InputError(
                    f"cache lacks {name}: run with a names_filter that keeps it, or with none, "
                    "so that the whole model is in the cache."
                )
            activation = cache[name]
            if not cache.has_batch_dim:
                activation = activation[None]
            with quietly(activation.device.type):
                probe.update(name, activation.detach(), watch)
    return assemble(probes, attributes)
