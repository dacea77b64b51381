"""The `metaint` command: demo, scan, audit, lab. Bad input is one sentence on stderr and exit status 2."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from metaint.cli_labs import lab
from metaint.errors import MetaintError
from metaint.shell import Checkpoint, Device, Dtype, Model, Revision, check, check_page, console, open_model

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


@app.command()
def scan(
    model: Model,
    probes: Annotated[
        str, typer.Option(help="What to read, joined by commas: heads, residual, inner; one pass feeds them all.")
    ] = "heads",
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
    revision: Revision = None,
    checkpoint: Checkpoint = None,
    device: Device = None,
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the random tokens or of the choice of windows.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Save the scan as a Zarr folder.")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Write the figures of residual and inner to this HTML page.")
    ] = None,
    sort: Annotated[str | None, typer.Option(help="Score to sort the table by.")] = None,
    top: Annotated[int | None, typer.Option(help="Print only this many heads; 0 for all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Score and label every head of MODEL; with --probes, read its residual stream and inner losses too."""
    chosen = _probe_names(probes)
    check(figures is None or chosen != ["heads"], "--figures draws residual and inner: add one of them to --probes.")
    check_page(figures)
    check(not as_csv or len(chosen) == 1, f"--csv holds one table, and --probes asks for {probes}: choose one.")
    check("heads" in chosen or (sort is None and top is None), "--sort and --top are for heads: add it to --probes.")
    check(text is None or repeat is None, "--text and --repeat were both given: choose one input.")
    check(not (as_json and as_csv), "--json and --csv were both given: choose one format.")
    check(tokens >= 1, f"--tokens is {tokens}: it must be at least 1.")
    check(repeat is None or repeat >= 2, f"--repeat is {repeat}: a block of at least 2 tokens can be repeated.")
    check(out is None or out.suffix == ".zarr", f"--out is {out}: give it a name that ends in .zarr.")
    from metaint.tasks import read_text
    from metaint.views.tables import SCORES

    check(sort is None or sort in SCORES, f"--sort is {sort!r}: choose one of {', '.join(SCORES)}.")
    prose = read_text(text) if text is not None else None
    opened = open_model(model, revision, checkpoint, device, dtype)
    from metaint import HeadProbe, InnerProbe, ResidualProbe, save, scan
    from metaint.scanning import default_tokens, text_tokens

    if prose is not None:
        source = {"task": "text", "source": str(text)}
        batch = text_tokens(opened, prose, length, max(1, tokens // length), seed=seed, bos=bos)
    else:
        block = repeat or 50
        source = {"task": "repeated_tokens"}
        batch = default_tokens(opened, block, max(2, tokens // (2 * block)), seed, bos, exact=repeat is not None)
    kinds = {"heads": HeadProbe, "residual": ResidualProbe, "inner": InnerProbe}
    readers = [kinds[name]() for name in chosen]
    found = scan(
        opened, batch, readers, batch_size=batch_size, seed=seed, progress=sys.stderr.isatty(), attributes=source
    )
    if out is not None:
        save(found, out)
    if figures is not None:
        from metaint.views.figures import stream_figures
        from metaint.views.page import write_page

        write_page(stream_figures(found), figures, f"metaint: {found.attrs['model']}")
    if as_json or as_csv:
        print(_as_text(found, chosen, as_json))
    else:
        terminal = console()
        facts = found.attrs
        terminal.print(
            f"{facts['model']}: {facts['n_layers']} layers x {facts['n_heads']} heads, {facts['weights']} weights, "
            f"{facts['dtype']}; {batch.shape[0]} sequences of {batch.shape[1]} tokens ({source['task']}"
            f"{', with BOS' if facts['bos'] else ''}, seed {seed})\n"
        )
        _print_groups(terminal, found, chosen, sort, top)
        for path in (out, figures):
            if path is not None:
                terminal.print(f"saved to {path}")


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
    from metaint.views.tables import print_audit

    print_audit(console(), audit(opened), model)


@app.command()
def demo(
    text: Annotated[Path | None, typer.Option(help="Build the task from this text, not from Python's prose.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the model and of its data.")] = 0,
    out: Annotated[Path, typer.Option(help="Where to save the scan of all checkpoints.")] = Path("demo.zarr"),
) -> None:
    """Train a small transformer on an in-context task, and watch its induction head appear."""
    check(out.suffix == ".zarr", f"--out is {out}: give it a name that ends in .zarr.")
    from metaint.tasks import python_prose, read_text

    prose = read_text(text) if text is not None else python_prose()
    from metaint.labs.demo import run

    run(console(), prose, seed, out)


def _probe_names(given: str) -> list[str]:
    """The names in --probes, each once."""
    names = [name.strip() for name in given.split(",")]
    known = len(set(names)) == len(names) and set(names) <= {"heads", "residual", "inner"}
    check(known, f"--probes is {given!r}: join some of heads, residual, inner by commas, each once.")
    return names


def _as_text(found: Any, chosen: list[str], as_json: bool) -> str:
    """A scan for machines: JSON of every group, or the table of the one group as CSV."""
    from metaint.views.streams import layer_frame, scan_json
    from metaint.views.tables import to_csv, to_json

    if as_json:
        return (to_json if chosen == ["heads"] else scan_json)(found)
    text = to_csv(found) if chosen == ["heads"] else layer_frame(found, chosen[0]).to_csv(index=False)
    return text.rstrip("\n")


def _print_groups(console: Console, found: Any, chosen: list[str], sort: str | None, top: int | None) -> None:
    from metaint.views.streams import print_inner, print_residual
    from metaint.views.tables import print_scan

    for name in chosen:
        if name == "heads":
            print_scan(console, found, sort, top)
        else:
            {"residual": print_residual, "inner": print_inner}[name](console, found)
