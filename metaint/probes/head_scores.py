"""What the sums that `HeadProbe` keeps of each sequence come to: a measure's score with its interval and baselines.

In: sums and counts by sequence. Out: values by the end of their variable's name.
"""

from jaxtyping import Float
from torch import Tensor

from metaint.measures.attention import Measure
from metaint.measures.resampling import bootstrap_interval


def each_sequence(
    measure: Measure,
    sums: Float[Tensor, "sequence slot layer head"],
    counts: Float[Tensor, "sequence slot layer #head"],
) -> tuple[Float[Tensor, "sequence slot layer head"], Float[Tensor, "sequence slot layer #head"]]:
    """Sums and counts, of queries or, where a measure says one thing of each sequence, of sequences."""
    if measure.per_sequence is None:
        return sums, counts
    sums = measure.per_sequence(sums, counts.expand_as(sums))
    return sums.nan_to_num(), (~sums.isnan()).to(sums.dtype)


def summarise(
    sums: Float[Tensor, "sequence slot layer head"],
    counts: Float[Tensor, "sequence slot layer 1"],
    uniform: Float[Tensor, "sequence slot layer 1"],
    measure: Measure,
) -> dict[str, Float[Tensor, "slot layer head"]]:
    """Score, uniform baseline, interval and count of a measure from what its sequences sum to."""
    if measure.per_sequence is not None:
        uniform = measure.per_sequence(uniform, counts).nan_to_num()
    sums, counts = each_sequence(measure, sums, counts)
    total = counts.sum(0)
    low, high = bootstrap_interval(sums, counts.expand_as(sums))
    return {
        "": sums.sum(0) / total,
        "_uniform": uniform.sum(0) / total,
        "_low": low,
        "_high": high,
        "_count": total,
    }


def off_sink(
    sums: Float[Tensor, "sequence 1 layer head"], beside: Float[Tensor, "sequence 1 layer head"]
) -> dict[str, Float[Tensor, "1 layer head"]]:
    """The share that a kind's keys have of the weight beside position 0, in [0, 1], with its interval.

    Read on the queries for which the kind is defined. A head of a language model leaves most of its weight on
    position 0 where it has nothing to do; this tells what it does with the rest.
    """
    low, high = bootstrap_interval(sums, beside)
    return {"_off_sink": sums.sum(0) / beside.sum(0), "_off_sink_low": low, "_off_sink_high": high}
