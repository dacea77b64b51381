"""SmolLM2-135M as metaint opens it, and the same weights in plain transformers, which knows nothing of hooks."""

import pytest
import torch

from metaint.models.smollm2 import smollm2_folder
from tests.real.reference import Reference

TEXT = """The lighthouse keeper wrote in the log every evening, before the lamp was lit and after the last boat had come
in. He wrote down the wind and the height of the tide, the names of the boats and who had sailed in them, and whether
the lamp had needed oil. When the keeper died, his daughter found forty years of evenings on the shelf. She read them
one winter, a year for each night, and in the spring she began to write in the log herself: the wind, the tide, the
names of the boats, and whether the lamp had needed oil."""
LENGTH = 72


@pytest.fixture(scope="session")
def reference(smollm2):
    """The weights that `smollm2` was opened from, as Hugging Face runs them."""
    return Reference.of(smollm2_folder())


@pytest.fixture(scope="session")
def tokens(smollm2):
    """Two windows of prose that begin with a BOS, and two that are a block repeated, one of them after a BOS."""
    words = smollm2.to_tokens(TEXT, prepend_bos=False)[0]
    bos = torch.tensor([smollm2.tokenizer.bos_token_id])
    half = LENGTH // 2
    rows = [
        torch.cat([bos, words[: LENGTH - 1]]),
        torch.cat([bos, words[half : half + LENGTH - 1]]),
        words[:half].repeat(2),
        torch.cat([bos, words[half : 2 * half].repeat(2)])[:LENGTH],
    ]
    return torch.stack(rows)


@pytest.fixture(scope="session")
def plain(reference, tokens):
    """What Hugging Face's own pass over `tokens` holds."""
    return reference(tokens)
