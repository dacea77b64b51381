"""How far a long call is: a bar on a terminal and in a notebook, elsewhere a plain line every ten seconds.

In: what is done, and how much of it there is. Out: a function to call as it gets done; lines go to stderr.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

# Seconds between two lines where there is no terminal.
EVERY = 10.0


@contextmanager
def progress_of(what: str, total: int, shown: bool = True, stays: bool = False) -> Iterator[Callable[[int], Any]]:
    """Shows how much of `total` is done, with rate and time left; `stays` leaves the bar there once it is full."""
    if not shown:
        yield lambda count: None
    elif has_bars():
        with tqdm(total=total, desc=what, leave=stays) as bar:
            yield bar.update
    else:
        lines = _Lines(what, total)
        yield lines.advance
        lines.end()


def tell(sentence: str, shown: bool = True) -> None:
    """A line of its own, above any bar."""
    if shown:
        tqdm.write(sentence, file=sys.stderr)
        sys.stderr.flush()


def has_bars() -> bool:
    """Whether a bar that is drawn over and over can be seen."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def duration(seconds: float) -> str:
    """Seconds below two minutes, else minutes and seconds."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


class _Lines:
    """The plain lines of one stage: at its start, at most every ten seconds, and at its end."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.start = self.last = time.monotonic()
        tell(f"{what}: {total} to do")

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last < EVERY or self.done >= self.total:
            return
        self.last = now
        rate = self.done / (now - self.start)
        left = duration((self.total - self.done) / rate) if rate > 0 else "an unknown time"
        tell(f"{self.what}: {self.done} of {self.total}, {rate:.3g} a second, {left} left")

    def end(self) -> None:
        tell(f"{self.what}: {self.done} of {self.total} done in {duration(time.monotonic() - self.start)}")
