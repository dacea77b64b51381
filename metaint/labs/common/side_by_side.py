"""Several training runs of a lab, one after the other or side by side in processes.

In: settings with a `name` and `steps`, and a function that trains one run in a folder. Out: what is left is on disk,
and the sentences of the runs that diverged. A run tells its step and one number along the way, which move a bar.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from tqdm.auto import tqdm

from metaint.errors import InputError, StoreError

# A run's name, its step (None once it has ended), and its number.
Tell = Callable[[str, int | None, float], None]
OnStep = Callable[[int, float], None]
TrainRun = Callable[[Path, Any, OnStep], Any]


class Diverged(InputError):
    """Training whose loss is no longer finite."""


def check_study(out: Path, settings: Sequence[Any], jobs: int) -> None:
    """InputError for an `out` that is a file, no runs, and a number of processes below 0."""
    if out.exists() and not out.is_dir():
        raise InputError(f"out is {out}, which is a file: name a folder.")
    if not settings:
        raise InputError("settings is empty: give at least one run.")
    if jobs < 0:
        raise InputError(f"jobs is {jobs}: give a number of processes, or 0 for as many as there are cores.")


def train_all(
    train_run: TrainRun, out: Path, settings: Sequence[Any], *, jobs: int, threads: int, number: str, progress: bool
) -> dict[str, str]:
    """Train each run in the folder of its name in `out`; the sentences of those that diverged, by name.

    `jobs` processes train at once, each with `threads` threads; with one, runs are trained here, in turn, with the
    threads there are. `train_run` must be a function of a module, or a partial of one. `number` names what runs tell
    beside their step. Raises what `train_run` raises, and StoreError if a process was killed.
    """
    with tqdm(total=sum(s.steps for s in settings), disable=not progress, desc="training", unit="step") as bar:
        tell = _teller(bar, number, {s.name: s.steps for s in settings})
        if jobs > 1:
            sentences = _in_processes(train_run, out, settings, jobs, threads, tell)
        else:
            sentences = dict(_train(train_run, out, s, tell) for s in settings)
    return {name: sentence for name, sentence in sentences.items() if sentence}


def _teller(bar: Any, number: str, steps: Mapping[str, int]) -> Tell:
    """Moves a bar on by what several runs, of so many steps, tell of themselves."""
    seen: dict[str, tuple[int, float]] = {}

    def tell(name: str, step: int | None, value: float) -> None:
        if step is None:  # it may have stopped before its last step
            bar.total -= steps[name] - (seen[name][0] if name in seen else 0)
            bar.refresh()
            return
        before = seen[name][0] if name in seen else step
        if name not in seen and not bar.disable:  # what an earlier call has trained is done, and wasn't timed
            bar.initial, bar.n, bar.last_print_n = (n + step for n in (bar.initial, bar.n, bar.last_print_n))
        seen[name] = (step, value)
        bar.set_postfix_str(f"{number} {', '.join(f'{value:.2g}' for _, value in seen.values())}", refresh=False)
        bar.update(step - before)

    return tell


def _train(train_run: TrainRun, out: Path, settings: Any, tell: Tell) -> tuple[str, str]:
    """Train one run; its name, and what it says of a loss that isn't finite."""
    sentence = ""
    try:
        train_run(out / settings.name, settings, partial(tell, settings.name))
    except Diverged as error:
        sentence = str(error)
    tell(settings.name, None, math.nan)
    return settings.name, sentence


def _in_processes(
    train_run: TrainRun, out: Path, settings: Sequence[Any], jobs: int, threads: int, tell: Tell
) -> dict[str, str]:
    context = get_context("spawn")  # a fork would copy torch's threads in whatever state they are
    with context.Manager() as manager:
        messages = manager.Queue()
        listener = Thread(target=lambda: [tell(*news) for news in iter(messages.get, None)], daemon=True)
        listener.start()
        try:
            with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
                tasks = [pool.submit(_train_and_tell, train_run, out, s, messages) for s in settings]
                return dict(task.result() for task in as_completed(tasks))
        except BrokenProcessPool as error:
            raise StoreError(
                f"a training process was killed; what it saved is in {out}: call again to go on."
            ) from error
        finally:
            messages.put(None)
            listener.join()


def _train_and_tell(train_run: TrainRun, out: Path, settings: Any, messages: Any) -> tuple[str, str]:
    return _train(train_run, out, settings, lambda *news: messages.put(news))
