"""The hook audit: do a model's hooks and weights carry what their names say?

`audit(model)` answers with a table, `require(model, checks)` with an exception. Both run a few short forward
passes and leave no trace on the model. What should hold is written in `invariants.py`; here it is judged.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import pandas
import torch
from torch import Tensor

from metaint.errors import HookAuditError, InputError, MetaintError, ModelError
from metaint.models import invariants
from metaint.models.describe import attending_layers, check_open
from metaint.models.folded import attention_input
from metaint.models.invariants import Pair, Trial
from metaint.models.protocol import Model
from metaint.models.reading import Edit, Unavailable, logits_after, random_tokens, read, tolerance, untouched

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
    "value_mix": _Check("hook_z is the pattern times hook_v", invariants.value_mix),
}
_WEIGHTS = {
    "output_sum": _Check("the sum of z W_O over heads, plus b_O, is the attention's output", invariants.output_sum),
    "weights_query": _Check("W_Q and b_Q give hook_q from the attention's input", invariants.weights_query),
    "weights_key": _Check("W_K and b_K give hook_k from the attention's input", invariants.weights_key),
    "weights_value": _Check("W_V and b_V give hook_v from the attention's input", invariants.weights_value),
    "attention_input": _Check("folded W_Q, W_K and W_V give q, k and v from the normalised stream", attention_input),
    "residual": _Check("what a block writes adds up to its hook_resid_post", invariants.residual),
    "stream": _Check("each hook_resid_pre is the hook_resid_post before it", invariants.stream, "fails"),
    "final_norm": _Check("ln_final.hook_scale is the norm of the last hook_resid_post", invariants.final_norm),
    "unembedding": _Check("ln_final and W_U make the logits of the last hook_resid_post", invariants.unembedding),
}
_EDITS = {
    "edit_pattern": "attn.hook_pattern",
    "edit_z": "attn.hook_z",
    "edit_value": "attn.hook_v",
    "edit_mlp": "hook_mlp_out",
}
CHECKS = (*_ATTENTION, *_WEIGHTS, *_EDITS)

# What the checks of each part read in a block.
_ATTENTION_HOOKS = ["attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_rot_q", "attn.hook_rot_k"]
_ATTENTION_HOOKS += ["attn.hook_pattern", "attn.hook_z", "attn.v_norm.hook_out"]
_ATTENTION_HOOKS += ["attn.hook_q_normed", "attn.hook_k_normed"]
_WEIGHT_HOOKS = ["hook_resid_pre", "ln1.hook_scale", "ln1.hook_normalized", "ln1.hook_out"]
_WEIGHT_HOOKS += ["attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "attn.o.hook_out", "attn.hook_out"]
_WEIGHT_HOOKS += ["ln1_post.hook_out", "ln1_post.hook_scale", "ln1_post.hook_normalized", "hook_attn_out"]
_WEIGHT_HOOKS += ["ln2.hook_normalized", "hook_mlp_out", "hook_resid_post"]

_cache: WeakKeyDictionary[Any, dict[tuple[Any, ...], list[Finding]]] = WeakKeyDictionary()


def audit(model: Model, refresh: bool = False) -> pandas.DataFrame:
    """Which of the checks hold on this model: one row each, in the order of `CHECKS`.

    - `check`: its name.
    - `status`: "holds", "fails" or "unavailable" (what the check needs is not there).
    - `difference`: the largest absolute difference, or NaN; for the edits the smallest change of the logits that an
      edit at one layer made.
    - `where`: the hook or weight of that difference.
    - `note`: one sentence.

    Six forward passes of a few tokens, remembered for as long as the model lives and is in the same state
    (compatibility mode, dtype); `refresh=True` runs them again. Raises ModelError if a forward pass fails.

    >>> import metaint
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> metaint.audit(model).status.value_counts().to_dict()
    {'holds': 19}
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
    trial = Trial(model, read(model, random_tokens(model, 2, TOKENS), names))
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
        note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        return Finding(name, "unavailable", math.nan, "", _sentence(note))
    if worst <= tolerance(_dtype(trial.model)):
        return Finding(name, "holds", difference, where, _sentence(check.statement))
    return Finding(name, "fails", difference, where, _sentence(f"it should hold that {check.statement}"))


def _compare(pair: Pair) -> tuple[float, float]:
    """The largest difference, beside the expected magnitude and in itself; NaN counts as infinite."""
    if pair.actual.shape != pair.expected.shape:
        return math.inf, math.nan
    absolute = float((pair.actual - pair.expected).abs().max())
    magnitude = pair.magnitude or max(float(pair.expected.abs().max()), torch.finfo(torch.float32).tiny)
    return (math.inf, math.nan) if math.isnan(absolute) else (absolute / magnitude, absolute)


def _try_edits(model: Model, name: str) -> Finding:
    """Edits each layer in a row of its own, all rows being the same tokens; the last row tells the noise.

    So one forward pass tells for each layer whether an edit there reaches the logits.
    """
    n_layers, hook = int(model.cfg.n_layers), _EDITS[name]
    tokens = random_tokens(model, 1, TOKENS).repeat(n_layers + 2, 1)
    change = _other_pattern if name == "edit_pattern" else _other_values
    layers = attending_layers(model) if hook.startswith("attn.") else range(n_layers)
    edits = {f"blocks.{layer}.{hook}": _edit_row(change, layer + 1) for layer in layers}
    try:
        logits = logits_after(model, tokens, edits)
    except Unavailable as missing:
        return Finding(name, "unavailable", math.nan, missing.hook, _sentence(str(missing)))
    effects = (logits[1:] - logits[:1]).abs().flatten(1).amax(1).tolist()
    noise = max(10 * effects.pop(), torch.finfo(logits.dtype).eps * float(logits[0].abs().max()))
    effect, weakest = min((effects[layer], layer) for layer in layers)
    where, short = f"blocks.{weakest}.{hook}", hook.removeprefix("attn.")
    if effect > noise:
        return Finding(name, "holds", effect, where, _sentence(f"an edit at {short} changes the logits"))
    return Finding(name, "fails", effect, where, _sentence(f"an edit at {short} should change the logits"))


def _edit_row(change: Edit, row: int) -> Edit:
    def edit(activation: Tensor) -> Tensor:
        edited = activation.clone()
        edited[row] = change(activation[row])
        return edited

    return edit


def _other_pattern(pattern: Tensor) -> Tensor:
    """A pattern [head, query, key] of random weights, on earlier keys alone so that any mask allows it."""
    weights = torch.rand(pattern.shape, generator=torch.Generator().manual_seed(1)).add(0.01).tril()
    return (weights / weights.sum(-1, keepdim=True)).to(pattern)


def _other_values(values: Tensor) -> Tensor:
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).to(values)
    return values + noise * (values.std() if float(values.std()) > 0 else 1.0)


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
}
