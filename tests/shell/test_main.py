"""The shell: tables, JSON and CSV, and one sentence with exit status 2 for bad input."""

import csv
import io
import json
import shutil

import pytest
import xarray as xr

import metaint
from metaint.scanning.saturate import SCALES
from metaint.tasks import repeated_tokens
from tests.builders import available_kinds

pytestmark = pytest.mark.skipif("gpt2" not in available_kinds(), reason="folders open with TransformerBridge")


def test_scan_prints_labels_and_every_score(run, folder):
    code, out, _ = run("scan", folder, "--tokens", 400)
    assert code == 0
    assert "2 layers x 4 heads, raw weights, float32" in out
    for head in ("0.0", "1.3"):
        assert f" {head} " in out
    for name in ("previous", "induction", "averaging", "sink", "tied"):
        assert name in out


@pytest.mark.parametrize("width", [80, 132, 200])
def test_no_cell_is_cut(run, folder, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    _, out, _ = run("scan", folder, "--tokens", 200)
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= width


def test_a_large_model_prints_its_first_heads(repeated_scan, capsys):
    from rich.console import Console

    from metaint.views.groups.head_tables import FEW_ROWS, print_scan

    heads = repeated_scan["heads"].to_dataset().isel(head=[0] * 64, layer=[0] * 80)
    big = heads.assign_coords(head=range(64), layer=range(80))
    print_scan(Console(width=200), xr.DataTree.from_dict({"/heads": big}), "entropy")
    out = capsys.readouterr().out
    assert f"{FEW_ROWS} of 5120 heads shown" in out
    assert len(out.splitlines()) < 3 * FEW_ROWS


def test_scan_streams_attention_and_says_where_it_does_not(run, folder):
    code, out, _ = run("scan", folder, "--tokens", 400, "--json", "--attention", "streamed")
    assert code == 0
    eager = json.loads(run("scan", folder, "--tokens", 400, "--json")[1])
    assert json.loads(out).keys() == eager.keys()
    code, out, _ = run("scan", folder, "--tokens", 200, "--attention", "auto", "--probes", "heads,saturation")
    assert code == 0
    assert "attention was not streamed: its SaturationProbe" in " ".join(out.split())


def test_scan_for_machines(run, folder, tmp_path):
    code, out, _ = run("scan", folder, "--tokens", 400, "--json", "--out", tmp_path / "scan.zarr")
    found = json.loads(out)
    assert code == 0
    assert [h["head"] for h in found["heads"]] == [f"{layer}.{head}" for layer in range(2) for head in range(4)]
    saved = metaint.load(tmp_path / "scan.zarr")["heads"]
    assert found["heads"][5]["entropy"] == pytest.approx(float(saved["entropy"][1, 1]))
    assert found["attributes"]["task"] == "repeated_tokens"
    _, out, _ = run("scan", folder, "--tokens", 400, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 8
    assert float(rows[5]["entropy"]) == pytest.approx(found["heads"][5]["entropy"])
    assert {"labels", "previous_token_null_mean", "tied_keys_tau_0.5"} <= set(rows[0])


def test_scan_reads_a_text(run, folder, tmp_path):
    (tmp_path / "words.txt").write_text("the cat sat on the dog " * 60)
    code, out, _ = run(
        "scan", folder, "--text", tmp_path / "words.txt", "--length", 32, "--sort", "entropy", "--top", 2
    )
    assert code == 0
    assert "(text" in out
    assert "of 32 tokens" in out


def test_audit_prints_a_table(run, folder):
    code, out, _ = run("audit", folder)
    assert code == 0
    assert "pattern_rows" in out
    assert "holds" in out


BAD = [
    (["scan", "nowhere-to-be-found"], "model 'nowhere-to-be-found' could not be opened"),
    (["scan", "./nowhere"], "'./nowhere' is not a folder"),
    (["scan", "FOLDER", "--repeat", "500"], "repeat is 500, and this model can repeat a block of at most"),
    (["scan", "FOLDER", "--repeat", "1"], "--repeat is 1: a block of at least 2 tokens"),
    (["scan", "FOLDER", "--text", "none.txt"], "none.txt"),
    (["scan", "FOLDER", "--text", "BINARY"], "binary.txt"),
    (["scan", "FOLDER", "--text", "EMPTY"], "empty.txt"),
    (["scan", "FOLDER", "--text", "WORDS", "--repeat", "5"], "--text and --repeat were both given: choose one input"),
    (["scan", "FOLDER", "--json", "--csv"], "--json and --csv were both given: choose one format"),
    (["scan", "FOLDER", "--text", "WORDS", "--length", "999"], "length is 999: this model reads windows of 2 to 128"),
    (["scan", "FOLDER", "--attention", "fast"], "--attention is 'fast': choose one of eager, streamed, auto"),
    (["scan", "FOLDER", "--tokens", "0"], "--tokens is 0: it must be at least 1"),
    (["scan", "FOLDER", "--batch-size", "0"], "--batch-size is 0: it must be at least 1"),
    (["scan", "FOLDER", "--dtype", "int8"], "dtype is 'int8': choose one of float32"),
    (["scan", "FOLDER", "--device", "abacus"], "device is 'abacus'"),
    (["scan", "FOLDER", "--out", "scan.txt"], "--out is scan.txt: give it a name that ends in .zarr"),
    (["scan", "FOLDER", "--sort", "induktion"], "--sort is 'induktion': choose one of previous_token"),
    (["scan", "FOLDER", "--revision", "a", "--checkpoint", "3"], "revision and checkpoint were both given"),
    (["scan", "toy"], "metaint demo"),
    (["demo", "--text", "EMPTY"], "empty.txt"),
    (["demo", "--out", "demo"], "--out is demo: give it a name that ends in .zarr"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD)
def test_bad_input_is_one_sentence_and_status_2(run, folder, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METAINT_CACHE", str(tmp_path / "cache"))
    files = {"BINARY": b"\x00\x01\xff", "EMPTY": b"", "WORDS": b"the cat sat on the dog " * 60}
    for name, content in files.items():
        (tmp_path / f"{name.lower()}.txt").write_bytes(content)
    given = [folder if a == "FOLDER" else f"{a.lower()}.txt" if a in files else a for a in arguments]
    code, out, err = run(*given)
    assert code == 2
    assert sentence in err
    assert err.startswith("metaint: ")
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in out + err


def test_a_failed_scan_keeps_the_earlier_result(run, folder, tmp_path):
    out = tmp_path / "scan.zarr"
    assert run("scan", folder, "--tokens", 200, "--json", "--out", out)[0] == 0
    before = metaint.load(out)["heads"]["entropy"].values
    assert run("scan", folder, "--repeat", 500, "--out", out)[0] == 2
    assert (metaint.load(out)["heads"]["entropy"].values == before).all()


def test_unknown_options_exit_with_2(run):
    assert run("scan", "toy", "--nonsense")[0] == 2


def test_three_probes_in_one_pass(run, folder, tmp_path):
    page, store = tmp_path / "p.html", tmp_path / "s.zarr"
    asked = ("scan", folder, "--tokens", 400, "--probes", "heads,residual,inner")
    code, out, err = run(*asked, "--figures", page, "--out", store)
    assert (code, err) == (0, "")
    for title in ("How heads look", "Residual stream", "Inner optimisation"):
        assert title in out
    assert '<section id="inner">' in page.read_text()
    assert set(metaint.load(store).children) == {"heads", "residual", "inner"}
    code, out, _ = run(*asked, "--json")
    found = json.loads(out)
    assert {"heads", "residual", "inner"} < set(found)
    code, out, _ = run("scan", folder, "--tokens", 400, "--probes", "inner", "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert float(rows[1]["loss"]) == pytest.approx(found["inner"]["layers"][1]["loss"], rel=1e-6)
    assert len(rows) == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--probes", "heads,norms"],
            "--probes is 'heads,norms': join some of heads, outputs, residual, inner, saturation, memory, weights",
        ),
        (["--probes", "inner,inner"], "--probes is 'inner,inner': join some of"),
        (["--probes", ""], "--probes is '': join some of"),
        (["--probes", "inner", "--figures", "a.png"], "--figures is a.png: give it a name that ends in .html."),
        (["--probes", "inner", "--figures", "no/a.html"], "--figures is no/a.html: there is no folder no."),
        (["--probes", "inner,heads", "--csv"], "--csv holds one table, and --probes asks for inner,heads: choose one."),
        (["--probes", "inner", "--top", "3"], "--sort and --top are for heads: add it to --probes."),
    ],
)
def test_probes_that_can_not_be_read_are_one_sentence(run, folder, arguments, sentence):
    code, out, err = run("scan", folder, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"metaint: {sentence}")
    assert err.count("\n") == 1


def test_the_inner_lab_writes_its_folder(run, folder, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text(" ".join(f"w{4 + i * i % 90}" for i in range(600)))
    asked = ("lab", "inner", folder, "--text", text, "--windows", 4, "--length", 20, "--positions", 6)
    code, out, err = run(*asked, "--out", tmp_path / "lab")
    assert (code, err) == (0, "")
    assert "look like an inner optimisation?" in out
    assert len(list((tmp_path / "lab").glob("*/figures.html"))) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--windows", 1], "--windows is 1: it must be at least 2."),
        (["--positions", 0], "--positions is 0: it must be at least 1."),
        (["--length", 2], "--length is 2: it must be at least 3."),
    ],
)
def test_a_lab_without_enough_is_one_sentence(run, folder, arguments, sentence):
    assert run("lab", "inner", folder, *arguments) == (2, "", f"metaint: {sentence}\n")


def test_saturation_and_weights(run, folder, tmp_path):
    code, out, _ = run(
        "scan", folder, "--probes", "saturation,weights", "--tokens", 300, "--figures", tmp_path / "p.html"
    )
    assert code == 0
    assert "Saturation: scores times a scale" in out
    assert "Norms of the parameters" in out
    assert "total variation" in (tmp_path / "p.html").read_text()
    code, out, _ = run("scan", folder, "--probes", "weights", "--csv")
    assert len(list(csv.DictReader(io.StringIO(out)))) == 8


def test_figures_and_report(run, folder, tmp_path):
    asked = ("scan", folder, "--probes", "heads,weights", "--tokens", 300, "--out", tmp_path / "s.zarr")
    assert run(*asked, "--figures", tmp_path / "p.html")[0] == 0
    page = (tmp_path / "p.html").read_text()
    assert all(f'<section id="{name}">' in page for name in ("heads", "weights"))
    code, out, err = run("report", tmp_path / "s.zarr", "-o", tmp_path / "r.html")
    assert (code, err) == (0, "")
    assert "saved to" in out
    assert "Scores of the heads</a>" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none.zarr"], "none.zarr does not exist: give the folder that save or --out wrote."),
        (["none.zarr", "-o", "r.txt"], "--out is r.txt: give it a name that ends in .html."),
    ],
)
def test_a_report_that_can_not_be_written_is_one_sentence(run, arguments, sentence):
    assert run("report", *arguments) == (2, "", f"metaint: {sentence}\n")


@pytest.fixture
def store(repeated_scan, tmp_path):
    return metaint.save(repeated_scan, tmp_path / "s.zarr")


def test_export_writes_tables(run, store, repeated_scan, tmp_path):
    for form in ((), ("--as", "parquet")):
        code, out, err = run("export", store, "-o", tmp_path / "tables", *form)
        assert (code, err) == (0, "")
        assert out == f"saved 3 tables to {tmp_path / 'tables'}: heads, labels, attributes\n"
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == [
        f"{name}.{form}" for name in ("attributes", "heads", "labels") for form in ("csv", "parquet")
    ]
    rows = list(csv.DictReader((tmp_path / "tables" / "heads.csv").open()))
    assert [row["head"] for row in rows] == [f"{layer}.{head}" for layer in range(2) for head in range(4)]
    assert float(rows[5]["entropy"]) == float(repeated_scan["heads"]["entropy"][1, 1])


def test_export_for_headvis(run, store, tmp_path):
    for _ in range(2):  # its own export is replaced
        code, out, err = run("export", store, "-o", tmp_path / "data", "--as", "headvis")
        assert (code, err) == (0, "")
        assert f"saved to {tmp_path / 'data'}" in out
    assert len(json.loads((tmp_path / "data" / "scatter_data.json").read_text())) == 8


def test_export_of_a_recording(run, gpt2, repeated, tmp_path):
    record = metaint.Recorder(
        gpt2, [metaint.HeadProbe(["entropy"])], every=5, path=tmp_path / "r.zarr", tokens=repeated
    )
    for step in (0, 5):
        record(step, loss=3.0 - step / 10)
    code, out, _ = run("export", tmp_path / "r.zarr", "-o", tmp_path / "tables")
    assert code == 0
    assert "heads, labels, training, attributes" in out
    assert (tmp_path / "tables" / "training.csv").read_text() == "step,loss\n0,3.0\n5,2.5\n"
    code, _, err = run("export", tmp_path / "r.zarr", "-o", tmp_path / "data", "--as", "headvis")
    assert code == 2
    assert err.startswith("metaint: scan is a recording over training, and HeadVis shows one step")
    assert not (tmp_path / "data").exists()


def test_export_of_a_circuit(run, tmp_path):
    from tests.circuits.planted import circuit_model
    from tests.planted import VOCAB

    graph = metaint.trace_circuit(circuit_model(), repeated_tokens(VOCAB, 8, batch=2), random=2)
    source = metaint.save_circuit(graph, tmp_path / "c.graphml")
    assert run("export", source, "-o", tmp_path / "c.json")[0] == 0
    again = metaint.save_circuit(graph, tmp_path / "again.json")
    assert (tmp_path / "c.json").read_text() == again.read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none.zarr", "-o", "t"], "none.zarr does not exist: give the folder that save or --out wrote."),
        (["none.graphml", "-o", "c.json"], "none.graphml does not exist: give the file that save_circuit wrote."),
        (["s.zarr", "-o", "t", "--as", "xls"], "--as is 'xls': choose one of csv, parquet, headvis."),
        (["s.zarr", "-o", "taken.txt"], "--out is taken.txt, which is a file: name a folder."),
        (["s.zarr", "-o", "taken.txt/t"], "--out is taken.txt/t: FOLDER/taken.txt is no folder."),
        (["c.graphml", "-o", "c.txt"], "--out is c.txt: give it a name that ends in .json."),
        (["c.graphml", "-o", "c.json", "--as", "csv"], "--as is 'csv', and c.graphml is a circuit: leave it out."),
        (["taken.txt", "-o", "t"], "taken.txt is not a Zarr store: give the folder that save or --out wrote."),
        (["torn.zarr", "-o", "t"],
         "torn.zarr is damaged: heads/entropy/zarr.json does not hold what was written there."),
    ],
)  # fmt: skip
def test_what_can_not_be_exported_is_one_sentence(run, store, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.txt").write_text("years of work")
    shutil.copytree(store, tmp_path / "torn.zarr")
    (tmp_path / "torn.zarr" / "heads" / "entropy" / "zarr.json").write_text('{"zarr_format"')
    sentence = sentence.replace("FOLDER", str(tmp_path))
    assert run("export", *arguments) == (2, "", f"metaint: {sentence}\n")
    assert (tmp_path / "taken.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.zarr", "taken.txt", "torn.zarr"]


def test_an_export_for_headvis_replaces_nothing_else(run, store, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "config.json").write_text("{}")
    code, _, err = run("export", store, "-o", tmp_path / "data", "--as", "headvis")
    assert code == 2
    assert err.endswith("data exists and is no export to HeadVis of metaint's: choose another name.\n")
    assert (tmp_path / "data" / "config.json").read_text() == "{}"


def test_saturate(run, folder, tmp_path):
    asked = ("saturate", folder, "--scales", "1,8", "--faithful", "--tokens", 200)
    code, out, _ = run(*asked, "--out", tmp_path / "s.zarr", "--figures", tmp_path / "p.html")
    assert code == 0
    assert "all parameters times a scale" in out
    assert "Published estimator" in out
    assert metaint.load(tmp_path / "s.zarr")["saturation"]["scale"].values.tolist() == [1, 8]
    code, out, _ = run("saturate", folder, "--json", "--tokens", 200)
    assert json.loads(out)["saturation"]["coordinates"]["scale"]["data"] == list(SCALES)  # as in Python


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--scales", "1,x"], "--scales is '1,x': join numbers by commas, such as 1,2,4."),
        (["--scales", ""], "--scales is '': join numbers by commas, such as 1,2,4."),
        (["--scales", "-1"], "scales has -1: parameters can be multiplied by finite numbers above 0."),
        (["--batch-size", 0], "--batch-size is 0: it must be at least 1."),
        (["--figures", "page"], "--figures is page: give it a name that ends in .html."),
    ],
)
def test_bad_saturate_is_one_sentence(run, folder, arguments, sentence):
    assert run("saturate", folder, *arguments) == (2, "", f"metaint: {sentence}\n")


def test_the_norm_growth_lab_trains_and_goes_on(run, tmp_path):
    asked = ("lab", "norm-growth", "--steps", 30, "--norms", "output", "--optimisers", "sgd", "--out", tmp_path / "lab")
    code, out, err = run(*asked)
    assert (code, err) == (0, "")
    assert (tmp_path / "lab" / "figures.html").stat().st_size > 10**6
    assert (tmp_path / "lab" / "summary.csv").read_text().count("\n") == 2
    assert run(*asked)[0] == 0  # nothing is trained again
    code, out, err = run(*asked, "--seed", 1)
    assert (code, out.count("Traceback")) == (2, 0)
    assert err.startswith("metaint: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--learning-rates", "fast"], "--learning-rates is 'fast': join numbers"),
        (["--norms", "middle"], "middle"),
        (["--minutes", "0"], "minutes is 0"),
    ],
)
def test_a_norm_growth_lab_that_can_not_be_is_one_sentence(run, tmp_path, arguments, words):
    code, _, err = run("lab", "norm-growth", *arguments, "--out", tmp_path / "lab")
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
