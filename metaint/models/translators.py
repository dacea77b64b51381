"""The translators of a tuned lens (Belrose et al. 2023, 2303.08112), as plain affine maps.

In: a lens of the library tuned-lens, a folder that it saved one to, or matrices. Out: one (matrix, bias) a layer.
tuned-lens is touched here alone, and only to read a folder.
"""

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metaint.errors import InputError
from metaint.models.reading import widen

_FILES = ("config.json", "params.pt")


def affine_translators(
    lens: Any, n_layers: int, d_model: int
) -> list[tuple[Float[Tensor, "d_model d_model"], Float[Tensor, "d_model"]]]:
    """Matrix M and bias b of each layer's translator, so that translated = x @ M + b for rows x [..., d_model].

    `lens` is a `tuned_lens.nn.lenses.TunedLens` (anything with its `layer_translators`), the folder that its `save`
    wrote (`config.json` and `params.pt`), or for each layer an `nn.Linear` or a pair (A [d_model, d_model],
    b [d_model]). All of these add to the stream: translated = x + x @ A + b, thus M = I + A. A Linear keeps its weight
    transposed, A = weight.T; pairs are taken as they are.

    Layer l is the stream *before* block l, `blocks.l.hook_resid_pre`: tuned-lens 0.2.0 trains translator i on
    `hidden_states[:-1][i]` of the Hugging Face model (`scripts/train_loop.py`, `Train.execute`; so do its evaluation
    and its plots), which begins with the embeddings and leaves out what the last block wrote. It adds the translator's
    output to the stream in `nn/lenses.py`, `TunedLens.transform_hidden`. What comes out stands for the stream after the
    last block, before the final norm. A lens trained so fits raw weights: centred ones move the streams.

    Half precision becomes float32; each matrix stays on its device, without gradients. A folder is read with the
    package's own loader, which unpickles tensors alone, and the global random state stays as it was. Raises InputError
    for anything else: another number of layers or width, a path that is no saved lens, or tuned-lens not installed.
    """
    translators = _translators(lens)
    if len(translators) != n_layers:
        raise InputError(f"the lens has {len(translators)} translators, and the model {n_layers} layers: one for each.")
    return [_affine(translator, layer, d_model) for layer, translator in enumerate(translators)]


def _translators(lens: Any) -> list[Any]:
    """One translator for each layer the lens has."""
    if isinstance(lens, (str, Path)):
        lens = _read(Path(lens).expanduser())
    layers = getattr(lens, "layer_translators", lens)
    if isinstance(layers, (Tensor, dict)) or not isinstance(layers, Iterable):
        raise InputError(
            f"lens is a {type(lens).__name__}: give a TunedLens, a folder it was saved to, or for each layer an "
            f"nn.Linear or a pair (matrix, bias)."
        )
    return list(layers)


@torch.no_grad()
def _affine(translator: Any, layer: int, d_model: int) -> tuple[Tensor, Tensor]:
    """(M [d_model, d_model], b [d_model]) of one residual translator."""
    if isinstance(translator, nn.Linear):
        matrix, bias = translator.weight.T, translator.bias
        bias = torch.zeros_like(matrix[0]) if bias is None else bias
    elif isinstance(translator, (tuple, list)) and [isinstance(part, Tensor) for part in translator] == [True, True]:
        matrix, bias = translator
    else:
        raise InputError(
            f"the lens has a {type(translator).__name__} for layer {layer}: give an nn.Linear or a pair of tensors "
            f"(matrix, bias)."
        )
    if matrix.shape != (d_model, d_model) or bias.shape != (d_model,):
        raise InputError(
            f"the lens has a matrix {list(matrix.shape)} and a bias {list(bias.shape)} for layer {layer}, and the "
            f"model's width is {d_model}: they must be [{d_model}, {d_model}] and [{d_model}]."
        )
    matrix, bias = widen(matrix), widen(bias)
    return matrix + torch.eye(d_model, dtype=matrix.dtype, device=matrix.device), bias.clone()


def _read(folder: Path) -> Any:
    """The TunedLens saved in this folder, without the unembedding, which is the model's."""
    absent = [name for name in _FILES if not (folder / name).is_file()]
    if absent:
        raise InputError(
            f"lens is {str(folder)!r}, which has no {absent[0]}: give a folder that tuned-lens saved a lens to "
            f"({' and '.join(_FILES)})."
        )
    if find_spec("tuned_lens") is None:
        raise InputError(
            f"lens is the folder {str(folder)!r}, and tuned-lens, which reads it, isn't installed: "
            f"pip install tuned-lens."
        )
    try:
        from tuned_lens.nn.lenses import TunedLens  # pyright: ignore[reportMissingImports]

        config = json.loads((folder / _FILES[0]).read_text())
        # The library asks the unembedding for its hash, to compare, and for its dtype. Its own `Unembed` can't be made
        # beside TransformerLens 4, and reading the translators needs no model.
        unembedding = SimpleNamespace(weight=torch.empty(0, dtype=torch.float32))
        unembed: Any = SimpleNamespace(unembedding=unembedding, unembedding_hash=lambda: config.get("unembed_hash"))
        with torch.random.fork_rng(devices=[]):  # nn.Linear draws weights before they are read
            return TunedLens.from_unembed_and_pretrained(unembed, str(folder), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in json, pickle or torch, each in its own way; the cause stays
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise InputError(
            f"lens is {str(folder)!r}, which tuned-lens can't read ({type(error).__name__}: "
            f"{reason.rstrip('.')[:300]}): save it anew."
        ) from error
