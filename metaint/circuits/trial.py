"""Whether passes that begin in the middle of a model give what whole passes give: tried, not assumed.

In: a model. Out: why they don't, in words, or nothing.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from tqdm.auto import tqdm

from metaint.circuits.clean import clean_pass
from metaint.circuits.passes import Variant, outcomes, whole_pass
from metaint.models.audit import holds
from metaint.models.reading import random_tokens, steady, tolerance

_TOKENS = 12
# Variants that are tried in one whole pass.
_STACKED = 64
_cannot: WeakKeyDictionary[Any, dict[Any, str]] = WeakKeyDictionary()


def begins_anywhere(model: Any, progress: bool = False) -> str:
    """Why passes that begin in the middle are not used; nothing where they give what whole passes give.

    Tried on a few tokens at every layer, and remembered for as long as the model lives and is in the same state.
    """
    if any(point._forward_hooks for point in model.hook_dict.values()):
        return "hooks are on the model, which run as they are meant to in whole passes"
    state = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    known = _cannot.setdefault(model, {})
    key = (bool(getattr(model, "compatibility_mode", False)), next(model.parameters()).dtype, state)
    if key not in known:
        known[key] = _try(model, progress)
    return known[key]


def _try(model: Any, progress: bool) -> str:
    if not holds(model, "output_sum"):
        return "the audit does not find attention's output to be the sum of z W_O over heads"
    layers, heads = range(int(model.cfg.n_layers)), int(model.cfg.n_heads)
    tokens = random_tokens(model, 2, _TOKENS)
    places = torch.zeros_like(tokens, dtype=torch.bool)
    places[0, -1], places[1, 1:] = True, True
    nothing = torch.zeros((), device=tokens.device, dtype=next(model.parameters()).dtype)
    variants = [Variant({layer: {head: nothing}}) for layer in layers for head in (layer % heads, heads - 1)]
    mlps = holds(model, "edit_mlp")
    variants += [Variant({}, {layer: nothing}) for layer in layers if mlps]
    variants.append(Variant({layer: {heads - 1: nothing} for layer in layers}))
    with steady(model), tqdm(total=len(variants), desc="try passes", disable=not progress, leave=False) as bar:
        clean = clean_pass(model, tokens, places, mlps=mlps)
        try:
            stacked = [variants[start : start + _STACKED] for start in range(0, len(variants), _STACKED)]
            plain = [logits for some in stacked for logits in whole_pass(model, clean, some)]
            plain[-1] = whole_pass(model, clean, variants[-1:])[0]
            for i, logits in outcomes(model, clean, variants, 4, anywhere=True):
                difference, layer = float((logits - plain[i]).abs().max()), variants[i].start[0]
                largest = float(torch.cat([plain[i], clean.logits]).abs().max())
                if not difference <= tolerance(logits.dtype) * largest:
                    return f"a pass that begins at layer {layer} gives other logits (by {difference:.3g})"
                bar.update()
        except Exception as error:  # whatever a model makes of a pass that begins in its middle
            return f"a pass that begins in the middle fails ({type(error).__name__}: {str(error)[:200]})"
    return ""
