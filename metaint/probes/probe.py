"""The base of every probe: hooks that fold what they read into a small `torchmetrics` state."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import xarray as xr
from torch import Tensor
from torchmetrics import Metric

from metaint.errors import HookAuditError, InputError, door
from metaint.models.audit import mistrust_of_mask, require
from metaint.models.describe import Shape, facts_of, shape_of
from metaint.models.inputs import InputWatch
from metaint.models.owner_hooks import OWNER_HOOKS, as_attribute, hooked_by_owner, ours
from metaint.models.protocol import Model
from metaint.models.reading import first_tensor, quietly
from metaint.models.streamed import RowReader
from metaint.scans.assemble import assemble

Hook = tuple[str, Callable[..., None]]
TOKENS_HOOK, EMBEDDING_HOOK = "embed.hook_in", "hook_embed"


class Probe(Metric):
    """Reads a model at `hook_names`, folding each activation into state with `update`.

    A subclass names its `group` in a scan and the `audits` it relies on, says where it reads, and turns its state
    into a labelled dataset. Adding, merging, resetting and moving state are `torchmetrics.Metric`'s own. What a probe
    reads without a pass it reads in `read_weights`, which `metaint.scan` and `metaint.attach` call before the passes.

    >>> import torch
    >>> import xarray
    >>> import metaint
    >>> from metaint.toys.small import small_transformer
    >>> class LargestProbe(metaint.Probe):
    ...     "The largest absolute value that attention writes anywhere."
    ...     group = "largest"
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.add_state("largest", torch.tensor(0.0), dist_reduce_fx="max")
    ...     def hook_names(self, shape):
    ...         return [f"blocks.{layer}.hook_attn_out" for layer in range(shape.n_layers)]
    ...     def update(self, name, activation, watch):
    ...         self.largest = torch.maximum(self.largest, activation.abs().max())
    ...     def compute(self):
    ...         return self.largest
    ...     def to_dataset(self):
    ...         return xarray.Dataset({"largest": float(self.compute())})
    >>> sizes = {"n_layers": 2, "n_heads": 2, "d_model": 8, "d_mlp": 16, "d_vocab": 30, "n_ctx": 20}
    >>> scan = metaint.scan(small_transformer(norm="pre", **sizes), probes=[LargestProbe()])
    >>> bool(scan["largest"]["largest"] > 0)
    True
    """

    full_state_update = False
    group: str = ""
    audits: Sequence[str] = ()
    # How often the batch is to be stacked for this probe, which changes all copies but the first.
    copies: int = 1
    reads_logits: bool = False

    @door
    def __init__(self) -> None:
        super().__init__()
        self._shape: Shape | None = None
        self.facts: dict[str, str | int] = {}
        self._pass: tuple[InputWatch, int] | None = None
        self._read: set[str] = set()
        # Hook points where the owner had hooks of his own in any pass that was read.
        self._hooked: list[str] = []

    @property
    def shape(self) -> Shape:
        """The shape of the model that was read; InputError where none was."""
        if self._shape is None:
            raise InputError(
                f"this {type(self).__name__} has read no model: give it to metaint.scan or metaint.attach."
            )
        return self._shape

    def hook_names(self, shape: Shape) -> list[str]:
        """The hook points this probe reads, by their TransformerLens names."""
        raise NotImplementedError

    def update(self, name: str, activation: Tensor, watch: InputWatch) -> None:
        """Fold in the activation at hook point `name`, of the pass that `watch` follows."""
        raise NotImplementedError

    def read_weights(self, model: Model) -> None:
        """Read what needs no pass, of a model that `prepare` has seen; most probes read nothing."""

    def opens_pass(self, name: str, watch: InputWatch) -> bool:
        """Whether this activation is the first that this probe reads of a forward pass; called once for each."""
        if self._pass == (watch, watch.passes) and name in self._read:
            watch.begin(None)  # the same hook again without an embedding: a pass fed with embeddings
        opens = self._pass != (watch, watch.passes)
        if opens:
            self._pass, self._read = (watch, watch.passes), set()
        self._read.add(name)
        return opens

    def to_dataset(self) -> xr.Dataset:
        """The state as labelled variables."""
        raise NotImplementedError

    def prepare(self, model: Model) -> None:
        """Learn the model's shape and check what this probe relies on; HookAuditError if it does not hold."""
        shape = shape_of(model)
        if self._shape is not None and shape != self.shape:
            raise InputError(
                f"this {type(self).__name__} has read a model of {self.shape.n_layers} layers x {self.shape.n_heads} "
                f"heads, and this one has {shape.n_layers} x {shape.n_heads}: use a new probe."
            )
        hook_points = model.hook_dict  # which a bridge makes anew at each call
        missing = [name for name in self.hook_names(shape) if name not in hook_points]
        if missing:
            raise HookAuditError(
                f"{type(self).__name__} reads {missing[0]}, which this model does not have: "
                "a model without attention patterns there (state-space layers, fused attention) can't be probed."
            )
        require(model, self.audits)
        self._shape, self.facts = shape, facts_of(model)
        if self._update_count == 0:
            self._hooked = []
        self.note_hooks(hook_points)

    def note_hooks(self, points: Mapping[str, Any]) -> None:
        """Record at which of these hook points the owner has hooks now, beside those of earlier passes."""
        self._hooked = list(dict.fromkeys([*self._hooked, *hooked_by_owner(points)]))
        if self._hooked:
            self.facts[OWNER_HOOKS] = as_attribute(self._hooked)

    def hooks(self, model: Model, watch: InputWatch) -> list[Hook]:
        """Read-only forward hooks for `model`, told by `watch` what the model is fed."""
        self.prepare(model)
        return [(name, ours(self._reader(name, watch))) for name in self.hook_names(self.shape)]

    def row_reader(self, watch: InputWatch) -> RowReader | None:
        """What reads attention in a streamed pass, in place of hooks in it; None for a probe that needs the hooks."""
        return None

    def module_hooks(self, model: Model) -> list[tuple[Any, Callable[..., Any]]]:
        """Modules of `model`, each with a forward hook, for what no hook point can carry; most probes need none."""
        return []

    def fwd_hooks(self, model: Model, tokens: Tensor | None = None, attention_mask: Tensor | None = None) -> list[Hook]:
        """Hooks for `model.run_with_hooks(tokens, fwd_hooks=probe.fwd_hooks(model))`.

        Token ids come from the model's hook on them; `HookedTransformer` has none, so pass `tokens`. Padding can't
        be seen from hooks: pass `attention_mask` if there is any. `metaint.attach` learns both by itself.
        """
        watch = InputWatch()
        if attention_mask is not None and (mistrust := mistrust_of_mask(model, attention_mask)):
            raise HookAuditError(mistrust)

        points = model.hook_dict

        def begin(activation: Tensor, hook: Any) -> None:
            watch.begin(activation if tokens is None else tokens, attention_mask)
            self.note_hooks(points)

        start = TOKENS_HOOK if TOKENS_HOOK in points else EMBEDDING_HOOK
        if start == EMBEDDING_HOOK and tokens is None:
            raise InputError(
                "tokens is missing, and this model has no hook on its token ids: "
                "call fwd_hooks(model, tokens), or use metaint.attach."
            )
        hooks = self.hooks(model, watch)
        if self.module_hooks(model):
            raise InputError(
                f"this model tells of its attention too late for hooks alone to change it: use metaint.attach or "
                f"metaint.scan for a {type(self).__name__}."
            )
        return [(start, ours(begin)), *hooks]

    def _reader(self, name: str, watch: InputWatch) -> Callable[..., None]:
        def hook(activation: Any, hook: Any) -> None:
            activation = first_tensor(activation)
            with quietly(activation.device.type):
                self.update(name, activation.detach()[: len(activation) // watch.copies], watch)

        return hook

    def merge_state(self, incoming_state: Any) -> None:
        """Add what another probe of the same kind has read, as if this one had read it too."""
        if isinstance(incoming_state, Probe) and self._shape is None:
            self._shape, self.facts = incoming_state._shape, dict(incoming_state.facts)
        if isinstance(incoming_state, Probe) and incoming_state._hooked:
            self._hooked = list(dict.fromkeys([*self._hooked, *incoming_state._hooked]))
            self.facts[OWNER_HOOKS] = as_attribute(self._hooked)
        mine = {name: list(value) for name, value in self.metric_state.items() if isinstance(value, list)}
        super().merge_state(incoming_state)
        for name, value in mine.items():  # torchmetrics puts what comes in first; an order is kept here
            theirs = getattr(self, name)
            setattr(self, name, [*value, *theirs[: len(theirs) - len(value)]])
        self._computed = None  # torchmetrics keeps the value from before the merge otherwise

    def __getstate__(self) -> dict[str, Any]:
        """Without the pass that was read last, which is not gone on with elsewhere."""
        return {**super().__getstate__(), "_pass": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        """Move the state to another device; it stays in full precision under `.to(dtype)` too (see `set_dtype`)."""
        if self._dtype_convert:
            return super()._apply(fn, exclude_state)
        device = fn(torch.zeros(1, device=self.device)).device
        return super()._apply(lambda tensor: tensor.to(device), exclude_state)

    def _read_something(self) -> None:
        """What torchmetrics does at `update`, for a step that folds in something else than an activation."""
        self._computed = None
        self._update_count += 1

    def to_scan(self, attributes: Mapping[str, Any] | None = None) -> xr.DataTree:
        """What was read so far as a scan with this probe's group alone."""
        return assemble([self], attributes)
