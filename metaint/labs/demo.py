"""`metaint demo`: train the toy, scan every checkpoint, and show when its heads appeared.

In: a text. Out: the toy in the user's cache directory, a scan with a `step` dimension, and what to try next.
"""

import time
from pathlib import Path

import xarray as xr
from rich.console import Console
from tqdm.auto import tqdm

from metaint.labels import label_heads
from metaint.labs.birth_training import Training, restore, train
from metaint.models.toy import save_toy, toy_of
from metaint.scanning import default_tokens, scan
from metaint.store import save
from metaint.tasks import bigram
from metaint.tasks.text import fold_prose
from metaint.views.tables import print_births, print_scan

# Most characters are triggers in turn: with the paper's 5 the head learns the frequent ones alone. None may be its
# own output, which would end a sequence in one repeated character.
TRIGGERS = 48
TARGET = 0.85


def run(console: Console, text: str, seed: int = 0, out: Path = Path("demo.zarr")) -> xr.DataTree:
    """Train, scan and print; returns the scan of all checkpoints that was saved to `out`.

    Raises InputError for a text too small to make the task from, StoreError if a result can't be written.
    """
    began = time.perf_counter()
    task = bigram(fold_prose(text), trigger_count=TRIGGERS, no_repeat=True)
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
        f"Done in {time.perf_counter() - began:.0f} s.\n"
        f"  the model    {folder}  (metaint.open_model('toy'))\n"
        f"  the scans    {path.resolve()}  (metaint.load('{path}'))\n"
        "Next: [bold]metaint scan toy --sort previous_token[/]",
        soft_wrap=True,
    )
    return births


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
        found = label_heads(heads.sel(step=step, drop=True))
        named = found[found["label"] != "none"]
        held = set(zip(named["head"], named["label"], strict=True))
        since = {pair: since.get(pair, int(step)) for pair in held}
    return since
