import math

import numpy as np
import pytest
import torch

from metaint.errors import InputError
from metaint.measures import recurrence
from metaint.models.structure import structure
from metaint.toys.diagonal_attention import diagonal_attention, orthogonal_minimum, unitary_minimum
from tests.builders import available_kinds, build

CAUSAL = [kind for kind in available_kinds() if kind != "bert"]


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["unitary", "orthogonal"])
def test_the_minima_have_their_structure(family):
    if family == "unitary":
        data, mass, ratio = structure(unitary_minimum(4, 4, 6)).squeeze("layer"), 0.0, 0.0
    else:
        data, mass, ratio = structure(orthogonal_minimum(4, 2, 6)).squeeze("layer"), math.sqrt(0.5), -0.5
    assert float(data["off_diagonal_mass"]) == pytest.approx(mass)
    assert float(data["head_orthogonality"]) == 0
    assert float(data["effective_rank"]) == pytest.approx(4 if family == "unitary" else 2)
    assert (data["positional_concentration"] == 1).all()
    assert (data["positional_ratio"] == ratio).all()
    assert np.abs(data["block_error"].sel(kind=family)).max() < 1e-6
    other = "orthogonal" if family == "unitary" else "unitary"
    assert (data["block_error"].sel(kind=other) > 0.5).all()
    assert data["position"].values.tolist() == [2, 3, 4, 5, 6]


def test_rows_of_positions_are_read_as_they_are_laid_out():
    model = diagonal_attention(3, 2, 5, dtype=torch.float64)
    data, C = structure(model), model.b.T @ model.a
    np.testing.assert_allclose(data["interaction"][0], C.detach())
    assert data["kind"].values.tolist() == ["unitary"]
    for T in range(2, 6):
        p = model.P[T - 2, :T].detach()
        at = data.sel(position=T)
        assert float(at["positional_ratio"]) == pytest.approx(float(p[-2] / p[-1]))
        assert float(at["positional_concentration"]) == pytest.approx(float(p[-2:].square().sum() / p.square().sum()))
        wanted = recurrence.block_error(C.detach(), float(p[-1]), "unitary")
        assert float(at["block_error"].sel(kind="unitary")) == pytest.approx(float(wanted))


@pytest.mark.parametrize("kind", CAUSAL)
def test_heads_of_any_model_are_seen_in_a_basis(kind):
    model = build(kind)
    U = torch.linalg.qr(torch.complex(draw(32, 32), draw(32, 32, seed=1))).Q.to(torch.complex64)
    data, groups = structure(model, U), 4 // model.W_K.shape[1]
    for layer in range(2):
        A, B = (torch.zeros(4, 32, dtype=torch.complex64) for _ in range(2))
        for head in range(4):
            own = {n: getattr(model, f"W_{n}")[layer].detach() for n in "QKVO"}
            QK = U.mH @ (own["Q"][head] @ own["K"][head // groups].T).to(U) @ U
            OV = U.mH @ (own["V"][head // groups] @ own["O"][head]).T.to(U) @ U
            A[head], B[head] = QK.diagonal(), OV.diagonal()
            outside = (1 - (A[head].norm() / QK.norm()) ** 2, 1 - (B[head].norm() / OV.norm()) ** 2)
            assert float(data["outside_QK"][layer, head]) == pytest.approx(float(outside[0]), abs=1e-5)
            assert float(data["outside_OV"][layer, head]) == pytest.approx(float(outside[1]), abs=1e-5)
        C = (B.T @ A).to(torch.complex128)
        np.testing.assert_allclose(data["A"][layer], A, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(data["interaction"][layer], C, rtol=1e-3, atol=1e-3)
        off = (C - C.diagonal().diag()).norm() / C.norm()
        assert float(data["off_diagonal_mass"][layer]) == pytest.approx(float(off), rel=1e-4)
    assert "positional_ratio" not in data


def test_a_basis_that_does_not_fit_is_said(gpt2):
    with pytest.raises(InputError, match=r"^basis is \[3, 3\]: give a unitary matrix of the stream, \[32, 32\]\.$"):
        structure(gpt2, torch.eye(3))
    with pytest.raises(
        InputError, match=r"^basis was given, and the heads of the model are diagonal as they are: leave"
    ):
        structure(unitary_minimum(4, 4, 6), torch.eye(4))
