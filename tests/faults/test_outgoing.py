"""Text that goes out, whatever it holds."""

import networkx
import numpy as np
import pandas as pd
import pytest
import xarray as xr

import metaint

HOSTILE = ["\ud800half", "=cmd|' /C calc'!A0", "+1+1", "@sum(1)", "-2+3", "\x00\x01\x1b[31m", "plain"]


@pytest.fixture
def scan(repeated_scan):
    scan = repeated_scan.copy()
    scan.attrs.update({f"fact{i}": text for i, text in enumerate(HOSTILE)})
    return scan


def test_tables_hold_every_text_and_no_formula(scan, tmp_path):
    metaint.save_tables(scan, tmp_path, "parquet")
    metaint.save_tables(scan, tmp_path, "csv")
    values = pd.read_csv(tmp_path / "attributes.csv", dtype=str, keep_default_na=False)
    texts = values.set_index("name")["value"]
    assert texts["fact1"] == "'=cmd|' /C calc'!A0"
    assert [texts[f"fact{i}"][0] for i in (2, 3, 4)] == ["'"] * 3
    assert texts["fact0"] == "�half"
    assert texts["fact6"] == "plain"
    assert pd.read_parquet(tmp_path / "attributes.parquet").set_index("name")["value"]["fact1"] == HOSTILE[1]
    heads = pd.read_csv(tmp_path / "heads.csv")
    np.testing.assert_allclose(heads["entropy"], scan["heads"]["entropy"].values.ravel())


def test_a_report_holds_every_text(scan, tmp_path):
    page = metaint.report(scan, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "�half" in page


def test_a_circuit_with_control_characters_can_be_read(tmp_path):
    graph = networkx.DiGraph([("embedding", "0.1"), ("0.1", "logits")], tokens="a\x00\x1b\ud800b\n")
    graph.nodes["0.1"]["token"] = "\x07"
    graph.edges["embedding", "0.1"]["by"] = "\x0c"
    read = metaint.load_circuit(metaint.save_circuit(graph, tmp_path / "circuit.graphml"))
    assert read.graph["tokens"] == "a���b\n"
    assert (read.nodes["0.1"]["token"], read.edges["embedding", "0.1"]["by"]) == ("�", "�")
    assert graph.nodes["0.1"]["token"] == "\x07"


def test_a_scan_with_half_a_pair_is_saved(scan, tmp_path):
    assert (
        metaint.load(metaint.save(scan, tmp_path / "scan.zarr"))["heads"]
        .to_dataset()
        .equals(scan["heads"].to_dataset())
    )
    assert isinstance(scan, xr.DataTree)
