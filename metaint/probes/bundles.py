"""What a scan keeps of single sequences, so that another scan of the same tokens can be compared pair by pair.

In: sums and counts of every score for each sequence, and the token ids. Out: `bundle_value` and `bundle_print` of a
group. Sequences are many and a scan is small: they are kept in at most `MOST_BUNDLES` bundles of neighbours, in single
precision, which takes at most one and a half times what the scan holds of each score anyway. `metaint.compare` and the
halves of `metaint.label_heads` rest on them.
"""

from collections.abc import Iterable, Sequence

import torch
import xarray as xr
from einops import reduce
from jaxtyping import Bool, Int
from torch import Tensor

from metaint.measures.resampling import pseudo_values

MOST_BUNDLES = 16
_DIMS = ("score", "bundle", "layer", "head")
# Odd numbers of 64 bits that spread the bits of a token and of its place (splitmix64, as signed integers).
_TOKEN = -7046029254386353131
_PLACE = -4658895280553007687
_SPREAD = (-7723592293110705685, 30), (-4658895280553007687, 27)


def fingerprints(
    tokens: Int[Tensor, "batch key"] | None, mask: Bool[Tensor, "batch key"], past: int
) -> Int[Tensor, " batch"]:
    """A number for the tokens of each sequence from `past` on, to be added over its passes; 0 where they are unknown.

    Padding changes nothing, wherever it stands.
    """
    if tokens is None:
        return torch.zeros(len(mask), dtype=torch.long, device=mask.device)
    place = mask.long().cumsum(-1)
    bits = tokens.long() * _TOKEN + place * _PLACE
    for factor, shift in _SPREAD:
        bits = (bits ^ (bits >> shift)) * factor
    return reduce((bits * mask)[:, past:], "batch key -> batch", "sum")


def add_bundles(
    data: xr.Dataset, ratios: Iterable[tuple[str, Tensor, Tensor]], prints: Sequence[Int[Tensor, " sequence"]]
) -> xr.Dataset:
    """A group with the values of its scores in each bundle of sequences; as it is where it has no two sequences."""
    of_sequences = torch.cat([torch.zeros(0, dtype=torch.long), *(block.cpu() for block in prints)])
    if len(of_sequences) < 2:
        return data
    size = min(MOST_BUNDLES, len(of_sequences))
    sizes = [size, data.sizes["layer"], data.sizes["head"]]
    values = {name: pseudo_values(sums, counts, size).float().expand(sizes) for name, sums, counts in ratios}
    if not values:
        return data
    place = torch.arange(len(of_sequences)) * size // len(of_sequences)
    of_bundles = torch.zeros(size, dtype=torch.long).index_add_(0, place, of_sequences)
    data = data.assign_coords(score=list(values), bundle=range(size))
    data["bundle_value"] = (_DIMS, torch.stack(list(values.values())).numpy())
    data["bundle_print"] = ("bundle", of_bundles.numpy())
    data["bundle_value"].attrs["description"] = "what each bundle of sequences gives: pseudo-values of the jackknife"
    data["bundle_print"].attrs["description"] = "tells of each bundle's tokens whether another scan read the same"
    return data
