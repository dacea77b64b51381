"""The exceptions of metaint: each carries one sentence with the argument, what it was, and what would do.

`door` is what public functions stand behind, so that a wrong type gets such a sentence too.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, get_args, get_type_hints

P = ParamSpec("P")
R = TypeVar("R")


class MetaintError(Exception):
    """The family; the shell prints its sentence and exits with status 2."""


class InputError(MetaintError, ValueError):
    """An argument (tokens, a mask, a text, a name) is not what the call needs."""


class ModelError(MetaintError, RuntimeError):
    """A model can't be opened, or lacks what was asked of it."""


class HookAuditError(ModelError):
    """A hook that a probe needs is missing or does not carry what its name says."""


class ActivationError(MetaintError, FloatingPointError):
    """An activation holds NaN or infinity; the sentence names the layer and the hook."""


class StoreError(MetaintError, OSError):
    """A scan can't be written or read."""


def door(function: Callable[P, R]) -> Callable[P, R]:
    """For a public function: where it fails on an argument of another type than is asked for, say which and of what.

    Arguments are looked at after the failure alone, so that a call that works costs nothing, and what a function says
    of them by itself comes first.
    """

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except MetaintError:
            raise
        except Exception as error:  # whatever a wrong type led to, far from here
            sentence = _misfit(function, args, kwargs)
            if sentence is None:
                raise
            raise InputError(sentence) from error

    return called


def _misfit(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The first argument that is not what its annotation says, as a sentence."""
    signature = inspect.signature(function)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return None  # which names the argument by itself
    hints = get_type_hints(function, include_extras=True)
    for name, value in given.items():
        variable = signature.parameters[name].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        hint = hints.get(name, Any)
        if not variable and not _fits(value, hint):
            return f"{name} is {_told(value)}: give {_words(hint)}."
    seed = given.get("seed", 0)
    if isinstance(seed, bool) or (isinstance(seed, int) and not 0 <= seed < 2**63):
        return f"seed is {_told(seed)}: give a whole number from 0 to 2**63 - 1."
    return None


def _fits(value: Any, hint: Any) -> bool:
    from beartype.door import is_bearable

    if getattr(hint, "__name__", "") == "Model":  # a protocol, and asking a bridge for its weights would stack them
        return hasattr(value, "cfg") and hasattr(value, "run_with_hooks")
    if isinstance(value, bool) and bool not in (hint, *get_args(hint)):  # which Python takes for a number
        return hint in (Any, object)
    return is_bearable(value, hint)


def _told(value: Any) -> str:
    shape = getattr(value, "shape", None)
    words = f"{type(value).__name__} {list(shape)}" if shape is not None else repr(value)
    return words if len(words) <= 80 else words[:77] + "..."


def _words(hint: Any) -> str:
    if getattr(hint, "__name__", "") == "Model":
        return "a model that TransformerLens or metaint.open_model opened"
    if isinstance(hint, type) and not hasattr(hint, "array_type"):
        return f"{'an' if hint.__name__[0] in 'aeiou' else 'a'} {hint.__name__}"
    return str(hint).replace("typing.", "").replace("collections.abc.", "").replace("torch.", "")
