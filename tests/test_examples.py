"""Every public function and class has an example that runs, and says what its docstring says."""

import doctest
import inspect

import pytest
import torch

import metaint
from tests.builders import available_kinds

OBJECTS = [
    name
    for name in metaint.__all__
    if inspect.isfunction(getattr(metaint, name)) or inspect.isclass(getattr(metaint, name))
]
pytestmark = pytest.mark.skipif(
    "native-attn-only" not in available_kinds(), reason="examples are written for TransformerLens 3.9 and newer"
)
FINDER = doctest.DocTestFinder(recurse=False)


@pytest.mark.parametrize("name", [name for name in OBJECTS if not name.endswith("Error")])
def test_the_example_of_a_public_name_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state()
    (example,) = FINDER.find(getattr(metaint, name), name, globs={})
    assert example.examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    lines: list[str] = []
    runner.run(example, out=lines.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(lines)
    assert torch.equal(torch.get_rng_state(), state)
