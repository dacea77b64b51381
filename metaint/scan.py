"""Reading a model: in one call (`scan`), inside the owner's own passes (`attach`), or from a cache (`read_cache`)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from metaint.errors import InputError
from metaint.models.inputs import InputWatch, watching
from metaint.models.open import steady
from metaint.probes.heads import HeadProbe
from metaint.probes.probe import Probe, assemble, quietly


@contextmanager
def attach(model: Any, *probes: Probe) -> Iterator[Any]:
    """Let probes read every forward pass inside the `with` block, whoever runs it and whatever it is fed.

    Token ids, the padding of an `attention_mask` and the length of a key-value cache are learnt from the passes
    themselves. Yields the probe (a tuple if there are several). On the way out, also by an exception, every hook is
    gone and what was read stays in the probes.
    """
    if not probes:
        raise InputError("attach got no probe: pass one, such as metaint.HeadProbe().")
    with watching(model) as watch:
        hooks = [hook for probe in probes for hook in probe.hooks(model, watch)]
        with model.hooks(fwd_hooks=hooks):
            yield probes[0] if len(probes) == 1 else probes


def scan(
    model: Any,
    tokens: Int[Tensor, "batch position"] | str | None = None,
    probes: Sequence[Probe] | None = None,
    *,
    attention_mask: Tensor | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
    **attributes: Any,
) -> xr.DataTree:
    """Scan a model in evaluation mode: one forward pass for each batch feeds every probe.

    `tokens` is a batch of token ids, a text, or None for 10 sequences of 50 random tokens repeated twice (see
    `metaint.tasks`); `probes` defaults to `[HeadProbe()]`; further keywords are recorded as attributes. Returns a
    `DataTree` with one group for each probe. Raises InputError for tokens that the model can't take, HookAuditError
    for a model whose hooks are not what a probe needs.
    """
    probes = [HeadProbe()] if probes is None else list(probes)
    if tokens is None:
        tokens = default_tokens(model, seed=seed)
        attributes.setdefault("task", "repeated_tokens")
    elif isinstance(tokens, str):
        tokens = model.to_tokens(tokens)
    assert isinstance(tokens, Tensor) or tokens is not None
    tokens, mask = check_tokens(model, tokens, attention_mask)
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: it must be at least 1.")
    starts = range(0, len(tokens), batch_size)
    with steady(model), attach(model, *probes):
        for start in tqdm(starts, desc="scan", disable=not progress, leave=False):
            rows = slice(start, start + batch_size)
            padding = {} if mask is None else {"attention_mask": mask[rows]}
            model(tokens[rows], return_type=None, **padding)
    bos = starts_with_bos(model, tokens, mask)
    return assemble(probes, seed=seed, bos=int(bos), tokens_shape=list(tokens.shape), **attributes)


def read_cache(
    cache: Any,
    tokens: Int[Tensor, "batch position"] | None = None,
    attention_mask: Tensor | None = None,
    probes: Sequence[Probe] | None = None,
    **attributes: Any,
) -> xr.DataTree:
    """Scan an `ActivationCache` after the fact: nothing is run, and nothing in the cache is changed.

    The token ids are in a bridge's cache (`embed.hook_in`); for `HookedTransformer` pass them. Without them the
    measures that match tokens are not a number.
    """
    probes = [HeadProbe()] if probes is None else list(probes)
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
    return assemble(probes, **attributes)


def default_tokens(
    model: Any, length: int = 50, batch: int = 10, seed: int = 0, bos: bool | None = None
) -> Int[Tensor, "batch position"]:
    """Random tokens repeated twice, from the ids that the model's tokenizer knows, after its BOS if it wants one."""
    from metaint.tasks.repeated import repeated_tokens

    vocab = int(model.cfg.d_vocab)
    tokenizer = getattr(model, "tokenizer", None)
    special: list[int] = []
    if tokenizer is not None and 2 * length < len(tokenizer) <= vocab:
        vocab = len(tokenizer)
        special = [i for i in getattr(tokenizer, "all_special_ids", []) if i is not None]
    first = bos_id(model) if (getattr(model.cfg, "default_prepend_bos", True) if bos is None else bos) else None
    if bos and first is None:
        raise InputError("bos was asked for, and this model's tokenizer has none: leave it out.")
    room = int(model.cfg.n_ctx) - (first is not None)
    length = min(length, room // 2, vocab - len(special) - 1)
    if length < 2:
        raise InputError(f"this model has room for {room} tokens of {vocab} kinds: too little to repeat anything.")
    ids = torch.tensor([i for i in range(vocab) if i not in set(special)]) if special else None
    return repeated_tokens(vocab, length, batch=batch, bos=first, ids=ids, seed=seed)


def bos_id(model: Any) -> int | None:
    """The id of the model's beginning-of-sequence token, or None."""
    tokenizer = getattr(model, "tokenizer", None)
    found = getattr(tokenizer, "bos_token_id", None)
    return int(found) if found is not None and found < model.cfg.d_vocab else None


def starts_with_bos(model: Any, tokens: Tensor, mask: Tensor | None) -> bool:
    """Whether every sequence begins with the model's BOS."""
    first = torch.zeros(len(tokens), dtype=torch.long) if mask is None else mask.long().argmax(-1).cpu()
    return bos_id(model) is not None and bool((tokens.cpu()[torch.arange(len(tokens)), first] == bos_id(model)).all())


def check_tokens(model: Any, tokens: Any, attention_mask: Any = None) -> tuple[Tensor, Tensor | None]:
    """Tokens and mask on the model's device, or one sentence on what is wrong with them."""
    if not isinstance(tokens, Tensor):
        raise InputError(f"tokens is a {type(tokens).__name__}: pass a tensor of ids [batch, position], or a text.")
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise InputError(f"tokens has dtype {tokens.dtype}: token ids are integers.")
    if tokens.ndim == 1:
        tokens = tokens[None]
    if tokens.ndim != 2:
        raise InputError(f"tokens has shape {tuple(tokens.shape)}: it must be [batch, position].")
    if tokens.numel() == 0:
        raise InputError(f"tokens is empty (shape {tuple(tokens.shape)}): give at least one sequence of two tokens.")
    cfg = model.cfg
    if tokens.shape[1] < 2:
        raise InputError("tokens has one position: attention needs at least two.")
    if tokens.shape[1] > cfg.n_ctx:
        raise InputError(f"tokens has {tokens.shape[1]} positions, and the model reads at most {cfg.n_ctx}: cut it.")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= cfg.d_vocab:
        wrong = low if low < 0 else high
        raise InputError(f"tokens holds id {wrong}, and the model's vocabulary is 0 to {cfg.d_vocab - 1}.")
    device = next(model.parameters()).device
    if attention_mask is None:
        return tokens.to(device), None
    mask = torch.as_tensor(attention_mask)
    if mask.shape != tokens.shape:
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}, and tokens {tuple(tokens.shape)}: they must be the same."
        )
    empty = (~mask.bool().any(-1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"attention_mask hides every position of sequence {empty[0]}: drop that sequence.")
    return tokens.to(device), mask.long().to(device)
