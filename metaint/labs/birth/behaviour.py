"""What a model does on in-context bigrams: what it predicts, and where its heads look.

In: a model and sequences of the task. Out: numbers by name. Source: the scores that transformer-birth's
`ihead_basic_main.py` logs (Bietti et al. 2023, 2306.00802), under the names given below, which are computed in
`measures/in_context.py`; masses, baselines and the score of Olsson et al. (2022) beside them are not its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from metaint.measures import in_context
from metaint.measures.in_context import Attended
from metaint.tasks.bigram import BigramSample

# Sequences that are evaluated at once: a pattern of 256 positions is 8 MB then.
_CHUNK = 32
# The source's "start" of a sequence.
_START = 10


@torch.no_grad()
def evaluate(model: Any, sample: BigramSample, attention: bool = True) -> dict[str, float]:
    """What the model predicts on a sample, and with `attention` where its heads look; NaN where nothing counts.

    Shares of positions predicted right: `accuracy` is the in-context accuracy (`acc_end`: positions with `outs >= 2`),
    `accuracy_without_copies` leaves out targets equal to the current token, `accuracy_triggers` takes first times too
    (`acc_tot`: `outs >= 1`), which can't be known, and `accuracy_start` those among the first 10 positions
    (`acc_start`). Chance is not 1/vocabulary but what repeating the current token scores: `copy_accuracy` and
    `copy_accuracy_triggers` (`repeat_frac`).

    Losses in nats: `loss_later` (`loss_head`: `outs >= 2`), `loss_first` (a trigger's first time, with the floor
    log(vocabulary)), `loss_bigram` (the rest). `in_context_learning_score` is the loss at the last position minus that
    at T // 10 (the 256th and the 25th predicted token of 256; Olsson et al. take the 500th and the 50th of 512):
    negative if it learns in context, and of one position a sequence, so that it is much noisier than the others.

    Of attention see `_attention`.
    """
    parts: list[dict[str, Tensor]] = []
    patterns: dict[str, Tensor] = {}
    layers = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)] if attention else []
    hooks = [(name, lambda pattern, hook, name=name: patterns.update({name: pattern[:, 0]})) for name in layers]
    for start in range(0, len(sample.tokens), _CHUNK):
        tokens, outs = (part[start : start + _CHUNK] for part in (sample.tokens, sample.outs))
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        with model.hooks(fwd_hooks=hooks):
            logits = model(inputs)
        losses = cross_entropy(logits.mT, targets, reduction="none")
        guess = logits.argmax(-1)
        parts.append(_predictions(guess, losses, inputs, targets, outs))
        if attention:
            parts[-1] |= _attention([patterns[name] for name in layers], guess, inputs, targets, outs)
    return {name: torch.cat([part[name] for part in parts]).double().nanmean().item() for name in parts[0]}


def _predictions(guess: Tensor, losses: Tensor, inputs: Tensor, targets: Tensor, outs: Tensor) -> dict[str, Tensor]:
    known, triggers, length = outs >= 2, outs >= 1, losses.shape[1]
    readings = {
        "accuracy": in_context.accuracy(guess, targets, known),
        "accuracy_without_copies": in_context.accuracy(guess, targets, known & (targets != inputs)),
        "accuracy_triggers": in_context.accuracy(guess, targets, triggers),
        "accuracy_start": in_context.accuracy(guess, targets, triggers)[:, :_START],
        "copy_accuracy": in_context.accuracy(inputs, targets, known),
        "copy_accuracy_triggers": in_context.accuracy(inputs, targets, triggers),
    }
    readings |= {f"loss_{name}": value for name, value in in_context.loss_parts(losses, outs)._asdict().items()}
    readings["in_context_learning_score"] = in_context.in_context_learning_score(losses, max(1, length // 10), length)
    return readings


def _attention(
    patterns: Sequence[Tensor], guess: Tensor, inputs: Tensor, targets: Tensor, outs: Tensor
) -> dict[str, Tensor]:
    """Scores of the first and the last layer's head, each with the `_uniform` of uniform attention: exact for a weight
    (`_mass`), and for what is asked of the most attended key the chance of a key drawn at random.

    Of the last at `outs >= 2`: `induction_mass` is its weight on what followed earlier occurrences of the current
    token, and `induction_match` (`score2_acc`) whether its most attended key is one of these; `attended_target`
    (`score2_next_acc`) and `attended_prediction` (`pred_attended_acc`) whether that key is the target, or what the
    model predicts. Of the first: `previous_mass` is its weight on the position before, everywhere; `back_to_trigger`
    whether the token after a trigger's first time looks back at it (`score_start_acc`), and
    `back_to_every_trigger` the same of all its times (`score_acc`).

    Of both, where there are two: `looked_back` (`score_cond_acc`) is whether the first looked one back at the key that
    the last attends to most, left out where that is key 0; `looked_back_mass`, of which alone `looked_back_uniform` is
    the baseline, is the weight of all ways from the query over a key to the one before it.
    """
    first, last, known = patterns[0], patterns[-1], outs >= 2
    match = in_context.attended_follows_match(last, inputs, known)
    previous = in_context.next_attends_back(first, torch.ones_like(known))
    scores = {
        "induction_mass": match.mass,
        "induction_match": match.hit,
        "induction_uniform": match.uniform,
        **_hit("attended_target", in_context.attended_is(last, inputs, targets, known)),
        **_hit("attended_prediction", in_context.attended_is(last, inputs, guess, known)),
        "previous_mass": previous.mass,
        "previous_uniform": previous.uniform,
        **_hit("back_to_trigger", in_context.next_attends_back(first, outs == 1)),
        **_hit("back_to_every_trigger", in_context.next_attends_back(first, outs >= 1)),
    }
    if len(patterns) > 1:
        both = in_context.attended_looked_back(first, last, known)
        scores |= {"looked_back_mass": both.mass, **_hit("looked_back", both)}
    return scores


def _hit(name: str, score: Attended) -> dict[str, Tensor]:
    return {name: score.hit, f"{name}_uniform": score.uniform}
