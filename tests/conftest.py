"""Shared fixtures; the shapes of every public measure are checked at run time in tests."""

import importlib
import os
import pkgutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# pytest-xdist tells its workers of 80 columns, and some shells export theirs: tests see what a pipe sees.
os.environ.pop("COLUMNS", None)

import pytest
import torch
from jaxtyping import install_import_hook

with install_import_hook(["metaint.measures"], "beartype.beartype"):
    # All of them here, since the hook reaches no file that was imported before it.
    for module in pkgutil.iter_modules([str(Path(__file__).parents[1] / "metaint" / "measures")]):
        importlib.import_module(f"metaint.measures.{module.name}")

import metaint
from metaint.tasks import repeated_tokens
from tests.builders import build

# Tiny models: waking a second thread costs more than it brings, most of all on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def gpt2():
    """A tiny random GPT-2 bridge: 2 layers, 4 heads. Shared, so leave it as it was."""
    return build("gpt2") if "gpt2" in available() else build(available()[0])


def available() -> list[str]:
    from tests.builders import available_kinds

    return list(available_kinds())


@pytest.fixture(params=available())
def any_model(request: pytest.FixtureRequest):
    """Every architecture that the installed TransformerLens supports."""
    return build(request.param)


@pytest.fixture(scope="session")
def repeated() -> torch.Tensor:
    """Six sequences of 32 random tokens repeated twice."""
    return repeated_tokens(96, 32, batch=6, ids=(5, 95), seed=1)


@pytest.fixture(scope="session")
def repeated_scan(gpt2, repeated):
    """A scan of the tiny GPT-2 on repeated tokens."""
    return metaint.scan(gpt2, repeated)


@pytest.fixture(scope="session")
def folder():
    """A tiny random GPT-2 as a folder in Hugging Face's format."""
    from tests.builders import hf_directory

    return str(hf_directory("gpt2"))


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in float32 on the CPU, out of its package. Shared, so leave it as it was."""
    from metaint.models.smollm2 import packaged

    if "llama" not in available():
        pytest.skip("SmolLM2 needs TransformerLens 3 or newer")
    try:
        packaged()
    except metaint.ModelError as error:
        pytest.skip(str(error))
    return metaint.open_model("smollm2", device="cpu")


@pytest.fixture
def run(monkeypatch, capsys):
    """The `metaint` command as a function: exit status, stdout, stderr."""
    from metaint.shell import main as cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["metaint", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call
