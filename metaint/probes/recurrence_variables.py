"""What `/recurrence` holds: each variable, its dimensions and what it says."""

from collections.abc import Sequence

from metaint.probes.means import Variable, mean

POSITION = ("position",)
REFERENCE = ("reference", "position")
BASELINES = ("zero", "persistence", "extrapolation")

_REFERENCE = "with W itself (truth), gradient descent, or least squares of least norm, from the same context"
_NEEDS = "NaN at contexts whose effective matrix wasn't read"
_LOSSES = {
    "zero": "the same of a prediction of 0",
    "persistence": "the same of the prediction s_T",
    "extrapolation": "the same of the prediction 2 s_T - s_{T-1}",
    "truth": "the same of W s_T: what noise leaves",
    "gradient_step": "the same of one gradient step from 0 on the inner loss, with one eta for all contexts",
}
# Comparisons under these names with one gradient step alone, as von Oswald et al. compare ...
_TO_ONE_STEP = {
    "prediction_difference": "mean absolute difference of the prediction from that of one gradient step (one eta for "
    "all contexts), over coordinates",
    "sensitivity_cosine": "mean cosine of each output's gradient in s_T, a row of the effective matrix, with that of "
    f"one gradient step; {_NEEDS}",
    "model_difference": f"mean length of the difference of these gradients; {_NEEDS}",
}
# ... and with each reference. All but the first need the matrices that the model applied.
_TO_EACH = {
    "reference_prediction_difference": f"mean absolute difference of the prediction, over coordinates, {_REFERENCE}",
    "effective_matrix_cosine": "mean cosine of d prediction / d s_T with the matrix of the reference, both as long "
    f"vectors; {_NEEDS}",
    "effective_matrix_error": "mean of ||d prediction / d s_T - the reference's matrix|| / ||the reference's matrix||; "
    f"{_NEEDS}",
    "reference_sensitivity_cosine": f"mean cosine of each output's gradient in s_T with the reference's; {_NEEDS}",
    "reference_model_difference": f"mean length of the difference of these gradients; {_NEEDS}",
}


def variables_of(references: Sequence[str]) -> tuple[Variable, ...]:
    """The variables where these are the references; each mean is over one value for each sequence and position."""
    losses = [_loss(name) for name in (*BASELINES, *references)]
    compared = [mean(name, POSITION, "", words, of=f"{name} gradient_step") for name, words in _TO_ONE_STEP.items()] + [
        mean(name, REFERENCE, "", words, of=name.removeprefix("reference_"), along=tuple(references))
        for name, words in _TO_EACH.items()
    ]
    return (
        mean(
            "loss", POSITION, "",
            "mean squared error of the prediction of s_{T+1} from s_1..s_T, averaged over coordinates",
        ),
        *losses,
        mean(
            "step_size", POSITION, "",
            "mean of the eta for which eta sum_t s_t s_{t-1}* is nearest to the effective matrix: the step that a "
            "gradient step would have",
        ),
        *compared,
        Variable(
            "effective_matrix_cosine_null", REFERENCE,
            "mean cosine with the reference's matrix for another sequence, over all pairs",
        ),
        Variable("eta", REFERENCE, "step sizes of the descents at each context length"),
        Variable(
            "decodability", ("layer",),
            "R² of W, entry by entry, read by ridge regression from the stream at T = decoded_at (layer 0 is the "
            "embedding), on sequences that weren't fitted; NaN below 10 sequences",
        ),
        Variable(
            "decodability_null", ("layer",),
            "the same for the W of another sequence: 0 or a little below, but for chance",
        ),
        Variable(
            "decodability_raw", (),
            "the same from the raw context s_1..s_T: what a linear map tells before any model; near 1 where the W "
            "commute and sequences start alike, since s_2 then tells W",
        ),
    )  # fmt: skip


def _loss(guess: str) -> Variable:
    words = f"the same of {guess.replace('_', ' ')}, on the same sequences"
    return mean(f"loss_{guess}", POSITION, "", _LOSSES.get(guess, words))
