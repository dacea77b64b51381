"""`metaint lab`: a paper as an experiment on a model."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from metaint.errors import InputError, ModelError
from metaint.shell import Checkpoint, Device, Dtype, Revision, check, console, open_model

lab = typer.Typer(help="A paper as an experiment on a model.", no_args_is_help=True)


@lab.command()
def inner(
    model: Annotated[str | None, typer.Argument(help="As for scan; toy and, if it can be reached, gpt2.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="Read windows of this text; by default Python's prose, for the toy its task.")
    ] = None,
    length: Annotated[int, typer.Option(help="Window length, in tokens.")] = 128,
    windows: Annotated[int, typer.Option(help="Sequences to read.")] = 32,
    positions: Annotated[int, typer.Option(help="Positions sampled from each sequence.")] = 64,
    revision: Revision = None,
    checkpoint: Checkpoint = None,
    device: Device = None,
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option(help="Seed of windows, samples, shuffling and the random model.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for figures, verdicts and scans.")] = Path("inner-lab"),
) -> None:
    """Does MODEL look like an inner optimisation? Beside its random initialisation and shuffled tokens."""
    check(windows >= 2, f"--windows is {windows}: at least 2 sequences tell an interval.")
    check(positions >= 1, f"--positions is {positions}: it must be at least 1.")
    check(length >= 3, f"--length is {length}: it must be at least 3.")
    check(not out.exists() or out.is_dir(), f"--out is {out}, which is a file: name a folder.")
    from metaint.tasks import python_prose, read_text

    prose = read_text(text) if text is not None else None
    from metaint.labs.inner import run, toy_tokens
    from metaint.scanning import text_tokens

    terminal = console()
    for name in ("toy", "gpt2") if model is None else (model,):
        try:
            opened = open_model(name, revision, checkpoint, device, dtype)
        except ModelError as error:
            if model is not None or name == "toy":
                raise
            terminal.print(f"{name} is left out: {error}")
            continue
        reach = min(length, int(opened.cfg.n_ctx))
        if prose is None and name == "toy":
            batch, source = toy_tokens(opened, windows, reach, seed), "in-context bigrams"
        else:
            batch = text_tokens(opened, prose or python_prose(), reach, windows, seed)
            source = str(text or "Python's prose")
        facts = {"task": "text", "source": source}
        folder = out / name.strip("/").replace("/", "--")
        progress = sys.stderr.isatty()
        run(terminal, opened, batch, folder, name, positions=positions, seed=seed, progress=progress, attributes=facts)


@lab.command("norm-growth")
def norm_growth(
    text: Annotated[Path | None, typer.Option(help="Train on this text; by default Python's own prose.")] = None,
    minutes: Annotated[float, typer.Option(help="About how long all runs take together.")] = 5.0,
    steps: Annotated[int | None, typer.Option(help="Steps of each run, instead of --minutes.")] = None,
    norms: Annotated[str, typer.Option(help="Placements of the norm, joined by commas.")] = "pre,output,post",
    optimisers: Annotated[str, typer.Option(help="adamw, sgd or both, joined by a comma.")] = "adamw,sgd",
    learning_rates: Annotated[str, typer.Option(help="A grid of learning rates, joined by commas.")] = "",
    weight_decays: Annotated[str, typer.Option(help="A grid of weight decays, joined by commas.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for runs, figures and tables.")] = Path("norm-growth-lab"),
) -> None:
    """Do parameters grow in training, and does attention saturate with them? Trains small models on text; resumable."""
    rates, decays = _numbers("--learning-rates", learning_rates), _numbers("--weight-decays", weight_decays)
    from metaint.labs.norm_growth import run
    from metaint.tasks import read_text

    prose = read_text(text) if text is not None else None
    chosen = {
        "norms": _names(norms),
        "optimisers": _names(optimisers),
        "learning_rates": rates,
        "weight_decays": decays,
    }
    run(console(), out, prose, minutes=minutes, steps=steps, seed=seed, progress=sys.stderr.isatty(), **chosen)


def _names(given: str) -> list[str]:
    return [part.strip() for part in given.split(",")]


def _numbers(option: str, given: str) -> list[float] | None:
    try:
        return [float(part) for part in given.split(",")] if given else None
    except ValueError:
        raise InputError(f"{option} is {given!r}: join numbers by commas, such as 0.001,0.01.") from None
