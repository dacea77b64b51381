"""`metaint lab`: a paper as an experiment on a model."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from metaint.errors import InputError, ModelError
from metaint.shell.common import (
    MOST_LENGTH,
    Checkpoint,
    Device,
    Dtype,
    Revision,
    check,
    check_place,
    check_range,
    check_seed,
    console,
    open_model,
)

# Larger ones are slips: building the models alone would take minutes, without a word.
_MOST_LAYERS, _MOST_WIDTH, _MOST_STEPS = 24, 8192, 100_000_000
# Seeds of a run are joined with its steps in 64 bits.
_LARGEST_SEED = 2**31 - 1

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
    check_range("--windows", windows, 2, 100_000)
    check_range("--length", length, 3, MOST_LENGTH)
    check_range("--positions", positions, 1, MOST_LENGTH)
    check_seed(seed)
    check_place(out)
    check(not out.exists() or out.is_dir(), f"--out is {out}, which is a file: name a folder.")
    from metaint.tasks import python_prose, read_text

    prose = read_text(text) if text is not None else None
    from metaint.labs.inner import run, toy_tokens
    from metaint.scanning.given import text_tokens

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
    check_range("--minutes", minutes, 0, 10_000)
    check_range("--steps", steps, 1, _MOST_STEPS)
    check_seed(seed)
    check_place(out)
    rates, decays = _numbers("--learning-rates", learning_rates), _numbers("--weight-decays", weight_decays)
    from metaint.labs.norm_growth.study import run
    from metaint.tasks import read_text

    prose = read_text(text) if text is not None else None
    chosen = {
        "norms": _names(norms),
        "optimisers": _names(optimisers),
        "learning_rates": rates,
        "weight_decays": decays,
    }
    run(console(), out, prose, minutes=minutes, steps=steps, seed=seed, progress=sys.stderr.isatty(), **chosen)


@lab.command()
def birth(
    text: Annotated[Path | None, typer.Option(help="The bigrams of this text; by default of Python's prose.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Short sequences and small batches: under a minute.")] = False,
    steps: Annotated[int | None, typer.Option(help="Steps of each run (default 200).")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a sequence (default 256).")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences of a step (default 256).")] = None,
    width: Annotated[int, typer.Option(help="Width of the stream, and of each head.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Of SGD with momentum 0.9.")] = 0.2,
    triggers: Annotated[str, typer.Option(help="fixed, random or both, joined by a comma.")] = "fixed",
    trigger_counts: Annotated[str, typer.Option(help="Numbers of triggers, joined by commas.")] = "5",
    outputs: Annotated[
        str,
        typer.Option(help="What triggers lead to: uniform, bigram, train (to be tested on others); joined by commas."),
    ] = "uniform",
    no_repeat: Annotated[bool, typer.Option("--no-repeat", help="No trigger leads to itself.")] = False,
    layers: Annotated[str, typer.Option(help="Layers, joined by commas; 1 is the baseline.")] = "2",
    freeze: Annotated[
        str, typer.Option(help="Train each run once more with matrices frozen until a step, such as W_K1:100,W_K2:100.")
    ] = "",
    loss: Annotated[
        str, typer.Option(help="head: positions the context tells; all: every position, with a linear W_F for bigrams.")
    ] = "head",
    seeds: Annotated[str, typer.Option(help="Seeds, joined by commas.")] = "0",
    jobs: Annotated[int, typer.Option(help="Runs trained at once; 0 for as many as there are cores.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for runs, figures and tables.")] = Path("birth-lab"),
) -> None:
    """Watch an induction head being born, memory by memory. Trains small transformers in-context bigrams; resumable."""
    check(not out.exists() or out.is_dir(), f"--out is {out}, which is a file: name a folder.")
    given = {"steps": steps, "length": length, "batch": batch}
    _check_training(steps, length, batch, width, jobs)
    check_place(out)
    counts = _integers("--trigger-counts", trigger_counts, 0, MOST_LENGTH)
    depths, drawn = _integers("--layers", layers, 1, _MOST_LAYERS), _integers("--seeds", seeds, 0, _LARGEST_SEED)
    from metaint.labs.birth.study import QUICK, run, runs
    from metaint.tasks import read_text

    prose = read_text(text) if text is not None else None
    settings = runs(
        triggers=_names(triggers),
        trigger_counts=counts,
        outputs=_names(outputs),
        layers=depths,
        seeds=drawn,
        freeze=freeze,
        no_repeat=no_repeat,
        loss=loss,
        d=width,
        learning_rate=learning_rate,
        **{**(QUICK if quick else {}), **{name: value for name, value in given.items() if value is not None}},
    )
    run(console(), out, settings, prose, jobs=jobs, progress=sys.stderr.isatty())


@lab.command()
def autoregression(
    setting: Annotated[
        str, typer.Option(help="augmented, unitary, orthogonal, haar, positional or icl-regression.")
    ] = "augmented",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter runs: under a minute.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The paper's sizes: up to hours.")] = False,
    width: Annotated[int | None, typer.Option(help="d, the width of the vectors.")] = None,
    length: Annotated[int | None, typer.Option(help="The longest context T; of icl-regression the points.")] = None,
    heads: Annotated[str, typer.Option(help="Of unitary and orthogonal: numbers of heads, joined by commas.")] = "",
    layers: Annotated[str, typer.Option(help="Of haar and icl-regression: depths, joined by commas.")] = "",
    steps: Annotated[int | None, typer.Option(help="Steps of each run.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences of a step.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, joined by commas.")] = "0",
    jobs: Annotated[int, typer.Option(help="Runs trained at once; 0 for as many as there are cores.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for runs, figures and tables, one in it for each setting.")] = Path(
        "autoregression-lab"
    ),
) -> None:
    """Do small transformers reach the optimum predicted for s_{t+1} = W s_t in context? Trains them; resumable."""
    check(not out.exists() or out.is_dir(), f"--out is {out}, which is a file: name a folder.")
    check(not (quick and full), "--quick and --full were both given: choose one.")
    _check_training(steps, length, batch, width, jobs)
    check_place(out)
    counts = _integers("--heads", heads, 1, _MOST_WIDTH) if heads else None
    depths = _integers("--layers", layers, 1, _MOST_LAYERS) if layers else None
    given = {"d": width, "length": length, "steps": steps, "batch": batch}
    seeded = _integers("--seeds", seeds, 0, _LARGEST_SEED)
    from metaint.labs.autoregression.study import run, runs

    size = "full" if full else "default"
    if quick:
        size = "quick"
    settings = runs(setting, size, seeds=seeded, heads=counts, layers=depths, **given)
    run(console(), out / setting, settings, jobs=jobs, progress=sys.stderr.isatty())


def _check_training(steps: int | None, length: int | None, batch: int | None, width: int | None, jobs: int) -> None:
    for option, value, most in (
        ("--steps", steps, _MOST_STEPS),
        ("--length", length, MOST_LENGTH),
        ("--batch", batch, MOST_LENGTH),
        ("--width", width, _MOST_WIDTH),
    ):
        check_range(option, value, 1, most)
    check_range("--jobs", jobs, 0, 1024)


def _integers(option: str, given: str, least: int, most: int) -> list[int]:
    try:
        values = [int(part) for part in given.split(",")]
    except ValueError:
        raise InputError(f"{option} is {given[:80]!r}: join whole numbers by commas, such as 0,1.") from None
    for value in values:
        check_range(option, value, least, most)
    return values


def _names(given: str) -> list[str]:
    return [part.strip() for part in given.split(",")]


def _numbers(option: str, given: str) -> list[float] | None:
    try:
        return [float(part) for part in given.split(",")] if given else None
    except ValueError:
        raise InputError(f"{option} is {given!r}: join numbers by commas, such as 0.001,0.01.") from None
