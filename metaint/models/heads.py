"""Heads by their names ("5.1" is head 1 of layer 5), and keys and values that several query heads share.

In: a model and a name; or a tensor with a dimension of heads. Out: layer and head; or the tensor with each shared head
as often as it is wanted.
"""

from torch import Tensor

from metaint.errors import InputError
from metaint.models.describe import check_open
from metaint.models.protocol import Model

# What a projection does to the stream, head by head, and back.
INTO_HEADS = "batch position d_model, head d_model d_head -> batch position head d_head"
OUT_OF_HEADS = "batch position head d_head, head d_head d_model -> batch position d_model"


def head_name(layer: int, head: int) -> str:
    """How a head is called, everywhere: "5.1"."""
    return f"{layer}.{head}"


def head_of(model: Model, name: str) -> tuple[int, int]:
    """Layer and head of a name such as "5.1"; InputError for one that the model does not have."""
    check_open(model)
    return head_among(int(model.cfg.n_layers), int(model.cfg.n_heads), name)


def head_among(n_layers: int, n_heads: int, name: str) -> tuple[int, int]:
    """`head_of` for a model of these sizes."""
    try:
        layer, head = (int(number) for number in str(name).split("."))
    except ValueError:
        layer, head = -1, -1
    if not (0 <= layer < n_layers and 0 <= head < n_heads):
        raise InputError(f"head is {name!r}: name one from 0.0 to {head_name(n_layers - 1, n_heads - 1)}.")
    return layer, head


def by_head(z: Tensor, n_heads: int) -> Tensor:
    """What heads give, [batch, position, head, width]: bridges show it undivided, or for multi-head latent attention
    divided by another width than the values'."""
    return z if z.ndim == 4 and z.shape[2] == n_heads else z.flatten(2).unflatten(-1, (n_heads, -1))


def repeat_heads(tensor: Tensor, heads: int, dim: int) -> Tensor:
    """Grouped key and value heads, each repeated for the query heads that share it."""
    return tensor.repeat_interleave(heads // tensor.shape[dim], dim) if tensor.shape[dim] < heads else tensor


def thin_heads(weight: Tensor, heads: int) -> Tensor:
    """One of each group of repeated heads: HookedTransformer's W_K repeats what its hook_k holds once."""
    return weight[:: weight.shape[0] // heads] if weight.shape[0] > heads else repeat_heads(weight, heads, 0)
