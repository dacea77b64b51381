import pytest

import metaint
from metaint.tasks import repeated_tokens
from metaint.views.export.headvis import save_headvis
from tests.views.export.headvis_files import SEQUENCES, patterns_of


@pytest.fixture(scope="module")
def tokens():
    """Repeated blocks after a token that stays, with some tokens twice in a row."""
    blocks = repeated_tokens(96, 8, batch=SEQUENCES, ids=(5, 95), bos=4, seed=3)
    blocks[::3, 5] = blocks[::3, 4]
    return blocks


@pytest.fixture(scope="module")
def scan(gpt2, tokens):
    return metaint.scan(gpt2, tokens, attributes={"source": "made up"})


@pytest.fixture(scope="module")
def patterns(gpt2, tokens):
    return patterns_of(gpt2, tokens)


@pytest.fixture(scope="module")
def folder(scan, gpt2, tokens, tmp_path_factory):
    return save_headvis(scan, tmp_path_factory.mktemp("headvis") / "data", gpt2, tokens, batch_size=5)
