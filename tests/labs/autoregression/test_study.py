"""Runs that are killed or diverge, studies of every setting, and the optima that training reaches."""

import io
import pickle
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import xarray as xr
from rich.console import Console

from metaint.errors import InputError, StoreError
from metaint.labs.autoregression import study as lab
from metaint.labs.autoregression.run import run_model, train_run
from metaint.labs.autoregression.settings import Settings
from metaint.labs.common.resumable import RECORDING
from metaint.labs.common.side_by_side import Diverged
from metaint.scans.recordings import read_recording
from tests.labs.autoregression.small_runs import HEADS, POSITIONAL, RUNS, Plain, read_fewer, settings

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
