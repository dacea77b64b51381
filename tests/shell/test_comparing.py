"""`metaint compare`: tables, JSON, a page, and one sentence with exit status 2 for bad input."""

import json

import pytest

import metaint
from metaint.tasks import repeated_tokens
from metaint.toys.small import small_transformer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two scans of the same tokens by name, and one of another shape."""
    folder = tmp_path_factory.mktemp("scans")
    tokens = repeated_tokens(50, 16, batch=6, seed=0)
    for name, heads, seed in (("a", 4, 0), ("b", 4, 1), ("small", 2, 0)):
        model = small_transformer(
            norm="pre", n_layers=2, n_heads=heads, d_model=32, d_mlp=32, d_vocab=50, n_ctx=40, seed=seed
        )
        metaint.save(metaint.scan(model, tokens), folder / f"{name}.zarr")
    return folder


def test_it_prints_differences_scores_and_labels(run, saved, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("compare", saved / "a.zarr", saved / "b.zarr", "--top", 3)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out.split("Largest")[1]
    for words in ("Largest differences", "paired by sequence, 6 of them", "rank", "b - a"):
        assert words in " ".join(out.split())
    rows = [line for line in out.split("Largest")[1].split("interval: 95")[0].splitlines() if " to " in line]
    assert len(rows) == 3


def test_it_prints_json_and_draws_a_page(run, saved, tmp_path):
    page = tmp_path / "comparison.html"
    code, out, _ = run("compare", saved / "a.zarr", saved / "b.zarr", "--json", "--figures", page)
    assert code == 0
    data = json.loads(out)
    assert data["attributes"]["paired"] == 1
    assert data["variables"]["difference"]["dims"] == ["score", "layer", "head"]
    assert "What differs between two scans" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["a.zarr", "none.zarr"], "does not exist: give the folder that save or --out wrote"),
        (["a.zarr", "small.zarr"], "scan_a is of 2 layers x 4 heads and scan_b of 2 x 2: compare scans"),
        (["a.zarr", "b.zarr", "--top", "-1"], "--top is -1: it must be at least 0"),
        (["a.zarr", "b.zarr", "--figures", "page.txt"], "--figures is page.txt: give it a name that ends in .html"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(run, saved, monkeypatch, arguments, sentence):
    monkeypatch.chdir(saved)
    code, out, err = run("compare", *arguments)
    assert code == 2
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in out + err
