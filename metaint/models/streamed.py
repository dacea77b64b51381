"""A pass whose attention is computed by rows: our own function in transformers' AttentionInterface, for its time alone.

In: a TransformerLens bridge over a model of transformers, and readers of rows. Out: a context in which each layer's
attention is made a block of rows at a time, each block told to the readers and thrown away. Everything is as it was
afterwards.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor

from metaint.measures.rows import mixed_rows, weights_of_rows
from metaint.models.describe import attending_layers
from metaint.models.protocol import Model
from metaint.models.reading import quietly
from metaint.models.row_masks import RowMask, Unstreamable, asked_mask, row_mask

# Rows in a block: of so many the weights of all heads stay in a CPU's cache, and the products are still large ones.
ROWS = 64
_numbers = itertools.count()


class RowReader(Protocol):
    """What is told of each layer's attention during a streamed pass."""

    def begin_layer(self, layer: int, value: Float[Tensor, "batch key value_head d_head"], queries: int) -> None: ...
    def read_rows(self, layer: int, rows: slice, pattern: Float[Tensor, "batch head row key"]) -> None: ...
    def end_layer(self, layer: int, z: Float[Tensor, "batch query head d_head"]) -> None: ...


@contextmanager
def streaming(model: Model, readers: Sequence[RowReader], rows: int = ROWS) -> Iterator[None]:
    """Passes inside have their attention computed by blocks of `rows`; raises Unstreamable where that can't be."""
    components = {layer: _component(model, layer) for layer in attending_layers(model)}
    interfaces = _interfaces()
    name = f"metaint_rows_{next(_numbers)}"
    layers = {id(part): layer for layer, each in components.items() for part in each.original_component.modules()}
    attend = _attention_function(layers, readers, rows)
    with ExitStack() as stack:
        for interface, function in zip(interfaces, (attend, asked_mask), strict=True):
            interface.register(name, function)
            stack.callback(interface._global_mapping.pop, name, None)
        for config in _configs(model):
            stack.callback(setattr, config, "_attn_implementation_internal", config._attn_implementation_internal)
        for config in _configs(model):
            config._attn_implementation_internal = name
        for component in components.values():
            # In its own dictionary: a bridge hands attributes that are set on to the module it wraps.
            component.__dict__["forward"] = _delegate(component)
            stack.callback(component.__dict__.pop, "forward", None)
        yield


def _interfaces() -> tuple[Any, Any]:
    """The registries of attention functions and of masks."""
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise Unstreamable("this version of transformers has no interface for attention functions") from error
    return AttentionInterface, AttentionMaskInterface


def _component(model: Model, layer: int) -> Any:
    """The bridge's attention of a layer, which wraps a module of transformers."""
    component = getattr(model.blocks[layer], "attn", None)
    if getattr(model, "original_model", None) is None or not hasattr(component, "original_component"):
        raise Unstreamable("only a TransformerLens bridge over a model of transformers has such an attention")
    if "forward" in component.__dict__:
        raise Unstreamable("its attention was replaced")
    return component


def _delegate(component: Any) -> Callable[..., Any]:
    """The forward of the base class of all attention bridges: the wrapped module between hooks on both its ends."""
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

    return AttentionBridge.forward.__get__(component)


def _configs(model: Any) -> list[Any]:
    """Every configuration in which a part of the wrapped model looks up its attention."""
    parts = model.original_model.modules()
    configs = {id(config): config for part in parts if (config := getattr(part, "config", None)) is not None}
    return [config for config in configs.values() if hasattr(config, "_attn_implementation_internal")]


def _attention_function(layers: dict[int, int], readers: Sequence[RowReader], rows: int) -> Callable[..., Any]:
    """What transformers calls in place of its own attention."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *_: Any, **options: Any
    ) -> tuple[Tensor, None]:
        layer = layers.get(id(module))
        if layer is None:
            raise Unstreamable("attention happens outside of its blocks")
        _check(query, key, options)
        with quietly(query.device.type):
            return by_rows(layer, (query, key, value), _mask(module, attention_mask, key, options), options), None

    def by_rows(layer: int, parts: tuple[Tensor, Tensor, Tensor], mask: RowMask, options: dict[str, Any]) -> Tensor:
        query, key, value = parts
        scoring = _scoring(query, options)
        for reader in readers:
            reader.begin_layer(layer, value.transpose(1, 2), query.shape[2])
        z = value.new_empty(len(query), query.shape[2], query.shape[1], value.shape[-1])
        for start in range(0, query.shape[2], rows):
            block = slice(start, min(start + rows, query.shape[2]))
            seen = mask.cut(block.start, block.stop)
            pattern = weights_of_rows(query[:, :, block], key[:, :, : seen.stop], seen.hidden, **scoring)
            z[:, block] = mixed_rows(pattern, value[:, :, : seen.stop])
            for reader in readers:
                reader.read_rows(layer, block, pattern)
        for reader in readers:
            reader.end_layer(layer, z)
        return z

    return attend


def _mask(module: Any, given: Any, key: Tensor, options: dict[str, Any]) -> RowMask:
    """What queries see: as the mask says, else up to themselves in a causal module."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return row_mask(given, bool(causal), key.shape[2], key.device)


def _scoring(query: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """How scores are made of queries and keys, in the words of transformers and in ours."""
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return {"scale": scale, "cap": float(options.get("softcap") or 0), "sink": options.get("s_aux")}


def _check(query: Tensor, key: Tensor, options: dict[str, Any]) -> None:
    """Raises Unstreamable for what the blocks do not know of."""
    if query.shape[2] != key.shape[2]:
        raise Unstreamable("it has more keys than queries, as with a cache")
    if options.get("position_bias") is not None:
        raise Unstreamable("positions enter its scores as a bias")
