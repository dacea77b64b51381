"""Runs of every setting that train in a moment."""

from typing import Any

import pytest

from metaint.labs.autoregression.settings import Settings

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


def read_fewer(monkeypatch: pytest.MonkeyPatch, many: int) -> None:
    for name in ("comparison", "products"):
        monkeypatch.setattr(f"metaint.labs.autoregression.{name}.MANY", many)
