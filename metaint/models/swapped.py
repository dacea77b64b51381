"""Parameters that hold other numbers for a while: memory changes hands, so that nothing is multiplied back.

In: tensors and what they hold meanwhile. Out: `Swapped`, a context whose end no interrupt can miss. The owner's memory
is never written to: parameters come back bit for bit, and a backward pass that was built before still works.
"""

import signal
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor


def copies_of(parameters: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each parameter, and each of `others` that shares its memory, with a copy that shares its memory alike."""
    memories: dict[int, torch.UntypedStorage] = {}
    for parameter in parameters.values():
        memory = parameter.untyped_storage()
        if memory.data_ptr() not in memories:
            memories[memory.data_ptr()] = memory.clone()
    pairs, known = [], set[int]()
    for tensor in [*parameters.values(), *others.values()]:
        memory = memories.get(tensor.untyped_storage().data_ptr())
        if memory is not None and id(tensor) not in known:
            known.add(id(tensor))
            copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            copy.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())  # pyright: ignore
            pairs.append((tensor, copy))
    return pairs


class Swapped:
    """A context in which tensors hold the memory of others, and which yields `value`.

    An interrupt (Ctrl-C) that arrives while memory changes hands, on the way in or out, waits until it is done.
    """

    def __init__(self, pairs: list[tuple[Tensor, Tensor]], value: Any) -> None:
        self._value = value
        self._before = [(tensor, tensor.data) for tensor, _ in pairs]
        self._meanwhile = pairs
        self._handler: Any = None
        self._waiting: list[tuple[int, Any]] = []

    def __enter__(self) -> Any:
        try:
            self._watch()
            _hold(self._meanwhile)
            self._deliver()
        except BaseException:
            self._leave()
            raise
        return self._value

    def __exit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        _hold(self._before)
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        self._deliver()

    def _watch(self) -> None:
        """Take interrupts in hand, which reach the main thread alone, until the way out."""
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler) and threading.current_thread() is threading.main_thread():
            self._handler = handler
            signal.signal(signal.SIGINT, self._interrupted)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        within = frame
        while within is not None and within.f_code not in _CRITICAL:
            within = within.f_back
        if within is not None:
            self._waiting.append((number, frame))
        else:
            self._handler(number, frame)

    def _deliver(self) -> None:
        if self._waiting:
            self._handler(*self._waiting.pop())


def _hold(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, memory in pairs:
        tensor.data = memory


# A flag would be set one moment too late: an interrupt may come before the first line of `__exit__`.
_CRITICAL = (Swapped.__enter__.__code__, Swapped.__exit__.__code__)
