"""What the recalls of a model's heads cost in time and in memory.

    python benchmarks/memory.py [--vocabulary 32000] [--heads 144] [--tokens 512]

On a random model of GPT-2-small's shape. Time: `ov` for all heads, beside the plain way, which makes the full OV
circuit W_E W_V W_O W_U of a head for the same tokens and takes its argmax; both for a few heads in turn, as the median
ratio of the rounds. Memory: the peak of the process above what it held with the model open.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def build(vocabulary: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    from metaint import open_model

    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary)).save_pretrained(folder)
        return open_model(folder, device="cpu")


def held(field: str) -> float:
    """A field of the process's status in MiB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


@torch.no_grad()
def plain(model: Any, weights: list[Any], tokens: torch.Tensor, layer: int, head: int) -> torch.Tensor:
    """Which tokens' own logit is the highest, by the whole circuit of one head."""
    normed = model.blocks[layer].ln1(model.W_E[tokens][None])[0]
    W_V, W_O = weights
    circuit = normed @ W_V[layer, head] @ W_O[layer, head] @ model.W_U
    return circuit.argmax(-1) == tokens


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--heads", type=int, default=144)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    import metaint
    from metaint.models.memory import Memories

    model = build(options.vocabulary)
    metaint.audit(model)
    heads = [(i // 12, i % 12) for i in range(options.heads)]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, a vocabulary of {options.vocabulary}")

    CLEAR.write_text("5")
    before = held("VmRSS")
    memories = Memories(model, options.tokens)
    taken = seconds(lambda: [memories.ov([head]) for head in heads])
    peak = held("VmHWM") - before
    print(f"ov recall of {len(heads)} heads, {options.tokens} tokens: {taken:.1f} s, {peak:.0f} MiB above the model")

    weights = [model.W_V.detach(), model.W_O.detach()]
    pairs = []
    for layer, head in heads[:: max(1, len(heads) // options.rounds)][: options.rounds]:
        ours = seconds(lambda layer=layer, head=head: memories.ov([(layer, head)]))
        theirs = seconds(lambda layer=layer, head=head: plain(model, weights, memories.tokens, layer, head))
        pairs.append(theirs / ours)
    middle, low, high = statistics.median(pairs), min(pairs), max(pairs)
    print(f"the whole circuit's argmax takes {middle:.2f} times as long ({low:.2f} to {high:.2f})")

    taken = seconds(lambda: list(memories.key_compositions(0, 1)))
    print(f"key composition of {12 * 12} pairs: {taken:.2f} s ({66 * taken:.0f} s for all pairs of 12 layers)")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
