"""Which keys a query may see, asked of a model's own mask a block of rows at a time.

In: what transformers asks of a mask interface, a mask [batch, 1, query, key], or nothing but a direction. Out:
`RowMask`, whose blocks say where to stop and what to hide before, so that no mask [query, key] is ever held.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Unstreamable(Exception):
    """This model's attention can't be computed by rows: the words say why, as the end of a sentence."""


# Whether queries see keys, both given by their positions: [batch or 1, 1, query, key].
Sees = Callable[[Int[Tensor, " query"], Int[Tensor, " key"]], Bool[Tensor, "batch 1 query key"]]


class Cut(NamedTuple):
    """What a block of rows sees: keys before `stop`, but for those that are hidden."""

    stop: int
    # Columns that not every row sees, and where they are hidden [batch or 1, 1, row, column].
    hidden: list[tuple[slice, Tensor]]


class RowMask:
    """A mask by blocks of rows; each block is looked up once, for all layers that share the mask."""

    def __init__(self, sees: Sees, keys: int, device: torch.device) -> None:
        self._sees, self._keys, self._device = sees, keys, device
        self._cuts: dict[tuple[int, int], Cut] = {}

    def cut(self, start: int, stop: int) -> Cut:
        """What the rows from `start` to before `stop` see."""
        if (start, stop) not in self._cuts:
            rows = torch.arange(start, stop, device=self._device)
            self._cuts[start, stop] = _cut(self._sees(rows, torch.arange(self._keys, device=self._device)))
        return self._cuts[start, stop]


def _cut(sees: Bool[Tensor, "batch 1 row key"]) -> Cut:
    """Only columns that some row sees and another does not need a mask: a few at the edges, as a rule."""
    anyone = sees.flatten(0, 2).any(0).nonzero()
    stop = int(anyone[-1]) + 1 if len(anyone) else 1
    sees = sees[..., :stop]
    everyone = sees.flatten(0, 2).all(0)
    mixed = (~everyone).nonzero().flatten().tolist()
    if not mixed:
        return Cut(stop, [])
    clear = everyone.nonzero().flatten().tolist()
    edges = [slice(mixed[0], mixed[-1] + 1)]
    if clear and mixed[0] < clear[0] and clear[-1] < mixed[-1] and clear[-1] - clear[0] + 1 == len(clear):
        edges = [slice(mixed[0], clear[0]), slice(clear[-1] + 1, mixed[-1] + 1)]  # a window: both its ends
    return Cut(stop, [(columns, ~sees[..., columns]) for columns in edges])


def asked_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: Any = "cpu",
    **_: Any,
) -> RowMask:
    """What stands in transformers' mask interface during a streamed pass: the model's own rule, not yet applied."""
    if use_vmap or q_offset or kv_offset or q_length != kv_length or mask_function is None:
        raise Unstreamable("its mask is not one of positions alone")
    sequences = torch.arange(batch_size, device=device)[:, None, None, None]
    head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    real = None if attention_mask is None else attention_mask.to(device).bool()

    def sees(query: Tensor, key: Tensor) -> Tensor:
        seen = mask_function(sequences, head, query[None, None, :, None], key[None, None, None, :])
        seen = seen.expand(-1, -1, len(query), len(key))
        return seen if real is None else seen & real[:, None, None, :]

    return RowMask(sees, kv_length, torch.device(device))


def row_mask(mask: Any, causal: bool, keys: int, device: torch.device) -> RowMask:
    """The mask that an attention function was given, whatever it is; None is the direction alone."""
    if isinstance(mask, RowMask):
        return mask
    if mask is None:
        return RowMask(lambda query, key: (key <= query[:, None])[None, None] | (not causal), keys, device)
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise Unstreamable(f"its mask has the shape {tuple(mask.shape)}")
    if mask.dtype != torch.bool:
        lowest = torch.finfo(mask.dtype).min / 2
        if not bool(((mask == 0) | (mask < lowest)).all()):
            raise Unstreamable("its mask adds a bias to the scores")
        mask = mask == 0
    return RowMask(lambda query, key: mask[:, :, query][..., : len(key)], keys, device)
