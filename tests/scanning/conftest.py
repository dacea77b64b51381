import pytest

from tests.builders import build
from tests.scanning.recordings import KIND


@pytest.fixture(scope="module")
def model():
    """Shared, so that it is audited once: for tests that don't care what its weights are."""
    return build(KIND)
