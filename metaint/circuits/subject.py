"""The model that parts are taken out of, with its facts: each asked once, when it is first needed.

In: a model. Out: a `Subject`, made once a call and handed to everything below it. An experiment runs many passes, and a
bridge makes what it is asked for anew each time: the stack of W_O, the dictionary of hooks.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from metaint.circuits.parts import Head, all_heads
from metaint.measures.inner import Readout
from metaint.models.audit import holds
from metaint.models.describe import Shape, facts_of, shape_of
from metaint.models.folded import FoldedWeights, folded_layers
from metaint.models.heads import head_among
from metaint.models.protocol import Model
from metaint.models.readout import readout_of


@dataclass(frozen=True)
class Subject:
    """A model and what is asked of it."""

    model: Model
    shape: Shape

    @property
    def layers(self) -> range:
        return range(self.shape.n_layers)

    @cached_property
    def heads(self) -> list[Head]:
        """Every head."""
        return all_heads(self.shape)

    def head(self, name: str) -> Head:
        """Layer and head of a name such as "5.1"; InputError for one that the model does not have."""
        return head_among(self.shape.n_layers, self.shape.n_heads, name)

    @cached_property
    def facts(self) -> dict[str, str | int]:
        """What a result records of the model."""
        return facts_of(self.model)

    @cached_property
    def has_mlps(self) -> bool:
        """Whether the model has MLPs, and what they write adds to the stream."""
        return self.shape.sublayers != "attention" and holds(self.model, "residual")

    @cached_property
    def can_read_out(self) -> bool:
        """Whether `readout` gives the model's own logits."""
        return holds(self.model, "unembedding")

    @cached_property
    def readout(self) -> Readout:
        """How the last stream becomes logits."""
        return readout_of(self.model)

    @cached_property
    def folded(self) -> list[FoldedWeights]:
        """The weights of each layer's heads as they meet the stream; raises Unavailable as `folded_layers` does."""
        with torch.no_grad():
            return list(folded_layers(self.model))

    @cached_property
    def _outputs(self) -> dict[int, Tensor]:
        return {}

    def output_weights(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """W_O of a layer: the module's own where it has one, else out of the stack of all layers."""
        if layer not in self._outputs:
            own = getattr(self.model.blocks[layer].attn, "W_O", None)
            if not (isinstance(own, Tensor) and own.ndim == 3):
                own = self.model.W_O[layer]
            self._outputs[layer] = own.detach()
        return self._outputs[layer]


def subject_of(model: Model) -> Subject:
    """The subject that a model is; InputError for a model that nobody has opened."""
    return Subject(model, shape_of(model))
