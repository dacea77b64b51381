"""The command that traces a circuit and tests it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from metaint.shell.common import (
    MOST_LENGTH,
    MOST_TOKENS,
    Checkpoint,
    Device,
    Dtype,
    Model,
    Revision,
    check,
    check_page,
    check_place,
    check_range,
    check_seed,
    console,
    open_model,
)

# The exit status of a command that was stopped by Ctrl-C.
_INTERRUPTED = 130


def trace(
    model: Model,
    target: Annotated[str, typer.Option(help="induction, previous_token, averaging or sink.")] = "induction",
    how: Annotated[str, typer.Option(help="What stands in for an ablated part: mean, zero or resample.")] = "mean",
    threshold: Annotated[float, typer.Option(help="Least share, of what all heads bring, of a part.")] = 0.02,
    random: Annotated[int, typer.Option(help="Random circuits to compare with, where it is close.")] = 50,
    least: Annotated[float, typer.Option(help="Least share, of what all heads bring, of a circuit.")] = 0.5,
    most: Annotated[int, typer.Option(help="Parts at most.")] = 16,
    race: Annotated[
        bool, typer.Option("--race/--no-race", help="Run on few sequences what can't count; or all on all.")
    ] = True,
    precision: Annotated[
        float, typer.Option(help="Half the width of an interval that is narrow enough, as a share.")
    ] = 0.05,
    text: Annotated[Path | None, typer.Option(help="Read windows of this text; else repeated random tokens.")] = None,
    length: Annotated[int, typer.Option(help="Window length for --text, in tokens.")] = 128,
    tokens: Annotated[int, typer.Option(help="About how many tokens to read in all.")] = 2000,
    revision: Revision = None,
    checkpoint: Checkpoint = None,
    device: Device = None,
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option(help="Seed of tokens and of random circuits.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Save the circuit: .graphml, or .json of MIB; a stopped run goes on from there.",
        ),
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="Draw the circuit on this HTML page.")] = None,
) -> None:
    """Trace MODEL's circuit for TARGET: ablate heads, MLPs and paths, and test what is found against random circuits.

    Ctrl-C gives the circuit as far as it is known; with --out the same command goes on from there.
    """
    check_page(figures)
    check(out is None or out.suffix in (".graphml", ".json"), f"--out is {out}: end it in .graphml or .json.")
    check_range("--tokens", tokens, 1, MOST_TOKENS)
    check_range("--length", length, 2, MOST_LENGTH)
    check_range("--random", random, 0, 100_000)
    check_range("--most", most, 1)
    check_range("--least", least, 0, 1)
    check_range("--precision", precision, 0, 1)
    check_seed(seed)
    journal = None if out is None else out.with_name(f"{out.name}.journal")
    check_place(journal)
    from metaint.tasks import read_text

    prose = read_text(text) if text is not None else None
    opened = open_model(model, revision, checkpoint, device, dtype)
    import metaint
    from metaint.scanning.given import default_tokens, text_tokens
    from metaint.views.circuit.table import print_circuit

    if prose is None:
        batch = default_tokens(opened, batch=max(2, tokens // 100), seed=seed)
    else:
        batch = text_tokens(opened, prose, length, max(2, tokens // length), seed=seed)
    options = {"how": how, "threshold": threshold, "random": random, "least": least, "most": most}
    options |= {"race": race, "precision": precision, "journal": journal, "seed": seed, "progress": True}
    circuit = metaint.trace_circuit(opened, batch, target=target, **options)
    circuit.graph["task"] = "repeated_tokens" if text is None else "text"
    print_circuit(console(), circuit)
    if out is not None and journal is not None:
        _keep(circuit, out, journal)
    if figures is not None:
        console().print(f"saved to {metaint.show_circuit(circuit, opened, batch[0]).save(figures)}")
    if not circuit.graph["finished"]:
        raise typer.Exit(_INTERRUPTED)


def _keep(circuit: Any, out: Path, journal: Path) -> None:
    """Save a circuit, but an unfinished one never in the place of another."""
    import metaint

    finished = circuit.graph["finished"]
    if finished or not out.exists() or _is_unfinished(out):
        console().print(f"saved to {metaint.save_circuit(circuit, out)}")
    else:
        console().print(f"{out} holds another circuit and is left as it is")
    if finished:
        journal.unlink(missing_ok=True)
    else:
        console().print(f"the same command goes on from {journal}")


def _is_unfinished(out: Path) -> bool:
    from metaint import load_circuit

    return out.suffix == ".graphml" and load_circuit(out).graph.get("finished") is False
