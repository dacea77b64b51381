"""`metaint trace`, and the views of `metaint report`."""

import io

import pytest
from rich.console import Console

import metaint
from metaint.circuits.ledger import Ledger
from metaint.views.circuit.table import print_circuit
from tests.builders import available_kinds
from tests.views.circuit.circuits import CIRCUITS, empty, of_gpt2, small

folders = pytest.mark.skipif("gpt2" not in available_kinds(), reason="folders open with TransformerBridge")


def printed(circuit):
    console = Console(file=io.StringIO(), width=200)
    print_circuit(console, circuit)
    return console.file.getvalue()


@folders
def test_a_circuit_is_traced_saved_drawn_and_reported(run, folder, tmp_path):
    circuit, page = tmp_path / "c.graphml", tmp_path / "c.html"
    asked = ("--random", 3, "--tokens", 400, "--threshold", 0.01)
    code, out, _ = run("trace", folder, *asked, "-o", circuit, "--figures", page)
    assert code == 0
    assert "Circuit for induction, by in_context_loss" in out
    assert metaint.load_circuit(circuit).graph["task"] == "repeated_tokens"
    assert "metaint-circuit" in page.read_text()
    metaint.save_circuit(of_gpt2(), tmp_path / "ours.graphml")
    run("scan", folder, "--tokens", 300, "--out", tmp_path / "s.zarr")
    out = tmp_path / "r.html"
    assert run("report", tmp_path / "s.zarr", "-o", out, "--circuit", tmp_path / "ours.graphml")[0] == 0
    assert 'class="metaint-circuit"' in out.read_text()
    assert 'class="metaint-attention"' not in out.read_text()
    text = tmp_path / "text.txt"
    text.write_text("some words to look at. " * 20)
    views = ("--circuit", tmp_path / "ours.graphml", "--model", folder)
    for option in ((), ("--text", text)):
        assert run("report", tmp_path / "s.zarr", "-o", out, *views, *option)[0] == 0
        assert 'class="metaint-attention"' in out.read_text()
        out.unlink()


@folders
def test_a_trace_that_is_stopped_goes_on(run, folder, tmp_path, monkeypatch):
    """Ctrl-C gives what is known, beside it what the same command goes on from; a finished circuit is never lost."""
    circuit, journal = tmp_path / "c.graphml", tmp_path / "c.graphml.journal"
    asked = ("trace", folder, "--random", 3, "--tokens", 400, "--threshold", 0.01, "-o", circuit)
    add, left = Ledger.add, [12]

    def stopping(self, name, start, values):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        add(self, name, start, values)

    monkeypatch.setattr(Ledger, "add", stopping)
    code, out, err = run(*asked)
    assert code == 130
    assert "unfinished" in out
    assert f"the same command goes on from {journal}" in out
    assert "looking at the model's hooks" in err
    assert "parts, 4 sequences: " in err
    assert metaint.load_circuit(circuit).graph["finished"] is False
    assert journal.exists()
    code, out, _ = run(*asked)
    assert code == 0
    assert not journal.exists()
    assert metaint.load_circuit(circuit).graph["finished"] is True
    left[0] = 12
    whole = circuit.read_bytes()
    code, out, _ = run(*asked)
    assert code == 130
    assert f"{circuit} holds another circuit and is left as it is" in out
    assert circuit.read_bytes() == whole


@pytest.mark.parametrize(
    ("command", "arguments", "sentence"),
    [
        ("trace", ["toy", "-o", "c.txt"], "--out is c.txt: end it in .graphml or .json."),
        ("trace", ["toy", "--tokens", 0], "--tokens is 0: it must be at least 1."),
        ("trace", ["toy", "--most", 0], "--most is 0: it must be at least 1."),
        ("trace", ["toy", "--least", 2], "--least is 2.0: it must be at most 1."),
        ("trace", ["toy", "--precision", -1], "--precision is -1.0: it must be at least 0."),
        ("trace", ["toy", "--figures", "c.txt"], "--figures is c.txt: give it a name that ends in .html."),
        ("report", ["s.zarr", "--text", "a.txt"], "--text is a.txt: patterns on it need --model."),
    ],
)
def test_bad_input_is_one_sentence(run, command, arguments, sentence):
    assert run(command, *arguments) == (2, "", f"metaint: {sentence}\n")


@folders
def test_a_scan_without_labels_has_no_heads_to_show(run, folder, tmp_path):
    run("scan", folder, "--tokens", 300, "--out", tmp_path / "s.zarr")
    code, out, err = run("report", tmp_path / "s.zarr", "-o", tmp_path / "r.html", "--model", folder)
    assert (code, out) == (2, "")
    assert "has no labelled head to show" in err
    assert not (tmp_path / "r.html").exists()


def test_the_table_of_a_circuit():
    told = printed(small())
    lines = [line.split() for line in told.splitlines()]
    (path,) = (line for line in lines if line[:2] == ["0.0", "1.0"])
    assert path[2] == "keys"
    assert path[-1].startswith("(+")
    shares = [line[-2:] for line in lines if line and line[-1] == "%"]
    assert len(shares) >= len(small().nodes) - 2
    assert "Direct paths" in told


def test_a_circuit_without_parts_says_why():
    circuit = empty()
    circuit.graph.update(found=False, why="Nothing to explain.")
    told = printed(circuit)
    assert "not found" in told
    assert "Nothing to explain." in told
    assert "Parts\n" not in told
    assert len(printed(CIRCUITS["dense"]()).splitlines()) > 60
