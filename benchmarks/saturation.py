"""What the sweeps of saturation cost: seven kappas in one pass, and all parameters at eleven scales.

    python benchmarks/saturation.py [--length 256] [--rounds 3] [--sequences 8]

On a random model of GPT-2-small's shape. The kappa sweep is held against the plain forward pass and against what one
would do without stacking, a pass with edited attention for each kappa; every pass has as many sequences, copies
counted, since a larger batch costs more a sequence on a CPU. The sweep of all parameters is held against
copying the model for each scale. Ratios are medians over the rounds of each round's ratio (lowest to highest); peak
memory is that of a process of its own above the plain forward pass.
"""

import argparse
import copy
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

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def build() -> Any:
    """A random model of GPT-2-small's shape."""
    import tempfile

    from transformers import GPT2Config, GPT2LMHeadModel

    from metaint import open_model

    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
        return open_model(folder, device="cpu")


def separate(model: Any, tokens: torch.Tensor, kappas: tuple[float, ...]) -> list[torch.Tensor]:
    """One cached pass for each kappa with scaled attention at hook_z, compared with the plain one afterwards."""
    from metaint.measures.saturation import sharpened

    names = ("hook_resid_post", "hook_pattern", "hook_z", "hook_v")
    _, plain = model.run_with_cache(tokens, return_type=None, names_filter=lambda name: name.endswith(names))
    results = []
    for kappa in kappas:
        held: dict[str, torch.Tensor] = {}

        def hold(x: torch.Tensor, hook: Any, held: dict = held) -> None:
            held[hook.name.split(".")[-2]] = x

        def edit(z: torch.Tensor, hook: Any, held: dict = held, kappa: float = kappa) -> torch.Tensor:
            return torch.einsum("bhqk,bkhd->bqhd", sharpened(held["pattern"], kappa), held["v"]).reshape(z.shape)

        hooks: list[tuple[str, Any]] = []
        for layer in range(model.cfg.n_layers):
            attention = f"blocks.{layer}.attn"
            hooks.append((f"{attention}.hook_v", lambda x, hook, held=held: held.update(v=x)))
            hooks.append((f"{attention}.hook_pattern", lambda x, hook, held=held: held.update(pattern=x)))
            hooks.append((f"{attention}.hook_z", edit))
        with model.hooks(fwd_hooks=hooks):
            _, cache = model.run_with_cache(
                tokens, return_type=None, names_filter=lambda name: name.endswith("hook_resid_post")
            )
        for layer in range(model.cfg.n_layers):
            name = f"blocks.{layer}.hook_resid_post"
            results.append(torch.cosine_similarity(plain[name], cache[name], dim=-1).mean())
            pattern = plain[f"blocks.{layer}.attn.hook_pattern"]
            results.append((sharpened(pattern, kappa) - sharpened(pattern, float("inf"))).abs().sum(-1).mean())
    return results


def copied(model: Any, tokens: torch.Tensor, scales: tuple[float, ...]) -> list[torch.Tensor]:
    """A deep copy of the model for each scale, its parameters multiplied, its cached streams compared."""

    def streams(which: Any) -> list[torch.Tensor]:
        _, cache = which.run_with_cache(tokens, return_type=None, names_filter=lambda n: n.endswith("hook_resid_post"))
        return list(cache.values())

    from metaint.models.parameters import own_parameters

    plain, results = streams(model), []
    for scale in scales:
        other = copy.deepcopy(model)
        for parameter in own_parameters(other).values():
            parameter.mul_(scale)
        results += [torch.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(plain, streams(other), strict=True)]
    return results


def variants(model: Any, tokens: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What is compared, by name."""
    import metaint
    from metaint.measures.saturation import KAPPAS

    scales = tuple(2.0**i for i in range(1, 11))
    return {
        "forward": lambda: model(tokens, return_type="logits"),
        "SaturationProbe, 7 kappas": lambda: metaint.scan(model, tokens, [metaint.SaturationProbe()]),
        "a pass for each kappa": lambda: separate(model, tokens, KAPPAS),
        "saturate, 11 scales": lambda: metaint.saturate(model, tokens, scales),
        "a copy for each scale": lambda: copied(model, tokens, scales),
    }


def prepared(length: int, sequences: int) -> dict[str, Callable[[], Any]]:
    model = build()
    tokens = torch.randint(50257, (sequences, length), generator=torch.Generator().manual_seed(0))
    for run in variants(model, tokens[:, :8]).values():  # the audit, and whatever else happens once
        run()
    return variants(model, tokens)


@torch.no_grad()
def peak(name: str, length: int, sequences: int) -> float:
    """Peak memory of this process in MiB while one variant runs."""
    run = prepared(length, sequences)[name]
    CLEAR.write_text("5")  # Linux: forget the peak so far, which is that of building the model
    run()
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def in_own_process(name: str, options: argparse.Namespace) -> float:
    command = [sys.executable, __file__, "--peak", name, "--length", str(options.length)]
    command += ["--sequences", str(options.sequences)]
    # glibc gives freed tensors back at once; else what it keeps for later is tens of MiB of noise.
    surroundings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=surroundings)
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def compare(options: argparse.Namespace) -> None:
    run = prepared(options.length, options.sequences)
    times: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(options.rounds):
        for name, call in run.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    base = in_own_process("forward", options)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.sequences} x {options.length} tokens"
    )
    for name, taken in times.items():
        each = [mine / plain for mine, plain in zip(taken, times["forward"], strict=True)]
        above = in_own_process(name, options) - base
        spread = f"({min(each):.2f} to {max(each):.2f})"
        seconds = statistics.median(taken)
        print(f"{name:34}{seconds:8.2f} s {statistics.median(each):7.2f} x forward {spread:18}{above:7.0f} MiB above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak, options.length, options.sequences))
    else:
        compare(options)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
