"""Whether a model does what an attention_mask says; GPT-1's bridge drops the causal mask where it is given one.

In: a model. Out: pairs that should be equal, for the audit. One pass of three rows: nothing hidden, the end of the
same tokens hidden, and the beginning.
"""

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from metaint.models.direction import is_causal, patterns_of
from metaint.models.invariants import Pair, Trial, pattern_hook
from metaint.models.protocol import Model
from metaint.models.reading import Unavailable, random_tokens, read, widen

_HIDDEN = 3


def masked_trial(model: Model, length: int) -> tuple[Trial, Tensor]:
    """A pass of one row of tokens three times over, and its mask; raises Unavailable where none can be given."""
    tokens = random_tokens(model, 1, length).repeat(3, 1)
    mask = torch.ones_like(tokens)
    mask[1, -_HIDDEN:] = 0
    mask[2, :_HIDDEN] = 0
    names = [pattern_hook(layer) for layer in range(int(model.cfg.n_layers))]
    try:
        return Trial(model, read(model, tokens, names, attention_mask=mask)), mask
    except TypeError as error:
        if "attention_mask" not in str(error):
            raise
        raise Unavailable("the model takes no attention_mask") from error


def right_padding(trial: Trial, mask: Tensor) -> Iterator[Pair]:
    """Nothing hidden, and the end: what lies before is as it would be without, in a causal model."""
    yield from _hidden(trial, mask, slice(0, 2))
    if is_causal(trial.model):
        logits = widen(trial.reading.logits)[:, : mask.shape[1] - _HIDDEN]
        yield Pair("logits", logits[1], logits[0])


def left_padding(trial: Trial, mask: Tensor) -> Iterator[Pair]:
    """The beginning hidden: queries there see nothing, which in float64 some softmax makes not a number of."""
    return _hidden(trial, mask, slice(2, 3))


def _hidden(trial: Trial, mask: Tensor, rows: slice) -> Iterator[Pair]:
    """No query that is real has weight on a hidden key, nor, in a causal model, on a later one."""
    causal, real = is_causal(trial.model), mask[rows].bool()
    unseen = rearrange(~real, "batch key -> batch 1 1 key")
    padding = rearrange(~real, "batch query -> batch 1 query 1")
    for name, pattern in patterns_of(trial.reading.activations).items():
        weight = widen(pattern[rows])
        hidden = unseen | torch.ones_like(weight, dtype=torch.bool).triu(1) if causal else unseen
        weight = weight.masked_fill(~hidden | padding, 0)
        yield Pair(name, weight, torch.zeros_like(weight), magnitude=1.0)
