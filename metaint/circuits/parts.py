"""Parts of a model by name: heads ("5.1"), MLPs ("mlp 3"), all heads of a layer together ("attn 3").

In: the shape of a model and names, "heads", "mlps" and "attns" for all of a kind among them. Out: `Named`, and the
parts each one stands for.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from metaint.errors import InputError
from metaint.models.describe import Shape
from metaint.models.heads import head_name

Head = tuple[int, int]
# A head, or with None the MLP of a layer.
Part = tuple[int, int | None]
FAMILIES = {"heads": "head", "mlps": "mlp", "attns": "attn"}


class Named(NamedTuple):
    """What one name stands for: a head, an MLP ("mlp") or all heads of a layer ("attn")."""

    kind: str
    layer: int
    head: int | None = None

    def parts(self, shape: Shape) -> list[Part]:
        if self.kind == "attn":
            return [(self.layer, head) for head in range(shape.n_heads)]
        return [(self.layer, self.head)]


def part_name(part: Part) -> str:
    """How a part is called: "5.1", or "mlp 3"."""
    layer, head = part
    return f"mlp {layer}" if head is None else head_name(layer, head)


def all_heads(shape: Shape) -> list[Head]:
    """Layer and number of every head."""
    return [(layer, head) for layer in shape.attending for head in range(shape.n_heads)]


def chosen_parts(shape: Shape, parts: Sequence[str] | str | None, sets: Any) -> list[Named]:
    """What `parts` names, each once, in its order; None is every head, or nothing where there are sets.

    Raises InputError for a name that the model does not have, and for no names.
    """
    if parts is None:
        return _known(shape)["heads"] if sets is None else []
    if (isinstance(parts, str) and parts not in FAMILIES) or (not parts and not sets):
        raise InputError(
            f'parts is {parts!r}: give a list of names such as ["5.1", "mlp 3"], "heads", "mlps" or "attns" for all '
            "of a kind, or None for every head."
        )
    return _named(shape, parts, "parts")


def named_sets(shape: Shape, sets: Any) -> dict[str, list[Part]]:
    """The parts of each set, by its name; InputError as `chosen_parts`."""
    if sets is None:
        return {}
    if not isinstance(sets, Mapping):
        sets = {"+".join(map(str, names)): names for names in sets}
    by_name: dict[str, list[Part]] = {}
    for name, names in sets.items():
        if (isinstance(names, str) and names not in FAMILIES) or not names:
            raise InputError(f'sets has {names!r} for {name!r}: give each as a list of names such as ["0.1", "mlp 5"].')
        parts = [part for item in _named(shape, names, "sets") for part in item.parts(shape)]
        by_name[str(name)] = list(dict.fromkeys(parts))
    return by_name


def _named(shape: Shape, names: Sequence[str] | str, argument: str) -> list[Named]:
    known = _known(shape)
    chosen: dict[Named, None] = {}
    for name in [names] if isinstance(names, str) else names:
        if not known.get(str(name)):
            raise InputError(f"{argument} has {name!r}: name {_choices(shape)}.")
        chosen |= dict.fromkeys(known[str(name)])
    return list(chosen)


def _known(shape: Shape) -> dict[str, list[Named]]:
    """What every name that the model has stands for."""
    layers = range(shape.n_layers)
    known = {part_name(head): [Named("head", *head)] for head in all_heads(shape)}
    known |= {f"attn {layer}": [Named("attn", layer)] for layer in shape.attending}
    if shape.sublayers != "attention":
        known |= {part_name((layer, None)): [Named("mlp", layer)] for layer in layers}
    every = [item for items in known.values() for item in items]
    for family, kind in FAMILIES.items():
        known[family] = [item for item in every if item.kind == kind]
    return known


def _choices(shape: Shape) -> str:
    last = shape.n_layers - 1
    heads = f'heads from "0.0" to "{head_name(last, shape.n_heads - 1)}", "attn 0" to "attn {last}"'
    if shape.sublayers == "attention":
        return f'{heads}, or "heads" or "attns" for all of a kind (the model has no MLPs)'
    return f'{heads}, "mlp 0" to "mlp {last}", or "heads", "mlps" or "attns" for all of a kind'
