"""What `/inner` holds: each variable, its dimensions and what it says."""

import torch

from metaint.probes.means import Variable, mean

LAYER = ("layer",)
BLOCK = ("block",)
SAMPLE = ("sample", "layer")
# The whole block, and its sublayers.
PARTS = ("", "_attn", "_mlp")
# The target itself, and another token's.
_TARGETS = ("", "_null")


def _of_steps(name: str, words: str, null_words: str = "") -> list[Variable]:
    """A mean over steps: of the true target and of another's, each of the whole block and of its sublayers."""
    described = {"": words, "_null": null_words}
    return [
        mean(f"{name}{null}{part}", BLOCK, f"steps{null}{part}", described[null] * (part == ""))
        for null in _TARGETS
        for part in PARTS
    ]


def _fidelities(words: str) -> list[Variable]:
    """Ratios of what the gradient promises to the decrease that came of it."""
    ends = [null + part for null in _TARGETS for part in PARTS]
    return [
        mean(f"fidelity{end}", BLOCK, f"loss_decrease{end}", words * (end == ""), of=f"descent{end}") for end in ends
    ]


VARIABLES = (
    mean(
        "loss", LAYER, "samples",
        "mean cross-entropy of the next token, in nats, if the stream at this layer were the last",
    ),
    mean(
        "target_rank", LAYER, "samples", then=torch.exp,
        words="geometric mean rank of the next token, 1 is the most likely",
    ),
    mean("top1", LAYER, "samples", "share of positions where the next token is the most likely"),
    mean("prediction_entropy", LAYER, "samples", "mean entropy of the prediction, in nats"),
    mean("kl_to_final", LAYER, "samples", "mean KL(final prediction || prediction at this layer), in nats"),
    mean("gradient_norm", LAYER, "samples", "mean length of the loss's gradient at the stream"),
    mean("loss_null", LAYER, "samples_null", "the same for another sampled token's target of the same sequence"),
    mean("norm_correct", LAYER, "correct", "mean length of the stream where the top prediction is right"),
    mean("norm_wrong", LAYER, "wrong", "mean length of the stream where it is wrong"),
    *_of_steps("loss_decrease", "mean loss before the step less the loss after it, in nats"),
    *_of_steps("improved", "share of positions where the step lowers the loss"),
    *_of_steps(
        "step_gradient_cosine",
        "mean cosine of the step with the descent direction -g; 1 is a gradient step",
        "the same with the gradient for another token's target",
    ),
    *_fidelities(
        "-<D, g> summed over tokens / loss decrease summed over tokens: 1 where the loss is linear along steps; it "
        "means little where the decrease is near 0"
    ),
    Variable(
        "learning_rate", BLOCK,
        "median of -<D, g> / ||g||², the learning rate that the step would have as a gradient step",
    ),
    Variable("learning_rate_attn", BLOCK),
    Variable("learning_rate_mlp", BLOCK),
    Variable(
        "norm_loss_spearman", LAYER,
        "Spearman over tokens of the stream's length and the loss, both at this layer",
    ),
    Variable(
        "norm_loss_spearman_partial", LAYER,
        "the same with token and target frequency (in the scanned text) and position partialled out",
    ),
    Variable("token_norm", SAMPLE, "length of the stream of single tokens"),
    Variable("token_loss", SAMPLE, "loss of single tokens, in nats"),
)  # fmt: skip
