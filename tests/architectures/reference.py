"""What a Hugging Face model itself computes: attentions, streams, logits, with a head silenced or scores scaled.

In: a model of transformers with eager attention. Out: `Run`, read by hooks on transformers' own modules. Nothing here
knows TransformerLens or metaint, whose numbers are held against these.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# The last part of the name of the module that mixes heads into the stream.
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "Wo")
_ATTENTIONS = ("attn", "attention", "mixer", "temporal_block")
_LEARNED = ("wpe", "position_embeddings", "embed_positions", "positions_embed")


@dataclass
class Run:
    """One forward pass."""

    attentions: list[Tensor] = field(default_factory=list)
    """Of the layers that attend, in their order: [batch, head, query, key]."""
    streams: list[Tensor] = field(default_factory=list)
    """Before each layer, and after the last: [batch, position, d_model]."""
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


class Reference:
    """A Hugging Face model and where things stand in it; `attends` are the layers with attention (None: all)."""

    def __init__(self, model: Any, attends: tuple[int, ...] | None = None) -> None:
        self.model = model
        size = getattr(model.config, "num_hidden_layers", None) or getattr(model.config, "n_layer", 0)
        lists = [m for _, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == size]
        self.layers = list(lists[0]) if lists else []
        self.attends = tuple(range(len(self.layers))) if attends is None else attends
        config = model.config
        self.heads = int(getattr(config, "num_attention_heads", None) or getattr(config, "n_heads", 0))

    @torch.no_grad()
    def run(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        silent: tuple[int, int] | None = None,
        kappa: float = 1.0,
    ) -> Run:
        """A pass; `silent` names the layer and head whose output is zeroed, `kappa` multiplies every score.

        Raises LookupError where it can't be made for comparison.
        """
        found = Run()
        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(_reading(layer, lambda x: found.streams.append(x)))
            stack.enter_context(_hooked(self.layers[-1], after=lambda y: found.streams.append(y)))
            if silent is not None:
                stack.enter_context(self.keeping(silent[0], [h for h in range(self.heads) if h != silent[1]]))
            calls = stack.enter_context(scores_times(kappa))
            output = self.model(tokens, output_attentions=True, **self._plain(), **self._padding(mask))
        if kappa != 1 and len(calls) != len(self.attends):
            raise LookupError(f"scores were scaled in {len(calls)} of {len(self.attends)} layers")
        found.attentions = [a for a in output.attentions if a is not None and a.ndim == 4]
        found.logits = output.logits
        return found

    def _plain(self) -> dict[str, Any]:
        takes = inspect.signature(self.model.forward).parameters
        return {"use_cache": False} if "use_cache" in takes else {}

    def _padding(self, mask: Tensor | None) -> dict[str, Any]:
        """The mask and, as in transformers' own generation, positions that count real tokens."""
        if mask is None:
            return {}
        counted = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        takes = "position_ids" in inspect.signature(self.model.forward).parameters
        takes = takes and self.model.config.model_type != "roberta"  # which counts from its padding id on
        return {"attention_mask": mask, **(counted if takes else {})}

    def output_module(self, layer: int) -> nn.Module:
        """The module that takes the outputs of a layer's heads, side by side."""
        named = [
            module
            for name, module in self.layers[layer].named_modules()
            if name.rsplit(".", 1)[-1] in _OUTPUTS and any(part in name for part in _ATTENTIONS)
            if "mlp" not in name and "cross" not in name and hasattr(module, "weight")
        ]
        if not named:
            raise LookupError("no single module mixes the heads")
        return named[-1]

    @contextlib.contextmanager
    def keeping(self, layer: int, heads: list[int], written: list[Tensor] | None = None) -> Iterator[None]:
        """Only these heads of a layer write; what they write together goes to `written`. A module that several layers
        share is changed in this layer alone."""
        inside: list[bool] = []

        def silence(x: Tensor) -> Tensor | None:
            if not inside:
                return None
            by_head = x.detach().clone().unflatten(-1, (self.heads, -1))
            left_out = [head for head in range(self.heads) if head not in heads]
            by_head[..., left_out, :] = 0
            return by_head.flatten(-2)

        def tell(y: Tensor) -> None:
            if inside and written is not None:
                written.append(y)

        module, block = self.output_module(layer), self.layers[layer]
        with (
            _hooked(block, before=lambda x: inside.append(True), after=lambda y: inside.clear()),
            _hooked(module, before=silence, after=tell),
        ):
            yield

    # ---- what a head's weights do to a token ---------------------------------------------------------------------

    @torch.no_grad()
    def ov_recall(self, layer: int, head: int, tokens: Tensor) -> float:
        """Share of tokens whose own logit is the highest of what the head writes where it attends to them.

        Each token is a sequence of its own, which the head has to attend to: its stream is put before the layer, what
        the head writes after the last one. Biases are what comes of a stream of zeros, and are taken off.
        """
        single = tokens[:, None]
        written, nothing = (self._write(layer, head, x, single) for x in self._embedded(single))
        write, norm = written - nothing, self._norm_after(layer, single)
        if norm is not None:
            write = norm(write) - norm(torch.zeros_like(write))
        logits = self._read_out(write, single) - self._read_out(torch.zeros_like(write), single)
        return float((logits.argmax(-1) == tokens).double().mean())

    def _embedded(self, single: Tensor) -> tuple[Tensor, Tensor]:
        """The streams of single tokens, positions left out, and zeros like them."""
        streams = self.run(single).streams[0]
        if any(name.rsplit(".", 1)[-1] in _LEARNED for name, _ in self.model.named_modules()):
            streams = self.model.get_input_embeddings().weight.detach()[single]
        return streams, torch.zeros_like(streams)

    def _write(self, layer: int, head: int, streams: Tensor, single: Tensor) -> Tensor:
        """What one head's output module makes of these streams."""
        found: list[Tensor] = []
        for heads in ([head], []):
            with _hooked(self.layers[layer], before=lambda x: streams), self.keeping(layer, heads, found):
                self.model(single, **self._plain())
        return found[0] - found[1]

    def _norm_after(self, layer: int, single: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The norm, if any, that reads what the attention wrote before it is added to the stream."""
        written: list[Tensor] = []
        reads: list[nn.Module] = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.keeping(layer, list(range(self.heads)), written))
            for name, module in self.layers[layer].named_modules():
                if "norm" in name.lower() and "." not in name:

                    def compare(x: Tensor, module: nn.Module = module) -> None:
                        if written and x.shape == written[-1].shape and torch.equal(x, written[-1]):
                            reads.append(module)

                    stack.enter_context(_reading(module, compare))
            self.model(single, **self._plain())
        return reads[0] if reads else None

    def _read_out(self, streams: Tensor, single: Tensor) -> Tensor:
        """The logits of these streams after the last layer."""
        with _hooked(self.layers[-1], after=lambda y: streams):
            return self.model(single, **self._plain()).logits[:, 0]


# ---- hooks on modules of transformers ----------------------------------------------------------------------------


@contextlib.contextmanager
def _hooked(
    module: nn.Module,
    before: Callable[[Tensor], Any] | None = None,
    after: Callable[[Tensor], Any] | None = None,
) -> Iterator[None]:
    """Functions of a module's hidden states, in and out; a tensor that one returns takes their place."""

    def on_input(_: Any, args: tuple, kwargs: dict) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        new = before(given) if before is not None else None
        if not isinstance(new, Tensor):
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def on_output(_: Any, __: Any, output: Any) -> Any:
        several = isinstance(output, tuple | list)
        new = after(output[0] if several else output) if after is not None else None
        if not isinstance(new, Tensor):
            return None
        return (new, *output[1:]) if several else new

    handles = [module.register_forward_pre_hook(on_input, with_kwargs=True), module.register_forward_hook(on_output)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reading(module: nn.Module, read: Callable[[Tensor], Any]) -> Any:
    return _hooked(module, before=lambda x: read(x.detach().clone()) and None)


@contextlib.contextmanager
def scores_times(kappa: float) -> Iterator[list[int]]:
    """Every softmax over a square of scores, with the scores times kappa; tells of each that was scaled."""
    calls: list[int] = []
    busy: list[bool] = []  # one form of softmax calls another
    kept = [(place, place.softmax) for place in (torch, torch.nn.functional, Tensor)]

    def scaled(softmax: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def instead(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            square = scores.ndim in (3, 4) and scores.shape[-1] - scores.shape[-2] in (0, scores.ndim - 3)
            if not busy and square:
                calls.append(1)
                scores = scores * kappa
            busy.append(True)
            try:
                return softmax(scores, *args, **kwargs)
            finally:
                busy.pop()

        return instead

    try:
        if kappa != 1:
            for place, softmax in kept[1:]:
                place.softmax = scaled(softmax)
            torch.softmax = scaled(kept[0][1])  # type: ignore[assignment]
        yield calls
    finally:
        for place, softmax in kept:
            place.softmax = softmax  # type: ignore[assignment]
