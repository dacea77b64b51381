"""The notebooks as they are kept: without outputs, with one picture each, and named in the README."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks are not installed")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["00", "01", "02", "03", "04", "05", "06", "07"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_clean(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert sum("picture" in cell.metadata.get("tags", []) for cell in code) == 1
    assert any(line.startswith("assert ") for cell in code for line in cell.source.splitlines())
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_shown_in_the_readme(path: Path) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    image = f"notebooks/images/{path.stem}.png"
    assert f"notebooks/{path.name}" in readme
    assert image in readme
    assert (ROOT / image).stat().st_size < 200_000
