"""Token ids and a model: whether it can read them, and how its sequences begin."""

from typing import Any

import torch
from torch import Tensor

from metaint.errors import HookAuditError, InputError
from metaint.models.audit import mistrust_of_mask
from metaint.models.describe import check_open
from metaint.models.protocol import Model


def first_id(model: Model, bos: bool | None) -> int | None:
    """The BOS to begin with: as asked, or (None) as the model's own `to_tokens` would; None for no BOS."""
    if bos is None:
        bos = bool(getattr(model.cfg, "default_prepend_bos", True))
    elif bos and bos_id(model) is None:
        raise InputError("bos was asked for, and this model's tokenizer has none: leave it out.")
    return bos_id(model) if bos else None


def bos_id(model: Model) -> int | None:
    """The id of the model's beginning-of-sequence token, or None."""
    tokenizer = getattr(model, "tokenizer", None)
    known = getattr(tokenizer, "bos_token_id", None)
    return int(known) if known is not None and known < model.cfg.d_vocab else None


def starts_with_bos(model: Model, tokens: Tensor, mask: Tensor | None) -> bool:
    """Whether every sequence begins with the model's BOS."""
    first = torch.zeros(len(tokens), dtype=torch.long) if mask is None else mask.long().argmax(-1).cpu()
    return bos_id(model) is not None and bool((tokens.cpu()[torch.arange(len(tokens)), first] == bos_id(model)).all())


def encoded(model: Model, tokens: Tensor | str) -> Tensor:
    """Token ids, of a text by the model's own tokenizer; InputError if it has none."""
    check_open(model)
    if not isinstance(tokens, str):
        return tokens
    to_tokens = getattr(model, "to_tokens", None)
    if to_tokens is None:
        raise InputError(f"tokens is a text, and a {type(model).__name__} has no to_tokens: pass token ids.")
    return to_tokens(tokens)


def check_tokens(model: Model, tokens: Any, attention_mask: Any = None) -> tuple[Tensor, Tensor | None]:
    """Tokens and mask on the model's device, or one sentence on what is wrong with them, or the model cannot do."""
    if not isinstance(tokens, Tensor):
        raise InputError(f"tokens is a {type(tokens).__name__}: pass a tensor of ids [batch, position], or a text.")
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise InputError(f"tokens has dtype {tokens.dtype}: token ids are integers.")
    if tokens.is_complex():
        raise InputError(f"tokens has dtype {tokens.dtype}: token ids are integers.")
    if tokens.dtype not in (torch.int32, torch.int64):  # which embeddings take
        tokens = tokens.long()
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
    check_ids(tokens, cfg.d_vocab)
    device = next(model.parameters()).device
    if attention_mask is None:
        return tokens.to(device), None
    try:
        mask = torch.as_tensor(attention_mask)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"attention_mask is a {type(attention_mask).__name__}: pass a tensor [batch, position] of 0 and 1."
        ) from None
    if mask.shape != tokens.shape:
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}, and tokens {tuple(tokens.shape)}: they must be the same."
        )
    check_mask(mask)
    empty = (~mask.bool().any(-1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"attention_mask hides every position of sequence {empty[0]}: drop that sequence.")
    if mistrust := mistrust_of_mask(model, mask):
        raise HookAuditError(mistrust)
    return tokens.to(device), mask.long().to(device)


def check_ids(tokens: Tensor, d_vocab: int) -> None:
    """InputError for an id that is outside the vocabulary."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= d_vocab:
        wrong = low if low < 0 else high
        raise InputError(f"tokens holds id {wrong}, and the model's vocabulary is 0 to {d_vocab - 1}.")


def check_mask(mask: Tensor) -> None:
    """InputError for a mask with anything but 0 and 1, of which models and measures would each make their own."""
    other = mask[(mask != 0) & (mask != 1)]
    if other.numel():
        raise InputError(f"attention_mask holds {other[0].item():g}: give 1 for a real token and 0 for padding.")
