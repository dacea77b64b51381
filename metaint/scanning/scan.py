"""Reading a model: in one call (`scan`), inside the owner's own passes (`attach`), or from a cache (`read_cache`)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from metaint.errors import InputError
from metaint.models.describe import check_open
from metaint.models.inputs import InputWatch, watching
from metaint.models.reading import steady
from metaint.models.tokens import check_tokens, encoded, first_id, starts_with_bos
from metaint.probes.heads import HeadProbe
from metaint.probes.probe import Probe, quietly
from metaint.scans.assemble import assemble


@contextmanager
def attach(model: Any, *probes: Probe) -> Iterator[Any]:
    """Let probes read every forward pass inside the `with` block, whoever runs it and whatever it is fed.

    Token ids, the padding of an `attention_mask` and the length of a key-value cache are learnt from the passes
    themselves. Yields the probe (a tuple if there are several). A hook sees what those before it left: a pattern that
    you edit is read as edited where your hooks were on the model before this block, else as it was. On the way out,
    also by an exception, every hook is gone and what was read stays in the probes.
    """
    with _attached(model, probes, private=False):
        yield probes[0] if len(probes) == 1 else probes


@contextmanager
def _attached(model: Any, probes: Sequence[Probe], private: bool) -> Iterator[None]:
    """`private`: nobody else wants the logits of these passes, so they are made where probes look at them."""
    if not probes:
        raise InputError("probes is empty: pass one, such as metaint.HeadProbe().")
    for probe in probes:  # before anything watches: the audit runs passes of its own
        probe.prepare(model)
    with watching(model) as watch:
        watch.private = private
        hooks = [hook for probe in probes for hook in probe.hooks(model, watch)]
        with model.hooks(fwd_hooks=hooks):
            yield


def scan(
    model: Any,
    tokens: Int[Tensor, "batch position"] | str | None = None,
    probes: Sequence[Probe] | None = None,
    *,
    attention_mask: Tensor | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
    attributes: Mapping[str, Any] | None = None,
) -> xr.DataTree:
    """Scan a model in evaluation mode: one forward pass for each batch feeds every probe.

    `tokens` is a batch of token ids, a text, or None for 10 sequences of 50 random tokens repeated twice (see
    `metaint.tasks`); `probes` defaults to `[HeadProbe()]`; `attributes` are recorded at the root of the scan. With a
    `SaturationProbe` each sequence takes the place of several of the `batch_size` in a pass. Returns a `DataTree` with
    one group for each probe. Raises InputError for tokens that the model can't take, HookAuditError
    for a model whose hooks are not what a probe needs.
    """
    probes = [HeadProbe()] if probes is None else list(probes)
    facts: dict[str, Any] = {"task": "repeated_tokens" if tokens is None else "given", **(attributes or {})}
    if tokens is None:
        tokens = default_tokens(model, seed=seed)
    tokens, mask = check_tokens(model, encoded(model, tokens), attention_mask)
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: it must be at least 1.")
    copies = max((probe.copies for probe in probes), default=1)
    size = max(1, batch_size // copies)
    starts = range(0, len(tokens), size)
    wanted = "logits" if any(probe.reads_logits for probe in probes) else None
    with steady(model), _attached(model, probes, private=True):
        # A probe of the weights alone needs no pass.
        hooked = any(probe.shape and probe.hook_names(probe.shape) for probe in probes)
        for start in tqdm(starts if hooked else (), desc="scan", disable=not progress, leave=False):
            rows = slice(start, start + size)
            padding = {} if mask is None else {"attention_mask": mask[rows].repeat(copies, 1)}
            model(tokens[rows].repeat(copies, 1), return_type=wanted, **padding)
    bos = starts_with_bos(model, tokens, mask)
    return assemble(probes, {"seed": seed, "bos": int(bos), "tokens_shape": list(tokens.shape), **facts})


def read_cache(
    cache: Any,
    tokens: Int[Tensor, "batch position"] | None = None,
    attention_mask: Tensor | None = None,
    probes: Sequence[Probe] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> xr.DataTree:
    """Scan an `ActivationCache` after the fact: nothing is run, and nothing in the cache is changed.

    The token ids are in a bridge's cache (`embed.hook_in`); for `HookedTransformer` pass them. Without them the
    measures that match tokens are not a number.
    """
    probes = [HeadProbe()] if probes is None else list(probes)
    if not hasattr(cache, "model"):
        raise InputError(
            f"cache is a {type(cache).__name__}: pass a model's ActivationCache (of a plain dict, "
            "ActivationCache(dict, model))."
        )
    watch = InputWatch()
    if tokens is None and "embed.hook_in" in cache:
        tokens = cache["embed.hook_in"]
    if tokens is not None and tokens.ndim == 1:
        tokens = tokens[None]
    watch.begin(tokens, attention_mask)
    for probe in probes:
        probe.prepare(cache.model)
        assert probe.shape is not None
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
                probe.read(name, activation.detach(), watch)
    return assemble(probes, attributes)


def default_tokens(
    model: Any,
    length: int = 50,
    batch: int = 10,
    seed: int = 0,
    bos: bool | None = None,
    exact: bool = False,
) -> Int[Tensor, "batch position"]:
    """Random tokens repeated twice, from the ids that the model's tokenizer knows, after its BOS if it wants one.

    The block is shortened to what the model's context and vocabulary hold, unless `exact`; then that is an InputError.
    """
    check_open(model)
    from metaint.tasks.repeated import repeated_tokens

    vocab = int(model.cfg.d_vocab)
    tokenizer = getattr(model, "tokenizer", None)
    special: list[int] = []
    if tokenizer is not None and 2 * length < len(tokenizer) <= vocab:
        vocab = len(tokenizer)
        special = [i for i in getattr(tokenizer, "all_special_ids", []) if i is not None]
    first = first_id(model, bos)
    room = int(model.cfg.n_ctx) - (first is not None)
    longest = min(room // 2, vocab - len(special))
    if longest < 2 or (exact and length > longest):
        raise InputError(f"repeat is {length}, and this model can repeat a block of at most {longest} tokens.")
    length = min(length, longest)
    ids = torch.tensor([i for i in range(vocab) if i not in set(special)]) if special else None
    return repeated_tokens(vocab, length, batch=batch, bos=first, ids=ids, seed=seed)


def text_tokens(
    model: Any, text: str, length: int, windows: int, seed: int | None = 0, bos: bool | None = None
) -> Int[Tensor, "batch position"]:
    """Windows of a text in the model's own tokens, each after its BOS if it wants one; the first with no seed."""
    from metaint.tasks.text import text_windows

    if not 2 <= length <= model.cfg.n_ctx:
        raise InputError(f"length is {length}: this model reads windows of 2 to {model.cfg.n_ctx} tokens.")
    if getattr(model, "tokenizer", None) is None:
        raise InputError("text was given, and this model has no tokenizer: pass token ids, or --repeat at the shell.")
    return text_windows(model, text, length, batch=windows, bos=first_id(model, bos), seed=seed)
