"""What `/saturation` holds: each variable, its dimensions and what it says, by the state that its sums lie in."""

from collections.abc import Sequence
from typing import Any

from metaint.measures.tile import TAUS
from metaint.probes.means import Variable, mean

SCALE = ("scale",)
HEAD = ("layer", "head")
STREAM = ("scale", "layer")
_BINS = ("layer", "head", "gap_bin")
_PLAIN: dict[str, Any] = {"interval": False}


def of_heads(kappas: Sequence[float]) -> tuple[Variable, ...]:
    """Means over the queries of each head."""
    return (
        mean(
            "total_variation", ("scale", *HEAD), "queries", along=tuple(kappas),
            words="mean distance of attention at scores times scale to saturated attention, 0 to 1; of unscaled "
            "inputs, so nothing propagates",
        ),
        mean(
            "output_change", ("scale", *HEAD), "length", along=tuple(kappas), **_PLAIN,
            words="sum over queries of ||z at scale - z|| over the sum of ||z||, nothing propagated",
        ),
        mean("off_maximum", HEAD, "queries", "mean of 1 - the largest weight of a row", **_PLAIN),
        mean(
            "tied_keys", ("tau", *HEAD), "queries", along=TAUS, **_PLAIN,
            words="mean number of keys whose score is within tau of the largest",
        ),
        mean(
            "gap_mean", HEAD, "gaps", of="gap", **_PLAIN,
            words="mean gap between the largest score and the next, where another key has weight (at most 87)",
        ),
    )  # fmt: skip


# Means over the same queries of what uniform attention has.
UNIFORM = (
    mean(
        "off_maximum_uniform", (), "queries", "what uniform attention scores on these tokens",
        of="largest_weight", then=lambda largest: 1 - largest, **_PLAIN,
    ),
    mean("tied_keys_uniform", (), "queries", "what uniform attention has: every visible key", **_PLAIN),
)  # fmt: skip

# Of the stream after each block, beside that of the first copy.
STREAMS = (
    mean(
        "similarity", STREAM, "positions",
        "mean cosine of the stream after each block with that at scores times scale, position 0 left out",
    ),
    mean(
        "similarity_first", STREAM, "firsts", **_PLAIN,
        words="mean cosine at position 0, which in a causal model attends to itself at every scale",
    ),
)  # fmt: skip

# Of the predictions at sampled positions, beside those of the first copy or, as null, of another position.
LOGITS = (
    mean(
        "kl", SCALE, "samples",
        "mean KL divergence of the predictions at scale from the model's own, in nats, at sampled positions",
    ),
    mean(
        "top1_agreement", SCALE, "samples",
        "share of sampled positions where the most likely token stays the same",
    ),
    mean(
        "loss_change", SCALE, "losses",
        "mean change of the next token's loss, in nats (NaN for a bidirectional model)",
    ),
    mean("kl_null", (), "others", "the same between predictions at two positions of a sequence", **_PLAIN),
    mean("top1_agreement_null", (), "others", "the same between two positions of a sequence", **_PLAIN),
)  # fmt: skip

_OTHERS = (
    Variable(
        "gap_count", _BINS,
        "queries in each log bin of the gap; the coordinate is the bin's lower edge",
    ),
    Variable(
        "gap_odds", _BINS,
        "sum over the same queries of (1 - m) / m, with m the weight on the tied largest scores",
    ),
    Variable("gap_tied_share", _BINS, "sum over the same queries of 1 / (number of tied largest scores)"),
    Variable(
        "similarity_null", STREAM,
        "the same for a token of another sequence: what a collapsed stream scores anyway",
    ),
    Variable(
        "similarity_centred", STREAM,
        "correlation of the two streams' unit vectors: their mean directions taken out",
    ),
)  # fmt: skip


def variables_of(kappas: Sequence[float]) -> tuple[Variable, ...]:
    """All variables of a group at these scales."""
    return (*of_heads(kappas), *UNIFORM, *STREAMS, *LOGITS, *_OTHERS)
