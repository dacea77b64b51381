"""The hooks that a model's owner has on it, under which whatever is read may be something else than the model's own.

In: hook points by name. Out: the names of those with hooks that are not ours, and how a scan records them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

# The attribute of a scan that names them.
OWNER_HOOKS = "owner_hooks"
# What a hook of ours is called; TransformerLens keeps the name of what it wraps.
_OURS = "a hook of metaint's probes"
# Names that a scan records at most; after these their number.
_NAMED = 10
Hook = TypeVar("Hook", bound=Callable[..., Any])


def ours(hook: Hook) -> Hook:
    """The same hook, marked as one that no owner added."""
    hook.__qualname__ = _OURS
    return hook


def hooked_by_owner(points: Mapping[str, Any]) -> list[str]:
    """The points with a forward hook that is not ours, each by the last of its names, in the order of the model."""
    names: dict[int, str] = {}
    for name, point in points.items():
        hooks = point._forward_hooks
        if hooks and any(_OURS not in getattr(hook, "__name__", "") for hook in hooks.values()):
            names[id(point)] = name
    return list(names.values())


def as_attribute(names: Iterable[str]) -> str:
    """The names in one line."""
    every = list(dict.fromkeys(names))
    shown, others = ", ".join(every[:_NAMED]), len(every) - _NAMED
    return shown if others <= 0 else f"{shown} and {others} more"
