"""Parts of a model by name: heads ("5.1"), MLPs ("mlp 3"), all heads of a layer together ("attn 3").

In: a model and names, "heads", "mlps" and "attns" for all of a kind among them. Out: `Named`, and the parts each one
stands for.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from metaint.errors import InputError
from metaint.models.describe import sublayers_of

# A head, or with None the MLP of a layer.
Part = tuple[int, int | None]
FAMILIES = {"heads": "head", "mlps": "mlp", "attns": "attn"}


class Named(NamedTuple):
    """What one name stands for: a head, an MLP ("mlp") or all heads of a layer ("attn")."""

    kind: str
    layer: int
    head: int | None = None

    def parts(self, model: Any) -> list[Part]:
        if self.kind == "attn":
            return [(self.layer, head) for head in range(int(model.cfg.n_heads))]
        return [(self.layer, self.head)]


def all_heads(model: Any) -> list[tuple[int, int]]:
    """Layer and number of every head."""
    return [(layer, head) for layer in range(int(model.cfg.n_layers)) for head in range(int(model.cfg.n_heads))]


def chosen_parts(model: Any, parts: Sequence[str] | str | None, sets: Any) -> list[Named]:
    """What `parts` names, each once, in its order; None is every head, or nothing where there are sets.

    Raises InputError for a name that the model hasn't, and for no names.
    """
    if parts is None:
        return _known(model)["heads"] if sets is None else []
    if (isinstance(parts, str) and parts not in FAMILIES) or (not parts and not sets):
        raise InputError(
            f'parts is {parts!r}: give a list of names such as ["5.1", "mlp 3"], "heads", "mlps" or "attns" for all '
            "of a kind, or None for every head."
        )
    return _named(model, parts, "parts")


def named_sets(model: Any, sets: Any) -> dict[str, list[Part]]:
    """The parts of each set, by its name; InputError as `chosen_parts`."""
    if sets is None:
        return {}
    named = sets if isinstance(sets, Mapping) else {"+".join(map(str, names)): names for names in sets}
    found: dict[str, list[Part]] = {}
    for name, names in named.items():
        if (isinstance(names, str) and names not in FAMILIES) or not names:
            raise InputError(f'sets has {names!r} for {name!r}: give each as a list of names such as ["0.1", "mlp 5"].')
        parts = [part for item in _named(model, names, "sets") for part in item.parts(model)]
        found[str(name)] = list(dict.fromkeys(parts))
    return found


def _named(model: Any, names: Sequence[str] | str, argument: str) -> list[Named]:
    known = _known(model)
    found: dict[Named, None] = {}
    for name in [names] if isinstance(names, str) else names:
        if not known.get(str(name)):
            raise InputError(f"{argument} has {name!r}: name {_choices(model)}.")
        found |= dict.fromkeys(known[str(name)])
    return list(found)


def _known(model: Any) -> dict[str, list[Named]]:
    """What every name that the model has stands for."""
    layers = range(int(model.cfg.n_layers))
    found = {f"{layer}.{head}": [Named("head", layer, head)] for layer, head in all_heads(model)}
    found |= {f"attn {layer}": [Named("attn", layer)] for layer in layers}
    if sublayers_of(model) != "attention":
        found |= {f"mlp {layer}": [Named("mlp", layer)] for layer in layers}
    every = [item for items in found.values() for item in items]
    return found | {word: [item for item in every if item.kind == kind] for word, kind in FAMILIES.items()}


def _choices(model: Any) -> str:
    last, head = int(model.cfg.n_layers) - 1, int(model.cfg.n_heads) - 1
    found = f'heads from "0.0" to "{last}.{head}", "attn 0" to "attn {last}"'
    if sublayers_of(model) == "attention":
        return f'{found}, or "heads" or "attns" for all of a kind (the model has no MLPs)'
    return f'{found}, "mlp 0" to "mlp {last}", or "heads", "mlps" or "attns" for all of a kind'
