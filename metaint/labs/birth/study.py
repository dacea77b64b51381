"""`metaint lab birth`: an induction head is born, and with it the memories it is made of.

In: a text and what to vary. Out: small transformers trained on in-context bigrams, a recording of each over training,
in words and figures when each memory formed and what the model could do by then. After Bietti et al. 2023, "Birth of a
Transformer: A Memory Viewpoint" (2306.00802).
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import xarray as xr
from rich.console import Console

from metaint.errors import InputError
from metaint.labs.birth.findings import describe, last_line, print_findings
from metaint.labs.birth.run import first_gradients, states_of, train_run
from metaint.labs.birth.settings import Settings, frozen_steps
from metaint.labs.birth.training import restore
from metaint.labs.common.resumable import RECORDING
from metaint.labs.common.side_by_side import OnStep, check_study, train_all
from metaint.scans.recordings import read_recording
from metaint.scans.whole import write_text

QUICK: dict[str, Any] = {"length": 64, "batch": 64, "steps": 150, "records": 16}


class Findings(NamedTuple):
    """What a study found, by the names of its runs."""

    settings: dict[str, Settings]
    recordings: dict[str, xr.DataTree]
    gradients: dict[str, xr.Dataset]
    """`/memory` of each run's first gradients."""
    summary: pd.DataFrame
    """One row a run: its settings and the numbers of `describe`."""


def runs(
    *,
    triggers: Sequence[str] = ("fixed",),
    trigger_counts: Sequence[int] = (5,),
    outputs: Sequence[str] = ("uniform",),
    layers: Sequence[int] = (2,),
    seeds: Sequence[int] = (0,),
    freeze: str = "",
    **rest: Any,
) -> list[Settings]:
    """Every combination; with `freeze` ("W_K1:100,W_K2:100") each with these matrices frozen for so long, and without.

    `rest` are the other fields of `Settings`. InputError for what can't be trained, or nothing to train.
    """
    for name, values in (("triggers", triggers), ("outputs", outputs), ("layers", layers), ("seeds", seeds)):
        if isinstance(values, str) or not values:
            raise InputError(f"{name} is {values!r}: give a list of at least one.")
    frozen = dict.fromkeys(["", freeze])
    grid = product(triggers, trigger_counts, outputs, layers, seeds, frozen)
    made = [Settings(t, k, o, layers=n, seed=s, frozen=f, **rest) for t, k, o, n, s, f in grid if n > 1 or f == ""]
    return list(dict.fromkeys(made))


def study(
    out: str | Path, settings: Sequence[Settings], text: str | None = None, *, jobs: int = 0, progress: bool = False
) -> Findings:
    """Train every run, each in its folder of `out`, and describe them; finished runs are not trained again.

    `jobs` processes train at once (0: as many as there are runs and cores), and share the cores. A run whose loss is
    no longer finite is left out of the figures, and its row says so. Raises InputError for what can't be trained, and
    if no run has a finite loss; StoreError if `out` can't be written or is damaged, or a worker was killed (call again
    to go on).
    """
    out, cores = Path(out), torch.get_num_threads()
    check_study(out, settings, jobs)
    for each in settings:  # told now rather than after the first run
        each.trainer(text)
    jobs = min(jobs or cores, len(settings))
    options: Any = {"jobs": jobs, "threads": max(1, cores // jobs), "number": "accuracy", "progress": progress}
    failed = train_all(partial(_train, text=text), out, settings, **options)
    named = {s.name: s for s in settings}
    recordings = {name: read_recording(out / name / RECORDING) for name in named if name not in failed}
    if not recordings:
        raise InputError(f"no run has a finite loss: {next(iter(failed.values()))}")
    gradients = {name: first_gradients(named[name], text) for name in recordings}
    rows = [describe(named[name], recordings[name], gradients[name]) for name in recordings]
    rows += [{"run": name, "order": f"diverged: {sentence}"} for name, sentence in failed.items()]
    return Findings(named, recordings, gradients, pd.DataFrame(rows))


def _train(folder: Path, settings: Settings, on_step: OnStep, text: str | None) -> None:
    train_run(folder, settings, text, on_step)


# ---- the command ------------------------------------------------------------------------------------------------


def run(
    console: Console,
    out: str | Path,
    settings: Sequence[Settings],
    text: str | None = None,
    *,
    jobs: int = 0,
    progress: bool = False,
) -> Findings:
    """Study, print what was found, and write `figures.html` and `summary.csv` to the folder `out`; the last line tells
    accuracy and the step at which each memory passed one half. Raises what `study` raises."""
    from metaint.views.drawing.page import write_page

    out = Path(out)
    cores = os.cpu_count() or 1
    console.print(
        f"{len(settings)} run{'s' * (len(settings) > 1)} of {settings[0].steps} steps of {settings[0].batch} sequences "
        f"of {settings[0].length} tokens, on {cores} core{'s' * (cores > 1)}; finished ones are taken as they are",
        style="dim",
        markup=False,
    )
    findings = study(out, settings, text, jobs=jobs, progress=progress)
    print_findings(console, findings.summary)
    write_page(birth_figures(out, findings, text), out / "figures.html", "Birth of an induction head")
    write_text(out / "summary.csv", findings.summary.to_csv(index=False))
    console.print(f"figures, tables and recordings are in {out}", markup=False)
    for row in findings.summary.to_dict("records"):
        if row["run"] in findings.recordings:
            console.print(last_line(row), markup=False, soft_wrap=True)
    return findings


def birth_figures(out: str | Path, findings: Findings, text: str | None = None) -> dict[str, Any]:
    """The figures of a study by name; of single models, those of its first run."""
    from metaint.labs.birth import figures as views, pictures
    from metaint.views.groups.birth import plot_birth

    plain = {name: tree for name, tree in findings.recordings.items() if not findings.settings[name].frozen}
    frozen = {name: frozen_steps(findings.settings[name].frozen) for name in findings.recordings if name not in plain}
    figures = {"birth": plot_birth(plain or findings.recordings)}
    if frozen:
        figures["staged"] = views.plot_staged(findings.recordings, frozen)
    kinds = {(s.triggers, s.trigger_count, s.outputs, s.layers) for s in findings.settings.values()}
    if len(kinds) > 1:
        figures["sweep"] = views.plot_sweep(plain or findings.recordings)
    name = next(iter(findings.recordings))
    models, tokens, vocabulary = _stages(Path(out) / name, findings.settings[name], findings.recordings[name], text)
    ends = {n: models[n] for n in (min(models), max(models))}
    figures["recalls"] = pictures.plot_recall_maps(ends, range(len(vocabulary)), vocabulary)
    figures["attention"] = pictures.plot_attention_at_birth(models, tokens, vocabulary)
    figures["gradients"] = views.plot_first_gradients(findings.gradients, findings.recordings)
    return figures


def _stages(
    folder: Path, settings: Settings, recording: xr.DataTree, text: str | None
) -> tuple[Mapping[str, Any], Any, tuple[str, ...]]:
    """The model before training, when accuracy first passed one half (or half-way), and after; and tokens to read."""
    task = settings.task(text)
    training = recording["training"].to_dataset()
    steps = training["step"].values
    passed = steps[training["accuracy"].values >= 0.5]
    born = int(passed[0]) if len(passed) else int(steps[len(steps) // 2])
    states = dict(states_of(folder))
    models = {
        f"step {step:>{len(str(settings.steps))}}": restore(settings.model(task.vocab), (step, states[step]))
        for step in sorted({int(steps[0]), born, int(steps[-1])})
    }
    tokens = task.sample(1, settings.length, torch.Generator().manual_seed(settings.seed << 32)).tokens[:, :-1]
    return models, tokens, task.vocabulary
