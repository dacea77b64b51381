"""Repeated random tokens: the stimulus on which induction heads show themselves.

In: a vocabulary size and a length. Out: `tokens[batch, position]`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from metaint.errors import InputError, door


@door
def repeated_tokens(
    vocab: int,
    length: int = 50,
    repeats: int = 2,
    batch: int = 10,
    *,
    bos: int | None = None,
    ids: tuple[int, int] | Sequence[int] | Int[Tensor, "candidate"] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Int[Tensor, "batch position"]:
    """`repeats` copies of `length` random ids, all different inside a copy, with `bos` in front if given.

    Ids are drawn without replacement: with it, chance repeats would add wrong targets and wrong keys.
    `repeats=1` is the control without repetition. `ids` narrows the draw: a tuple (low, high) is the range
    low..high-1, and a list or a 1-D tensor holds the candidates themselves (repeats among them count once),
    for models to which uniform ids are foreign. The id `bos` is never drawn. The result has `repeats *
    length` positions, one more with `bos`; it depends on `seed` alone and not on the device or the global
    random state.

    Raises InputError if there are fewer than `length` candidates, for ids outside 0..vocab-1 and for sizes
    below 1.

    Source: the induction stimulus of Olsson et al. 2022 and of TransformerLens's main demo (L=50, R=2, batch
    10).
    """
    for name, value in (("vocab", vocab), ("length", length), ("repeats", repeats), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is {value!r}: give a whole number of at least 1.")
    if bos is not None and not 0 <= bos < vocab:
        raise InputError(f"bos is {bos}, outside the vocabulary 0..{vocab - 1}: give an id inside it.")
    candidates = _candidates(vocab, ids)
    if bos is not None:
        candidates = candidates[candidates != bos]
    if len(candidates) < length:
        raise InputError(
            f"length is {length}, but only {len(candidates)} different ids can be drawn: "
            f"give a length of at most {len(candidates)} or more ids."
        )
    generator = torch.Generator().manual_seed(seed)
    # One permutation a sequence: all at once would hold batch · vocab random numbers.
    picks = [torch.randperm(len(candidates), generator=generator)[:length] for _ in range(batch)]
    tokens = candidates[torch.stack(picks)].repeat(1, repeats)
    if bos is not None:
        tokens = torch.cat([tokens.new_full((batch, 1), bos), tokens], dim=1)
    return tokens.to(device)


def _candidates(vocab: int, ids: object) -> Int[Tensor, "candidate"]:
    """The different ids to draw from, in ascending order."""
    if ids is None:
        return torch.arange(vocab)
    if isinstance(ids, tuple):
        if len(ids) != 2 or not 0 <= ids[0] < ids[1] <= vocab:
            raise InputError(
                f"ids is {ids}: give a range (low, high) with 0 <= low < high <= {vocab}, or a list of ids."
            )
        return torch.arange(*ids)
    try:
        listed = torch.as_tensor(ids, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"ids is of type {type(ids).__name__}: give a range (low, high) or a list of ids.") from None
    if listed.dim() != 1 or listed.is_floating_point() or listed.is_complex() or listed.dtype == torch.bool:
        raise InputError(
            f"ids has {listed.dim()} dimensions of {listed.dtype}: give one dimension of whole numbers, or (low, high)."
        )
    if len(listed) and (listed.min() < 0 or listed.max() >= vocab):
        raise InputError(
            f"ids reach from {int(listed.min())} to {int(listed.max())}, "
            f"outside the vocabulary 0..{vocab - 1}: give ids inside it."
        )
    return listed.long().unique()
