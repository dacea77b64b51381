"""Sets of parts that race: `run`, with less of it for what plainly does little.

In: an experiment and sets of parts. Out: what `run` gives, NaN for the sequences on which a set was not measured.
"""

from collections.abc import Iterable, Sequence

from jaxtyping import Float
from torch import Tensor

from metaint.circuits.counting import effects_of
from metaint.circuits.experiment import Experiment, name_of_set, run
from metaint.circuits.parts import Part
from metaint.circuits.race import Outcome, Rules, race
from metaint.scanning.progress import tell

# Sets that are named while a race runs.
_SHOWN = 8


def raced(
    experiment: Experiment, sets: Sequence[Iterable[Part]], rules: Rules
) -> tuple[Float[Tensor, "1+set sequence"], Outcome]:
    """The metric of each sequence as the model is and without each set, and what the race dropped."""
    sets = [list(parts) for parts in sets]
    names = [name_of_set(experiment, parts) for parts in sets]
    clean, without = run(experiment, [experiment.subject.heads], what="all heads")

    def measure(numbers: Sequence[int], upto: int) -> Tensor:
        values = run(experiment, [sets[i] for i in numbers], upto, f"ablate, {upto} sequences")
        changes = values[1:] - values[:1]
        if experiment.progress:
            tell(f"most so far: {_strongest([names[i] for i in numbers], changes, without[:upto] - clean[:upto])}")
        return changes

    outcome = race(measure, len(sets), (), without - clean, rules)
    return experiment.ledger.table([name_of_set(experiment, []), *names], len(clean)), outcome


def _strongest(names: Sequence[str], changes: Tensor, total: Tensor) -> str:
    """The sets that bring most, with their shares."""
    effects = zip(effects_of(changes, total), names, strict=True)
    ranked = sorted(effects, key=lambda pair: pair[0].share, reverse=True)
    return ", ".join(f"{name.removeprefix('without ')} {100 * effect.share:.0f} %" for effect, name in ranked[:_SHOWN])
