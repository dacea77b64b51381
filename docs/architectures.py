"""Which architectures metaint reads rightly: tiny random models beside what transformers itself computes.

    python docs/architectures.py [--only "Llama, Gemma 2"] [--out docs/architectures.md]

In: `tests/architectures`, which names the models and holds the comparisons. Out: the matrix, as a page and, with
`--only`, in the terminal alone. No network, no download; a minute or two on one core.
"""

import argparse
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from tests.architectures.cells import ABSOLUTE, CELLS, KAPPA, RELATIVE, Outcome, cells_of  # noqa: E402
from tests.architectures.upstream import UPSTREAM  # noqa: E402
from tests.architectures.zoo import ZOO, quiet  # noqa: E402

MARKS = {"equal": "=", "refused": "r", "nan": "NaN", "no reference": "·", "WRONG": "**WRONG**", "ERROR": "**ERROR**"}
HEADER = """# Architectures

Tiny random models of {count} architectures and variants, built by transformers' own classes, opened through
TransformerLens's bridge on the CPU in float32, and held against what transformers' own modules compute: attentions
with eager attention, the streams between layers, the logits with a head's output zeroed, and all scores times {kappa}.
{summary}

Made by `make architectures` with torch {torch}, transformers {transformers}, transformer-lens {lens} on Python
{python}. Random weights prove equality, not usefulness.

## How to read it

- `=`: equal, within {relative:g} of the largest value and {absolute:g}.
- `r`: refused in a sentence, which is told below by its number.
- `NaN`: metaint says "not a number" where a reference has one: the audit does not find the weights to be what a head
  does (a norm after each addition, a gate, a projection that clips), so it claims nothing.
- `·`: transformers' modules do not give what would be compared, or there is nothing to compare.
- **WRONG**: another number, without a word. **ERROR**: something else than a sentence.

The columns: *logits* of the bridge; *heads*, nine scores of every head by a plain loop over queries; the same with
sequences *left*- and *right*-padded; *residual*, mean norms of the stream at every layer; *ablation*, the change of the
loss without one head of the first and of the last layer that attends; *labels* at low thresholds, beside those of the
attentions that transformers tells; *recalls*, `ov_recall` beside each token put through the module alone; *saturation*
at scores times {kappa}: predictions, streams, and each head's distance from saturated.

A layer without attention (state-space, convolution, linear attention) is NaN in every score of heads, and the
coordinate `layer_kind` says what it is; such layers are checked to be NaN. *attend* counts the layers that attend.

A learnt sink (gpt-oss) takes part of each row. Scores of kinds (`previous_token`, `first_token`, ...) and `sink_rate`
are of the weights as they are, so that a head which mostly looks at its sink scores little; their null is of the same
weights shuffled. `sink_mass` is the remainder. Every other statistic (entropy, effective keys, averaging, largest
weight, distances, ties) is of the row divided by its sum. In `/saturation` the sink is a key whose value is zero: it is
scaled with the rest, and can be the largest or tied.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names of the zoo, separated by semicolons")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "architectures.md")
    options = parser.parse_args()
    names = [name.strip() for name in options.only.split(";")] if options.only else list(ZOO)
    if unknown := [name for name in names if name not in ZOO]:
        sys.exit(f"--only has {unknown[0]!r}: name some of {'; '.join(ZOO)}.")
    torch.set_num_threads(1)
    rows = {}
    for number, name in enumerate(names, 1):
        rows[name] = _cells(name)
        print(f"{number}/{len(names)} {name}: {_in_words(rows[name])}", flush=True)
    if not options.only:
        partial = options.out.with_suffix(".partial")
        partial.write_text(page(rows))
        partial.replace(options.out)


def _cells(name: str) -> dict[str, Outcome]:
    try:
        with quiet():
            return dict(cells_of(name))
    except Exception as error:  # one architecture that can't even be built doesn't stop the others
        return dict.fromkeys(CELLS, Outcome("ERROR", f"{type(error).__name__}: {error}".splitlines()[0][:200]))


def _in_words(cells: dict[str, Outcome]) -> str:
    other = {cell: outcome for cell, outcome in cells.items() if outcome.status != "equal"}
    return ", ".join(f"{cell} {outcome.status} {outcome.note[:90]}" for cell, outcome in other.items()) or "equal"


def page(rows: dict[str, dict[str, Outcome]]) -> str:
    """The page, from the cells of every architecture."""
    notes: dict[str, int] = {}
    lines = [f"| architecture | attend | {' | '.join(CELLS)} |", f"|---|---|{'---|' * len(CELLS)}"]
    for name, cells in rows.items():
        marks = [_mark(outcome, notes) for outcome in cells.values()]
        lines.append(f"| {name} | {_attend(name)} | {' | '.join(marks)} |")
    text = HEADER.format(
        count=len(rows),
        kappa=f"{KAPPA:g}",
        summary=summary(rows),
        torch=version("torch"),
        transformers=version("transformers"),
        lens=version("transformer-lens"),
        python=platform.python_version(),
        relative=RELATIVE,
        absolute=ABSOLUTE,
    )
    sentences = [f"{number}. {note}" for note, number in notes.items()]
    return "\n".join([text + "## The matrix\n", *lines, "", "## What the refusals say\n", *sentences, "", UPSTREAM])


def summary(rows: dict[str, dict[str, Outcome]]) -> str:
    """How many are equal in every cell, and what is to be said of the others."""
    statuses = [[outcome.status for outcome in cells.values()] for cells in rows.values()]
    whole = sum(set(row) == {"equal"} for row in statuses)
    fine = sum(set(row) <= {"equal", "nan", "no reference"} for row in statuses) - whole
    wrong = sum(bool({"WRONG", "ERROR"} & set(row)) for row in statuses)
    some = len(rows) - whole - fine - wrong
    return (
        f"{whole} are equal in every cell, {fine} in every cell that is a number in both, {some} have cells that are "
        f"refused in a sentence, and {wrong} give a number that is another or something else than a sentence."
    )


def _mark(outcome: Outcome, notes: dict[str, int]) -> str:
    mark = MARKS[outcome.status]
    if outcome.status not in ("refused", "WRONG", "ERROR"):
        return mark
    note = outcome.note.replace("|", "\\|")[:300]
    return f"{mark} {notes.setdefault(note, len(notes) + 1)}"


def _attend(name: str) -> str:
    attends = ZOO[name].attends
    return "all" if attends is None else str(len(attends))


if __name__ == "__main__":
    main()
