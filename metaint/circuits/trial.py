"""Whether passes that begin in the middle of a model give what whole passes give: tried, not assumed.

In: a subject. Out: why they do not, in words, or nothing.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from metaint.circuits.clean import clean_pass
from metaint.circuits.passes import outcomes, whole_pass
from metaint.circuits.subject import Subject
from metaint.circuits.variants import Variant
from metaint.models.audit import holds
from metaint.models.reading import random_tokens, steady, tolerance
from metaint.scanning.progress import progress_of

_TOKENS = 12
# Variants that are tried in one whole pass.
_STACKED = 64
_cannot: WeakKeyDictionary[Any, dict[Any, str]] = WeakKeyDictionary()


def begins_anywhere(subject: Subject, progress: bool = False) -> str:
    """Why passes that begin in the middle are not used; nothing where they give what whole passes give.

    Tried on a few tokens at the first layer, one in the middle and the last of each kind (blocks of a kind are one
    piece of code), and remembered for as long as the model lives and is in the same state.
    """
    model = subject.model
    if any(point._forward_hooks for point in model.hook_dict.values()):
        return "hooks are on the model, which run as they are meant to in whole passes"
    state = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    known = _cannot.setdefault(model, {})
    key = (bool(getattr(model, "compatibility_mode", False)), next(model.parameters()).dtype, state)
    if key not in known:
        known[key] = _try(subject, progress)
    return known[key]


def _try(subject: Subject, progress: bool) -> str:
    model = subject.model
    if not holds(model, "output_sum"):
        return "the audit does not find attention's output to be the sum of z W_O over heads"
    tokens = random_tokens(model, 2, _TOKENS)
    places = torch.zeros_like(tokens, dtype=torch.bool)
    places[0, -1], places[1, 1:] = True, True
    mlps = holds(model, "edit_mlp")
    variants = _variants(subject, mlps, torch.zeros((), device=tokens.device, dtype=next(model.parameters()).dtype))
    with steady(model), progress_of("passes that begin in the middle, tried", len(variants), progress) as advance:
        clean = clean_pass(subject, tokens, places, mlps=mlps)
        try:
            plain: list[Tensor] = []
            for start in range(0, len(variants), _STACKED):
                plain += whole_pass(clean, variants[start : start + _STACKED])
            plain[-1] = whole_pass(clean, variants[-1:])[0]
            for i, logits in outcomes(clean, variants, 4, anywhere=True):
                difference, layer = float((logits - plain[i]).abs().max()), variants[i].start[0]
                largest = float(torch.cat([plain[i], clean.logits]).abs().max())
                if not difference <= tolerance(logits.dtype) * largest:
                    return f"a pass that begins at layer {layer} gives other logits (by {difference:.3g})"
                advance(1)
        except Exception as error:  # whatever a model makes of a pass that begins in its middle
            return f"a pass that begins in the middle fails ({type(error).__name__}: {str(error)[:200]})"
    return ""


def _variants(subject: Subject, mlps: bool, nothing: Tensor) -> list[Variant]:
    """Two heads and, where asked for, the MLP of the layers that are tried, and at last a head of every layer."""
    heads, tried = subject.shape.n_heads, _tried_layers(subject)
    variants = []
    for layer in tried:
        if layer in subject.shape.attending:
            variants += [Variant({layer: {head: nothing}}) for head in (layer % heads, heads - 1)]
    if mlps:
        variants += [Variant({}, {layer: nothing}) for layer in tried]
    return [*variants, Variant({layer: {heads - 1: nothing} for layer in subject.shape.attending})]


def _tried_layers(subject: Subject) -> list[int]:
    """The first, the middle and the last layer of each kind: what it mixes by, and how far back it attends."""
    shape = subject.shape
    by_kind: dict[Any, list[int]] = {}
    for layer in subject.layers:
        kind = tuple(values[layer] for values in (shape.layer_kinds, shape.windows) if values)
        by_kind.setdefault(kind, []).append(layer)
    return sorted({layers[i] for layers in by_kind.values() for i in (0, len(layers) // 2, -1)})
