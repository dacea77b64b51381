"""What the hooks of a model carry."""

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
