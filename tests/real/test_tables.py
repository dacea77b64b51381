"""The reference tables in `docs/heads` are what today's code says of SmolLM2."""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

DOCS = Path(__file__).parents[2] / "docs"
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("metaint_tables", DOCS / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_as_written(tables, smollm2):
    stored = pq.read_table(DOCS / "heads" / "smollm2.parquet")
    facts = {key.decode(): value.decode() for key, value in stored.schema.metadata.items()}
    scans = tables.scans_of(smollm2)
    tasks = list(scans)
    today = tables.provenance(scans["text"])
    assert facts["source_sha256"] == today["source_sha256"]
    if facts["text_sha256"] != today["text_sha256"]:
        tasks.remove("text")  # another Python, whose documentation is another text
    before, now = stored.to_pandas(), tables.frame_of(scans)
    for task in tasks:
        old, new = (frame[frame["task"] == task].set_index("head") for frame in (before, now))
        assert len(old) == 270
        pd.testing.assert_series_equal(old["labels"], new["labels"])
        numbers = old.select_dtypes("number").columns
        assert len(numbers) > 100
        np.testing.assert_allclose(new[numbers], old[numbers], rtol=1e-3, atol=1e-3)


def test_the_page_says_what_the_file_says(tables):
    frame = pq.read_table(DOCS / "heads" / "smollm2.parquet").to_pandas()
    page = (DOCS / "heads" / "smollm2.md").read_text(encoding="utf-8")
    best = frame[frame["task"] == "repeated_tokens"].nlargest(1, "induction").iloc[0]
    line = next(line for line in page.splitlines() if line.startswith(f"| {best['head']} |"))
    assert f"{best['induction']:.3f} ({best['induction_low']:.3f}–{best['induction_high']:.3f}; " in line
