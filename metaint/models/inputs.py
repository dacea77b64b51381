"""What a model is being fed: token ids, padding and cache, learnt from the owner's own forward passes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from metaint.errors import HookAuditError, InputError
from metaint.models.audit import mistrust_of_mask
from metaint.models.protocol import Model
from metaint.models.tokens import check_mask


class Inputs(NamedTuple):
    """One forward pass: its keys (cached ones first), which of them are real, and how many were cached."""

    tokens: Int[Tensor, "batch key"] | None
    mask: Bool[Tensor, "batch key"]
    past: int


class InputWatch:
    """Follows forward passes: what came in, and what earlier passes left in a key-value cache.

    `passes` grows by one with each forward pass, so that a reader knows when a new one began. Where a probe changes
    what it compares, the batch is stacked `copies` times: the first is as the owner has it and the one that `resolve`
    tells of. `readers` are called with the logits of each pass, `openers` when one begins.
    """

    def __init__(self) -> None:
        self.passes = 0
        self.copies = 1
        self.readers: list[Callable[[Tensor], None]] = []
        # Called when a pass begins.
        self.openers: list[Callable[[], None]] = []
        # Where nobody but readers wants the logits of the passes, the positions [copies, sample] they are made at;
        # where nobody wants any, they are made at one position.
        self.private = False
        self.wants_logits = True
        self.logits_at: Tensor | None = None
        self.gathered = False
        self._new: Tensor | None = None
        self._mask: Tensor | None = None
        self._past: int | None = None
        self._resolved: Inputs | None = None
        self._previous: Inputs | None = None

    def begin(self, tokens: Tensor | None, mask: Tensor | None = None, past: int | None = None) -> None:
        """A forward pass starts with these new tokens (None: embeddings, which have no ids)."""
        self.passes += 1
        self.logits_at, self.gathered = None, False
        new = tokens if tokens is None or tokens.ndim == 2 else tokens.unsqueeze(0)
        self._new = None if new is None else self._first_copy(new)
        self._mask, self._past = None if mask is None else self._first_copy(mask), past
        self._previous, self._resolved = self._resolved, None
        for opener in self.openers:
            opener()

    def stack(self, copies: int) -> None:
        """Expect each batch this many times over; InputError if another number was asked for before."""
        if self.copies not in (1, copies):
            raise InputError(
                f"probes want the batch {self.copies} and {copies} times over: use one of them, or scan twice."
            )
        self.copies = copies

    def _first_copy(self, values: Tensor) -> Tensor:
        if self.copies == 1:
            return values
        batch = len(values) // self.copies
        first = values[:batch]
        if batch == 0 or not torch.equal(first.repeat(self.copies, *[1] * (values.ndim - 1)), values):
            raise InputError(
                f"the batch of {len(values)} sequences is not {self.copies} copies of one: a SaturationProbe compares "
                "copies, so feed the model probe.stacked(tokens), with the mask stacked alike."
            )
        return first

    def note(self, mask: Tensor | None, past: int | None) -> None:
        """Add what is learnt after the embedding: the padding mask and the length of the cache."""
        self._mask = self._first_copy(mask) if mask is not None else self._mask
        self._past = past if past is not None else self._past

    def resolve(self, batch: int, queries: int, keys: int | None, device: torch.device) -> Inputs:
        """The inputs of the current pass, as seen from a pattern of `queries` rows and `keys` columns.

        A residual stream tells no `keys`: without word of a cache it is taken to have none.
        """
        if self._resolved is None:
            cached = 0 if keys is None else keys - queries
            past = cached if self._past is None else self._past
            tokens = self._with_history(self._new, past, batch)
            self._resolved = Inputs(tokens, self._full_mask(batch, past, queries, device), past)
        return self._resolved

    def _with_history(self, new: Tensor | None, past: int, batch: int) -> Tensor | None:
        if new is None or past == 0:
            return new
        before = self._previous.tokens if self._previous else None
        if before is None or before.shape[0] != batch or before.shape[1] < past:
            raise InputError(
                f"this forward pass continues {past} cached positions whose tokens were never seen: "
                "attach before the prompt's own forward pass."
            )
        return torch.cat([before[:, :past].to(new.device), new], dim=1)

    def _full_mask(self, batch: int, past: int, queries: int, device: torch.device) -> Tensor:
        total = past + queries
        mask = self._mask
        if mask is None:
            mask = torch.ones(batch, queries, dtype=torch.bool, device=device)
        elif mask.ndim != 2:
            raise InputError(
                f"attention_mask has {mask.ndim} dimensions: padding is read from a mask of shape "
                "[batch, position] with 1 for real tokens."
            )
        else:
            check_mask(mask)
        mask = mask.to(device).bool()
        if mask.shape[1] == queries != total:
            before = self._previous.mask if self._previous else torch.ones(batch, past, device=device)
            mask = torch.cat([before[:, :past].bool(), mask], dim=1)
        if mask.shape != (batch, total):
            raise InputError(
                f"attention_mask has shape {tuple(mask.shape)}, but the pass has {batch} sequences of {total} "
                "positions: give one entry for each."
            )
        empty = (~mask.any(-1)).nonzero().flatten().tolist()
        if empty:
            raise InputError(f"attention_mask hides every position of sequence {empty[0]}: drop that sequence.")
        return mask


@contextmanager
def watching(model: Model, masks_checked: bool = False) -> Iterator[InputWatch]:
    """Watch a model's forward passes through pre-hooks on its modules, and take them off again.

    The token ids come from the embedding, padding and cache from the wrapped Hugging Face model or, where there is
    none (`HookedTransformer`), from the first block; logits are what either makes of its last stream. A pass with an
    attention_mask raises HookAuditError in a model that the audit doesn't find to do what it says, unless whoever
    feeds it has checked its masks.
    """
    watch = InputWatch()
    if not masks_checked:
        mistrust_of_mask(model, torch.zeros(1, 1))  # the audit runs a pass, which is remembered: not inside another
    outer: dict[str, Any] = {}

    def on_model(_: Any, args: tuple, kwargs: dict) -> None:
        mask = kwargs.get("attention_mask")
        if not masks_checked and mask is not None and (mistrust := mistrust_of_mask(model, mask)):
            raise HookAuditError(mistrust)
        outer.update(mask=mask, past=_cached(kwargs.get("past_key_values")))
        if kwargs.get("inputs_embeds") is not None:
            watch.begin(None, **outer)

    def on_embed(_: Any, args: tuple, kwargs: dict) -> None:
        ids = args[0] if args else next(iter(kwargs.values()))
        watch.begin(ids, **outer)

    def on_block(_: Any, args: tuple, kwargs: dict) -> None:
        entry = kwargs.get("past_kv_cache_entry")
        past = None if entry is None else entry.past_keys.shape[1]
        watch.note(kwargs.get("attention_mask"), past)

    cap = float(getattr(model.cfg, "output_logits_soft_cap", 0) or 0)

    def on_output(module: Any, _: Any, output: Any) -> None:
        logits = getattr(output, "logits", output)
        logits = logits[0] if isinstance(logits, tuple) else logits
        # HookedTransformer caps what its unembedding gives, the wrapped models cap their own.
        if watch.readers and cap > 0 and module is not wrapped:
            logits = cap * torch.tanh(logits / cap)
        for reader in watch.readers:
            reader(logits)

    def on_unembed(_: Any, args: tuple) -> tuple | None:
        where = watch.logits_at
        if not watch.wants_logits and args and args[0].ndim == 3:
            return (args[0][:, -1:], *args[1:])
        if where is None or not args or args[0].shape[:1] != where.shape[:1]:
            return None
        watch.gathered = True
        return (args[0][torch.arange(len(where), device=where.device)[:, None], where], *args[1:])

    wrapped = getattr(model, "original_model", None)
    with ExitStack() as stack:
        if wrapped is not None:
            stack.callback(wrapped.register_forward_pre_hook(on_model, with_kwargs=True).remove)
        elif hasattr(model, "blocks"):
            stack.callback(model.blocks[0].register_forward_pre_hook(on_block, with_kwargs=True).remove)
        embed = getattr(model, "embed", None)
        if embed is not None:
            stack.callback(embed.register_forward_pre_hook(on_embed, with_kwargs=True).remove)
        unembed = getattr(model, "unembed", None)
        if unembed is not None:
            stack.callback(unembed.register_forward_pre_hook(on_unembed).remove)
        last = wrapped if wrapped is not None else unembed
        if last is not None:
            stack.callback(last.register_forward_hook(on_output).remove)
        yield watch


def _cached(past: Any) -> int | None:
    """Length of a Hugging Face cache, as far as it says so."""
    return int(past.get_seq_length()) if hasattr(past, "get_seq_length") else None
