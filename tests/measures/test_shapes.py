"""The shapes that measures promise are checked while tests run, in every file of the room."""

import sys
from pathlib import Path

import pytest

import metaint
from metaint.measures import growth

FILES = sorted((Path(metaint.__file__).parent / "measures").glob("*.py"))


@pytest.mark.parametrize("name", [file.stem for file in FILES if file.stem != "__init__"])
def test_every_file_was_imported_inside_the_hook(name):
    loader = sys.modules[f"metaint.measures.{name}"].__spec__.loader
    assert type(loader).__module__.startswith("jaxtyping")


def test_a_wrong_shape_is_an_error():
    with pytest.raises(Exception, match="Type-check error"):
        growth.product_norm([[1.0]], [[1.0]])
