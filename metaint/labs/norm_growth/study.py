"""`metaint lab norm-growth`: what training does to the length of the parameters, and to attention with it.

In: a text. Out: small language models trained on it with each placement of the norm and each optimiser, a recording of
each over training, and in words and figures what grew, by which trend, and whether attention saturated. After Merrill
et al. 2021, "Effects of Parameter Norm Growth During Transformer Training" (2010.09697), whose "pre-norm" is "output".
"""

import math
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import xarray as xr
from rich.console import Console

from metaint.errors import InputError
from metaint.labs.common.side_by_side import Diverged
from metaint.labs.norm_growth.findings import describe, facts_of_run, print_findings, slopes_of
from metaint.labs.norm_growth.run import seconds, settings_of, train_run
from metaint.labs.norm_growth.settings import NORMS, OPTIMISERS, Settings, characters
from metaint.scans.whole import write_text

_FEWEST_STEPS = 30
# Of the minutes, what is left for opening models, measuring slopes and drawing.
_SPARE = 0.05


class Findings(NamedTuple):
    """What a study found, by the names of its runs."""

    recordings: dict[str, xr.DataTree]
    summary: pd.DataFrame
    """One row a run: its settings, the numbers of `describe`, and what they say in words."""
    slopes: pd.DataFrame
    """Columns run, activation, slope (mean over layers), low and high (least and most), expected."""


def study(
    out: str | Path,
    text: str | None = None,
    *,
    steps: int | None = None,
    minutes: float = 5,
    norms: Sequence[str] = NORMS,
    optimisers: Sequence[str] = OPTIMISERS,
    learning_rates: Sequence[float] | None = None,
    weight_decays: Sequence[float] | None = None,
    seed: int = 0,
    progress: bool = False,
    on_run: Callable[[str], None] = lambda line: None,
    **sizes: int,
) -> Findings:
    """Train every combination, each in its folder of `out`, and describe them; finished runs are not trained again.

    Without `steps` all runs have as many as those in `out`, or as fit into `minutes` together. `sizes` are the other
    fields of `Settings`; `on_run` is told what happens, a line each. A run whose loss is no longer finite is left out
    of the figures, and its row says so. Raises InputError for what can't be trained, for a text too short and for an
    `out` with another study; StoreError if it can't be written or is damaged.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"out is {out}, which is a file: name a folder.")
    for name, values in (("norms", norms), ("optimisers", optimisers)):
        if isinstance(values, str) or not values:
            raise InputError(f"{name} is {values!r}: give a list of at least one.")
    grid = list(dict.fromkeys(product(norms, optimisers, learning_rates or [None], weight_decays or [None])))
    rest: dict[str, Any] = {"seed": seed, **sizes}
    drafts = [Settings(n, o, steps or _FEWEST_STEPS, r, w, **rest) for n, o, r, w in grid]
    if steps is None:
        steps = steps_for(drafts, minutes, out, text, on_run)
    recordings, rows, slopes = {}, [], []
    for n, o, r, w in grid:
        settings = Settings(n, o, steps, r, w, **rest)
        on_run(f"{settings.name}: {steps} steps")
        try:
            recording = train_run(out / settings.name, settings, text, progress=progress)
        except Diverged as error:
            on_run(str(error))
            rows.append({**facts_of_run(settings), "growth": "diverged"})
            continue
        own_slopes = slopes_of(out / settings.name, settings, text)
        recordings[settings.name] = recording
        slopes.append(own_slopes)
        entropy = characters(text, settings.length).entropy
        rows.append(describe(recording, settings, own_slopes) | {"unigram_entropy": entropy})
    if not recordings:
        raise InputError("learning_rates leaves no run with a finite loss: give smaller ones.")
    return Findings(recordings, pd.DataFrame(rows), pd.concat(slopes, ignore_index=True))


def steps_for(
    drafts: Sequence[Settings], minutes: float, out: Path, text: str | None, on_run: Callable[[str], None]
) -> int:
    """The steps of the runs in `out`, so that all have the same; without any, as many as fit into `minutes`."""
    if not 0 < minutes < math.inf:
        raise InputError(f"minutes is {minutes}: give a number above 0.")
    began = time.perf_counter()
    for folder in sorted(out.glob("*/")):
        earlier = settings_of(folder)
        if earlier is not None:
            on_run(f"{out} has runs of {earlier.steps} steps: so have these")
            return earlier.steps
    step, record = seconds(drafts[0], text)
    left = minutes * 60 * (1 - _SPARE) - (time.perf_counter() - began)
    fits = int((left / len(drafts) - drafts[0].records * record) / step)
    on_run(f"a step takes {1000 * step:.0f} ms and a record {1000 * record:.0f} ms here")
    return max(_FEWEST_STEPS, fits)


# ---- the command ------------------------------------------------------------------------------------------------


def run(console: Console, out: str | Path, text: str | None = None, **arguments: Any) -> Findings:
    """Study, print what was found, and write `figures.html`, `summary.csv` and `slopes.csv` to the folder `out`.

    `arguments` are those of `study`. Raises what that raises.
    """
    from metaint.labs.norm_growth.figures import training_figures
    from metaint.views.drawing.page import write_page

    out = Path(out)
    findings = study(out, text, on_run=lambda line: console.print(line, style="dim", markup=False), **arguments)
    print_findings(console, findings.summary)
    write_page(training_figures(findings.recordings, findings.slopes), out / "figures.html", "Norm growth in training")
    write_text(out / "summary.csv", findings.summary.to_csv(index=False))
    write_text(out / "slopes.csv", findings.slopes.to_csv(index=False))
    console.print(f"figures, tables and recordings are in {out}\n", markup=False)
    return findings
