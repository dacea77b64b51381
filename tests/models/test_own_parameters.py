"""Which parameters are counted: those of the model of transformers, each once, whatever the bridge shares."""

import pytest
import torch

import metaint
from tests.models.architectures import bridged, needs_bridge, original

pytestmark = needs_bridge


@pytest.mark.parametrize("kind", ["phi3", "glm", "glm4", "gpt1"])
def test_fused_projections_count_once(kind):
    model = bridged(kind)
    weights = metaint.scan(model, probes=[metaint.WeightProbe()])["weights"]
    theirs = original(kind)
    assert weights.attrs["parameters"] == theirs.num_parameters()
    squares = torch.stack([parameter.detach().double().square().sum() for parameter in theirs.parameters()])
    assert float(weights["total_norm"]) == pytest.approx(float(squares.sum().sqrt()), rel=1e-6)
    of_mlp = [
        p.detach().double().square().sum() for n, p in theirs.named_parameters() if ".mlp." in n and place(n) == 1
    ]
    if kind != "gpt1":
        found = float(weights["parameter_norm"].sel(layer=1, part="mlp"))
        assert found == pytest.approx(float(torch.stack(of_mlp).sum().sqrt()), rel=1e-6)


def place(name):
    """The block that a parameter of transformers belongs to."""
    return next(int(piece) for piece in name.split(".") if piece.isdigit())


def test_scaling_multiplies_fused_projections_once():
    model = bridged("phi3")
    fused = next(p for n, p in model.original_model.named_parameters() if n.endswith("gate_up_proj.weight"))
    before = fused.clone()
    with metaint.scaled(model, 2.0):
        assert torch.equal(fused, 2 * before)
    assert torch.equal(fused, before)
