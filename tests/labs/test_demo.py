"""The demo's second act: the heads that tell most, on repeated tokens and on text, and a report that opens alone."""

import io

import pytest
from rich.console import Console

import metaint
from metaint.errors import ModelError
from metaint.labs import demo
from metaint.tasks import repeated_tokens
from tests.builders import available_kinds
from tests.planted import PLANTED, VOCAB, planted_model

pytestmark = pytest.mark.skipif(
    "native-attn-only" not in available_kinds(), reason="needs TransformerBridge.boot_native"
)


@pytest.fixture
def terminal():
    return Console(file=io.StringIO(), width=120)


def test_the_telling_heads_stand_in_the_table_and_in_the_report(monkeypatch, tmp_path, terminal):
    inputs = {
        task: repeated_tokens(VOCAB, 16, batch=8, seed=seed) for seed, task in enumerate(("repeated_tokens", "text"))
    }
    monkeypatch.setattr(demo, "open_model", lambda name: planted_model())
    monkeypatch.setattr(demo, "reference_inputs", lambda model, text, seed: inputs)
    demo.show_smollm2(terminal, "prose", 0, tmp_path / "demo.html")
    told, page = terminal.file.getvalue(), (tmp_path / "demo.html").read_text(encoding="utf-8")
    named = {head: label for head, label in PLANTED.items() if label in ("induction", "previous_token")}
    assert named
    for head, label in named.items():
        assert any(line.split()[:2] == [head, label] for line in told.splitlines())
    assert "Attention of the most telling heads on text" in page
    assert str(tmp_path / "demo.html") in told.replace("\n", "")


def test_without_the_package_the_demo_says_so_and_ends_well(monkeypatch, tmp_path, terminal):
    def missing(name):
        raise ModelError("smollm2 is in a package which is not installed: pip install it")

    monkeypatch.setattr(demo, "open_model", missing)
    demo.show_smollm2(terminal, "prose", 0, tmp_path / "demo.html")
    assert "SmolLM2 is left out: smollm2 is in a package which is not installed" in terminal.file.getvalue()
    assert not (tmp_path / "demo.html").exists()


@pytest.mark.real
def test_reference_inputs_are_read_by_smollm2(smollm2):
    inputs = demo.reference_inputs(smollm2, metaint.tasks.python_prose())
    assert inputs["repeated_tokens"].shape == (demo.REPEATED, 101)
    assert inputs["text"].shape == (demo.WINDOWS, demo.LENGTH)
