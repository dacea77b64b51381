"""What a race saves: parts measured until it is plain whether they count, beside all on everything and a plain loop.

    python benchmarks/trace.py [--models smollm2 gpt2] [--layers 16 17 18] [--sequences 20] [--looped 6] [--seed 0]

The parts are the heads and MLPs of `--layers` (0: all), on as many sequences of 50 random tokens repeated twice. "race"
is what `trace_circuit` does with them: two sequences, then four, eight ... for what could still count, and a sample of
what was dropped. "exact" is the same with `race=False`. "loop" is what a notebook would write, one pass with one hook
for each of `--looped` heads on all sequences, and what that makes for all parts. The parts on which race and exact
disagree are named with their shares. "smollm2" is SmolLM2-135M-Instruct; "gpt2" has random weights of GPT-2-small's
shape, by the loss of the next token (no head of it predicts in context): all 144 heads and 12 MLPs with `--layers 0`.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from ablation import by_sequence, gpt2

from metaint import open_model
from metaint.circuits import race as racing
from metaint.circuits.circuit import PRECISION
from metaint.circuits.counting import known_parts, race_parts
from metaint.circuits.experiment import Experiment, run, set_up
from metaint.circuits.ledger import Ledger
from metaint.circuits.parts import Part, part_name
from metaint.circuits.race import THRESHOLD, Rules
from metaint.circuits.subject import subject_of
from metaint.scanning.given import default_tokens

MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "smollm2": (lambda: open_model("smollm2"), "in_context_loss"),
    "gpt2": (gpt2, "next_token_loss"),
}


def compare(name: str, options: argparse.Namespace) -> None:
    """Times of the three, and where two of them disagree."""
    opened, metric = MODELS[name]
    model = opened()
    tokens = default_tokens(model, batch=options.sequences, seed=options.seed)
    subject = subject_of(model)
    experiment = set_up(subject, tokens, "mean", metric, batch_size=None, seed=options.seed)
    layers = set(options.layers) if options.layers != [0] else set(subject.layers)
    parts: list[Part] = [head for head in subject.heads if head[0] in layers]
    parts += [(layer, None) for layer in sorted(layers)]
    racing.FEW = 0
    values = run(experiment, [subject.heads])
    total = values[1] - values[0]
    print(f"{name}: {len(parts)} parts, {len(tokens)} x {tokens.shape[1]} tokens, {torch.get_num_threads()} threads")
    counting = {}
    for kind in ("race", "exact"):
        own = replace(experiment, ledger=Ledger())
        wall, cpu = time.perf_counter(), time.process_time()
        rules = Rules(THRESHOLD, PRECISION, seed=options.seed, on=kind == "race")
        outcome = race_parts(own, parts, set(), total, rules)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        effects = known_parts(own, parts, total)
        counting[kind] = {part for part, effect in effects.items() if effect.counts(THRESHOLD)}
        passes = sum(effect.sequences for effect in effects.values())
        print(f"  {kind}: {wall:.1f} s, CPU {cpu:.1f} s; {len(counting[kind])} count; {passes} passes of one sequence")
        if kind == "race":
            print(f"    {outcome.sentence('parts')}")
    for part in sorted(counting["race"] ^ counting["exact"], key=str):
        kind = "the race" if part in counting["race"] else "exact"
        print(f"    {part_name(part)} counts by {kind} alone: {100 * effects[part].share:.2f} % on all sequences")
    _loop(experiment, parts, options.looped)


def _loop(experiment: Experiment, parts: list[Part], count: int) -> None:
    """The plain loop over some of the heads, and what it makes for all parts."""
    heads = [(layer, head) for layer, head in parts if head is not None]
    some = heads[:: max(1, len(heads) // count)][:count]
    wall, cpu = time.perf_counter(), time.process_time()
    by_sequence(experiment.subject.model, experiment.tokens, some)
    scale = (1 + len(parts)) / (1 + len(some))  # the clean pass is one of them
    wall, cpu = scale * (time.perf_counter() - wall), scale * (time.process_time() - cpu)
    print(
        f"  loop: {wall:.1f} s, CPU {cpu:.1f} s, from {len(some)} heads; {len(parts) * len(experiment.tokens)} passes"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layers", nargs="+", type=int, default=[16, 17, 18])
    parser.add_argument("--sequences", type=int, default=20)
    parser.add_argument("--looped", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in options.models:
        compare(name, options)


if __name__ == "__main__":
    main()
