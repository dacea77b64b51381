"""How heads lie in hooks, and which way queries look: two checks of the audit that the others rest on.

In: a Trial whose two rows begin with the same tokens. Out: pairs that should be equal, as in `invariants.py`.
"""

from collections.abc import Iterator

import torch

from metaint.models.direction import halves, is_causal
from metaint.models.heads import by_head
from metaint.models.invariants import Pair, Trial


def direction(trial: Trial) -> Iterator[Pair]:
    """The logits of two rows whose tokens are the same up to there: later tokens tell in a bidirectional model."""
    first, second = halves(trial.reading)
    if is_causal(trial.model):
        yield Pair("logits", second, first)
    else:
        yield Pair("logits", torch.tensor(float(torch.equal(first, second))), torch.tensor(0.0), magnitude=1.0)


def head_shapes(trial: Trial) -> Iterator[Pair]:
    """The shapes of hook_z and hook_q, [batch, position, head, d_head], and of hook_k and hook_v, whose heads may be
    shared."""
    batch, length = trial.reading.logits.shape[:2]
    n_heads = int(trial.model.cfg.n_heads)
    for layer in trial.attending:
        for letter in "qkvz":
            name = f"blocks.{layer}.attn.hook_{letter}"
            if name not in trial.reading and letter != "z":
                continue
            activation = trial.reading[name]
            if letter == "z":  # which is read by heads however it is divided
                activation = by_head(activation, n_heads)
            shape = list(activation.shape)
            shared = letter in "kv" and len(shape) == 4 and shape[2] > 0 and n_heads % shape[2] == 0
            heads = shape[2] if shared else n_heads
            yield Pair(name, torch.tensor(shape), torch.tensor([batch, length, heads, shape[-1]]))
