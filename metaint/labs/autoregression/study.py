"""`metaint lab autoregression`: transformers that learn s_{t+1} = W s_t in context, beside what theory says they reach.

In: a setting and sizes. Out: small models trained on it, a recording of each, one table of what was measured against
the closed-form optimum, and figures. After Sander et al. 2024 (2402.05787), and for "icl-regression" von Oswald et al.
2023 (2212.07677).
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import xarray as xr
from rich.console import Console

from metaint.errors import InputError
from metaint.labs.autoregression.comparison import compare, describe, enough_heads, label, steps_of
from metaint.labs.autoregression.findings import last_line, print_findings
from metaint.labs.autoregression.products import products
from metaint.labs.autoregression.run import run_model, train_run
from metaint.labs.autoregression.settings import MODELS, SIZES, Settings, runs
from metaint.labs.autoregression.training import DESCENTS, positional_descent
from metaint.labs.common.side_by_side import check_study, train_all
from metaint.measures.recurrence import interaction, positional_rows
from metaint.scans.whole import write_text
from metaint.toys.vector_model import VectorModel

__all__ = ["MODELS", "SIZES", "Findings", "Settings", "autoregression_figures", "label", "run", "runs", "study"]

# Trainings so short that one process is done with all of them before a second has started.
_SHORT = ("positional",)


class Findings(NamedTuple):
    """What a study found, by the names of its runs."""

    settings: dict[str, Settings]
    recordings: dict[str, xr.DataTree]
    table: pd.DataFrame
    """Rows of `compare`: run, seed, quantity, measured, predicted, key."""
    details: pd.DataFrame
    """One row a run: its settings and the numbers of `describe`."""
    models: dict[str, VectorModel]


def study(out: str | Path, settings: Sequence[Settings], *, jobs: int = 0, progress: bool = False) -> Findings:
    """Train every run, each in its folder of `out`, and compare; finished runs are not trained again.

    `jobs` processes train at once (0: as many as there are runs and cores, or seeds, where a run takes seconds). A run
    whose loss is no longer finite is left out. Raises InputError for what can't be trained, for an `out` with other
    runs of these names, and if no run has a finite loss; StoreError if `out` can't be written or is damaged, or a
    worker was killed (call again to go on).
    """
    out, cores = Path(out), os.cpu_count() or 1
    check_study(out, settings, jobs)
    most = len({s.seed for s in settings}) if settings[0].setting in _SHORT else len(settings)
    jobs = min(jobs, len(settings)) or min(cores, most)
    ordered = list(settings)
    if jobs > 1:  # the longest first
        ordered.sort(key=lambda s: -s.steps * s.layers * s.length)
    options: Any = {"jobs": jobs, "threads": 1, "number": "loss", "progress": progress}
    with _one_thread():  # which is fastest for models as small as these, and gives the same numbers everywhere
        failed = train_all(train_run, out, ordered, **options)
        return _compared(out, {s.name: s for s in settings}, failed)


def _compared(out: Path, settings: Mapping[str, Settings], failed: Mapping[str, str]) -> Findings:
    """Finished runs, read and compared; of those that failed, the sentences."""
    named = {name: s for name, s in settings.items() if name not in failed}
    if not named:
        raise InputError(f"no run has a finite loss: {next(iter(failed.values()))}")
    recordings = {name: train_run(out / name, s) for name, s in named.items()}
    models = {name: run_model(out / name, s) for name, s in named.items()}
    rows = {name: compare(s, recordings[name], models[name]) for name, s in named.items()}
    details = [describe(s, recordings[name], models[name], rows[name]) for name, s in named.items()]
    details += [{"run": name, "failed": sentence} for name, sentence in failed.items()]
    table = pd.DataFrame([row for of_run in rows.values() for row in of_run])
    return Findings(named, recordings, table, pd.DataFrame(details), models)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- the command ------------------------------------------------------------------------------------------------


def run(
    console: Console, out: str | Path, settings: Sequence[Settings], *, jobs: int = 0, progress: bool = False
) -> Findings:
    """Study, print what was found, and write `figures.html`, `comparison.csv` and `runs.csv` to the folder `out`; the
    last line tells measured against predicted optimum. Raises what `study` raises."""
    from metaint.views.drawing.page import write_page

    out, setting, cores = Path(out), settings[0].setting, os.cpu_count() or 1
    console.print(
        f"{setting}: {len(settings)} run{'s' * (len(settings) > 1)} of up to {max(s.steps for s in settings)} steps, "
        f"on {cores} core{'s' * (cores > 1)}; finished ones are taken as they are",
        style="dim",
        markup=False,
    )
    findings = study(out, settings, jobs=jobs, progress=progress)
    print_findings(console, setting, findings.table, findings.details)
    write_page(autoregression_figures(findings), out / "figures.html", f"Autoregression in context: {setting}")
    write_text(out / "comparison.csv", findings.table.to_csv(index=False))
    write_text(out / "runs.csv", findings.details.to_csv(index=False))
    console.print(f"figures, tables and recordings are in {out}", markup=False)
    console.print(last_line(setting, findings.table), markup=False, soft_wrap=True)
    return findings


def autoregression_figures(findings: Findings) -> dict[str, Any]:
    """The figures of a study by name; of single models, those of its first seed."""
    from metaint.labs.autoregression import comparison_figures as compared, figures as views

    setting = next(iter(findings.settings.values())).setting
    seeds = {s.seed for s in findings.settings.values()}
    names = {name: label(s) + f", seed {s.seed}" * (len(seeds) > 1) for name, s in findings.settings.items()}
    recordings = {names[name]: tree for name, tree in findings.recordings.items()}
    details: Any = findings.details[findings.details["run"].isin(list(names))]
    key: Any = findings.table[findings.table["key"] & findings.table["quantity"].str.startswith("loss")]
    optima = {label: row["predicted"] for label, row in zip(_labels(key, seeds), key.to_dict("records"), strict=True)}
    figures = {"training": views.plot_losses(recordings, optima)}
    if setting == "augmented":
        figures["steps"] = compared.plot_steps(details)
    if setting in ("unitary", "orthogonal"):
        figures["heads"] = compared.plot_staircase(details)
    if setting == "positional":
        steps = {name: steps_of(tree) for name, tree in findings.recordings.items()}
        rows = {names[n]: _last_rows(s, findings.models[n], steps[n]) for n, s in findings.settings.items()}
        figures["rows"] = compared.plot_rows(rows)
    if setting in ("haar", "icl-regression"):
        descents = {k: float(details[f"loss_gradient_steps_{k}"].iloc[0]) for k in DESCENTS}
        figures["depth"] = compared.plot_depth(details, descents)
    if setting in ("augmented", "haar"):
        figures["positions"] = views.plot_positions(recordings)
    maps = _maps_of(findings.settings, findings.models)
    figures |= {name: compared.plot_maps(**arguments) for name, arguments in maps.items()}
    if setting in ("augmented", "haar", "icl-regression"):
        figures["agreement"] = views.plot_agreement(recordings)
    return figures


def _labels(rows: pd.DataFrame, seeds: set[int]) -> list[str]:
    return [row["run"] + f", seed {row['seed']}" * (len(seeds) > 1) for row in rows.to_dict("records")]


def _last_rows(s: Settings, model: Any, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """p_1..p_T of the longest context of "positional", and what is predicted for them after so many steps."""
    predicted, _ = positional_descent(s, steps)
    return positional_rows(model.P.detach())[-1].numpy(), predicted[-1].numpy()


def _maps_of(settings: Mapping[str, Settings], models: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Arguments of `comparison_figures.plot_maps`, of models of the first seed; none where nothing is to be seen."""
    first = min(s.seed for s in settings.values())
    runs = [(s, models[name]) for name, s in settings.items() if s.seed == first]
    if runs[0][0].setting in ("unitary", "orthogonal"):
        return {"matrices": _head_maps(*min(runs, key=lambda run: abs(run[0].heads - enough_heads(run[0]))))}
    if runs[0][0].setting == "positional":
        limit = max(model.P.detach().abs().max().item() for _, model in runs)
        maps = {label(s): np.tril(model.P.detach().numpy()[:-1], 1) for s, model in runs}
        caption = (
            "How to read: row t holds the weights that the query at position t gives to the keys, up to the one after "
            "it. The authors' pictures end at the diagonal; the weights right of it, which they leave out, are the "
            "largest."
        )
        return {"positions": {"maps": maps, "title": "Learnt positional weights P", "caption": caption, "limit": limit}}
    if runs[0][0].setting == "augmented":
        length = max((s.length for s, _ in runs if s.model == "free"), default=0)
        chosen = [(s, model) for s, model in runs if s.model in ("diagonal", "free") and s.length == length]
        return {"weights": _weight_maps(chosen)} if chosen else {}
    return {}


def _head_maps(s: Settings, model: Any) -> dict[str, Any]:
    A, B, P = (getattr(model, name).detach() for name in ("a", "b", "P"))
    C, products = interaction(A, B), A @ B.mT
    last = positional_rows(P)[-1, -1]
    maps = {
        "p_T C": (last * C).numpy(),
        "A Bᵀ / its largest": (products / products.abs().max()).numpy(),
        "P / its largest": (torch.tril(P[:-1], 1) / P[:-1].tril(1).abs().max()).numpy(),
    }
    ideal = "the identity" if s.setting == "unitary" else "blocks [[1, 1], [1, 1]]"
    row = "p_T alone" if s.setting == "unitary" else "p_T and, half as large and of the other sign, p_{T-1}"
    caption = (
        f"How to read: without error p_T C is {ideal}, and rows of P hold {row}, at the right end. Off the diagonal of "
        "A Bᵀ, heads against heads, is what one head reads of what another asks for: nothing where heads are "
        "orthogonal, as they must be with just as many as a loss of 0 takes, and not with more."
    )
    return {"maps": maps, "title": f"Heads and positions, H = {s.heads}", "caption": caption, "subtitle": label(s)}


def _weight_maps(chosen: list[tuple[Settings, Any]]) -> dict[str, Any]:
    maps = {}
    for s, model in chosen:
        for name, product in zip(("QK", "OV"), products(s, model), strict=True):
            maps[f"{s.model}: {name}"] = (product / product.abs().max()).numpy()
    caption = (
        "How to read: W_Q W_K^T of a query's (s_t, s_{t-1}), down, with a key's, and W_V W_O from (s_t, s_{t-1}), "
        "down, to the prediction, each divided by its largest entry. One gradient step has the diagonals of the blocks "
        "at the upper right and at the top, all of one size and sign; signs may flip together by rows. Faint entries "
        "beside these diagonals are the coupling that lets the free model do better."
    )
    s = chosen[0][0]
    subtitle = f"d = {s.d}, T = {s.length}"
    return {"maps": maps, "title": "What queries and values read", "caption": caption, "subtitle": subtitle}
