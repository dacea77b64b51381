import io
import math
import pickle
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import xarray as xr
from rich.console import Console

from metaint.errors import InputError, StoreError
from metaint.labs.autoregression import study as lab, training
from metaint.labs.autoregression.comparison import compare
from metaint.labs.autoregression.findings import four, last_line, over_seeds
from metaint.labs.autoregression.products import coupled_loss, products, step_of, use_of, with_products
from metaint.labs.autoregression.run import run_model, train_run
from metaint.labs.autoregression.settings import Settings
from metaint.labs.autoregression.training import Starts
from metaint.labs.common.resumable import RECORDING
from metaint.labs.common.side_by_side import Diverged
from metaint.measures.closed_forms import augmented_optimum, regression_optimum, unitary_loss
from metaint.measures.recurrence import positional_rows
from metaint.scans.recordings import read_recording
from metaint.toys.linear_attention import gradient_step, linear_attention, regression_step

Plain = dict[str, Any]
AUGMENTED: Plain = {"setting": "augmented", "model": "diagonal", "d": 3, "length": 4, "steps": 6, "learning_rate": 0.02}
HEADS: Plain = {
    "setting": "unitary", "model": "heads", "d": 3, "length": 5, "steps": 8, "learning_rate": 0.01, "heads": 3,
    "starts": 3,
}  # fmt: skip
POSITIONAL: Plain = {
    "setting": "positional", "model": "positions", "d": 1, "length": 6, "steps": 9, "learning_rate": 0.5, "batch": 40,
    "mu": 20.0,
}  # fmt: skip
REGRESSION: Plain = {
    "setting": "icl-regression", "model": "linear", "d": 3, "length": 4, "steps": 5, "learning_rate": 1e-3
}  # fmt: skip
HAAR: Plain = {"setting": "haar", "model": "released", "d": 2, "length": 4, "steps": 4, "learning_rate": 1e-2}
RUNS = {"augmented": AUGMENTED, "unitary": HEADS, "positional": POSITIONAL, "icl-regression": REGRESSION, "haar": HAAR}


def settings(of: Plain, **changed: Any) -> Settings:
    return Settings(**{"batch": 8, "records": 3, **of, **changed})


# ---- what is trained, and on what -------------------------------------------------------------------------------


def test_expected_losses_are_those_of_each_start() -> None:
    s = settings(HEADS)
    starts: Any = Starts(s)
    assert starts.a.shape == (3, 3, 3)
    assert not torch.equal(starts.a[0], starts.a[1])
    found = training.expected_losses(s, starts)
    for i, loss in enumerate(found):
        C = starts.b[i].mT @ starts.a[i]
        rows = [unitary_loss(C, starts.P[i, T - 2, :T]) for T in range(2, 6)]
        torch.testing.assert_close(loss, torch.stack(rows).mean())
    best: Any = training.trained(s, starts)
    assert torch.equal(best.a, starts.a[int(found.argmin())])


@pytest.mark.parametrize("setting", ["unitary", "orthogonal"])
def test_even_sequences_have_the_expected_loss(setting: str) -> None:
    s = settings(HEADS, setting=setting, d=4, length=6)
    starts = Starts(s)
    with torch.no_grad():
        for name in "abP":
            getattr(starts, name).mul_(5)
        model, expected = starts.one(1), training.expected_losses(s, starts)[1]
        sample = training.even_sequences(s, 1024)
        torch.testing.assert_close(sample.vectors[:, 3], (sample.matrices @ sample.vectors[:, 2, :, None])[..., 0])
        assert training.objective(s, model, sample).mean().item() == pytest.approx(expected.item(), rel=5e-3)


def test_the_loss_of_positions_is_that_of_the_model_on_its_sequences() -> None:
    s = settings(POSITIONAL)
    starts = Starts(s)
    assert [name for name, _ in starts.named_parameters()] == ["P"]
    with torch.no_grad():
        starts.P.copy_(torch.randn(starts.P.shape, generator=torch.Generator().manual_seed(1)))
        sample = training.draw(s, s.batch, s.seed)
        assert sample[0].angle().max() <= 2 * math.pi * s.length / s.mu
        own = training.objective(s, starts.one(0), sample).mean()
        torch.testing.assert_close(training.expected_losses(s, starts)[0], own, rtol=1e-4, atol=1e-5)


def test_descent_on_positions_in_closed_form() -> None:
    s = settings(POSITIONAL, length=4)
    lags = torch.arange(4, dtype=torch.float64)
    theta = 2 * math.pi * (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    G = (2 * (lags[:, None] - lags)[..., None] * theta / s.mu).cos().mean(-1)
    P = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    ideal = torch.eye(4, dtype=torch.float64)[-1]
    for _ in range(7):
        gap = positional_rows(P) - ideal
        loss = torch.einsum("ti,ij,tj->t", gap, G, gap).mean()
        (gradient,) = torch.autograd.grad(loss, P)
        P = (P - s.learning_rate * gradient).detach().requires_grad_()
    rows, left = training.positional_descent(s, 7)
    torch.testing.assert_close(rows, positional_rows(P).detach(), rtol=1e-6, atol=1e-8)
    gap = rows - ideal
    assert left == pytest.approx(torch.einsum("ti,ij,tj->t", gap, G, gap).mean().item(), rel=1e-6)
    assert training.positional_descent(s, 0)[1] == pytest.approx(1)


@pytest.mark.parametrize(("model", "free"), [("diagonal", 3), ("signed", 3), ("blocks", 9), ("free", 81)])
def test_only_free_weights_are_drawn_and_descend(model: str, free: int) -> None:
    s = settings(AUGMENTED, model=model)
    built = training.build(s)
    training.objective(s, built, training.draw(s, 8, 0)).mean().backward()
    weights = {name: getattr(built.blocks[0].attn, name) for name in ("W_Q", "W_K", "W_V", "W_O")}
    assert all(weight.count_nonzero() == free for weight in weights.values())
    assert all((weight.grad != 0).logical_and(weight == 0).sum() == 0 for weight in weights.values())
    assert weights["W_K"][0, 6:, :3].diagonal().count_nonzero() == 3
    positive = all((weight >= 0).all() for weight in weights.values())
    assert positive == (model == "diagonal")


def test_objectives() -> None:
    model = linear_attention(3)
    s = settings(AUGMENTED)
    sample = training.draw(s, 4, 0)
    errors = (model(sample[0][:, :-1]) - sample[0][:, 1:]).abs().square()
    assert torch.equal(training.objective(s, model, sample), errors[:, 3].mean(-1))
    shared = settings(AUGMENTED, model="shared")
    torch.testing.assert_close(training.objective(shared, model, sample), errors[:, 1:].mean((1, 2)))
    # Longer sequences than the context change nothing.
    longer = training.draw(s, 4, 0, 8)
    torch.testing.assert_close(training.objective(s, model, longer), errors[:, 3].mean(-1))
    haar = settings(HAAR, d=3)
    real = training.draw(haar, 4, 0)
    torch.testing.assert_close(real[0].norm(dim=-1), torch.ones(4, 5))
    expected = (model(real[0][:, :-1]) - real[0][:, 1:]).square().mean((1, 2))
    torch.testing.assert_close(training.objective(haar, model, real), expected)


def test_regression_beside_one_gradient_step() -> None:
    s = settings(REGRESSION)
    eta = regression_optimum(4, 3).eta
    found = training.regression_scan(s, regression_step(3, 4, eta))
    assert float(found["step_size"]) == pytest.approx(eta, rel=1e-4)
    assert float(found["prediction_difference"]) == pytest.approx(0, abs=1e-5)
    assert float(found["sensitivity_cosine"]) == pytest.approx(1, abs=1e-4)
    assert float(found["model_difference"]) == pytest.approx(0, abs=1e-5)
    assert float(found["loss"]) == pytest.approx(regression_optimum(4, 3).loss, rel=0.05)
    # The best step on these sequences is no worse on them, and more steps do better.
    assert float(found["loss_gradient_steps_1"]) <= float(found["loss"]) * 1.01
    assert float(found["loss_gradient_steps_5"]) < float(found["loss_gradient_steps_2"]) < float(found["loss"])
    double = training.regression_scan(s, regression_step(3, 4, 2 * eta))
    assert float(double["step_size"]) == pytest.approx(2 * eta, rel=1e-4)


# ---- what is compared -------------------------------------------------------------------------------------------


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


def read_fewer(monkeypatch: pytest.MonkeyPatch, many: int) -> None:
    for name in ("comparison", "products"):
        monkeypatch.setattr(f"metaint.labs.autoregression.{name}.MANY", many)


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


# ---- runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_goes_on_with_the_same_numbers(name: str, tmp_path: Path) -> None:
    s = settings(RUNS[name])
    whole = train_run(tmp_path / "whole", s)
    assert list(whole["training"].to_dataset()["step"]) == s.record_steps
    assert ("structure" in whole) == (name in ("unitary", "positional"))

    def kill(step: int, loss: float) -> None:
        if step == s.record_steps[1] + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(tmp_path / "killed", s, kill)
    path = tmp_path / "killed" / RECORDING
    assert list(read_recording(path)["recurrence"].to_dataset()["step"]) == s.record_steps[:2]
    steps: list[int] = []
    again = train_run(tmp_path / "killed", s, lambda step, loss: steps.append(step))
    assert steps[0] == s.record_steps[1]
    for group in whole.children:
        xr.testing.assert_equal(whole[group].to_dataset(), again[group].to_dataset())
    assert train_run(tmp_path / "killed", s).equals(again)


def test_a_folder_keeps_to_its_run(tmp_path: Path) -> None:
    s = settings(POSITIONAL)
    train_run(tmp_path / "run", s)
    with pytest.raises(InputError, match="which holds a run with batch 40, and 41 was asked for"):
        train_run(tmp_path / "run", settings(POSITIONAL, batch=41))
    with pytest.raises(StoreError, match="holds no trained model"):
        run_model(tmp_path / "none", s)
    (tmp_path / "run" / "state.safetensors").write_bytes(b"nothing")
    with pytest.raises(StoreError, match="is damaged"):
        train_run(tmp_path / "run", s)


def test_a_loss_that_is_not_finite_is_said(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"^learning_rate is 1e\+30, with which heads-d3-T5-H3-seed0 had no finite loss"):
        train_run(tmp_path, settings(HEADS, learning_rate=1e30))


# ---- studies ----------------------------------------------------------------------------------------------------

SMALL: dict[str, Plain] = {
    "augmented": {"d": 2, "length": 4, "steps": 3},
    "unitary": {"d": 2, "length": 4, "steps": 3},
    "orthogonal": {"d": 2, "length": 4, "steps": 3, "starts": 2},
    "haar": {"d": 2, "length": 4, "steps": 3},
    "positional": {"length": 5, "steps": 3, "batch": 20},
    "icl-regression": {"d": 2, "length": 3, "steps": 3, "layers": [1, 2]},
}


@pytest.mark.parametrize("setting", SMALL)
def test_a_study_compares_and_draws(setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_fewer(monkeypatch, 512)
    given = {"batch": 8, "records": 2, **SMALL[setting]}
    told = io.StringIO()
    grid = lab.runs(setting, "quick", **given)
    found = lab.run(Console(file=told, width=100), tmp_path / "lab", grid, jobs=1)
    text = told.getvalue()
    assert max(map(len, text.splitlines()[:-1])) <= 100
    assert text.splitlines()[-1].startswith(f"{setting}, measured against predicted: ")
    assert len(found.recordings) == len(grid)
    assert set(found.table["run"]) == {lab.label(s) for s in grid}
    for name in ("figures.html", "comparison.csv", "runs.csv"):
        assert (tmp_path / "lab" / name).stat().st_size > 100
    table: Any = pd.read_csv(tmp_path / "lab" / "comparison.csv")
    assert {"run", "quantity", "measured", "predicted"} <= set(table)
    assert table["key"].any()


def test_runs_can_go_to_another_process() -> None:
    """As `train_all` sends them; that processes train what one does is seen in the birth lab."""
    grid = lab.runs("positional", seeds=[0, 1])
    function, sent = pickle.loads(pickle.dumps((train_run, grid)))
    assert function is train_run
    assert sent == grid


def test_a_diverged_run_is_said_and_left_out(tmp_path: Path) -> None:
    fine, wild = settings(HEADS), settings(HEADS, heads=2, learning_rate=1e30)
    told = io.StringIO()
    found = lab.run(Console(file=told, width=300), tmp_path, [fine, wild], jobs=1)
    assert set(found.recordings) == {fine.name}
    assert f"{wild.name} diverged: learning_rate is 1e+30" in told.getvalue()
    with pytest.raises(InputError, match=r"^no run has a finite loss: learning_rate is 1e\+30"):
        lab.study(tmp_path, [wild], jobs=1)


def test_runs_of_each_size_are_distinct() -> None:
    for setting in lab.MODELS:
        for size in lab.SIZES:
            grid = lab.runs(setting, size, seeds=[0, 1])
            assert len({s.name for s in grid}) == len(grid)
            assert {s.seed for s in grid} == {0, 1}
    assert [s.heads for s in lab.runs("orthogonal")] == [1, 2, 3, 4, 5, 6, 8]
    assert [s.heads for s in lab.runs("unitary", d=3, length=6)] == [1, 2, 3, 5]
    full = lab.runs("orthogonal", "full")[0]
    assert (full.learning_rate, full.steps) == (1e-3, 100_000)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: lab.runs("orthogonal", d=5),
            "d is 5: give an even number, since eigenvalues come in conjugate pairs.",
        ),
        (
            lambda: lab.runs("unitary", d=4, length=4),
            "length is 4, and d is 4: give at least 5 vectors, or least squares can't tell W.",
        ),
        (
            lambda: lab.runs("icl-regression", length=9),
            "length is 9, and d is 10: give at least 10 points, or least squares is singular.",
        ),
        (lambda: lab.runs("augmented", length=1), "length is 1: give at least 2."),
        (lambda: lab.runs("unitary", heads=[0]), "heads is 0: give at least 1."),
        (lambda: lab.runs("haar", layers=[0]), "layers is 0: give at least 1."),
        (lambda: lab.runs("haar", heads=[2]), "heads is [2], which setting 'haar' has no use for: leave it out."),
        (lambda: lab.runs("unitary", layers=[]), "layers is [], which setting 'unitary' has no use for: leave it out."),
        (lambda: lab.runs("positional", d=2), "d is 2, which setting 'positional' has no use for: leave it out."),
        (lambda: lab.runs("augmented", batch=0), "batch is 0: give at least 2."),
        (lambda: lab.runs("augmented", seeds=[-1]), "seed is -1: give at least 0."),
        (lambda: lab.runs("augmented", seeds=[]), "seeds is empty: give at least one."),
        (
            lambda: lab.runs("softmax"),
            "setting is 'softmax': choose one of augmented, unitary, orthogonal, haar, positional, icl-regression.",
        ),
        (lambda: lab.runs("haar", "huge"), "size is 'huge': choose one of quick, default, full."),
        (lambda: settings(HEADS, model="free"), "model is 'free': choose one of heads."),
        (lambda: settings(HEADS, learning_rate=0.0), "learning_rate is 0: give a finite number above 0."),
        (lambda: lab.study("out", []), "settings is empty: give at least one run."),
        (
            lambda: lab.study("out", [settings(HEADS)], jobs=-1),
            "jobs is -1: give a number of processes, or 0 for as many as there are cores.",
        ),
    ],
)  # fmt: skip
def test_bad_settings_get_one_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value) == sentence


# ---- the optima that training reaches ---------------------------------------------------------------------------


def measured(tmp_path: Path, grid: list[Settings]) -> Any:
    return lab.study(tmp_path, grid, jobs=1).table


@pytest.mark.slow
def test_linear_attention_reaches_one_gradient_step_and_goes_below_it_with_coupling(tmp_path: Path) -> None:
    grid = [s for s in lab.runs("augmented", "quick") if s.length == 8 and s.model in ("diagonal", "signed", "free")]
    found = lab.study(tmp_path, grid, jobs=1)
    table: Any = found.table.set_index(["run", "quantity"])
    for model in ("diagonal", "signed"):
        for quantity in ("loss", "step"):
            row = table.loc[(f"{model}, T = 8", quantity)]
            assert row["measured"] == pytest.approx(row["predicted"], rel=0.03)
    assert table.loc[("free, T = 8", "loss")]["measured"] < 0.95 * 4 / 11
    free: Any = found.details.set_index("model").loc["free"]
    assert free["loss_without_coupling"] > 4 / 11
    assert free["loss_without_other"] == pytest.approx(free["loss"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "heads", "ratio"), [("unitary", [5, 10], 0.0), ("orthogonal", [1, 5], -0.5)])
def test_diagonal_heads_reach_the_staircase(setting: str, heads: list[int], ratio: float, tmp_path: Path) -> None:
    table = measured(tmp_path, lab.runs(setting, "quick", heads=heads))
    losses = table[table["quantity"] == "loss"]
    for row in losses.to_dict("records"):
        assert row["measured"] == pytest.approx(row["predicted"], rel=0.02, abs=0.02)
    last = table[table["run"] == f"H = {heads[-1]}"].set_index("quantity")["measured"]
    assert last["head orthogonality"] < 0.05
    assert last["p_{T-1} / p_T, farthest"] == pytest.approx(ratio, abs=0.03)


@pytest.mark.slow
def test_regression_reaches_one_gradient_step(tmp_path: Path) -> None:
    table = measured(tmp_path, lab.runs("icl-regression", "quick")).set_index("quantity")["measured"]
    assert table["loss of the construction"] == pytest.approx(0.2062, rel=0.01)
    assert table["loss"] == pytest.approx(0.2062, rel=0.03)
    assert table["cosine of sensitivities"] > 0.99


@pytest.mark.slow
def test_positions_are_those_that_the_authors_saved(tmp_path: Path) -> None:
    table = measured(tmp_path, [s for s in lab.runs("positional") if s.mu in (50, 300)])
    saved = table[table["quantity"].str.contains("as saved")]
    assert len(saved) == 7
    for row in saved.to_dict("records"):
        assert row["measured"] == pytest.approx(row["predicted"], rel=0.02)
