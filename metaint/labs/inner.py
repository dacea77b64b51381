"""`metaint lab inner`: which predictions of the inner-optimisation view hold for a model, and against what.

In: a model and sequences. Out: `/residual` and `/inner` of the model, of the same architecture at random
initialisation and of the model on shuffled sequences, their figures, and a table of verdicts. The predictions are our
reading of Wu & Varshney (2310.05884), whose own experiments were not available to us; see `measures/inner.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor

from metaint.errors import InputError, StoreError
from metaint.labs.demo import TRIGGERS
from metaint.measures.resampling import bootstrap_interval
from metaint.models.fresh import fresh_model
from metaint.models.tokens import starts_with_bos
from metaint.probes.inner import InnerProbe
from metaint.probes.residual import ResidualProbe
from metaint.scanning.scan import scan
from metaint.scans.store import save
from metaint.scans.whole import write_text
from metaint.tasks import bigram
from metaint.tasks.text import fold_prose, python_prose
from metaint.views.drawing.terminal import number, plain_table

CONDITIONS = ("trained", "random initialisation", "shuffled tokens")
# A first-order prediction within a factor of two of what happened is called one that holds.
FIDELITY = (0.5, 2.0)


class Estimate(NamedTuple):
    """A number with its 95 % interval over sequences."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        interval = "" if np.isnan(self.low) else f"\n{number(self.low)} to {number(self.high)}"
        return number(self.value) + interval


class Findings(NamedTuple):
    """Scans and verdicts of one model."""

    scans: dict[str, xr.DataTree]
    verdicts: pd.DataFrame


def study(
    model: Any,
    tokens: Int[Tensor, "batch position"],
    *,
    positions: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
    attributes: Mapping[str, Any] | None = None,
) -> Findings:
    """Scan the model, its fresh twin and the model on shuffled tokens, and judge each prediction.

    The tokens of a sequence are shuffled among themselves (its BOS stays first). Raises InputError for tokens the
    model can't take, HookAuditError for one without the hooks, ModelError for one that can't be made anew.
    """
    inputs = {
        "trained": (model, tokens),
        "random initialisation": (fresh_model(model, seed), tokens),
        "shuffled tokens": (model, shuffled(tokens, starts_with_bos(model, tokens, None), seed)),
    }
    scans, probes = {}, {}
    for name, (which, batch) in inputs.items():
        probes[name] = InnerProbe(positions, seed=seed)
        readers = [ResidualProbe(positions, seed=seed), probes[name]]
        facts = {"condition": name, **(attributes or {})}
        scans[name] = scan(which, batch, readers, batch_size=batch_size, seed=seed, progress=progress, attributes=facts)
    return Findings(scans, judge(scans, probes))


def shuffled(tokens: Int[Tensor, "batch position"], keep_first: bool, seed: int = 0) -> Int[Tensor, "batch position"]:
    """Each sequence with its tokens in a random order of its own."""
    order = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed))
    if keep_first:
        order[:, 0] = -1.0
    return tokens.gather(1, order.argsort(-1).to(tokens.device))


def judge(scans: Mapping[str, xr.DataTree], probes: Mapping[str, InnerProbe]) -> pd.DataFrame:
    """One row for each prediction: what it says, the estimate in each condition, the contrasts, and the verdict.

    Blocks are taken together; the first is left out where there are three or more, since the logit lens of an
    embedding tells of the current token. A contrast pairs the same sequences. A prediction holds if its interval and
    those of its contrasts lie above 0, fails if its own interval does not reach above 0, and is undecided otherwise.
    """
    rows = []
    for claim, name, null in _CLAIMS:
        effects = {condition: _effect(probe, name, null) for condition, probe in probes.items()}
        trained = effects["trained"]
        estimates = {condition: _estimate(*effect) for condition, effect in effects.items()}
        contrasts = {
            f"minus {other}": _estimate(trained[0] - effects[other][0], trained[1]) for other in CONDITIONS[1:]
        }
        verdict = _verdict(estimates["trained"], list(contrasts.values()))
        rows.append(_row(claim, estimates, contrasts, verdict))
    rows.append(_fidelity_row(probes))
    rows += _described(scans)
    return pd.DataFrame(rows)


_CLAIMS = (
    ("A block lowers the loss of the next token (nats a block)", "loss_decrease", None),
    ("A block lowers it at more than half of the positions (share above 0.5)", "improved", 0.5),
    ("Steps follow this token's gradient (cosine above that of another token's)", "step_gradient_cosine", "_null"),
)


def _blocks(count: int) -> slice:
    return slice(int(count >= 3), None)


def _effect(probe: InnerProbe, name: str, null: float | str | None) -> tuple[Float[Tensor, " sequence"], Tensor]:
    """Sums over blocks in each sequence of a mean of `/inner` less its null, and their counts."""
    sums, counts = probe.sequence_sums(name)
    if isinstance(null, str):
        sums = sums - probe.sequence_sums(name + null)[0]
    elif null is not None:
        sums = sums - null * counts
    blocks = _blocks(sums.shape[1])
    return sums[:, blocks].sum(1), counts[:, blocks].sum(1)


def _estimate(sums: Float[Tensor, " sequence"], counts: Float[Tensor, " sequence"]) -> Estimate:
    low, high = bootstrap_interval(sums[:, None], counts[:, None])
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high))


def _verdict(own: Estimate, contrasts: list[Estimate]) -> str:
    if np.isnan(own.low):
        return "undecided: one sequence tells no interval"
    if own.low <= 0:
        return "does not hold" if own.high <= 0 or own.value <= 0 else "undecided"
    beaten = [contrast.low > 0 for contrast in contrasts]
    if all(beaten):
        return "holds"
    return "holds, but no more than " + " or ".join(
        name for name, more in zip(("at initialisation", "on shuffled tokens"), beaten, strict=True) if not more
    )


def _row(claim: str, estimates: Mapping[str, Estimate], contrasts: Mapping[str, Estimate], verdict: str) -> dict:
    row: dict[str, Any] = {"prediction": claim}
    for name, estimate in {**estimates, **contrasts}.items():
        row |= {name: estimate.value, f"{name} low": estimate.low, f"{name} high": estimate.high}
    return {**row, "verdict": verdict}


def _fidelity_row(probes: Mapping[str, InnerProbe]) -> dict:
    """The ratio of what the gradient predicts to what the loss did, over all blocks; near 1 where it is linear."""
    claim = f"The gradient foretells the fall of the loss (ratio within {FIDELITY[0]:g} to {FIDELITY[1]:g})"
    estimates = {}
    for name, probe in probes.items():
        descent, decrease = probe.sequence_sums("fidelity")
        blocks = _blocks(descent.shape[1])
        first_order, fall = descent[:, blocks].sum(1), decrease[:, blocks].sum(1)
        certain = _estimate(fall, torch.ones_like(fall)).low > 0  # a ratio to nothing says nothing
        estimates[name] = _estimate(first_order, fall) if certain else Estimate(np.nan, np.nan, np.nan)
    own = estimates["trained"]
    if np.isnan(own.low):
        return _row(claim, estimates, {}, "undecided: the loss does not fall for certain")
    inside = own.low >= FIDELITY[0] and own.high <= FIDELITY[1]
    outside = own.high < FIDELITY[0] or own.low > FIDELITY[1]
    verdict = "holds" if inside else "undecided"
    if outside:
        verdict = "does not hold"
    return _row(claim, estimates, {}, verdict)


def _described(scans: Mapping[str, xr.DataTree]) -> list[dict]:
    """What the view speaks of and what yet proves nothing: growth of norms, and norm against loss."""
    growth, correlation = {}, {}
    for name, tree in scans.items():
        residual, last = tree["residual"], tree["inner"].to_dataset().isel(layer=-1)
        growth[name] = Estimate(residual["growth_rate"].item(), np.nan, np.nan)
        ends = ("", "_low", "_high")
        correlation[name] = Estimate(*(float(last[f"norm_loss_spearman_partial{end}"]) for end in ends))
    return [
        _row("Norms grow with depth (factor a layer)", growth, {}, "no evidence: adding anything does that"),
        _row("Norm goes with loss (partial Spearman, last layer)", correlation, {}, "described, no prediction"),
    ]


def toy_tokens(model: Any, batch: int, length: int, seed: int = 0) -> Int[Tensor, "batch position"]:
    """Sequences of the task that `metaint demo` trains the toy on; it was trained on no other text.

    Raises InputError for a toy whose characters are not those of the demo's default text: give a text.
    """
    task = bigram(fold_prose(python_prose()), trigger_count=TRIGGERS, no_repeat=True)
    if model.tokenizer.decode(range(task.vocab)) != "".join(task.vocabulary):
        raise InputError("text is missing, and this toy was made from a text of its own: pass --text.")
    return task.sample(batch, length, seed).tokens[:, :length]


def run(
    console: Console,
    model: Any,
    tokens: Tensor,
    out: Path,
    title: str,
    *,
    positions: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
    attributes: Mapping[str, Any] | None = None,
) -> Findings:
    """Study a model, print the verdicts, and write figures, verdicts and scans to the folder `out`.

    Raises StoreError if the folder can't be written.
    """
    from metaint.views.drawing.page import write_page
    from metaint.views.groups.inner import plot_inner
    from metaint.views.groups.residual import plot_residual

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"the folder {out} can't be made ({error.strerror or error}).") from error
    options: Any = {"positions": positions, "batch_size": batch_size, "seed": seed}
    findings = study(model, tokens, **options, progress=progress, attributes=attributes)
    print_verdicts(console, findings.verdicts, title)
    figures = {"residual": plot_residual(findings.scans), "inner": plot_inner(findings.scans)}
    write_page(figures, out / "figures.html", f"Inner optimisation: {title}")
    write_text(out / "verdicts.csv", findings.verdicts.to_csv(index=False))
    for name, tree in findings.scans.items():
        save(tree, out / f"{name.replace(' ', '-')}.zarr")
    console.print(f"figures, verdicts and scans are in {out}\n")
    return findings


def print_verdicts(console: Console, verdicts: pd.DataFrame, title: str) -> None:
    """The verdicts as a table, and how to read them."""
    table = plain_table(f"Does {title} look like an inner optimisation?")
    table.add_column("prediction", overflow="fold")
    for name in CONDITIONS:
        table.add_column(name.replace(" ", "\n"), justify="right")
    table.add_column("verdict", overflow="fold")
    table.show_lines = True
    for row in verdicts.to_dict("records"):
        cells = [str(Estimate(row[n], row[f"{n} low"], row[f"{n} high"])) for n in CONDITIONS]
        table.add_row(row["prediction"], *cells, f"[bold]{row['verdict']}[/]")
    console.print(table)
    console.print(
        "[dim]Below each number its 95 % interval, by resampling sequences; a prediction holds if the trained model's "
        "lies above 0 and above both controls on the same sequences. Means over blocks (the first left out of three or "
        "more) and sampled positions. An operational definition inspired by Wu & Varshney (2023), no theorem of "
        "theirs: what holds says that steps lower this loss along its gradient, not that the model was built to.[/]\n"
    )
