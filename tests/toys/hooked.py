"""What the hooks of a model carry, and what no model of tokens reads."""

from typing import Any

import torch
from torch import Tensor


def readings(model: Any, inputs: Tensor, **options: Any) -> dict[str, Tensor]:
    """What each hook carried in one forward pass, in the order of firing; none fires twice."""
    carried: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        assert hook.name not in carried
        carried[hook.name] = activation.detach()

    with torch.no_grad():
        model.run_with_hooks(inputs, fwd_hooks=[(name, keep) for name in model.hook_dict], **options)
    return carried


def unreadable(tokens: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
    """What a model of fewer than 36 positions refuses, made of tokens [3, 12]."""
    return [
        (tokens[0], {}),
        (tokens[:, :0], {}),
        (tokens.repeat(1, 3), {}),
        (tokens[:, :1], {"return_type": "loss"}),
        (tokens, {"return_type": "both"}),
        (tokens, {"attention_mask": torch.ones(12)}),
    ]
