"""The weights of heads beside the minima that Sander et al. 2024 (2402.05787) find for s_{t+1} = W s_t.

In: a model, of diagonal heads or any other with a basis in which W is diagonal. Out: a dataset of what
`measures/recurrence.py` says of the structure of its heads.
"""

from typing import Any

import torch
import xarray as xr
from jaxtyping import Inexact
from torch import Tensor

from metaint.errors import InputError
from metaint.measures import recurrence
from metaint.measures.autoregression import Commuting
from metaint.models.audit import require
from metaint.models.heads import repeat_heads


def structure(model: Any, basis: Inexact[Tensor, "d_model d_model"] | None = None) -> xr.Dataset:
    """How far heads have the structure of the known minima: diagonals A and B in a basis, C = B^T A, and positions.

    For a `DiagonalAttention`: (layer, head, coordinate) `A`, `B`; (layer, coordinate, coordinate_to) `interaction`, C;
    (layer) `off_diagonal_mass`, `head_orthogonality`, `effective_rank`; for contexts of T = 2, 3, ... vectors
    (position) `positional_concentration`, `positional_ratio`, (kind, position) `block_error`. For other models the same
    without the last three, from the heads' W_Q W_K^T and W_V W_O in a unitary `basis` of the stream, by columns
    (default: as it is), with `outside_QK` and `outside_OV` (layer, head): what A and B leave out. See
    `measures/recurrence.py`. Raises InputError for a basis that does not fit, HookAuditError for weights that are not
    what their names say.
    """
    if getattr(model, "P", None) is not None:
        if basis is not None:
            raise InputError("basis was given, and the heads of the model are diagonal as they are: leave it out.")
        heads = [recurrence.Diagonals(model.a.detach(), model.b.detach(), torch.zeros(0), torch.zeros(0))]
        variables = _positional(heads[0], model.P.detach())
    else:
        heads, variables = _diagonals(model, basis), {}
        for name in ("outside_QK", "outside_OV"):
            variables[name] = (("layer", "head"), torch.stack([getattr(layer, name) for layer in heads]))
    C = torch.stack([recurrence.interaction(layer.A, layer.B) for layer in heads])
    for name in ("A", "B"):
        variables[name] = (("layer", "head", "coordinate"), torch.stack([getattr(layer, name) for layer in heads]))
    orthogonality = torch.stack([recurrence.head_orthogonality(layer.A, layer.B) for layer in heads])
    variables |= {
        "interaction": (("layer", "coordinate", "coordinate_to"), C),
        "off_diagonal_mass": (("layer",), recurrence.off_diagonal_mass(C)),
        "head_orthogonality": (("layer",), orthogonality),
        "effective_rank": (("layer",), recurrence.effective_rank(C)),
    }
    data = xr.Dataset({name: (dims, value.cpu().numpy()) for name, (dims, value) in variables.items()})
    if "position" in data.dims:
        kinds = ["unitary", "orthogonal"][: data.sizes["kind"]]
        data = data.assign_coords(position=range(2, data.sizes["position"] + 2), kind=kinds)
    return data


def _positional(heads: recurrence.Diagonals, P: Tensor) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    """For each row of P that counts, the weights of a context of T = 2, 3, ... vectors."""
    n, d = len(P), heads.A.shape[1]
    rows = recurrence.positional_rows(P)
    C = recurrence.interaction(heads.A, heads.B)
    kinds: list[Commuting] = ["unitary"] if d % 2 else ["unitary", "orthogonal"]
    errors = [recurrence.block_error(C.expand(n - 1, -1, -1), rows[:, -1], kind) for kind in kinds]
    return {
        "positional_concentration": (("position",), recurrence.positional_concentration(rows)),
        "positional_ratio": (("position",), recurrence.positional_ratio(rows)),
        "block_error": (("kind", "position"), torch.stack(errors)),
    }


def _diagonals(model: Any, basis: Tensor | None) -> list[recurrence.Diagonals]:
    require(model, ("weights_query", "weights_key", "weights_value", "output_sum"))
    width, n_heads = int(model.cfg.d_model), int(model.cfg.n_heads)
    W_Q, W_O = model.W_Q.detach(), model.W_O.detach()
    W_K, W_V = (repeat_heads(weight.detach(), n_heads, 1) for weight in (model.W_K, model.W_V))
    basis = torch.eye(width, dtype=W_Q.dtype, device=W_Q.device) if basis is None else basis.to(W_Q.device)
    if basis.shape != (width, width):
        raise InputError(f"basis is {list(basis.shape)}: give a unitary matrix of the stream, {[width, width]}.")
    return [recurrence.diagonals_in(basis, q @ k.mT, v @ o) for q, k, v, o in zip(W_Q, W_K, W_V, W_O, strict=True)]
