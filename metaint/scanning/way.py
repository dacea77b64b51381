"""How a scan comes by attention: from the patterns of the model's own eager attention, or streamed, by rows.

In: a model, probes and what was asked for. Out: the way, and where it is not the one asked for, why. A model's streamed
pass is compared with its eager one on a few short sequences first, and the answer remembered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from metaint.errors import InputError, MetaintError
from metaint.measures.attention import HEAD_MEASURES
from metaint.models.audit import mistrust_of_mask
from metaint.models.describe import attending_layers
from metaint.models.protocol import Model
from metaint.models.reading import random_tokens, read, tolerance, untouched, widen
from metaint.models.row_masks import Unstreamable
from metaint.models.streamed import streaming
from metaint.models.writing import stamp
from metaint.probes.heads import HeadProbe
from metaint.probes.outputs import OutputProbe
from metaint.probes.probe import Probe
from metaint.scanning.attached import attached, hooks_beside

Asked = Literal["eager", "streamed", "auto"]
WAYS = ("eager", "streamed", "auto")
# The short sequences: a block of tokens twice, in so many rows at a time that several blocks are made of them.
_TOKENS, _ROWS = 24, 7
_DIFFERENCE, _TIES = 1e-5, 0.1
_NO_INTERFACE = "its attention does not go through transformers' AttentionInterface"

# Of a model in one state, by what is read of it.
_checked: WeakKeyDictionary[Any, tuple[Any, dict[Any, str]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Way:
    """Whether attention is streamed, and why it is not where that was to be decided."""

    streamed: bool
    reason: str = ""

    @property
    def facts(self) -> dict[str, str]:
        """What a scan records of it."""
        way = {"attention_way": "streamed" if self.streamed else "eager"}
        return {**way, "attention_reason": self.reason} if self.reason else way


def way_of(model: Model, probes: Sequence[Probe], asked: str) -> Way:
    """The way to scan this model with these probes.

    Raises InputError for another word than `WAYS`, and where "streamed" was asked for and can't be had.
    """
    if asked not in WAYS:
        raise InputError(f'attention is {asked!r}: give "eager", "streamed" or "auto".')
    if asked == "eager":
        return Way(False)
    for probe in probes:
        probe.prepare(model)
    reason = _why_not(model, probes)
    if reason and asked == "streamed":
        kind = type(getattr(model, "original_model", model)).__name__
        raise InputError(
            f'attention is "streamed", and this scan of a {kind} can\'t be: {reason}. Give attention="auto" or "eager".'
        )
    return Way(not reason, reason)


def _why_not(model: Model, probes: Sequence[Probe]) -> str:
    for probe in probes:
        inside = [name for name in hooks_beside(probe) if ".attn." in name]
        if inside:
            return f"its {type(probe).__name__} reads {inside[0]}, which no streamed pass has"
        if probe.module_hooks(model) or probe.copies > 1:
            return f"its {type(probe).__name__} changes what passes compute"
    hooked = next((name for name, point in model.hook_dict.items() if ".attn." in name and point._forward_hooks), "")
    if hooked:
        return f"a hook of yours is on {hooked}, where a streamed pass does not come by"
    own = [m for probe in probes if isinstance(probe, HeadProbe) for m in probe.measures if m not in HEAD_MEASURES]
    groups = sorted({probe.group for probe in probes if not isinstance(probe, HeadProbe)})
    state = (bool(getattr(model, "compatibility_mode", False)), stamp(model))
    if model not in _checked or _checked[model][0] != state:
        _checked[model] = (state, {})
    cached, key = _checked[model][1], (*groups, *own)
    if key not in cached:
        cached[key] = _difference(model, probes, own)
    return cached[key]


def _difference(model: Model, probes: Sequence[Probe], own: Sequence[Any]) -> str:
    """What differs between an eager and a streamed pass over short sequences, or why there is none; "" if nothing."""
    tokens = random_tokens(model, 3, _TOKENS // 2).repeat(1, 2)
    masks = _masks(model, tokens)
    with untouched(model):
        for mask in masks:
            try:
                found = _of_hooks(model, probes, tokens, mask) or _of_scans(model, probes, own, tokens, mask)
            except Unstreamable as error:
                return str(error)
            except MetaintError:
                raise
            except Exception as error:
                if _is_ours(error):
                    raise
                # Most models with an attention of their own stumble over a mask that is no tensor.
                return f"{_NO_INTERFACE} ({type(error).__name__})"
            if found:
                return f"{found} would differ from the eager way's"
    return ""


def _is_ours(error: Exception) -> bool:
    """Whether an error was raised by code of this package, not by a model's."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__", "")).startswith("metaint.")


@dataclass(frozen=True)
class _Layers:
    """A reader that remembers whose attention came by."""

    layers: set[int]

    def begin_layer(self, layer: int, value: Tensor, queries: int) -> None:
        self.layers.add(layer)

    def read_rows(self, layer: int, rows: slice, pattern: Tensor) -> None: ...
    def end_layer(self, layer: int, z: Tensor) -> None: ...


def _masks(model: Model, tokens: Tensor) -> list[Tensor | None]:
    """No padding, and padding at both ends where the model can be trusted with it."""
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    mask[2, -5:] = 0
    return [None] if mistrust_of_mask(model, mask) else [None, mask]


def _of_hooks(model: Model, probes: Sequence[Probe], tokens: Tensor, mask: Tensor | None) -> str:
    """The first of the logits and the hooks that probes read which is not the same in a streamed pass."""
    names = [name for probe in probes for name in hooks_beside(probe)]
    padding = {} if mask is None else {"attention_mask": mask}
    eager = read(model, tokens, names, **padding)
    seen = _Layers(set())
    with streaming(model, [seen], _ROWS):
        streamed = read(model, tokens, names, use_cache=False, **padding)
    if seen.layers != set(attending_layers(model)):
        raise Unstreamable(_NO_INTERFACE)
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    if not _alike(widen(streamed.logits)[real], widen(eager.logits)[real], tolerance(eager.logits.dtype)):
        return "logits"
    for name, activation in eager.activations.items():
        if name not in streamed:
            return f"{name}, which does not fire,"
        if not _alike(streamed[name][real], eager[name][real], tolerance(activation.dtype)):
            return name
    return ""


def _of_scans(model: Model, probes: Sequence[Probe], own: Sequence[Any], tokens: Tensor, mask: Tensor | None) -> str:
    """The first sums that are not the same in a streamed scan, of every head measure and of what heads write."""
    limit = max(_DIFFERENCE, 0.0 if (wide := tolerance(_dtype(model))) < 1e-4 else wide)
    given = [probe for probe in probes if isinstance(probe, OutputProbe)]
    fresh = [[HeadProbe([*HEAD_MEASURES, *own]), *(_like(probe) for probe in given)] for _ in range(2)]
    padding = {} if mask is None else {"attention_mask": mask}
    for rows, each in zip((0, _ROWS), fresh, strict=True):
        with attached(model, each, private=True, rows=rows):
            model(tokens, **padding)
    for eager, streamed in zip(*fresh, strict=True):
        ties = [place for name, place in getattr(eager, "slots", {}).items() if name.startswith("tied")]
        for name, expected in _sums(eager).items():
            slot_limits = torch.full((expected.shape[1] if expected.ndim > 1 else 1,), limit)
            for place in ties if name == "sums" else ():
                slot_limits[place] = _TIES
            if not _alike_by_slot(_sums(streamed)[name], expected, slot_limits):
                return f"{name} of /{eager.group}"
    return ""


def _sums(probe: Probe) -> dict[str, Tensor]:
    """What a probe has added up, [sequence, slot, ...]: all that its variables are made of."""
    state = probe.metric_state
    return {name: torch.cat(value) if isinstance(value, list) else value[None] for name, value in state.items()}


def _alike_by_slot(actual: Tensor, expected: Tensor, limits: Tensor) -> bool:
    """`_alike` of each slot by itself, whose values have a size of their own."""
    if expected.ndim < 2 or actual.shape != expected.shape:
        return _alike(actual, expected, float(limits[0]))
    slots = zip(actual.unbind(1), expected.unbind(1), limits.tolist(), strict=True)
    return all(_alike(mine, theirs, limit) for mine, theirs, limit in slots)


def _like(probe: OutputProbe) -> OutputProbe:
    return OutputProbe(probe.kinds, positions=min(probe.positions, _TOKENS), seed=probe.seed)


def _dtype(model: Model) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _alike(actual: Tensor, expected: Tensor, limit: float) -> bool:
    """Whether all differences are within the limit of the largest value, or of 1; NaN is like NaN."""
    if actual.shape != expected.shape:
        return False
    scale = max(1.0, float(expected.nan_to_num(nan=0.0).abs().max())) if expected.numel() else 1.0
    return torch.allclose(actual.double(), expected.double(), rtol=0, atol=limit * scale, equal_nan=True)
