"""What a trained model is compared with: its products, and what each paper's optimum predicts."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from metaint.labs.autoregression import training
from metaint.labs.autoregression.comparison import compare
from metaint.labs.autoregression.findings import four, last_line, over_seeds
from metaint.labs.autoregression.products import coupled_loss, products, step_of, use_of, with_products
from metaint.labs.autoregression.run import run_model, train_run
from metaint.measures.closed_forms import augmented_optimum, regression_optimum
from metaint.toys.linear_attention import gradient_step, linear_attention
from tests.labs.autoregression.small_runs import (
    AUGMENTED,
    HAAR,
    HEADS,
    POSITIONAL,
    REGRESSION,
    Plain,
    read_fewer,
    settings,
)


def test_weights_of_the_construction_are_its_diagonals() -> None:
    s = settings(AUGMENTED)
    best = augmented_optimum(4, 3)
    model = gradient_step(3, best.eta)
    mean, spread = step_of(s, model)
    assert mean == pytest.approx(best.eta)
    assert spread == pytest.approx(0, abs=1e-7)
    use = use_of(s, model)
    for part in ("QK_coupling", "QK_other", "OV_coupling", "OV_other"):
        assert use[part] == 0
    assert use["loss_without_coupling"] == use["loss_without_other"] == pytest.approx(best.loss, rel=0.03)


def test_products_are_all_that_predictions_tell() -> None:
    s = settings(AUGMENTED, model="free")
    model = linear_attention(3, seed=3)
    vectors = training.draw(s, 5, 1)[0]
    with torch.no_grad():
        torch.testing.assert_close(with_products(s, *products(s, model))(vectors), model(vectors), rtol=1e-4, atol=1e-5)
        use = use_of(s, model)
    assert sum(use[f"QK_{name}"] for name in ("diagonal", "coupling", "other")) == pytest.approx(1)
    assert use["OV_other"] > 0.2


@pytest.mark.parametrize(("d", "T"), [(3, 4), (4, 7)])
def test_coupled_values_lose_less_than_a_plain_step(d: int, T: int) -> None:
    """Over a grid of couplings and steps, on even phases, the least loss is the derived one."""
    theta = 2 * math.pi * torch.quasirandom.SobolEngine(d, scramble=True, seed=1).draw(2**15)
    vectors = torch.exp(1j * theta[:, None] * torch.arange(T + 1)[:, None]).to(torch.complex64)
    step, target = gradient_step(d, 1.0)(vectors[:, :T])[:, -1].detach(), vectors[:, T]
    losses = {}
    for eps in torch.linspace(0, 0.2, 41).tolist():
        guess = (1 + eps) * step - eps * step.sum(-1, keepdim=True)
        eta = (guess.conj() * target).real.sum() / guess.abs().square().sum()
        losses[eps] = (eta * guess - target).abs().square().mean().item()
    assert losses[0] == pytest.approx(augmented_optimum(T, d).loss, rel=0.01)
    assert min(losses.values()) == pytest.approx(coupled_loss(T, d), rel=0.01)
    assert coupled_loss(T, d) < 0.99 * augmented_optimum(T, d).loss
    assert coupled_loss(8, 5) == pytest.approx(0.34667, abs=1e-5)


def rows(tmp_path: Path, of: Plain, **changed: Any) -> Any:
    s = settings(of, **changed)
    recording = train_run(tmp_path / "run", s)
    return pd.DataFrame(compare(s, recording, run_model(tmp_path / "run", s))).set_index("quantity")


def test_what_is_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_fewer(monkeypatch, 4096)
    found = rows(tmp_path / "augmented", AUGMENTED)
    assert found["predicted"].tolist() == pytest.approx([2 / 5, 1 / 5])
    found = rows(tmp_path / "shared", AUGMENTED, model="shared")
    assert found["predicted"]["step"] == pytest.approx(6 / 26)
    found = rows(tmp_path / "two heads", HEADS, heads=2)
    assert found.index.tolist() == ["loss"]
    assert found["predicted"]["loss"] == 1
    found = rows(tmp_path / "pairs", HEADS, setting="orthogonal", d=4, length=6, heads=2)
    assert found["predicted"]["loss"] == 0
    assert found["predicted"]["p_{T-1} / p_T, farthest"] == -0.5
    assert found["predicted"]["effective rank of C"] == 2
    found = rows(tmp_path / "regression", REGRESSION)
    assert found["predicted"]["step"] == pytest.approx(regression_optimum(4, 3).eta)
    assert found["measured"]["loss of the construction"] == pytest.approx(found["predicted"]["loss"], rel=0.05)
    found = rows(tmp_path / "haar", HAAR, layers=2)
    assert "loss, against 2 steps" in found.index


def test_positions_stop_where_the_closed_form_says(tmp_path: Path) -> None:
    found = rows(tmp_path, POSITIONAL, steps=3000, batch=4000)
    assert found["measured"]["steps until it stopped"] < 3000
    assert found["measured"]["steps until it stopped"] == pytest.approx(
        found["predicted"]["steps until it stopped"], rel=0.03
    )
    assert found["measured"]["p_T of the last row"] == pytest.approx(
        found["predicted"]["p_T of the last row"], rel=0.03
    )
    assert found["measured"]["loss there"] == pytest.approx(1e-3, rel=0.1)


def test_rows_of_seeds_and_the_last_line() -> None:
    table = pd.DataFrame(
        [
            {"run": run, "seed": seed, "quantity": "loss", "measured": 1 + seed, "predicted": 2.0, "key": True}
            for seed in (0, 1)
            for run in ("H = 1", "H = 2")
        ]
        + [{"run": "H = 1", "seed": 0, "quantity": "rank", "measured": 3, "predicted": 3.0, "key": False}]
    )
    means = over_seeds(table)
    assert means["measured"].tolist() == [1.5, 1.5, 3]
    assert (means["low"].tolist()[0], means["high"].tolist()[0]) == (1, 2)
    assert last_line("unitary", table) == (
        "unitary, measured against predicted, mean of 2 seeds: "
        "loss (H = 1; H = 2) 1.5000, 1.5000 against 2.0000, 2.0000"
    )
    assert [four(value) for value in (-0.0, 0.12345, 887, 19.5, math.nan)] == ["0.0000", "0.1235", "887", "19.50", "–"]
