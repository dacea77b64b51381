"""What `metaint.ablate` costs for every head of a model, beside the plain loop of one forward pass a head.

    python benchmarks/ablation.py [--rounds 5] [--sequences N] [--block 50] [--heads 12] [--models toy heads gpt2]

The loop is what a notebook would write: `run_with_hooks` on all sequences with hook_z of one head set to zero, the loss
of every next token from the logits, and its mean where the next token is what followed the current one before. Both run
on repeated random tokens, in one process and in turn, and their effects are compared; where
there are more sequences than `ablate` runs at once, the loop is also run in batches of that size. "toy" is the
embedded toy: two layers of one head, of which the loop runs six in all (the model as it is, and each head) and `ablate`
three. "heads" is the same with eight heads in each layer, "gpt2" random weights of GPT-2-small's shape (`--heads` heads
of each layer are taken out; all of them take minutes). Ratios are medians over the rounds of each round's ratio (lowest
to highest), of wall and of CPU time.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy


def toy(heads: int = 1) -> Any:
    from metaint.toys.embedded import boot_toy

    shape = {"n_layers": 2, "n_heads": heads, "d_model": 128, "d_head": 128 // heads, "n_ctx": 128, "d_vocab": 65}
    model = boot_toy(shape)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 128**0.5)
    return model


def gpt2() -> Any:
    import tempfile

    from transformers import GPT2Config, GPT2LMHeadModel

    from metaint import open_model

    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
        return open_model(folder, device="cpu")


SEQUENCES = {"toy": 128, "heads": 32, "gpt2": 2}
MODELS: dict[str, Callable[[], Any]] = {"toy": toy, "heads": lambda: toy(8), "gpt2": gpt2}


def loop(model: Any, tokens: torch.Tensor, names: list[tuple[int, int]], batch: int) -> torch.Tensor:
    """The effect of each head, one pass after the other, so many sequences at a time."""
    parts = [by_sequence(model, some, names) for some in tokens.split(batch)]
    return torch.cat(parts, 1).mean(1)


@torch.no_grad()
def by_sequence(model: Any, tokens: torch.Tensor, names: list[tuple[int, int]]) -> torch.Tensor:
    from metaint.measures.in_context import follower

    known = follower(tokens)[:, :-1] == tokens[:, 1:]

    def measured(logits: torch.Tensor) -> torch.Tensor:
        losses = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return (losses.view_as(known) * known).sum(1) / known.sum(1)

    clean, results = measured(model(tokens)), []
    for layer, head in names:

        def zero(z: torch.Tensor, hook: Any, head: int = head) -> torch.Tensor:
            z = z.clone()
            z[:, :, head] = 0
            return z

        logits = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", zero)])
        results.append(measured(logits) - clean)
    return torch.stack(results)


def compare(name: str, options: argparse.Namespace) -> None:
    """Times and ratios for one model."""
    import metaint
    from metaint.circuits.experiment import TOKENS

    model = MODELS[name]().eval()
    vocab, count = int(model.cfg.d_vocab), int(model.cfg.n_heads)
    names = [(layer, head) for layer in range(int(model.cfg.n_layers)) for head in range(min(options.heads, count))]
    chosen = None if options.heads >= count else [f"{layer}.{head}" for layer, head in names]
    block, sequences = min(options.block, int(model.cfg.n_ctx) // 2, vocab), options.sequences or SEQUENCES[name]
    tokens = metaint.tasks.repeated_tokens(vocab, block, batch=sequences)
    batch = max(1, TOKENS // tokens.shape[1])
    runs: dict[str, Callable[[], Any]] = {
        "ablate": lambda: metaint.ablate(model, tokens, chosen, "zero", random=0)["effect"].values,
        "loop": lambda: loop(model, tokens, names, sequences),
    }
    if sequences > batch:
        runs["loop in batches"] = lambda: loop(model, tokens, names, batch)
    metaint.ablate(model, tokens[:2], chosen and chosen[:1], "zero", random=0)  # the audit's passes, made once a model
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in runs}
    results: dict[str, Any] = {}
    for _ in range(options.rounds):
        for kind, run in runs.items():
            start = time.perf_counter(), time.process_time()
            results[kind] = run()
            times[kind].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    ours = torch.tensor([results["ablate"][place] for place in names])
    difference = max(float((ours - other).abs().max()) for kind, other in results.items() if kind != "ablate")
    print(
        f"{name}: {len(names)} heads, {sequences} x {2 * block} tokens; effects differ by at most {difference:.0e} nats"
    )
    report(times)


def report(times: dict[str, list[tuple[float, float]]]) -> None:
    for i, clock in enumerate(("wall", "CPU")):
        for kind, taken in times.items():
            seconds = [pair[i] for pair in taken]
            ratios = [other / ours[i] for other, ours in zip(seconds, times["ablate"], strict=True)]
            spread = f"{statistics.median(ratios):6.2f} x ablate ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"    {clock:4} {kind:16} {statistics.median(seconds):8.3f} s {spread if kind != 'ablate' else ''}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, help="128 for the toy, 32 with eight heads, 2 for GPT-2's shape")
    parser.add_argument("--block", type=int, default=50)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in options.models:
        compare(name, options)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
