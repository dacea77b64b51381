"""What `BigramTask.sample` costs beside a plain generator of the same sequences.

    python benchmarks/bigram.py [--text FILE] [--batch 512] [--length 256] [--triggers 5] [--rounds 5]

The plain way follows the paper's description a token at a time, and draws each with `choice` of a NumPy generator
from a list of the ids, as the published code does. Both run in one process on the same chain (the stored counts of
tiny-Shakespeare, or the characters of a text) with fixed triggers. The ratio is the median over the rounds of each
round's ratio (lowest to highest). Below: `sample` alone, for other triggers and vocabularies. On one thread, in
seconds of the processor, so that a busy machine counts for neither.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

COUNTS = Path(__file__).resolve().parents[1] / "tests" / "data" / "tinyshakespeare_counts.json"


def stored_chain(**options: Any) -> Any:
    """The task over the characters of tiny-Shakespeare."""
    from metaint.tasks import BigramTask

    stored = json.loads(COUNTS.read_text())
    first, second, counts = torch.tensor(stored["bigram"]).T
    chain = torch.zeros(2 * [len(stored["vocabulary"])]).long().index_put_((first, second), counts)
    return BigramTask.from_counts(torch.tensor(stored["unigram"]), chain, stored["vocabulary"], **options)


def plain(task: Any, batch: int, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and how often each trigger has come so far, drawn one token after the other."""
    everything = list(np.arange(task.vocab))
    shares, rows = task.unigram.numpy(), list(task.bigram.numpy())
    triggers = task.fixed_triggers.tolist()
    sequences, counts = [], []
    for _ in range(batch):
        rule = {trigger: rng.choice(everything) for trigger in triggers}
        seen = dict.fromkeys(triggers, 0)
        tokens, outs = [rng.choice(everything, p=shares)], []
        for _ in range(length):
            last = tokens[-1]
            if last in rule:
                seen[last] += 1
                tokens.append(rule[last])
            else:
                tokens.append(rng.choice(everything, p=rows[last]))
            outs.append(seen.get(last, 0))
        sequences.append(tokens)
        counts.append(outs)
    return np.array(sequences), np.array(counts)


def seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def beside(task: Any, batch: int, length: int, rounds: int) -> None:
    """One line: both ways, and their ratio."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    task.sample(batch, length, generator)
    slow, fast = [], []
    for _ in range(rounds):
        slow.append(seconds(lambda: plain(task, batch, length, rng)))
        # Several batches, so that one pause of the machine does not make the round.
        fast.append(seconds(lambda: [task.sample(batch, length, generator) for _ in range(10)]) / 10)
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    print(
        f"plain {statistics.median(slow):.2f} s, sample {1e3 * statistics.median(fast):.1f} ms a batch: "
        f"{statistics.median(ratios):.0f} x ({min(ratios):.0f} to {max(ratios):.0f})"
    )


def alone(title: str, task: Any, batch: int, length: int, rounds: int) -> None:
    """One line: the milliseconds of a batch."""
    generator = torch.Generator().manual_seed(0)
    task.sample(batch, length, generator)
    times = [1e3 * seconds(lambda: task.sample(batch, length, generator)) for _ in range(4 * rounds)]
    print(f"{title:60} {statistics.median(times):8.1f} ms ({min(times):.1f} to {max(times):.1f})")


def main() -> None:
    from metaint.tasks import BigramTask, read_text

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--text", help="a text file; by default the stored counts")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--triggers", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    def make(triggers: str, count: int) -> Any:
        settings: dict[str, Any] = {"triggers": triggers, "trigger_count": count}
        return BigramTask.from_text(read_text(options.text), **settings) if options.text else stored_chain(**settings)

    torch.set_num_threads(1)
    task = make("fixed", options.triggers)
    print(f"torch {torch.__version__}; {task.vocab} tokens, {options.triggers} fixed triggers, ", end="")
    print(f"batch {options.batch}, length {options.length}")
    beside(task, options.batch, options.length, options.rounds)

    half = options.batch // 2 or 1
    for triggers, count in (("fixed", 5), ("random", 5), ("random", 48)):
        title = f"{task.vocab} tokens, {count} {triggers} triggers, batch {half}"
        alone(title, make(triggers, count), half, options.length, options.rounds)
    # Frequencies as 1 / rank, about those of words.
    shares = 1 / torch.arange(1, 50_258).double()
    ids = torch.multinomial(shares, 1_000_000, True, generator=torch.Generator().manual_seed(0))
    title = f"50257 tokens, 5 random triggers, batch {half}"
    alone(title, BigramTask.from_tokens(ids, 50_257), half, options.length, options.rounds)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
