"""What every step of a scan costs on a real model, beside the model's own forward pass and Hugging Face's.

    python benchmarks/real.py [--model smollm2] [--threads 2] [--rounds 3] [--minutes 6]

On SmolLM2 (or another model by name or folder), on windows of Python's documentation, in one process and in turn: the
forward pass under TransformerLens and that of transformers with SDPA, opening, the hook audit, scans with `HeadProbe`
at three lengths and with each other probe alone, and last the command line with four probes in a process of its own.
After the first round a step is repeated while it has taken less than 20 seconds and the run less than `--minutes`.
Ratios are medians over the rounds of each round's ratio to the forward pass of the same tokens (8 x 128 where a step
has none), with the lowest and the highest. A scan makes no logits that no probe reads, so it can take less time than a
forward pass.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[1]
SIZES = ((8, 128), (4, 256), (2, 1024))
PROBES = ("ResidualProbe", "InnerProbe", "SaturationProbe", "MemoryProbe", "WeightProbe")
COMMAND = ("--probes", "residual,inner,saturation,weights", "--tokens", "2000")
# Seconds after which a step is not repeated.
ENOUGH = 20
OURS, THEIRS = "forward pass", "transformers, SDPA"


class Step(NamedTuple):
    """What is timed: a call, and the size of the batch whose forward passes it is compared with."""

    name: str
    size: tuple[int, int]
    run: Callable[[], Any]


def steps_of(name: str, text: Path) -> list[Step]:
    """Everything that is timed, forward passes first; each call runs once."""
    import metaint
    from metaint.scanning.given import text_tokens

    model = metaint.open_model(name, device="cpu")
    plain = reference(name)
    tokens = {size: text_tokens(model, text.read_text(), size[1], size[0]) for size in SIZES}
    steps: list[Step] = []
    for size, batch in tokens.items():
        steps.append(Step(OURS, size, lambda batch=batch: model(batch)))
        steps.append(Step(THEIRS, size, lambda batch=batch: plain(batch)))
        steps.append(Step("HeadProbe", size, lambda batch=batch: metaint.scan(model, batch)))
    first = SIZES[0]
    for kind in PROBES:
        probe = getattr(metaint, kind)
        steps.append(Step(kind, first, lambda probe=probe: metaint.scan(model, tokens[first], [probe()])))
    steps.append(Step("audit", first, lambda: metaint.audit(model, refresh=True)))
    steps.append(Step("open_model", first, lambda: metaint.open_model(name, device="cpu")))
    command = [
        sys.executable,
        "-c",
        "from metaint.shell.main import main; main()",
        "scan",
        name,
        *COMMAND,
        "--text",
        str(text),
    ]
    steps.append(Step("command, 4 probes", first, lambda: subprocess.run(command, check=True, capture_output=True)))
    return steps


def reference(name: str) -> Any:
    """The same model as transformers runs it."""
    from transformers import AutoModelForCausalLM

    from metaint.models.smollm2 import converted

    folder = converted()[0] if name == "smollm2" else name
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval()


def measure(steps: list[Step], rounds: int, seconds: float) -> dict[Step, list[float]]:
    """Seconds of each step in each round that it took part in; all steps take part in the first."""
    end = time.perf_counter() + seconds
    taken: dict[Step, list[float]] = {step: [] for step in steps}
    for step in steps[: 3 * len(SIZES)]:  # warms up, and audits
        step.run()
    with tqdm(total=rounds * len(steps), leave=False) as bar:
        for _ in range(rounds):
            for step in steps:
                bar.set_description(f"{step.name}, {_words(step.size)}")
                last = taken[step][-1:]
                if not last or (sum(taken[step]) < ENOUGH and time.perf_counter() + last[0] < end):
                    began = time.perf_counter()
                    step.run()
                    taken[step].append(time.perf_counter() - began)
                bar.update()
    return taken


def report(taken: dict[Step, list[float]]) -> None:
    """A line for each step: seconds, and ratios to both forward passes of the same round."""
    base = {(step.name, step.size): seconds for step, seconds in taken.items()}
    print(f"{'':20}{'tokens':10}{'seconds (range)':>24}{'x forward (range)':>24}{'x SDPA':>9}")
    for step, seconds in taken.items():
        ours, theirs = (_ratios(seconds, base[name, step.size]) for name in (OURS, THEIRS))
        print(
            f"{step.name:20}{_words(step.size):10}{_spread(seconds):>24}{_spread(ours):>24}"
            f"{statistics.median(theirs):9.2f}"
        )


def _ratios(seconds: list[float], base: list[float]) -> list[float]:
    return [a / b for a, b in zip(seconds, base, strict=False)]


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _words(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2", help="a name, or a folder in Hugging Face's format")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=6, help="begin no repetition that would end later")
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS=str(options.threads), PYTHONPATH=str(ROOT))  # for the command's process
    torch.set_num_threads(options.threads)
    from metaint.tasks import python_prose

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        text = Path(folder) / "prose.txt"
        text.write_text(python_prose())
        taken = measure(steps_of(options.model, text), options.rounds, 60 * options.minutes)
    print(f"{options.model}: torch {torch.__version__}, {options.threads} threads, {os.cpu_count()} cores")
    report(taken)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
