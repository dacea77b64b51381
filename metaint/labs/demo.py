"""`metaint demo`: the birth of an induction head in a toy, then the heads of a real language model.

In: a text. Out: the toy in the user's cache directory, a scan of its checkpoints, a report on SmolLM2's heads, and what
to try next.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xarray as xr
from rich.console import Console
from torch import Tensor
from tqdm.auto import tqdm

from metaint.errors import ModelError
from metaint.labs.birth.training import Training, restore, train
from metaint.models.open import open_model
from metaint.scanning.given import default_tokens, text_tokens
from metaint.scanning.scan import scan
from metaint.scans.labels import label_heads, telling_heads
from metaint.scans.store import save
from metaint.tasks import bigram
from metaint.tasks.text import fold_prose
from metaint.toys.embedded import save_toy, toy_of
from metaint.views.attention.patterns import show_attention
from metaint.views.drawing.terminal import number, plain_table
from metaint.views.drawing.view import View
from metaint.views.groups.head_tables import print_scan, print_telling
from metaint.views.report import report

# Most characters are triggers in turn: with the paper's 5 the head learns the frequent ones alone. None may be its
# own output, which would end a sequence in one repeated character.
TRIGGERS = 48
TARGET = 0.85
# What SmolLM2 reads: sequences of random tokens that repeat, and windows of so many tokens of text.
REPEATED = 20
WINDOWS = 16
LENGTH = 128
# The heads whose attention the report shows, and the positions it shows of a sequence.
SHOWN = 9
DRAWN = 101


def run(
    console: Console, text: str, seed: int = 0, out: Path = Path("demo.zarr"), page: Path = Path("demo.html")
) -> xr.DataTree:
    """Both acts; returns the scan of the toy's checkpoints, which `out` holds. The report on SmolLM2 goes to `page`.

    Raises InputError for a text too small to make the task from, StoreError if a result can't be written. Where
    SmolLM2 can't be opened a sentence says so.
    """
    began = time.perf_counter()
    births = show_birth(console, text, seed, out)
    show_smollm2(console, text, seed, page)
    console.print(f"Done in {time.perf_counter() - began:.0f} s.")
    return births


def show_birth(console: Console, text: str, seed: int, out: Path) -> xr.DataTree:
    """Train the toy, scan its checkpoints, and print when its heads appeared."""
    task = bigram(fold_prose(text), trigger_count=TRIGGERS, no_repeat=True)
    console.rule("1. A toy learns to look things up", align="left")
    console.print(
        f"Task: sequences over {task.vocab} characters with the text's own bigrams, in which {TRIGGERS} random trigger "
        "characters are each followed by an output drawn anew for every sequence: to predict it, a model must look it "
        "up in the context.\nModel: two attention layers of one head each, no MLP, no normalisation (the simplified "
        "model of Bietti et al. 2023).\n"
    )
    training = train(task, target=TARGET, seed=seed, progress=True)
    report_training(console, training)
    births = scan_checkpoints(training, seed)
    console.print()
    print_scan(console, births.isel(step=-1))
    print_births(console, births, first_labelled(births))
    last = training.history.isel(step=-1)
    info = {"seed": seed, "accuracy": float(last["accuracy"]), "steps": int(last["step"])}
    folder = save_toy(toy_of(training.model), list(task.vocabulary), info)
    path = save(births, out)
    console.print(
        f"  the toy        {folder}  (metaint.open_model('toy'))\n"
        f"  its scans      {path.resolve()}  (metaint.load('{path}'))\n",
        soft_wrap=True,
    )
    return births


def show_smollm2(console: Console, text: str, seed: int, page: Path) -> None:
    """Scan SmolLM2 on repeated random tokens and on text; print its most telling heads, and write a report on them."""
    console.rule("2. The heads of a real language model", align="left")
    console.print("Opening SmolLM2-135M-Instruct (the first time, its weights are converted: some 20 s).")
    try:
        model = open_model("smollm2")
    except ModelError as error:
        console.print(f"SmolLM2 is left out: {error}\n", soft_wrap=True)
        return
    inputs = reference_inputs(model, text, seed)
    scans = {
        task: scan(model, tokens, seed=seed, progress=True, attributes={"task": task})
        for task, tokens in inputs.items()
    }
    layers, heads = model.cfg.n_layers, model.cfg.n_heads
    console.print(
        f"SmolLM2-135M-Instruct: {layers} layers x {heads} heads, read on {REPEATED} sequences of random tokens that "
        f"repeat, and on {WINDOWS} x {LENGTH} tokens of prose.\n"
    )
    print_telling(console, scans["repeated_tokens"], scans["text"])
    report(scans["repeated_tokens"], page, attention_views(model, scans["repeated_tokens"], inputs))
    console.print(
        f"  the report     {page.resolve()}  (opens without a network)\n"
        "Try next:\n"
        "  [bold]metaint scan smollm2 --text essay.txt --figures figures.html[/]   a text of your own\n"
        "  [bold]metaint audit smollm2[/]                                          what its hooks really carry\n"
        "  model = metaint.open_model('smollm2')                            in a notebook: notebooks/07\n",
        soft_wrap=True,
    )


def reference_inputs(model: Any, text: str, seed: int = 0) -> dict[str, Tensor]:
    """What SmolLM2's heads are read on, here and in the tables of `docs/heads`, by task: [sequence, position] each."""
    return {
        "repeated_tokens": default_tokens(model, batch=REPEATED, seed=seed),
        "text": text_tokens(model, text, LENGTH, WINDOWS, seed=seed),
    }


def attention_views(model: Any, scanned: xr.DataTree, inputs: dict[str, Tensor]) -> dict[str, View]:
    """Where the most telling heads look: on a sequence that repeats, and on the first words of a window of text."""
    heads = telling_heads(scanned, SHOWN)["head"].tolist()
    titles = {"repeated_tokens": "random tokens that repeat", "text": "text"}
    return {
        f"Attention of the most telling heads on {title}": show_attention(model, inputs[task][0, :DRAWN], heads)
        for task, title in titles.items()
    }


def report_training(console: Console, training: Training) -> None:
    """In-context accuracy at the end, and when it passed its target."""
    last, passed = training.history.isel(step=-1), training.history.attrs["passed_at"]
    when = f"passed {TARGET:g} at step {passed}" if passed >= 0 else f"has not passed {TARGET:g}"
    console.print(
        f"In-context accuracy on held-out sequences: {float(last['accuracy']):.3f} after {int(last['step'])} steps "
        f"({float(last['accuracy_without_copies']):.3f} without positions whose target equals the current token: here "
        f"there are none, since no trigger is its own output); it {when}."
    )


def scan_checkpoints(training: Training, seed: int) -> xr.DataTree:
    """`/heads` at every checkpoint along a `step` dimension, on the same repeated random tokens, and `/training`."""
    model = training.model
    tokens = default_tokens(model, seed=seed)
    scans = [
        scan(restore(model, checkpoint), tokens, seed=seed, attributes={"task": "repeated_tokens"})
        for checkpoint in tqdm(training.checkpoints, desc="scanning checkpoints", leave=False)
    ]
    steps = xr.DataArray([step for step, _ in training.checkpoints], dims="step", name="step")
    heads = xr.concat([s["heads"].to_dataset() for s in scans], dim=steps, combine_attrs="override")
    root = xr.Dataset(attrs=scans[-1].attrs)
    return xr.DataTree.from_dict({"/": root, "/heads": heads, "/training": training.history})


def first_labelled(births: xr.DataTree) -> dict[tuple[str, str], int]:
    """The first checkpoint (step) from which on a head holds a label to the end, by (head, label)."""
    heads = births["heads"].to_dataset()
    since: dict[tuple[str, str], int] = {}
    for step in heads["step"].values:
        labelled = label_heads(heads.sel(step=step, drop=True))
        named = labelled[labelled["label"] != "none"]
        held = set(zip(named["head"], named["label"], strict=True))
        since = {pair: since.get(pair, int(step)) for pair in held}
    return since


def print_births(console: Console, births: xr.DataTree, since: Mapping[tuple[str, str], int]) -> None:
    """How two scores of the heads that hold such a label at the end grew over the checkpoints, and since when."""
    heads, training = births["heads"].to_dataset(), births["training"].to_dataset()
    wanted = {"previous_token": "previous_token", "induction": "induction"}
    followed = sorted((head, label) for head, label in since if label in wanted)
    if not followed:
        console.print("No head holds the previous-token or the induction label at the end.\n")
        return
    columns = ("step", "in-context accuracy", *(f"{head} {label}" for head, label in followed))
    table = plain_table("Over training", numbers=columns, no_wrap=True)
    for step in heads["step"].values:
        cells = []
        for head, label in followed:
            layer, index = (int(part) for part in head.split("."))
            cell = number(float(heads[wanted[label]].sel(step=step, layer=layer, head=index)))
            if step >= since[head, label]:
                cell = f"[bold]{cell}[/]"
            cells.append(cell)
        table.add_row(str(int(step)), number(float(training["accuracy"].sel(step=step))), *cells)
    console.print(table)
    for head, label in sorted(followed, key=lambda pair: since[pair]):
        console.print(f"Head {head} appeared as {label} head at step {since[head, label]} (bold from there on).")
    console.print()
