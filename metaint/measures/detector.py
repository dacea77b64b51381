"""The scores of `transformer_lens.head_detector.detect_head`, for those who come from it."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaint.errors import InputError

DetectorName = Literal["previous_token_head", "duplicate_token_head", "induction_head"]


def detector_scores(
    pattern: Float[Tensor, "head query key"],
    tokens: Int[Tensor, " key"],
    *,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    error_measure: str = "mul",
) -> dict[DetectorName, Float[Tensor, " head"]]:
    """The scores of `transformer_lens.head_detector.detect_head`, for its three kinds at once.

    To find one's feet, not to judge a head by: an ideal induction head scores 0.5 here, since "mul" divides by the
    weight of every query, and with `exclude_bos` a sink with 1 % on the previous token scores 1.0. "mul" is in
    [0, 1]; "abs" is 1 minus the mean absolute difference of a row, unbounded below. The pattern is not edited.
    """
    if error_measure not in ("mul", "abs"):
        raise InputError(f'error_measure is {error_measure!r}: choose "mul" or "abs".')
    length = pattern.shape[-1]
    keys = torch.arange(length, device=pattern.device)
    back = keys[:, None] - keys
    same = (tokens[:, None] == tokens[None, :]) & (back > 0)
    shifted = torch.zeros_like(same)
    shifted[:, 1:] = (tokens[:, None] == tokens[None, :-1]) & (back[:, :-1] > 0)
    wanted: dict[DetectorName, Tensor] = {
        "previous_token_head": back == 1,
        "duplicate_token_head": same,
        "induction_head": shifted & (back >= 0),
    }
    allowed = torch.ones(length, length, dtype=torch.bool, device=pattern.device)
    if exclude_bos:
        allowed[:, 0] = False
    if exclude_current_token:
        allowed.fill_diagonal_(False)
    if error_measure == "mul":
        total = (pattern * allowed).sum((-2, -1))
        return {name: (pattern * (mask & allowed)).sum((-2, -1)) / total for name, mask in wanted.items()}
    # detect_head rounds the distance to three decimals, and so do we.
    return {
        name: 1 - ((pattern - mask.float()).abs() * allowed).sum((-2, -1)).div(length).mul(1000).round().div(1000)
        for name, mask in wanted.items()
    }
