"""What `ResidualProbe` and `InnerProbe` cost beside the model's own forward pass, and beside plain autograd.

    python benchmarks/residual.py [--length 1024] [--rounds 5] [--positions 16 64 256] [--vocabularies 8192 50257]

On random models of GPT-2-small's shape, in one process and in turn. The naive way keeps the residual streams in a
cache and asks autograd for the gradient of the loss at each of them, for the true and for a permuted target, with
entropy, rank and divergence beside: once at every position, as a first notebook would, and once at the very
positions that `InnerProbe` samples. Ratios are medians over the rounds of each round's ratio (lowest to highest).
With `--memory` instead: the peak of the process above the plain forward pass, each variant in a process of its own.
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
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div, layer_norm

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def build(vocabulary: int) -> Any:
    """A random model of GPT-2-small's shape with a vocabulary of this size."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from metaint import open_model

    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary)).save_pretrained(folder)
        model = open_model(folder, device="cpu")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def naive(model: Any, tokens: torch.Tensor, positions: int | None) -> list[torch.Tensor]:
    """Loss, gradients, entropy, rank and divergence at every point of the stream, by autograd."""
    streams = ("hook_resid_pre", "hook_resid_mid", f"blocks.{model.cfg.n_layers - 1}.hook_resid_post")
    _, cache = model.run_with_cache(tokens, return_type=None, names_filter=lambda name: name.endswith(streams))
    points = [z for name, z in cache.items() if name.endswith(streams)]
    rows = torch.arange(tokens.shape[1] - 1) if positions is None else torch.randperm(tokens.shape[1] - 1)[:positions]
    targets = tokens[0, rows + 1]
    gain, bias = (p.detach() for p in model.ln_final.parameters())
    weight = model.W_U.detach()
    final = (layer_norm(points[-1][0, rows], gain.shape, gain, bias, 1e-5) @ weight).log_softmax(-1)
    results = []
    for point in points:
        z = point[0, rows].detach().requires_grad_()
        with torch.enable_grad():
            logits = layer_norm(z, gain.shape, gain, bias, 1e-5) @ weight
            loss = cross_entropy(logits, targets, reduction="none")
            other = cross_entropy(logits, targets.flip(0), reduction="none")
            gradient = torch.autograd.grad(loss.sum(), z, retain_graph=True)[0]
            gradient_other = torch.autograd.grad(other.sum(), z)[0]
        logits = logits.detach()
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        rank = (logits > logits.gather(1, targets[:, None])).sum(-1)
        divergence = kl_div(log_p, final, reduction="none", log_target=True).sum(-1)
        results += [loss.detach(), gradient, gradient_other, entropy, rank, divergence]
    return results


def compare(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for counted in [False] + [True] * rounds:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if counted:
                times[name].append(time.perf_counter() - start)
    return times


def report(title: str, times: dict[str, list[float]]) -> None:
    """A line for each variant: its seconds and its ratio to the forward pass of the same round."""
    print(f"\n{title}")
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times["forward"], strict=True)]
        spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:36} {statistics.median(seconds):8.2f} s {statistics.median(ratios):8.2f} x forward {spread}")


def peak(vocabulary: int, length: int, positions: int | None) -> float:
    """Peak memory of this process in MiB while the model runs, with an InnerProbe of so many positions or without."""
    import metaint

    model = build(vocabulary)
    tokens = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    probes = [] if positions is None else [metaint.InnerProbe(positions)]
    for probe in probes:
        probe.prepare(model)
    CLEAR.write_text("5")  # Linux: forget the peak so far, which is that of building the model
    for _ in range(2):
        with torch.no_grad(), metaint.attach(model, *probes) if probes else torch.no_grad():
            model(tokens, return_type=None)
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def report_memory(options: argparse.Namespace) -> None:
    """A line for each vocabulary and number of positions, each measured in a process of its own."""
    # glibc gives freed tensors back at once; else what it keeps for later is tens of MiB of noise.
    surroundings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    for vocabulary in options.vocabularies:
        base = None
        for count in [0, *options.positions]:
            command = [sys.executable, __file__, "--peak", str(count), "--length", str(options.length)]
            command += ["--vocabularies", str(vocabulary)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=surroundings)
            peak = float(done.stdout.splitlines()[-1])
            base = peak if base is None else base
            what = f"InnerProbe, {count} positions" if count else "forward"
            print(f"vocabulary of {vocabulary:6}: {what:26} peak {peak:7.0f} MiB, {peak - base:5.0f} above forward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--positions", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 50257, 128256])
    parser.add_argument("--memory", action="store_true", help="peak memory, not time")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        print(peak(options.vocabularies[0], options.length, options.peak or None))
        return
    if options.memory:
        report_memory(options)
        return
    import metaint

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.length} tokens")
    for vocabulary in options.vocabularies:
        model = build(vocabulary)
        tokens = torch.randint(vocabulary, (1, options.length), generator=torch.Generator().manual_seed(0))

        def probed(probe: Callable[[], Any], model: Any = model, tokens: torch.Tensor = tokens) -> Callable[[], Any]:
            def run() -> None:
                with metaint.attach(model, probe()):
                    model(tokens, return_type=None)

            return run

        def autograd(
            positions: int | None, model: Any = model, tokens: torch.Tensor = tokens
        ) -> Callable[[], list[torch.Tensor]]:
            return lambda: naive(model, tokens, positions)

        runs: dict[str, Callable[[], Any]] = {"forward": lambda m=model, t=tokens: m(t, return_type=None)}
        runs["ResidualProbe"] = probed(metaint.ResidualProbe)
        for count in options.positions:
            runs[f"InnerProbe, {count} positions"] = probed(lambda n=count: metaint.InnerProbe(n))
            runs[f"autograd, {count} positions"] = autograd(count)
        if vocabulary <= 60000:  # beyond, every position at once does not fit in memory
            runs["autograd, every position"] = autograd(None)
        with torch.no_grad():
            report(f"vocabulary of {vocabulary}", compare(runs, options.rounds))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
