"""Commands that hand on what was saved: report and export."""

from pathlib import Path
from typing import Annotated, Any

import typer

from metaint.models.protocol import Model
from metaint.shell.common import check, check_place, console, open_model, reading

_FORMATS = ("csv", "parquet", "headvis")


def report(
    scan: Annotated[Path, typer.Argument(help="A scan that --out wrote, or a recording over training.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the page.")] = Path("report.html"),
    circuit: Annotated[Path | None, typer.Option(help="Draw this circuit too (.graphml, by metaint trace).")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Show patterns of this model: of the circuit's heads, at a click, or of labelled heads."),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Show them where this text begins; else random tokens.")] = None,
) -> None:
    """Write SCAN to one HTML file that opens offline: provenance, labels, and every figure with its source."""
    check(out.suffix == ".html", f"--out is {out}: give it a name that ends in .html.")
    check(text is None or model is not None, f"--text is {text}: patterns on it need --model.")
    import metaint

    check_place(out)
    loaded = metaint.load(scan)
    views = _views(loaded, circuit, model, text)
    with reading(scan, "scan"):
        console().print(f"saved to {metaint.report(loaded, out, views)}")


def _views(scan: Any, circuit: Path | None, name: str | None, text: Path | None) -> dict[str, Any]:
    """The views that the options of `report` ask for, by title."""
    import metaint
    from metaint.views.report import labelled_heads

    graph = None if circuit is None else metaint.load_circuit(circuit)
    if name is None:
        return {} if graph is None or circuit is None else {"Circuit": _drawn(graph, circuit)}
    model = open_model(name, scan.attrs.get("revision") or None, None, None, "float32")
    tokens = _shown(model, text)
    if graph is not None and circuit is not None:
        return {"Circuit": _drawn(graph, circuit, model, tokens)}
    heads = labelled_heads(scan)
    check(bool(heads), f"--model is {name}, and {scan.attrs.get('model', 'the scan')} has no labelled head to show.")
    return {"Attention of labelled heads": metaint.show_attention(model, tokens, heads, how="canvas")}


def _drawn(graph: Any, path: Path, *read: Any) -> Any:
    import metaint

    with reading(path, "circuit"):
        return metaint.show_circuit(graph, *read)


def _shown(model: Model, text: Path | None) -> Any:
    """One sequence: the beginning of a text, or a block of random tokens twice."""
    from metaint.scanning.given import default_tokens, text_tokens
    from metaint.tasks import read_text

    if text is None:
        return default_tokens(model, length=20, batch=1)[0]
    return text_tokens(model, read_text(text), min(96, int(model.cfg.n_ctx)), 1, seed=None)[0]


def export(
    source: Annotated[
        Path, typer.Argument(help="A scan that --out wrote, a recording over training, or a circuit (.graphml).")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; of a circuit a file that ends in .json.")],
    form: Annotated[
        str | None,
        typer.Option("--as", help="csv (default) or parquet, a file for each table; or headvis, for its frontend."),
    ] = None,
) -> None:
    """Write SOURCE for other programs: a scan as tables or for HeadVis, a circuit in the format of MIB."""
    if source.suffix == ".graphml":
        _export_circuit(source, out, form)
        return
    form = form or "csv"
    check(form in _FORMATS, f"--as is {form!r}: choose one of {', '.join(_FORMATS)}.")
    check(not out.is_file(), f"--out is {out}, which is a file: name a folder.")
    import metaint

    check_place(out)
    scan = metaint.load(source)
    with reading(source, "scan"):
        if form == "headvis":
            console().print(f"saved to {metaint.save_headvis(scan, out)}: serve it as the data folder of HeadVis")
            return
        paths = metaint.save_tables(scan, out, form)
    console().print(f"saved {len(paths)} tables to {out}: {', '.join(path.stem for path in paths)}")


def _export_circuit(source: Path, out: Path, form: str | None) -> None:
    check(form is None, f"--as is {form!r}, and {source} is a circuit: leave it out.")
    check(out.suffix == ".json", f"--out is {out}: give it a name that ends in .json.")
    import metaint

    check_place(out)
    graph = metaint.load_circuit(source)
    with reading(source, "circuit"):
        console().print(f"saved to {metaint.save_circuit(graph, out)}")
