"""SmolLM2 as Hugging Face runs it: attentions, streams and logits of a plain pass, without TransformerLens."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForCausalLM


class Pass(NamedTuple):
    """One forward pass: `patterns[layer, batch, head, query, key]`, `streams[layer, batch, position, d_model]`.

    There is one stream more than there are layers: the first is the embedding, the last stands before the final norm.
    """

    patterns: Tensor
    streams: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Reference:
    """A Hugging Face model with eager attention."""

    model: Any

    @staticmethod
    def of(folder: Path) -> "Reference":
        """The model of a folder, in float32."""
        return Reference(LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval())

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Pass:
        """A pass over sequences without padding."""
        last = []
        # Hugging Face's last hidden state stands after the final norm.
        hook = self.model.model.norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
        try:
            out = self.model(tokens, output_attentions=True, output_hidden_states=True, use_cache=False)
        finally:
            hook.remove()
        streams = torch.stack([*out.hidden_states[:-1], last[0]])
        return Pass(torch.stack(out.attentions), streams, out.logits)

    @torch.no_grad()
    def lens(self, streams: Tensor) -> Tensor:
        """The log probabilities that these streams would give if they were the last: final norm, then the head."""
        return self.model.lm_head(self.model.model.norm(streams)).log_softmax(-1)

    @contextmanager
    def sharpened(self, kappa: float) -> Iterator[None]:
        """Every score times kappa: the queries' weights are multiplied (SmolLM2 has no biases), and put back."""
        weights = [layer.self_attn.q_proj.weight for layer in self.model.model.layers]
        before = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for weight in weights:
                weight.mul_(kappa)
            try:
                yield
            finally:
                for weight, old in zip(weights, before, strict=True):
                    weight.copy_(old)
