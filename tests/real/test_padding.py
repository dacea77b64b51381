"""Sequences of different lengths in one padded batch of SmolLM2 read as each does alone, whichever side is padded."""

import pytest
import torch
import xarray as xr

import metaint

pytestmark = pytest.mark.real

LENGTHS = (72, 40, 23)
PROBES = {
    "heads": metaint.HeadProbe,
    "residual": metaint.ResidualProbe,
    "inner": lambda: metaint.InnerProbe(8),
}


@pytest.fixture(scope="module")
def sequences(tokens):
    """A block that repeats itself, and two stretches of prose."""
    return [tokens[2], tokens[0][: LENGTHS[1]], tokens[1][: LENGTHS[2]]]


@pytest.fixture(scope="module")
def alone(smollm2, sequences):
    """Probes that read one sequence after the other, without padding."""
    probes = [make() for make in PROBES.values()]
    for sequence in sequences:
        scan = metaint.scan(smollm2, sequence[None], probes)
    return scan


@pytest.fixture(scope="module", params=["left", "right"])
def padded(request, smollm2, sequences):
    """The same sequences in one batch; padding is a common token of the text, so that it would count if it could."""
    fill = int(sequences[0][5])
    rows, masks = [], []
    for sequence in sequences:
        pad = sequence.new_full((LENGTHS[0] - len(sequence),), fill)
        parts = [(sequence, torch.ones_like(sequence)), (pad, torch.zeros_like(pad))]
        ordered = parts[::-1] if request.param == "left" else parts
        rows.append(torch.cat([row for row, _ in ordered]))
        masks.append(torch.cat([mask for _, mask in ordered]))
    probes = [make() for make in PROBES.values()]
    return metaint.scan(smollm2, torch.stack(rows), probes, attention_mask=torch.stack(masks))


@pytest.mark.parametrize("group", PROBES)
def test_padding_changes_nothing(padded, alone, group):
    found, wanted = padded[group].to_dataset(), alone[group].to_dataset()
    assert found.attrs == wanted.attrs
    # Fidelity is a ratio of small sums: a resample whose denominator is near 0 makes much of rounding.
    ratios = [name for name in found if "fidelity" in str(name)]
    xr.testing.assert_allclose(found.drop_vars(ratios), wanted.drop_vars(ratios), rtol=1e-3, atol=1e-3)
    xr.testing.assert_allclose(found[ratios], wanted[ratios], rtol=5e-2, atol=1e-2)
