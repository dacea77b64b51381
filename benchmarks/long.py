"""What a scan of long contexts costs: streamed and eager, beside SDPA's forward pass and TransformerLens's own.

    python benchmarks/long.py [--lengths 512 1024 2048 4096] [--threads 2] [--rounds 3] [--most 2048]

On SmolLM2, on one sequence of random tokens of each length. Every run is a process of its own, which opens the model,
runs a short pass (for streamed scans the check of the model with it) and then the one that is measured; runs take
turns, so that a slow moment of the machine meets all alike. Seconds are the fewest of the rounds, and the ratio is the
median over the rounds of each round's ratio to SDPA's forward pass, which makes no logits. Peak memory is that of the
measured pass above what the process held before it. What holds whole patterns is left out beyond `--most` tokens.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SDPA, OURS = "SDPA, no logits", "streamed, every measure"
PAIRS = ("previous_token", "first_token", "duplicate_token", "induction", "prefix_match")
# Runs that hold the pattern of a layer, or of all.
WHOLE = ("TransformerLens", "eager, every measure")
NAMES = (SDPA, "SDPA", "streamed, pairs", OURS, *WHOLE)


def measured(name: str) -> Callable[[torch.Tensor], Any]:
    """What a run measures, as a function of tokens."""
    import metaint

    if name.startswith("SDPA"):
        from transformers import AutoModelForCausalLM

        from metaint.models.smollm2 import converted

        plain = AutoModelForCausalLM.from_pretrained(converted()[0], dtype=torch.float32, attn_implementation="sdpa")
        part = plain.eval().model if name == SDPA else plain.eval()
        return lambda tokens: part(tokens, use_cache=False)
    model = metaint.open_model("smollm2", device="cpu")
    if name == "TransformerLens":
        return lambda tokens: model(tokens, return_type=None)
    way = name.split(",")[0]
    measures = PAIRS if name.endswith("pairs") else None
    return lambda tokens: metaint.scan(model, tokens, [metaint.HeadProbe(measures)], attention=way)


def child(name: str, length: int, threads: int) -> None:
    """Measure one run and print seconds and MiB."""
    torch.set_num_threads(threads)
    tokens = torch.randint(100, 40_000, (1, length), generator=torch.Generator().manual_seed(0))
    run = measured(name)
    with torch.no_grad():
        run(tokens[:, :64])
        CLEAR.write_text("5")  # the peak is counted from here
        before = status("VmRSS")
        start = time.perf_counter()
        run(tokens)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "MiB": (status("VmHWM") - before) / 1024}))


def status(field: str) -> int:
    """A line of this process's status, in KiB."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(field))


def ask(name: str, length: int, threads: int) -> dict[str, float]:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--child", name, "--lengths", str(length), "--threads", str(threads)]
    # Freed memory goes back at once, so that what a run held before does not hide what it needs.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_TRIM_THRESHOLD_": "0", "HF_HUB_OFFLINE": "1"}
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(answer.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=int, default=2048)
    parser.add_argument("--child", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.lengths[0], options.threads)
        return
    print(f"{'tokens':>6}  {'run':<24}{'seconds':>9}{'x SDPA':>8}{'x TransformerLens':>19}{'MiB above':>11}")
    for length in options.lengths:
        names = [name for name in NAMES if length <= options.most or name not in WHOLE]
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(options.rounds):
            for name in names:
                runs[name].append(ask(name, length, options.threads))
        for name, each in runs.items():
            ratio = f"{_ratio(each, runs[SDPA]):.2f}"
            lens = f"{_ratio(each, runs[WHOLE[0]]):.2f}" if WHOLE[0] in runs else "-"
            fewest, most = min(run["seconds"] for run in each), max(run["MiB"] for run in each)
            print(f"{length:>6}  {name:<24}{fewest:>9.2f}{ratio:>8}{lens:>19}{most:>11.0f}", flush=True)


def _ratio(runs: list[dict[str, float]], others: list[dict[str, float]]) -> float:
    return statistics.median(a["seconds"] / b["seconds"] for a, b in zip(runs, others, strict=True))


if __name__ == "__main__":
    main()
