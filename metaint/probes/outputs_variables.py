"""What `/outputs` holds: each variable, its dimensions and what it says."""

from collections.abc import Sequence

from metaint.measures.measure import Measure
from metaint.probes.means import Variable, mean

HEAD = ("layer", "head")

_LENGTHS = (
    mean("output_norm", HEAD, "queries", "mean length of what the head writes, ||z W_O||"),
    mean(
        "output_share", HEAD, "output_of_layer", of="output_norm",
        words="mean length of what the head writes over the mean of the layer's heads: 1 is an average head",
    ),
    mean(
        "z_share", HEAD, "z_of_layer", of="z",
        words="mean length of z, before W_O, over the mean of the layer's heads (Avg Head Output Norm (LN), or HONOR, "
        "of Sandoval-Segura et al. 2025, 2504.03889; a tenth of a model's heads lie below 0.38 to 0.59 in what they "
        "published)",
    ),
    mean(
        "sink_drain", HEAD, "values", of="missing",
        words="how much shorter the value of position 0 is, through W_O, than the mean of the others: 1 holds nothing, "
        "0 is as long, below 0 longer",
    ),
    mean(
        "first_token_output", HEAD, "energy", of="from_first",
        words="the part of what is written that comes from position 0, <A_i0 v_0 W_O, z_i W_O> / ||z_i W_O||², both "
        "summed over queries: 1 all, 0 none, below 0 opposes the rest",
    ),
)  # fmt: skip

_SAMPLED = (
    mean("along_stream", HEAD, "samples", "mean length of what is written along the stream, below 0 against it"),
    mean("across_stream", HEAD, "samples", "mean length of what is written across the stream"),
)

_SAYS = (
    "logits as the write alone gives them to the output, less their mean over the vocabulary, with the final norm's "
)
_SAYS += "length as it was in the pass; mean over positions, weighted by attention"
_SAID = (
    mean("copying", HEAD, "weight", f"the logit of the token that the head looks at, position 0 left out: {_SAYS}"),
    mean(
        "copying_null", HEAD, "weight",
        "the same of the tokens that it may look at, with each row's weights shuffled among them, exactly",
    ),
    mean(
        "copying_deviations", HEAD, "copying_spread", of="copying",
        words="copying over the standard deviation of those logits over the vocabulary",
    ),
    mean("copying_deviations_null", HEAD, "copying_spread", "the same of the null", of="copying_null"),
    mean(
        "following", HEAD, "following_weight", f"the logit of the token after the one that the head looks at: {_SAYS}",
    ),
    mean("following_null", HEAD, "following_weight", "the same with each row's weights shuffled among its keys"),
    mean(
        "following_deviations", HEAD, "following_spread", of="following",
        words="following over the standard deviation of those logits over the vocabulary",
    ),
    mean("following_deviations_null", HEAD, "following_spread", "the same of the null", of="following_null"),
)  # fmt: skip


def written(kind: Measure) -> str:
    """The variable of a kind, value-weighted."""
    return f"{kind.name}_written"


def variables_of(kinds: Sequence[Measure]) -> tuple[Variable, ...]:
    """Every variable of `/outputs`, of these kinds of heads."""
    words = "{} with each weight times the length of the value through W_O, over its row's sum"
    weighted = [mean(written(kind), HEAD, f"{written(kind)} queries", words.format(kind.name)) for kind in kinds]
    return (*_LENGTHS, *weighted, *_SAMPLED, *_SAID)
