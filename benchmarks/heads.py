"""What `HeadProbe` and `OutputProbe` cost beside a forward pass, and beside `transformer_lens.head_detector`.

    python benchmarks/heads.py [--lengths 512 1024] [--rounds 7]

On a random model of GPT-2-small's shape, in one process and in turn (so that a slow moment of the machine meets all
alike): a plain forward pass, the same pass under `metaint.attach` with every head measure, with what heads write as
well, without and with what that says to the vocabulary, `run_with_cache` alone, and `detect_head` for its three
kinds. Ratios are medians over the rounds of each round's ratio to its own forward pass. Peak memory is measured in a
process for each, above the peak of a process that runs the plain pass.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
WRITES, SAYS = "and OutputProbe", "and what it says"
KINDS = ("previous_token_head", "duplicate_token_head", "induction_head")


def build() -> Any:
    """A random model of GPT-2-small's shape; two thousand positions, since detect_head wants one to spare."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from metaint import open_model

    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(GPT2Config(n_positions=2048)).save_pretrained(folder)
        model = open_model(folder, device="cpu")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def variants(model: Any, tokens: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What is compared: each call runs once."""
    from transformer_lens.head_detector import detect_head

    import metaint

    def forward() -> Any:
        return model(tokens, return_type=None)

    def read(*probes: Any) -> Any:
        with metaint.attach(model, *probes):
            forward()
        return probes

    def probe() -> Any:
        return read(metaint.HeadProbe())

    def writes() -> Any:
        return read(metaint.HeadProbe(), metaint.OutputProbe(positions=0))

    def says() -> Any:
        return read(metaint.HeadProbe(), metaint.OutputProbe())

    def cache() -> Any:
        return model.run_with_cache(tokens, return_type=None)

    def detect() -> Any:
        model.to_tokens = lambda *_, **__: tokens  # it takes strings alone, and the random model has no words
        return [detect_head(model, "random tokens", kind) for kind in KINDS]

    return {
        "forward": forward,
        "HeadProbe": probe,
        WRITES: writes,
        SAYS: says,
        "run_with_cache": cache,
        "detect_head x 3": detect,
    }


def repeated(length: int) -> torch.Tensor:
    from metaint.tasks import repeated_tokens

    return repeated_tokens(50257, length // 2, batch=1)


def peak(name: str, length: int) -> float:
    """Peak memory of this process in MiB while one variant runs, once the model is built and all code is loaded."""
    run = variants(build(), repeated(length))
    for warm in ("HeadProbe", name):
        run[warm]()
    CLEAR.write_text("5")  # Linux: forget the peak so far, which is that of building the model
    for _ in range(2):
        run[name]()
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def compare(lengths: list[int], rounds: int) -> None:
    model = build()
    for length in lengths:
        run = variants(model, repeated(length))
        times: dict[str, list[float]] = {name: [] for name in run}
        for turn in range(rounds + 1):
            for name, call in run.items():
                began = time.perf_counter()
                call()
                if turn:  # the first round warms up
                    times[name].append(time.perf_counter() - began)
        memory = {name: in_own_process(name, length) if CLEAR.exists() else float("nan") for name in run}
        report(length, times, memory)


def in_own_process(name: str, length: int) -> float:
    command = [sys.executable, __file__, "--peak", name, "--lengths", str(length)]
    # glibc gives freed tensors back at once; else what it keeps for later is tens of MiB of noise.
    prompt = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=prompt)
    return json.loads(done.stdout.splitlines()[-1])


def report(length: int, times: dict[str, list[float]], memory: dict[str, float]) -> None:
    pattern = 12 * length * length * 4 / 2**20
    print(f"\nT = {length}; one layer's pattern is {pattern:.0f} MiB in float32")
    print(f"{'':18}{'seconds':>9}{'min':>8}{'max':>8}{'ratio':>8}{'min':>8}{'max':>8}{'peak above forward':>22}")
    ratios = {}
    for name, taken in times.items():
        each = [mine / base for mine, base in zip(taken, times["forward"], strict=True)]
        ratios[name] = statistics.median(each)
        above = memory[name] - memory["forward"]
        print(
            f"{name:18}{statistics.median(taken):9.3f}{min(taken):8.3f}{max(taken):8.3f}{ratios[name]:8.3f}"
            f"{min(each):8.3f}{max(each):8.3f}{above:14.0f} MiB"
        )
    ours, theirs = (memory[name] - memory["forward"] for name in ("HeadProbe", "detect_head x 3"))
    print(
        f"HeadProbe, {len(measures())} measures in one pass: {ratios['detect_head x 3'] / ratios['HeadProbe']:.1f} x "
        f"faster than detect_head for three kinds, peak {theirs - ours:.0f} MiB lower; "
        f"target 1.15: {ratios['HeadProbe']:.3f}, target {pattern:.0f} MiB: {ours:.0f} MiB\n"
        f"with OutputProbe, target 1.35: {ratios[WRITES]:.3f}, and {ratios[SAYS] - ratios[WRITES]:.3f} more for what "
        "64 positions of each head say, the unembedding's covariance once a block of passes among it"
    )


def measures() -> tuple[Any, ...]:
    from metaint.measures.attention import HEAD_MEASURES

    return HEAD_MEASURES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak", choices=["forward", "HeadProbe", WRITES, SAYS, "run_with_cache", "detect_head x 3"])
    options = parser.parse_args()
    with torch.no_grad():
        if options.peak:
            print(json.dumps(peak(options.peak, options.lengths[0])))
        else:
            print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {options.rounds} rounds")
            compare(options.lengths, options.rounds)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
