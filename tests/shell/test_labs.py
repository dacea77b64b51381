"""`metaint lab` at the shell: a run from end to end, and one sentence with exit status 2 for bad input."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run: Run) -> Run:
    return partial(run, "lab")


def test_autoregression_ends_with_measured_against_predicted(run: Run, tmp_path: Any) -> None:
    options = ("--setting", "positional", "--length", 5, "--steps", 400, "--batch", 30, "--jobs", 1, "--out", tmp_path)
    code, out, _ = run("autoregression", *options)
    assert code == 0
    last = out.strip().splitlines()[-1]
    assert last.startswith("positional, measured against predicted: steps until it stopped (mu = 50; mu = 100; ")
    assert (tmp_path / "positional" / "figures.html").is_file()
    # What is there is taken as it is, and keeps to its settings.
    code, again, _ = run("autoregression", *options)
    assert (code, again.strip().splitlines()[-1]) == (0, last)
    code, out, told = run("autoregression", *options, "--batch", 31)
    assert (code, out.count("\n")) == (2, 1)
    assert "which holds a run with batch 30, and 31 was asked for" in told


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--setting", "softmax"],
            "setting is 'softmax': choose one of augmented, unitary, orthogonal, haar, positional, icl-regression.",
        ),
        (
            ["--setting", "orthogonal", "--width", "5"],
            "d is 5: give an even number, since eigenvalues come in conjugate pairs.",
        ),
        (["--setting", "unitary", "--heads", "0"], "--heads is 0: it must be at least 1."),
        (
            ["--setting", "unitary", "--heads", "1,two"],
            "--heads is '1,two': join whole numbers by commas, such as 0,1.",
        ),
        (["--length", "1"], "length is 1: give at least 2."),
        (
            ["--setting", "haar", "--length", "5"],
            "length is 5, and d is 5: give at least 6 vectors, or least squares can't tell W.",
        ),
        (
            ["--setting", "icl-regression", "--length", "9"],
            "length is 9, and d is 10: give at least 10 points, or least squares is singular.",
        ),
        (["--layers", "2"], "layers is [2], which setting 'augmented' has no use for: leave it out."),
        (["--seeds", "-1"], "--seeds is -1: it must be at least 0."),
        (["--quick", "--full"], "--quick and --full were both given: choose one."),
    ],
)
def test_bad_input_of_autoregression_gets_one_sentence(
    run: Run, options: list[str], sentence: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, told = run("autoregression", *options)
    assert (code, out) == (2, "")
    assert " ".join(told.split()) == f"metaint: {sentence}"
    assert not list(tmp_path.iterdir())
