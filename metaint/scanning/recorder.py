"""Recording over training: a scan every so often along a `step` dimension, in a Zarr store that survives a kill.

In: the loop's own calls, a `transformers.Trainer`, or a loop that can't be edited. Out: `read_recording(path)`.
How records lie in the store, and why a kill does them no harm, is in `record_store.py`.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from metaint.errors import InputError, StoreError, door
from metaint.models.describe import facts_of
from metaint.models.owner_hooks import OWNER_HOOKS, hooked_by_owner
from metaint.models.protocol import Model
from metaint.models.reading import roots_of
from metaint.probes.probe import Probe
from metaint.scanning.alarm import MARK, Alarm, Warn
from metaint.scanning.given import given_inputs, whole
from metaint.scanning.record_store import append, create, layout_of, trim, with_step, writing
from metaint.scanning.scan import chosen_probes, scan
from metaint.scans.checksums import TABLE
from metaint.scans.recordings import groups_of, root_of

# What must be the same to go on with a recording; the device and the versions may change.
_SAME = ("model", "weights", "dtype", "n_layers", "n_heads", "attention", "seed", "tokens_sha256", "probes")


class Recorder:
    """Scans a model while it is trained: call it with the step after each optimiser step.

    - `probes`: what is read; they are reset before each record.
    - `every`: a number of steps, the steps themselves, or a function of the step.
    - `path`: the Zarr store. It must not exist, unless `resume` goes on after its last whole record.
    - `tokens`, `batch_size`, `seed`, `attributes`: as in `metaint.scan`; the tokens stay the same.

    - `warn_above`: an attention logit, such as MuonClip's 100 (2507.20534), above which `on_warning(step, heads)` is
      called with the heads and their largest logits (None: a Python warning), and `/training` marks the step with a
      `logit_alarm` of 1. Needs `HeadProbe(max_logit=True)`.

    Scans run in evaluation mode, without gradients and autocast, and leave modes and random states as they were.
    `last` is the last scan made. Where several processes train, only one may record.

    Raises InputError for arguments that don't fit, or another model, tokens or probes than those at `path`;
    StoreError if something is in the way at `path`, damaged, or can't be written.

    >>> import metaint, tempfile
    >>> from metaint.toys.small import small_transformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_mlp": 16, "d_vocab": 30, "n_ctx": 20}
    >>> model = small_transformer(norm="pre", **sizes)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     recorder = metaint.Recorder(model, [metaint.HeadProbe()], every=2, path=f"{folder}/run.zarr")
    ...     for step in range(4):
    ...         scan = recorder(step, loss=1 / (1 + step))  # after each step of an optimiser
    ...     recording = metaint.read_recording(f"{folder}/run.zarr")
    >>> recording["heads"]["induction"].sizes
    Frozen({'step': 2, 'layer': 1, 'head': 2})
    """

    @door
    def __init__(
        self,
        model: Model,
        probes: Sequence[Probe],
        *,
        every: int | Iterable[int] | Callable[[int], bool],
        path: str | Path,
        tokens: Tensor | str | None = None,
        batch_size: int = 8,
        seed: int = 0,
        attributes: Mapping[str, Any] | None = None,
        resume: bool = False,
        warn_above: float | None = None,
        on_warning: Warn | None = None,
    ) -> None:
        self._model, self._probes, self._path = model, chosen_probes(probes), Path(path)
        if not self._probes:
            raise InputError("probes is empty: pass at least one, such as [metaint.HeadProbe()].")
        self._alarm = Alarm.of(warn_above, on_warning, self._probes)
        self._wanted = _chooser(every)
        given = given_inputs(model, tokens, batch_size=batch_size, seed=seed)
        digest = hashlib.sha256(given.tokens.long().cpu().numpy().tobytes()).hexdigest()[:16]
        groups = sorted(probe.group for probe in self._probes)
        facts = {"task": given.task, "tokens_sha256": digest, "probes": groups, **(attributes or {})}
        facts = json.loads(json.dumps(facts, default=str))
        same_tokens = given.tokens.clone()
        self._scan = partial(scan, model, same_tokens, self._probes, batch_size=batch_size, seed=seed, attributes=facts)
        self.last: xr.DataTree | None = None
        self._steps: list[int] = []
        self._layout: dict[str, Any] = {}  # of every record
        with writing(self._path):  # fails now rather than after hours of training
            if self._path.exists():
                self._open(resume, {**facts_of(model), "seed": seed, **facts})
            self._path.parent.mkdir(parents=True, exist_ok=True)
        self._step = max(self._steps, default=0)
        self._resumed = max(self._steps, default=-math.inf)

    @property
    def steps(self) -> list[int]:
        """The recorded steps, those found by `resume` among them."""
        return list(self._steps)

    def __call__(self, step: int, **scalars: float | Tensor) -> xr.DataTree | None:
        """Record if `every` asks for this step; `scalars` (loss=...) go to `/training`. Returns the scan, or None.

        A scalar may come and go: where it was not given it is NaN. Where hooks of yours are on the model, `owner_hooks`
        there is the number of their hook points (attributes are those of the first record). Raises InputError for a
        step that isn't above the last recorded one, what `scan` raises, and StoreError, with the records before intact,
        if it can't be written.
        """
        step = whole(step, "step")
        if self._steps and step <= self._steps[-1]:
            raise InputError(
                f"step is {step}, and step {self._steps[-1]} is already recorded in {self._path}: steps must rise, "
                "so call the recorder for later steps alone."
            )
        self._step = step
        if not self._wanted(step):
            return None
        hooked = len(hooked_by_owner(self._model.hook_dict))
        if hooked:
            scalars = {OWNER_HOOKS: hooked, **scalars}
        training = xr.Dataset({name: _number(name, value) for name, value in scalars.items()})
        for probe in self._probes:
            probe.reset()
        with _undisturbed(self._model):
            scanned = self._scan()
        loud = {} if self._alarm is None else self._alarm.heads(scanned)
        if self._alarm is not None:
            training[MARK] = float(bool(loud))
        groups = {name: group.to_dataset() for name, group in scanned.children.items()} | {"training": training}
        self._write({name: with_step(data, step) for name, data in groups.items()}, scanned.attrs)
        self._steps.append(step)
        self.last = scanned
        if self._alarm is not None:
            self._alarm.tell(step, loud)
        return scanned

    @contextmanager
    def following(self, start: int | None = None) -> Iterator["Recorder"]:
        """Count and record the optimiser steps that train this model inside the `with` block, whoever takes them.

        Step `start` (default: the last this recorder was called with or resumed from, else 0) is recorded on the way
        in; steps that `resume` has found are passed over. Where several optimisers step, the first to do so counts.
        `/training` gets the `loss` of the last forward pass that returned one to be trained on.
        """
        step, counted, loss = self._step if start is None else whole(start, "start"), set[int](), {}

        def after_forward(module: Any, args: Any, output: Any) -> None:
            returned = getattr(output, "loss", output)
            if isinstance(returned, Tensor) and returned.ndim == 0 and returned.requires_grad:
                loss["loss"] = returned.detach()

        def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            nonlocal step
            held = {id(p) for group in optimizer.param_groups for p in group["params"]} & _parameters(self._model)
            if not counted:
                counted.update(held)  # the first optimiser's; a later loop's holds some of them
            if held & counted:
                step += 1
                self._advance(step, loss)

        handles = [self._model.register_forward_hook(after_forward), register_optimizer_step_post_hook(after_step)]
        try:
            self._advance(step, loss)
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def as_callback(self) -> Any:
        """A `transformers.TrainerCallback` for a Trainer of the model that a bridge wraps, `bridge.original_model`.

        It records when training begins and after each step, in the main process, with the loss that was logged last;
        steps that `resume` has found (the Trainer may go on from an older checkpoint) are passed over. Raises
        InputError when the Trainer begins to train another model.
        """
        from transformers import TrainerCallback

        recorder = self

        class RecorderCallback(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if not _parameters(kwargs["model"]) & _parameters(recorder._model):
                    raise InputError(
                        "the Trainer trains another model than the recorder scans: give the recorder a bridge, "
                        "and the Trainer its bridge.original_model."
                    )
                self.on_step_end(args, state, control)

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.is_world_process_zero:
                    logged = [entry["loss"] for entry in state.log_history if "loss" in entry]
                    scalars = {"loss": logged[-1]} if logged else {}
                    recorder._advance(state.global_step, scalars)

        return RecorderCallback()

    def _advance(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Record for a loop that can't be told which steps are there already, or that begins where the last ended."""
        self._step = step
        if step > self._resumed and self._steps[-1:] != [step]:
            self(step, **scalars)

    def _open(self, resume: bool, here: Mapping[str, Any]) -> None:
        """Go on with the store at `path`: drop what a kill left of a torn record, and learn how records look."""
        if not resume:
            raise StoreError(f"{self._path} exists: give another path, or resume=True to go on with a recording there.")
        stored = root_of(self._path)["attributes"]
        for name in _SAME:
            if stored.get(name) != here[name]:
                raise InputError(
                    f"path is {self._path}, a recording with {name} {stored.get(name)!r}, and this recorder has "
                    f"{here[name]!r}: resume with the same model, tokens and probes, or give another path."
                )
        groups = groups_of(self._path, stored["records"], stored.get(TABLE))
        self._layout, self._steps = layout_of(groups), groups["training"]["step"].values.tolist()
        trim(self._path, len(self._steps))

    def _write(self, groups: dict[str, xr.Dataset], attributes: Mapping[Any, Any]) -> None:
        """Add a record to the store, which the first one makes; what fails halfway is undone."""
        layout = layout_of(groups)
        with writing(self._path):
            if not self._layout:
                create(self._path, groups, attributes)
                self._layout = layout
                return
            for name in {**self._layout, **layout}:
                if self._layout.get(name) != layout.get(name):
                    raise InputError(
                        f"the scan's {name} has another shape or other labels than the records in {self._path}: "
                        "go on with the same model, tokens and probes, or give another path."
                    )
            try:
                append(self._path, groups, len(self._steps))
            except BaseException:
                with suppress(Exception):  # so that metaint.load finds it whole again too
                    trim(self._path, len(self._steps))
                raise


# What a recorder takes, and what it gives back to the loop.


def _chooser(every: Any) -> Callable[[int], bool]:
    if callable(every):
        return lambda step: bool(every(step))
    if isinstance(every, Integral) and int(every) >= 1:
        return lambda step: step % int(every) == 0
    if isinstance(every, Iterable) and not isinstance(every, str):
        steps = {whole(step, "a step in every") for step in every}
        if steps:
            return steps.__contains__
    raise InputError(f"every is {every!r}: give a number of steps above 0, a list of steps, or a function of the step.")


def _number(name: str, value: Any) -> float:
    try:
        if name.isidentifier():  # it becomes a folder's name
            return float(value.detach()) if isinstance(value, Tensor) else float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
        pass
    raise InputError(
        f"the scalar {name} is a {type(value).__name__}: give one number under a plain name, as in loss=2."
    )


def _parameters(model: Model) -> set[int]:
    return {id(parameter) for root in roots_of(model).values() for parameter in root.parameters()}


@contextmanager
def _undisturbed(model: Model) -> Iterator[None]:
    """The random states of torch, NumPy and Python come back; autocast is off, whose cache would lose gradients."""
    devices, python, numpy = {p.device for p in model.parameters()}, random.getstate(), np.random.get_state()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([device for device in devices if device.type == "cuda"]))
            for kind in {device.type for device in devices}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
