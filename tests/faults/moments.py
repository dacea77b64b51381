"""Interrupts at every line of what must not be interrupted, as a terminal sends them."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

# How much is tried: `make faults` asks for all of it, and CI for a part.
THOROUGH = os.environ.get("METAINT_FAULTS") == "all"


def interrupted_at_each_line(module: Any, call: Callable[[], Any]) -> Iterator[int]:
    """Run a call again and again, each time with Ctrl-C at a later line of the module, until one is not reached.

    Yields the number of the line, after the interrupt has been raised.
    """
    number = 0
    while True:
        seen = 0

        def trace(frame: Any, event: str, _: Any, at: int = number) -> Any:
            nonlocal seen
            if frame.f_code.co_filename != module.__file__:
                return None
            if event == "line":
                seen += 1
                if seen == at + 1:
                    signal.raise_signal(signal.SIGINT)
            return trace

        raised = False
        sys.settrace(trace)
        try:
            call()
        except KeyboardInterrupt:
            raised = True
        finally:
            sys.settrace(None)
        if seen <= number:
            return
        assert raised, f"the interrupt at line {number} of {module.__name__} was lost"
        yield number
        number += 1
