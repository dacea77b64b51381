"""Probes on a model: their hooks, and in a streamed pass the readers of its rows.

In: a model and probes. Out: a context in which every pass is read, and after which nothing of it is left.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from metaint.errors import InputError
from metaint.models.inputs import InputWatch, watching
from metaint.models.parameters import check_finite
from metaint.models.protocol import Model
from metaint.models.streamed import streaming
from metaint.probes.probe import Probe


@contextmanager
def attached(model: Model, probes: Sequence[Probe], private: bool, rows: int = 0) -> Iterator[None]:
    """`private`: the passes are our own. Nobody else wants their logits, which are made where probes look at them, and
    their masks were checked with their tokens. `rows`: stream attention by so many rows at a time; 0 leaves it."""
    if not probes:
        raise InputError("probes is empty: pass one, such as metaint.HeadProbe().")
    if len({id(probe) for probe in probes}) < len(probes):
        raise InputError("probes holds the same probe twice, which would count every sequence twice: pass it once.")
    for probe in probes:  # before anything watches: the audit runs passes of its own
        probe.prepare(model)
    if any(probe.group == "memory" for probe in probes):  # a recall is a rank, which NaN would pass for
        check_finite(model)
    for probe in probes:
        probe.read_weights(model)
    with watching(model, masks_checked=private) as watch, ExitStack() as stack:
        watch.private = private
        watch.wants_logits = not private or any(probe.reads_logits for probe in probes) or _hooked(model, "unembed")
        for module, hook in (pair for probe in probes for pair in probe.module_hooks(model)):
            stack.callback(module.register_forward_hook(hook).remove)
        hooks = [hook for probe in probes for hook in probe.hooks(model, watch)]
        if not private:  # their owner's hooks come and go from pass to pass
            points = model.hook_dict
            watch.openers += [partial(probe.note_hooks, points) for probe in probes]
        if rows:
            beside = {name for probe in probes for name in hooks_beside(probe)}
            hooks = [(name, hook) for name, hook in hooks if name in beside]
            readers = [reader for probe in probes if (reader := probe.row_reader(watch)) is not None]
            stack.enter_context(streaming(model, readers, rows))
        with model.hooks(fwd_hooks=hooks):
            yield


def _hooked(model: Model, part: str) -> bool:
    """Whether the owner has hooks on a part of the model."""
    return any(bool(point._forward_hooks) for name, point in model.hook_dict.items() if name.startswith(part))


def hooks_beside(probe: Probe) -> list[str]:
    """The hooks a probe reads in a streamed pass: all but those in attention, which its row reader stands for."""
    names = probe.hook_names(probe.shape)
    return names if probe.row_reader(InputWatch()) is None else [name for name in names if ".attn." not in name]
