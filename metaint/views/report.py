"""A scan as one HTML file to hand on: provenance, labels to sort and filter, every figure with its source, no network.

In: a scan, or a recording over training. Out: a page that opens anywhere. What comes from models and tokens is shown as
text, wherever it stands. `figures_of` gives the figures alone.
"""

import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import xarray as xr
from plotly import graph_objects as go

from metaint.errors import InputError, door
from metaint.scans.labels import label_heads
from metaint.scans.whole import write_text
from metaint.views.drawing.page import document, figure_html
from metaint.views.drawing.terminal import number
from metaint.views.drawing.view import View
from metaint.views.groups import training
from metaint.views.groups.catalogue import VIEWS

Figures = Mapping[str, go.Figure]

# First in the table of provenance, in this order and under these names; what else a scan records follows.
_FACTS = {
    "model": "model", "revision": "revision", "weights": "weights", "dtype": "dtype", "device": "device",
    "n_layers": "layers", "n_heads": "heads in a layer", "attention": "attention", "task": "task", "source": "source",
    "tokens_shape": "tokens (sequences, length)", "bos": "begins with BOS", "seed": "seed",
}  # fmt: skip
_COLUMNS = {
    "head": "head", "label": "label", "score": "score", "low": "95 % from", "high": "to", "off_sink": "off sink",
    "borderline": "near the line", "uniform": "uniform", "null_mean": "null", "null_std": "null's deviation",
    "margin": "margin", "on_first": "on first token", "written": "written", "output_share": "output share",
}  # fmt: skip


@door
def report(scan: xr.DataTree, path: str | Path, views: Mapping[str, View] | None = None) -> Path:
    """Write what a scan holds to one HTML file that needs no network, and return its path.

    - `scan`: a scan, or a recording over training, which is drawn over its steps, and what else its groups allow at
      the last one.
    - `path`: where to write the page; an earlier file is replaced once the new one is whole.
    - `views`: circuits, attention or tokens (`metaint.show_circuit` and its like), each under its title; they come
      before the figures, and the scripts that several share are written once.

    Raises InputError where a scan has no group that can be drawn, StoreError if the file can't be written.

    >>> import metaint, tempfile, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=1, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> scan = metaint.scan(model, torch.arange(20).view(2, 10))
    >>> metaint.report(scan, tempfile.mkdtemp() + "/report.html").name
    'report.html'
    """
    figures = figures_of(scan)
    views = views or {}
    sections = [("Provenance", f"<h2>Provenance</h2>{_provenance(scan)}")]
    if "heads" in figures:
        title = f"Labelled heads{_at_step(scan)}"
        sections.append((title, f"<h2>{title}</h2>{_label_table(_last_step(scan))}"))
    for title, view in views.items():
        sections.append((title, f"<h2>{escape(title)}</h2>{view.body}{_source(view.source)}"))
    drawn = [(group, figure) for group, by_name in figures.items() for figure in by_name.values()]
    for i, (group, figure) in enumerate(drawn):
        layout: Any = figure.layout
        source = training.SOURCE if group == "training" else VIEWS[group].source
        sections.append((layout.title.text, figure_html(figure, i) + _source(source)))
    links = "".join(f'<li><a href="#section-{i}">{escape(title)}</a></li>' for i, (title, _) in enumerate(sections))
    body = "\n".join(f'<section id="section-{i}">{html}</section>' for i, (_, html) in enumerate(sections))
    title = f"metaint: {scan.attrs.get('model', 'scan')}"
    scripts = "".join(dict.fromkeys(script for view in views.values() for script in view.scripts))
    page = document(title, f"<nav><ol>{links}</ol></nav>\n{scripts}{body}\n<script>{_SCRIPT}</script>", _STYLE)
    write_text(Path(path), page)
    return Path(path)


def _source(source: str) -> str:
    return f'<p class="source">Source: {escape(source)}</p>' if source else ""


def figures_of(scan: xr.DataTree) -> dict[str, Figures]:
    """Every figure that a scan allows, by group and then by name; what is over training comes first, as "training".

    InputError where there is none.
    """
    figures: dict[str, Figures] = {}
    if training.drawn_groups(scan):
        figures["training"] = {"training": training.plot_training(scan)}
    last = _last_step(scan)
    step = _at_step(scan)
    if step:
        last.attrs["model"] = f"{scan.attrs.get('model', 'scan')}{step}"
    groups = _groups(last)
    figures |= {group: view.figures(last) for group, view in VIEWS.items() if group in groups}
    if not figures:
        raise InputError(f"scan has no group that can be drawn: it needs one of {', '.join(VIEWS)}.")
    return figures


def _groups(scan: xr.DataTree) -> dict[str, xr.Dataset]:
    """The groups into which something was read."""
    return {str(name): node.to_dataset() for name, node in scan.children.items() if node.data_vars}


def _last_step(scan: xr.DataTree) -> xr.DataTree:
    groups = {
        f"/{name}": data.isel(step=-1, drop=True) if "step" in data.dims else data
        for name, data in _groups(scan).items()
    }
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=dict(scan.attrs)), **groups})


def _at_step(scan: xr.DataTree) -> str:
    """What a recording's last step adds to a title (" at step 400"); nothing for a scan."""
    last = [
        int(data["step"].values[-1]) for name, data in _groups(scan).items() if name in VIEWS and "step" in data.dims
    ]
    return f" at step {max(last)}" if last else ""


# ---- tables -----------------------------------------------------------------------------------------------------


def _provenance(scan: xr.DataTree) -> str:
    facts = {title: scan.attrs[key] for key, title in _FACTS.items() if key in scan.attrs}
    if "bos" in scan.attrs:
        facts[_FACTS["bos"]] = "yes" if scan.attrs["bos"] else "no"
    facts |= {str(key).replace("_", " "): value for key, value in scan.attrs.items() if key not in _FACTS}
    for name, data in _groups(scan).items():
        read = data.attrs
        if read.get("tokens_seen"):
            facts[f"read for /{name}"] = f"{read['tokens_seen']} tokens in {read.get('sequences', '?')} sequences"
        if "step" in data.dims:
            steps = data["step"].values
            facts[f"steps of /{name}"] = f"{len(steps)}, from {steps[0]} to {steps[-1]}"
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(_fact(value))}</td></tr>" for key, value in facts.items())
    return f'<table class="facts">{rows}</table>' if rows else "<p>The scan records nothing of where it comes from.</p>"


def _fact(value: Any) -> str:
    value = getattr(value, "tolist", lambda: value)()  # what Zarr gives back may be NumPy's
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value) or "–"


def _label_table(scan: xr.DataTree) -> str:
    """The labels as a table to sort and filter; heads without a label are counted alone."""
    table = label_heads(scan)
    named = table.query("label != 'none'").sort_values("margin", ascending=False)
    left = f"{table['label'].tolist().count('none')} of {table['head'].nunique()} heads earned no label."
    if named.empty:
        return f"<p>{left}</p>"
    columns = {name: title for name, title in _COLUMNS.items() if bool(named[name].notna().any())}
    heads = "".join(
        f'<th aria-sort="none"><button type="button">{escape(title)}</button></th>' for title in columns.values()
    )
    rows = "".join(f"<tr>{''.join(_cell(row, name) for name in columns)}</tr>" for row in named.to_dict("records"))
    return (
        "<p>How to read: a label asks for its threshold of the score, or of the share of the weight beside position 0 "
        "(off sink), and for a score above what uniform attention scores on the same tokens and above its null; margin "
        "is how far above the larger of both; near the line: other tokens may undo it. It misleads where read "
        f"as what a head is for: it tells where a head looks. {left} Click on a column to sort by it.</p>"
        '<p><label>Filter <input type="search" class="filter" placeholder="induction, or 5.1"></label> '
        '<span class="count" role="status"></span></p><div class="scroll"><table class="sortable">'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def labelled_heads(scan: xr.DataTree, most: int = 24) -> list[str]:
    """The heads with a label, in the order of the model: those with the widest margins where there are more."""
    table = label_heads(_last_step(scan)).query("label != 'none'").sort_values("margin", ascending=False)
    first = table.drop_duplicates("head").head(most)
    return first.sort_values(["layer", "index"])["head"].tolist()


def _cell(row: dict[Any, Any], name: str) -> str:
    """A cell, with the number it is sorted by."""
    if name == "label":
        return f"<td>{escape(row[name])}</td>"
    if name == "head":
        return f'<td data-value="{row["layer"] * 10**6 + row["index"]}">{escape(row[name])}</td>'
    if name == "borderline":
        return f'<td data-value="{int(row[name])}">{"yes" * row[name]}</td>'
    value = float(row[name])
    return f'<td data-value="{"" if math.isnan(value) else value}">{number(value)}</td>'


_STYLE = """section { border-top: 1px solid #ddd; padding-top: 0.5rem }
h2 { font-size: 1.1rem }
nav ol { columns: 2; padding-left: 1.5rem }
.source { color: #444; font-size: 12px; margin: 0 0 0 12px }
table { border-collapse: collapse; font-size: 14px }
td, th { text-align: left; padding: 3px 12px 3px 0; vertical-align: top; overflow-wrap: anywhere }
.facts th { font-weight: normal; color: #555; white-space: nowrap }
.scroll { max-height: 30rem; overflow: auto; border: 1px solid #ddd }
.sortable thead { position: sticky; top: 0; background: #fff }
.sortable td, .sortable th { padding: 3px 8px; white-space: nowrap }
.sortable { width: 100% }
.sortable td:nth-child(n+3), .sortable th:nth-child(n+3) { text-align: right; font-variant-numeric: tabular-nums }
.sortable tbody tr:nth-child(even) { background: #f6f6f6 }
.sortable button { font: inherit; font-weight: bold; background: none; border: 0; padding: 0; cursor: pointer }
[aria-sort=ascending] button::after { content: " ▲" }
[aria-sort=descending] button::after { content: " ▼" }"""

# Cells are compared by their number where they have one; what has none stays below, whichever way is sorted.
_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells], section = table.closest("section");
  const filter = section.querySelector("input.filter"), count = section.querySelector(".count");
  const key = (row, i) => {
    const cell = row.cells[i];
    return "value" in cell.dataset ? (cell.dataset.value === "" ? null : Number(cell.dataset.value)) : cell.textContent;
  };
  heads.forEach((head, i) => head.addEventListener("click", () => {
    const numeric = i > 1, was = head.getAttribute("aria-sort");
    const up = was === "none" ? !numeric : was === "descending";
    heads.forEach(other => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const sorted = [...body.rows].sort((a, b) => {
      const x = key(a, i), y = key(b, i);
      if (x === null || y === null) return (x === null) - (y === null);
      return (up ? 1 : -1) * (x < y ? -1 : x > y ? 1 : 0);
    });
    body.append(...sorted);
  }));
  const show = () => {
    const wanted = filter.value.trim().toLowerCase();
    let shown = 0;
    for (const row of body.rows) {
      const texts = [...row.cells].slice(0, 2).map(cell => cell.textContent.toLowerCase());
      row.hidden = !texts.some(text => text.includes(wanted));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${body.rows.length} shown`;
  };
  filter.addEventListener("input", show);
  show();
}
"""
