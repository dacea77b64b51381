"""Whether a model's queries see earlier keys alone: measured once a model, never read off a name or a configuration.

In: a model. Out: `is_causal`. The bridge of TransformerLens 3.9 calls BERT causal, which it is not, and ModernBERT's
decoder is causal though its name holds "Bert".
"""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from metaint.errors import MetaintError, ModelError
from metaint.models.protocol import Model
from metaint.models.reading import Reading, random_tokens, read, tolerance, untouched, widen

_TOKENS = 6

_measured: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def is_causal(model: Model) -> bool:
    """Whether queries see earlier keys alone, by one pass of a few tokens, remembered as long as the model lives.

    Bidirectional is a model all of whose patterns have weight on later keys; where no pattern fires, one in which a
    later token changes earlier logits. Raises ModelError if the pass fails.
    """
    if model not in _measured:
        tokens = sharing_half(random_tokens(model, 2, _TOKENS))
        with untouched(model):
            try:
                names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(int(model.cfg.n_layers))]
                learn_direction(model, read(model, tokens, names))
            except MetaintError:
                raise
            except Exception as error:
                raise ModelError(f"A forward pass of a few tokens failed: {type(error).__name__}: {error}") from error
    return _measured[model]


def sharing_half(tokens: Tensor) -> Tensor:
    """Tokens of which the second row begins as the first does, for the first half."""
    tokens = tokens.clone()
    half = tokens.shape[1] // 2
    tokens[1, :half] = tokens[0, :half]
    return tokens


def learn_direction(model: Model, reading: Reading) -> None:
    """Remember the direction that a pass of tokens which share their first half tells of, the first time."""
    if model not in _measured:
        patterns = patterns_of(reading.activations)
        if patterns:
            _measured[model] = not all(bool((pattern.triu(1) > 0).any()) for pattern in patterns.values())
        else:
            first, second = halves(reading)
            limit = tolerance(reading.logits.dtype) * float(first.abs().max())
            _measured[model] = float((first - second).abs().max()) <= limit


def patterns_of(activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The patterns [batch, head, query, key] among what a pass carried."""
    return {name: a for name, a in activations.items() if name.endswith("attn.hook_pattern") and a.ndim == 4}


def halves(reading: Reading) -> tuple[Tensor, Tensor]:
    """The logits of both rows where their tokens are the same."""
    half = reading.logits.shape[1] // 2
    logits = widen(reading.logits)
    return logits[0, :half], logits[1, :half]
