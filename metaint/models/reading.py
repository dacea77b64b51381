"""One forward pass that leaves no trace: what the named hooks carried, and the logits."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metaint.models.protocol import Model

Edit = Callable[[Tensor], Tensor]


class Unavailable(Exception):
    """What a check needs isn't there: the sentence says what is missing, `hook` which hook (or "")."""

    def __init__(self, sentence: str, hook: str = "") -> None:
        super().__init__(sentence)
        self.hook = hook


@dataclass(frozen=True)
class Reading:
    """What one forward pass carried: `reading[name]` is the activation at that hook, widened to float32.

    `activations` keeps the order in which the hooks first fired.
    """

    activations: dict[str, Tensor]
    logits: Tensor

    def __getitem__(self, name: str) -> Tensor:
        """The activation at this hook; raises Unavailable, naming the hook, if it never fired."""
        if name not in self.activations:
            raise Unavailable(f"the hook {name} never fired", name)
        return widen(self.activations[name])

    def __contains__(self, name: str) -> bool:
        return name in self.activations

    def before(self, name: str, other: str) -> bool:
        """Whether both hooks fired, and `name` before `other`."""
        order = list(self.activations)
        return name in order and other in order and order.index(name) < order.index(other)


def read(model: Model, tokens: Tensor, names: Sequence[str], **options: Any) -> Reading:
    """The activations at those of the named hooks that the model has and that fire, in one forward pass; `options`
    are the model's own."""
    activations: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(activation: Any, hook: Any) -> None:
            activation = first_tensor(activation)
            if isinstance(activation, Tensor):
                # A copy: some models add to the residual stream in place.
                activations[name] = activation.detach().clone()

        return hook

    hook_points = model.hook_dict  # which a bridge makes anew at each call
    present = [name for name in names if name in hook_points]
    logits = _forward(model, tokens, [(name, keep(name)) for name in present], **options)
    return Reading(activations, logits)


def first_tensor(activation: Any) -> Any:
    """What a hook is told, where a block gives a list or a tuple (GPT-1) its first item."""
    return activation[0] if isinstance(activation, list | tuple) and activation else activation


def logits_after(
    model: Model, tokens: Tensor, edits: dict[str, Edit], readers: Mapping[str, Callable[[Any], None]] | None = None
) -> Tensor:
    """The logits of a forward pass in which each named activation is replaced by what its edit returns; `readers` see
    theirs.

    Raises Unavailable, naming the hook, if a hook isn't there or never fires.
    """
    fired: set[str] = set()

    def apply(name: str, edit: Edit) -> Callable[..., Tensor]:
        def hook(activation: Tensor, hook: Any) -> Tensor:
            fired.add(name)
            return edit(activation)

        return hook

    hook_points = model.hook_dict
    for name in edits:
        if name not in hook_points:
            raise Unavailable(f"the hook {name} never fired", name)
    hooks: list[tuple[str, Callable[..., Any]]] = [(name, apply(name, edit)) for name, edit in edits.items()]
    hooks += [(name, lambda x, hook, reader=reader: reader(x)) for name, reader in (readers or {}).items()]
    logits = _forward(model, tokens, hooks)
    for name in edits:
        if name not in fired:
            raise Unavailable(f"the hook {name} never fired", name)
    return logits


def random_tokens(model: Model, rows: int, length: int) -> Tensor:
    """Tokens [row, token] drawn uniformly from the model's ordinary ids (special ones can mean padding)."""
    special = set(getattr(getattr(model, "tokenizer", None), "all_special_ids", None) or ())
    ordinary = [i for i in range(int(model.cfg.d_vocab)) if i not in special] or [0]
    generator = torch.Generator().manual_seed(0)
    length = min(length, int(getattr(model.cfg, "n_ctx", length)))
    drawn = torch.randint(len(ordinary), (rows, length), generator=generator)
    return torch.tensor(ordinary)[drawn].to(next(model.parameters()).device)


def roots_of(model: Model) -> dict[str, nn.Module]:
    """The model, and the one that it wraps, which a bridge keeps outside its own modules; each with a prefix."""
    roots = {"": model, "wrapped.": getattr(model, "original_model", None)}
    return {prefix: root for prefix, root in roots.items() if isinstance(root, nn.Module)}


@contextmanager
def steady(model: Model) -> Iterator[None]:
    """Evaluation mode and no gradients inside; every module's training flag is as it was afterwards."""
    modules = {id(module): module for root in roots_of(model).values() for module in root.modules()}
    flags = [(module, module.training) for module in modules.values()]
    try:
        for module, _ in flags:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def quietly(device: str) -> Iterator[None]:
    """Compute in full precision and off the tape, whatever mode the owner's forward pass runs in."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        yield


@contextmanager
def untouched(model: Model) -> Iterator[None]:
    """Runs the model in eval mode, without gradients and without the hooks already on it; then puts all back.

    The caller's hooks are neither called (they may count) nor seen (they may edit). Training flags come back
    module by module, since a part of a model can be in another mode than the whole.
    """
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # Bridges warn of edits without effect: the audit's finding, not news.
        stack.enter_context(steady(model))
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        stack.enter_context(_silenced({id(point): point for point in model.hook_dict.values()}.values()))
        yield


@contextmanager
def _silenced(hook_points: Any) -> Iterator[None]:
    # The dictionaries are emptied and filled again, not replaced: handles refer to them to remove themselves.
    silenced = [(hooks, list(hooks.items())) for point in hook_points if (hooks := point._forward_hooks)]
    try:
        for hooks, _ in silenced:
            hooks.clear()
        yield
    finally:
        for hooks, items in silenced:
            hooks.clear()
            hooks.update(items)


def _forward(model: Model, tokens: Tensor, fwd_hooks: list[tuple[str, Callable[..., Any]]], **options: Any) -> Tensor:
    with model.hooks(fwd_hooks=fwd_hooks):
        output = model(tokens, **options)
    output = getattr(output, "logits", output)
    return output[0] if isinstance(output, tuple) else output


def widen(tensor: Tensor) -> Tensor:
    """Half precision becomes float32; float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def tolerance(dtype: torch.dtype) -> float:
    """The relative difference that rounding explains in this dtype: 6e-5 in float32, 0.006 in float16, 0.016 in
    bfloat16. Never less than in float32, since some models compute the softmax in float32 whatever their dtype.
    """
    return 8 * math.sqrt(max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) * 2**-11)
