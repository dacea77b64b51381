"""Random bad lines at the shell: one sentence and a status, never a traceback, before the work begins."""

import sys

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from metaint.shell import main as shell
from tests.builders import available_kinds
from tests.faults.moments import THOROUGH

pytestmark = pytest.mark.skipif("gpt2" not in available_kinds(), reason="folders open with TransformerBridge")

NUMBERS = ["0", "-1", "-99999999999", str(2**63), str(2**80), "1e9", "nan", "inf", "x", "", "0,", "99", "1,,2"]
PATHS = [
    "~nouser/x",
    "a" * 300,
    "/proc/none/x.zarr",
    "/dev/null/x.html",
    "\ud800.zarr",
    "none.graphml",
    ".",
    "",
    "a\nb",
]
OPTIONS = {
    "scan": ["--probes", "--text", "--repeat", "--length", "--tokens", "--batch-size", "--seed", "--sort", "--top"],
    "saturate": ["--scales", "--text", "--length", "--tokens", "--batch-size", "--seed", "--dtype", "--device"],
    "trace": ["--target", "--how", "--threshold", "--random", "--text", "--length", "--tokens", "--seed"],
    "report": ["--circuit", "--model", "--text"],
    "export": ["--as"],
    "audit": ["--dtype", "--device", "--revision", "--checkpoint"],
    "lab inner": ["--text", "--length", "--windows", "--positions", "--seed"],
    "lab norm-growth": ["--minutes", "--steps", "--norms", "--optimisers", "--learning-rates", "--seed"],
    "lab birth": [
        "--steps",
        "--length",
        "--batch",
        "--width",
        "--triggers",
        "--layers",
        "--freeze",
        "--seeds",
        "--jobs",
    ],
    "lab autoregression": ["--setting", "--width", "--length", "--heads", "--layers", "--steps", "--seeds", "--jobs"],
    "demo": ["--text", "--seed"],
}
# A line is bad for sure: what is read is not there, or nothing can be written at --out.
BAD = {"report": ["none.zarr"], "export": ["none.zarr"]}


@st.composite
def lines(draw):
    command = draw(st.sampled_from(sorted(OPTIONS)))
    chosen = draw(st.lists(st.sampled_from(OPTIONS[command]), max_size=3, unique=True))
    values = st.sampled_from(NUMBERS + PATHS) | st.text(max_size=12)
    line = [*command.split(), *BAD.get(command, [])]
    if command in ("scan", "saturate", "trace", "audit"):
        line.append(draw(st.sampled_from(["~nouser", "none/at/all", "a" * 300, "", "x\0y"])))
    elif command not in BAD:
        line += ["--out", "/dev/null/nothing.zarr"]
    elif command == "export":
        line += ["--out", draw(st.sampled_from(PATHS))]
    for option in chosen:
        line += [option, draw(values)]
    return line


@settings(
    max_examples=300 if THOROUGH else 120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(line=lines())
def test_a_bad_line_gets_a_sentence_and_status_2(line, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["metaint", *line])
    with pytest.raises(SystemExit) as stop:
        shell.main()
    out = capsys.readouterr()
    assert stop.value.code == 2, (line, out)
    assert "Traceback" not in out.err


@pytest.mark.parametrize(
    "line",
    [
        "scan FOLDER --length 0 --text TEXT",
        "scan FOLDER --seed -1",
        f"scan FOLDER --seed {2**64}",
        "scan FOLDER --tokens 99999999999",
        "scan ~nouser",
        "saturate FOLDER --batch-size 0",
        "trace FOLDER --length 0 --text TEXT",
        "lab inner toy --windows 99999999999",
        "lab birth --layers 99",
        f"lab birth --seeds {2**64}",
        "demo --out /dev/null/demo.zarr",
        "report GRAPHML -o report.html",
        "export GRAPHML -o circuit.json",
        "report FOREIGN -o report.html",
        "export FOREIGN -o tables --as headvis",
    ],
)
def test_what_made_a_traceback_gets_a_sentence(line, run, folder, tmp_path, monkeypatch):
    import numpy as np
    import xarray as xr

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some words " * 50)
    (tmp_path / "foreign.graphml").write_text(
        '<graphml xmlns="http://graphml.graphdrawing.org/xmlns"><graph edgedefault="directed">'
        '<node id="embedding"/><node id="logits"/><edge source="embedding" target="logits"/></graph></graphml>'
    )
    heads = xr.Dataset({"rain": ("day", np.arange(3.0))})
    xr.DataTree.from_dict({"/heads": heads}).to_zarr(tmp_path / "foreign.zarr", consolidated=False)
    places = {"FOLDER": folder, "TEXT": "text.txt", "GRAPHML": "foreign.graphml", "FOREIGN": "foreign.zarr"}
    code, _, err = run(*[places.get(part, part) for part in line.split()])
    assert code == 2
    assert err.startswith("metaint: ")
    assert len(err.strip().splitlines()) == 1
