"""The hook audit: do a model's hooks and weights carry what their names say?

`audit(model)` answers with a table, `require(model, checks)` with an exception. Both run a few short forward
passes and leave no trace on the model. What should hold is written in `invariants.py` and `projections.py`, for one
layer after another; here it is judged.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import pandas
import torch
from torch import Tensor

from metaint.errors import HookAuditError, InputError, MetaintError, ModelError, door
from metaint.models import invariants, layout, projections
from metaint.models.describe import attending_layers, check_open
from metaint.models.direction import learn_direction, sharing_half
from metaint.models.edits import effects_of
from metaint.models.folded import attention_input
from metaint.models.invariants import Pair, Trial
from metaint.models.masks import left_padding, masked_trial, right_padding
from metaint.models.protocol import Model
from metaint.models.reading import Unavailable, random_tokens, read, tolerance, untouched

TOKENS = 12


@dataclass(frozen=True)
class Finding:
    """One row of the audit."""

    check: str
    status: str
    difference: float
    where: str
    note: str


class _Check(NamedTuple):
    statement: str
    pairs: Callable[[Trial], Iterator[Pair]]
    if_missing: str = "unavailable"


_ATTENTION = {
    "pattern_fires": _Check("hook_pattern fires as [batch, head, query, key]", invariants.pattern_fires, "fails"),
    "pattern_order": _Check("hook_pattern fires before hook_z, which is made of it", invariants.pattern_order),
    "pattern_rows": _Check("each row of the pattern sums to one", invariants.pattern_rows),
    "pattern_causal": _Check("no query has weight on a later key", invariants.pattern_causal),
    "pattern_from_scores": _Check("softmax(q·k) gives the pattern", invariants.pattern_from_scores),
    "direction": _Check("later tokens change earlier logits only where patterns see later keys", layout.direction),
    "head_shapes": _Check("hook_q, k, v and z are [batch, position, head, d_head]", layout.head_shapes),
    "value_mix": _Check("hook_z is the pattern times hook_v", invariants.value_mix),
}
_WEIGHTS = {
    "output_sum": _Check("the sum of z W_O over heads, plus b_O, is the attention's output", projections.output_sum),
    "weights_query": _Check("W_Q and b_Q give hook_q from the attention's input", projections.weights_query),
    "weights_key": _Check("W_K and b_K give hook_k from the attention's input", projections.weights_key),
    "weights_value": _Check("W_V and b_V give hook_v from the attention's input", projections.weights_value),
    "attention_input": _Check("folded W_Q, W_K and W_V give q, k and v from the normalised stream", attention_input),
    "residual": _Check("what a block writes adds up to its hook_resid_post", projections.residual),
    "stream": _Check("each hook_resid_pre is the hook_resid_post before it", projections.stream, "fails"),
    "final_norm": _Check("ln_final.hook_scale is the norm of the last hook_resid_post", projections.final_norm),
    "unembedding": _Check("ln_final and W_U make the logits of the last hook_resid_post", projections.unembedding),
}
_EDITS = {
    "edit_pattern": "attn.hook_pattern",
    "edit_z": "attn.hook_z",
    "edit_value": "attn.hook_v",
    "edit_mlp": "hook_mlp_out",
}
_MASKS = {
    "attention_mask": ("an attention_mask hides the end of a sequence, and later keys stay hidden", right_padding),
    "left_padding": ("an attention_mask hides the beginning of a sequence", left_padding),
}
CHECKS = (*_ATTENTION, *_WEIGHTS, *_EDITS, *_MASKS)

# What the checks of each part read in a block.
_ATTENTION_HOOKS = ["attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_rot_q", "attn.hook_rot_k"]
_ATTENTION_HOOKS += ["attn.hook_pattern", "attn.hook_z", "attn.v_norm.hook_out"]
_ATTENTION_HOOKS += ["attn.hook_q_normed", "attn.hook_k_normed"]
_WEIGHT_HOOKS = ["hook_resid_pre", "ln1.hook_scale", "ln1.hook_normalized", "ln1.hook_out"]
_WEIGHT_HOOKS += ["attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "attn.o.hook_out", "attn.hook_out"]
_WEIGHT_HOOKS += ["ln1_post.hook_out", "ln1_post.hook_scale", "ln1_post.hook_normalized", "hook_attn_out"]
_WEIGHT_HOOKS += ["ln2.hook_normalized", "hook_mlp_out", "hook_resid_post"]

_cache: WeakKeyDictionary[Any, dict[tuple[Any, ...], list[Finding]]] = WeakKeyDictionary()


@door
def audit(model: Model, refresh: bool = False) -> pandas.DataFrame:
    """Which of the checks hold on this model: one row each, in the order of `CHECKS`.

    - `check`: its name.
    - `status`: "holds", "fails" or "unavailable" (what the check needs is not there).
    - `difference`: the largest absolute difference, or NaN; for the edits the smallest change of the logits that an
      edit at one layer made.
    - `where`: the hook or weight of that difference.
    - `note`: one sentence.

    Seven forward passes of a few tokens, remembered for as long as the model lives and is in the same state
    (compatibility mode, dtype); `refresh=True` runs them again. Raises ModelError if a forward pass fails.

    >>> import metaint
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> metaint.audit(model).status.value_counts().to_dict()
    {'holds': 23}
    """
    findings = [finding for group in _GROUPS for finding in _findings(model, group, refresh)]
    return pandas.DataFrame([asdict(finding) for finding in findings])


def require(model: Model, checks: Iterable[str]) -> None:
    """Raises HookAuditError for the first of these checks that does not hold; runs only the passes they need.

    Raises InputError for a name that is not in `CHECKS`, ModelError if a forward pass fails.
    """
    for check in checks:
        if check not in CHECKS:
            raise InputError(f"checks has {check!r}: name checks of the audit ({', '.join(CHECKS)}).")
        group = next(name for name, group in _GROUPS.items() if check in group.checks)
        finding = next(finding for finding in _findings(model, group) if finding.check == check)
        if finding.status != "holds":
            measured = "" if math.isnan(finding.difference) else f" (difference {finding.difference:.3g})"
            raise HookAuditError(f"The hook audit's {check} {_verb(finding)}{measured}: {finding.note}")


def holds(model: Model, check: str) -> bool:
    """Whether a check of the audit holds, for readings that can do without."""
    try:
        require(model, [check])
    except HookAuditError:
        return False
    return True


def mistrust_of_mask(model: Model, mask: Tensor) -> str | None:
    """Why a model can't be trusted with this attention_mask [batch, position], or None if it can."""
    padded_left = mask.ndim == 2 and not bool(mask[:, 0].all())
    for check in ("attention_mask", "left_padding") if padded_left else ("attention_mask",):
        try:
            require(model, [check])
        except HookAuditError as error:
            return f"attention_mask was given, and this model can't be trusted with one. {error}"
    return None


def _verb(finding: Finding) -> str:
    place = f" at {finding.where}" if finding.where else ""
    return f"fails{place}" if finding.status == "fails" else f"can't be checked{place}"


def _findings(model: Model, group: str, refresh: bool = False) -> list[Finding]:
    check_open(model)
    cached = _cache.setdefault(model, {})
    key = (group, bool(getattr(model, "compatibility_mode", False)), _dtype(model))
    if refresh or key not in cached:
        with untouched(model):
            try:
                cached[key] = _GROUPS[group].run(model)
            except MetaintError:
                raise
            except Exception as error:
                raise ModelError(f"The hook audit's forward pass failed: {type(error).__name__}: {error}") from error
    return cached[key]


def _run_checks(model: Model, checks: dict[str, _Check], hooks: Iterable[str]) -> list[Finding]:
    names = [f"blocks.{layer}.{hook}" for layer in range(int(model.cfg.n_layers)) for hook in hooks]
    names += ["hook_pos_embed", "ln_final.hook_scale"]
    trial = Trial(model, read(model, sharing_half(random_tokens(model, 2, TOKENS)), names))
    learn_direction(model, trial.reading)
    return [_judge(name, check, trial) for name, check in checks.items()]


def _judge(name: str, check: _Check, trial: Trial) -> Finding:
    """The layer where the difference is largest beside what rounding explains decides."""
    worst, difference, where = -1.0, math.nan, ""
    try:
        for pair in check.pairs(trial):
            relative, absolute = _compare(pair)
            if not relative <= worst:
                worst, difference, where = relative, absolute, pair.where
    except Unavailable as missing:
        return Finding(name, check.if_missing, math.nan, missing.hook, _sentence(str(missing)))
    except Exception as error:
        return Finding(name, "unavailable", math.nan, "", _sentence(_missing(error)))
    if worst <= tolerance(_dtype(trial.model)):
        return Finding(name, "holds", difference, where, _sentence(check.statement))
    return Finding(name, "fails", difference, where, _sentence(f"it should hold that {check.statement}"))


def _missing(error: Exception) -> str:
    """Why a check can't be made, from what a model or PyTorch said of it."""
    words = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, RuntimeError) and ("size" in words or "shape" in words):
        return "the shapes of what the check needs don't fit each other in this model"
    return f"the model does not have what the check needs ({words.split('. ')[0].rstrip('.')})"


def _compare(pair: Pair) -> tuple[float, float]:
    """The largest difference, beside the expected magnitude and in itself; NaN counts as infinite."""
    if pair.actual.shape != pair.expected.shape:
        return math.inf, math.nan
    absolute = float((pair.actual - pair.expected).abs().max())
    magnitude = pair.magnitude or max(float(pair.expected.abs().max()), torch.finfo(torch.float32).tiny)
    return (math.inf, math.nan) if math.isnan(absolute) else (absolute / magnitude, absolute)


def _try_edits(model: Model, name: str) -> Finding:
    """Whether an edit in each layer changes the logits, and at hook_z by what one head writes."""
    hook = _EDITS[name]
    try:
        effects = effects_of(model, hook, TOKENS)
    except Unavailable as missing:
        return Finding(name, "unavailable", math.nan, missing.hook, _sentence(str(missing)))
    short = hook.removeprefix("attn.")
    # W_O may be at fault itself, which is output_sum's finding.
    if effects.astray is not None and holds(model, "output_sum"):
        layer, difference = effects.astray
        note = f"an edit of one head at {short} should change what that head writes, and nothing else"
        return Finding(name, "fails", difference, f"blocks.{layer}.{hook}", _sentence(note))
    layers = attending_layers(model) if hook.startswith("attn.") else range(int(model.cfg.n_layers))
    writing = [layer for layer in layers if layer not in effects.silent]
    if not writing:
        note = f"no layer's attention writes anything, so that an edit at {short} rightly changes nothing"
        return Finding(name, "holds", max(effects.logits), "", _sentence(note))
    effect, weakest = min((effects.logits[layer], layer) for layer in writing)
    where = f"blocks.{weakest}.{hook}"
    if effect > effects.noise:
        return Finding(name, "holds", effect, where, _sentence(f"an edit at {short} changes the logits"))
    return Finding(name, "fails", effect, where, _sentence(f"an edit at {short} should change the logits"))


def _try_masks(model: Model) -> list[Finding]:
    """What attention_masks do, in a pass of their own."""
    try:
        trial, mask = masked_trial(model, TOKENS)
    except Unavailable as missing:
        note = _sentence(str(missing))
        return [Finding(name, "unavailable", math.nan, missing.hook, note) for name in _MASKS]
    checks = {n: _Check(words, partial(pairs, mask=mask)) for n, (words, pairs) in _MASKS.items()}
    return [_judge(name, check, trial) for name, check in checks.items()]


def _dtype(model: Model) -> torch.dtype:
    """The dtype the model computes in, as far as its first parameter tells."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:].rstrip('.')}."


class _Group(NamedTuple):
    """Checks that share forward passes, so that a probe pays for what it requires and no more."""

    checks: Iterable[str]
    run: Callable[[Any], list[Finding]]


_GROUPS = {
    "attention": _Group(_ATTENTION, lambda model: _run_checks(model, _ATTENTION, _ATTENTION_HOOKS)),
    "weights": _Group(_WEIGHTS, lambda model: _run_checks(model, _WEIGHTS, _WEIGHT_HOOKS)),
    # Each in a pass of its own.
    **{name: _Group([name], lambda model, name=name: [_try_edits(model, name)]) for name in _EDITS},
    "masks": _Group(_MASKS, _try_masks),
}
