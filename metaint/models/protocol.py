"""What may be asked of a model: a HookedTransformer, a bridge, or a toy of our own.

Whatever else is asked (`to_tokens` and a tokenizer, which toys do not have, biases, norms, learned positions, the
model that a bridge wraps) is asked by `getattr`, with an answer for models without it; what hooks and weights carry is
trusted as far as the audit goes. In: nothing. Out: a type.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn


class Model(Protocol):
    """An open model, with TransformerLens's names for its hooks and weights.

    Weights are [layer, head, d_model, d_head], W_O [layer, head, d_head, d_model]; `cfg` holds at least `n_layers`,
    `n_heads`, `d_model`, `d_head`, `d_vocab` and `n_ctx`.
    """

    cfg: Any
    blocks: Any

    @property
    def W_E(self) -> Tensor: ...
    @property
    def W_U(self) -> Tensor: ...
    @property
    def W_Q(self) -> Tensor: ...
    @property
    def W_K(self) -> Tensor: ...
    @property
    def W_V(self) -> Tensor: ...
    @property
    def W_O(self) -> Tensor: ...
    @property
    def hook_dict(self) -> Mapping[str, Any]: ...
    def hooks(self, fwd_hooks: Any = ..., bwd_hooks: Any = ...) -> AbstractContextManager[Any]: ...
    def run_with_hooks(self, *args: Any, fwd_hooks: Any = ..., **kwargs: Any) -> Any: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def register_forward_hook(self, hook: Any) -> Any: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
