"""Modules that compute nothing, or read something else, for the time of a pass.

In: a model's modules. Out: contexts; afterwards the modules are as they were.

Blocks are passed over by giving their module another `forward`. TransformerLens's own `start_at_layer` does not exist
before 4.0 on bridges, and in 4.3 computes the blocks below all the same.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from metaint.circuits.clean import Clean, first_input


@contextmanager
def passed_over(clean: Clean, layers: Iterable[int]) -> Iterator[None]:
    """Blocks that give what they are given."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(giving(clean.subject.model.blocks[layer], None, clean.block_items[layer]))
        yield


@contextmanager
def giving(module: nn.Module, value: Tensor | Callable[[], Tensor] | None, items: int) -> Iterator[None]:
    """A module that computes nothing and gives `value` (a function: what that makes when the module is called), or
    None for its first input: as the first of so many `items`, or with 0 as it is."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        made = value() if callable(value) else value
        first = first_input(args, kwargs)[1] if made is None else made
        return (first, *[None] * (items - 1)) if items else first

    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


@contextmanager
def reading(block: nn.Module, stream: Tensor) -> Iterator[None]:
    """A block that reads this stream, whatever it is given."""

    def replace(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        name, _ = first_input(args, kwargs)
        return ((stream, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: stream})

    handle = block.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
