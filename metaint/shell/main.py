"""The `metaint` command: demo, scan, trace, compare, report, export, audit, lab. Bad input: a sentence and status 2."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from metaint.errors import InputError, MetaintError
from metaint.scans.groups import BY_NAME, SCANNED
from metaint.shell.circuits import trace
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
    quieten,
)
from metaint.shell.comparing import compare
from metaint.shell.files import export, report
from metaint.shell.labs import lab

# How attention is come by, as `metaint.scan` has it.
WAYS = ("eager", "streamed", "auto")

app = typer.Typer(
    help="Read a transformer through its TransformerLens hooks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

app.add_typer(lab, name="lab")


def main() -> None:
    """Run the command; the family's own errors become one sentence and status 2."""
    try:
        app()
    except MetaintError as error:
        print(f"metaint: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # of the user's own paths, or of a disk
        print(f"metaint: {error.filename or 'a file'}: {error.strerror or error}.", file=sys.stderr)
        sys.exit(2)


@app.command()
def scan(
    model: Model,
    probes: Annotated[str, typer.Option(help=f"Joined by commas: {', '.join(SCANNED)}; one pass feeds all.")] = "heads",
    text: Annotated[Path | None, typer.Option(help="Read windows of this text.")] = None,
    repeat: Annotated[
        int | None, typer.Option(help="Read random tokens, this many, repeated twice (default 50).")
    ] = None,
    length: Annotated[int, typer.Option(help="Window length for --text, in tokens.")] = 128,
    tokens: Annotated[int, typer.Option(help="About how many tokens to read in all.")] = 2000,
    batch_size: Annotated[int, typer.Option(help="Sequences in one forward pass.")] = 8,
    bos: Annotated[
        bool | None,
        typer.Option("--bos/--no-bos", help="Begin with the model's BOS; by default as it was trained."),
    ] = None,
    attention: Annotated[
        str, typer.Option(help="eager, streamed (faster, and long windows fit) or auto: streamed where it can be.")
    ] = "eager",
    revision: Revision = None,
    checkpoint: Checkpoint = None,
    device: Device = None,
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the random tokens or of the choice of windows.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Save the scan as a Zarr folder.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Write every figure of the scan to this HTML page.")] = None,
    sort: Annotated[str | None, typer.Option(help="Score to sort the table by.")] = None,
    top: Annotated[int | None, typer.Option(help="Print only this many heads; 0 for all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Score and label every head of MODEL; with --probes, read its stream, losses, saturation and weights too."""
    chosen = _probe_names(probes)
    check_page(figures)
    check(not as_csv or len(chosen) == 1, f"--csv holds one table, and --probes asks for {probes}: choose one.")
    check("heads" in chosen or (sort is None and top is None), "--sort and --top are for heads: add it to --probes.")
    check(text is None or repeat is None, "--text and --repeat were both given: choose one input.")
    check(not (as_json and as_csv), "--json and --csv were both given: choose one format.")
    _check_sizes(tokens, length, batch_size, seed)
    check(repeat is None or repeat >= 2, f"--repeat is {repeat}: a block of at least 2 tokens can be repeated.")
    check_range("--repeat", repeat, 2, MOST_LENGTH)
    check_range("--top", top, 0)
    check(attention in WAYS, f"--attention is {attention!r}: choose one of {', '.join(WAYS)}.")
    check_place(out)
    check(out is None or out.suffix == ".zarr", f"--out is {out}: give it a name that ends in .zarr.")
    from metaint.tasks import read_text
    from metaint.views.groups.head_tables import SCORES

    check(sort is None or sort in SCORES, f"--sort is {sort!r}: choose one of {', '.join(SCORES)}.")
    prose = read_text(text) if text is not None else None
    opened = open_model(model, revision, checkpoint, device, dtype)
    import metaint
    from metaint import scan
    from metaint.scanning.given import default_tokens, text_tokens

    if prose is not None:
        source = {"task": "text", "source": str(text)}
        batch = text_tokens(opened, prose, length, max(1, tokens // length), seed=seed, bos=bos)
    else:
        block = repeat or 50
        source = {"task": "repeated_tokens"}
        batch = default_tokens(opened, block, max(2, tokens // (2 * block)), seed, bos, exact=repeat is not None)
    readers = [getattr(metaint, BY_NAME[name].probe)() for name in chosen]
    options = {"batch_size": batch_size, "seed": seed, "attention": attention, "progress": sys.stderr.isatty()}
    result = scan(opened, batch, readers, attributes=source, **options)
    _keep(result, out, figures)
    if as_json or as_csv:
        print(_as_text(result, chosen, as_json))
    else:
        terminal = console()
        facts = result.attrs
        terminal.print(
            f"{facts['model']}: {facts['n_layers']} layers x {facts['n_heads']} heads, {facts['weights']} weights, "
            f"{facts['dtype']}; {batch.shape[0]} sequences of {batch.shape[1]} tokens ({source['task']}"
            f"{', with BOS' if facts['bos'] else ''}, seed {seed})\n"
        )
        if "attention_reason" in facts:
            terminal.print(f"attention was not streamed: {facts['attention_reason']}\n")
        _print_groups(terminal, result, chosen, sort, top)
        for path in (out, figures):
            if path is not None:
                terminal.print(f"saved to {path}")


@app.command()
def saturate(
    model: Model,
    scales: Annotated[
        str | None, typer.Option(help="Factors of all parameters, joined by commas (default: 1,2,4 ... 1024).")
    ] = None,
    faithful: Annotated[bool, typer.Option("--faithful", help="The published script's mask and counts too.")] = False,
    text: Annotated[Path | None, typer.Option(help="Read windows of this text; else repeated random tokens.")] = None,
    length: Annotated[int, typer.Option(help="Window length for --text, in tokens.")] = 128,
    tokens: Annotated[int, typer.Option(help="About how many tokens to read in all.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Sequences in one forward pass.")] = 8,
    revision: Revision = None,
    checkpoint: Checkpoint = None,
    device: Device = None,
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option(help="Seed of tokens, windows and sampled positions.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Save the result as a Zarr folder.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Write the figures to this HTML page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What becomes of MODEL as all its parameters are multiplied; of its scores alone: scan --probes saturation."""
    _check_sizes(tokens, length, batch_size, seed)
    check_place(out)
    check(out is None or out.suffix == ".zarr", f"--out is {out}: give it a name that ends in .zarr.")
    check_page(figures)
    factors = _factors(scales)
    from metaint.tasks import read_text

    prose = read_text(text) if text is not None else None
    opened = open_model(model, revision, checkpoint, device, dtype)
    import metaint
    from metaint.scanning.given import default_tokens, text_tokens
    from metaint.views.groups.saturation import print_saturation

    if prose is None:
        batch, source = default_tokens(opened, batch=max(2, tokens // 100), seed=seed), {"task": "repeated_tokens"}
    else:
        batch = text_tokens(opened, prose, length, max(2, tokens // length), seed=seed)
        source = {"task": "text", "source": str(text)}
    options = {"batch_size": batch_size, "seed": seed, "progress": sys.stderr.isatty(), "attributes": source}
    result = metaint.saturate(opened, batch, factors, faithful=faithful, **options)
    _keep(result, out, figures)
    if as_json:
        print(_as_text(result, ["saturation"], True))
        return
    print_saturation(console(), result)
    for path in (out, figures):
        if path is not None:
            console().print(f"saved to {path}")


def _check_sizes(tokens: int, length: int, batch_size: int, seed: int) -> None:
    """What is read, and how."""
    check_range("--tokens", tokens, 1, MOST_TOKENS)
    check_range("--length", length, 1, MOST_LENGTH)
    check_range("--batch-size", batch_size, 1, MOST_TOKENS)
    check_seed(seed)


def _factors(given: str | None) -> tuple[float, ...]:
    """The numbers in --scales, or those that `metaint.saturate` takes without any."""
    from metaint.scanning.saturate import SCALES

    if given is None:
        return SCALES
    try:
        return tuple(float(part) for part in given.split(","))
    except ValueError:
        raise InputError(f"--scales is {given!r}: join numbers by commas, such as 1,2,4.") from None


@app.command()
def audit(
    model: Model,
    revision: Revision = None,
    checkpoint: Checkpoint = None,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Check which invariants MODEL's hooks and weights hold."""
    opened = open_model(model, revision, checkpoint, device, dtype)
    from metaint import audit
    from metaint.views.audit import print_audit

    print_audit(console(), audit(opened), model)


app.command()(trace)
app.command()(compare)
app.command()(report)
app.command()(export)


@app.command()
def demo(
    text: Annotated[Path | None, typer.Option(help="Build the task from this text, not from Python's prose.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the model and of its data.")] = 0,
    out: Annotated[Path, typer.Option(help="Where to save the scan of all checkpoints.")] = Path("demo.zarr"),
    page: Annotated[Path, typer.Option("--report", help="Where to write the report on SmolLM2.")] = Path("demo.html"),
) -> None:
    """Watch an induction head appear in a toy, then see the heads of a real language model."""
    check(out.suffix == ".zarr", f"--out is {out}: give it a name that ends in .zarr.")
    check_page(page, "--report")
    check_place(out)
    check(not out.exists() or (out / "zarr.json").is_file(), f"--out is {out}, which is no scan: choose another name.")
    check_seed(seed)
    from metaint.tasks import python_prose, read_text

    prose = read_text(text) if text is not None else python_prose()
    quieten()
    from metaint.labs.demo import run

    run(console(), prose, seed, out, page)


def _probe_names(given: str) -> list[str]:
    """The names in --probes, each once."""
    names = [name.strip() for name in given.split(",")]
    known = len(set(names)) == len(names) and set(names) <= set(SCANNED)
    check(known, f"--probes is {given!r}: join some of {', '.join(SCANNED)} by commas, each once.")
    return names


def _as_text(result: Any, chosen: list[str], as_json: bool) -> str:
    """A scan for machines: JSON of every group, or the table of the one group as CSV."""
    from metaint.views.export.scan_json import scan_json
    from metaint.views.export.tables import csv_safe
    from metaint.views.groups.catalogue import VIEWS

    if as_json:
        return scan_json(result)
    frame = next(iter(VIEWS[chosen[0]].frames.values()))
    return csv_safe(frame(result)).to_csv(index=False).rstrip("\n")


def _keep(result: Any, out: Path | None, figures: Path | None) -> None:
    """Save a scan, and its figures, where the options ask for it."""
    if out is not None:
        from metaint import save

        save(result, out)
    if figures is not None:
        from metaint.views.drawing.page import write_page

        write_page(result.metaint.plot(), figures, f"metaint: {result.attrs['model']}")


def _print_groups(console: Console, result: Any, chosen: list[str], sort: str | None, top: int | None) -> None:
    from metaint.views.groups.catalogue import VIEWS
    from metaint.views.groups.head_tables import print_scan

    for name in chosen:
        if name == "heads":
            print_scan(console, result, sort, top)
        else:
            VIEWS[name].print(console, result)
