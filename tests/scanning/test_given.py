"""Inputs of every call that feeds a model: defaults, and what bad ones get, in the same words everywhere."""

import pytest
import torch

import metaint
from metaint import default_tokens, text_tokens
from metaint.errors import InputError

GOOD = torch.randint(5, 95, (3, 16), generator=torch.Generator().manual_seed(0))
CALLS = {
    "scan": metaint.scan,
    "saturate": metaint.saturate,
    "ablate": metaint.ablate,
    "record": lambda model, tokens, **given: metaint.Recorder(
        model, [metaint.HeadProbe()], every=1, path="never.zarr", tokens=tokens, **given
    ),
}
BAD = [
    ({"batch_size": 0}, "batch_size is 0: it must be at least 1."),
    ({"batch_size": 2.5}, "batch_size is 2.5: it must be an integer."),
    ({"seed": None}, "seed is None: it must be an integer."),
    ({"seed": 2**64}, f"seed is {2**64}: give a number of at most 63 bits, such as 0."),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("given", "sentence"), BAD)
def test_bad_inputs_get_the_same_sentence_everywhere(gpt2, call, given, sentence):
    with pytest.raises(InputError) as caught:
        CALLS[call](gpt2, GOOD, **given)
    assert str(caught.value) == sentence


def test_default_tokens_repeat_and_use_what_the_tokenizer_knows(gpt2):
    tokens = default_tokens(gpt2, length=20, batch=5)
    special = set(gpt2.tokenizer.all_special_ids)
    first = int(gpt2.cfg.default_prepend_bos)
    assert tokens.shape == (5, 40 + first)
    assert torch.equal(tokens[:, first : first + 20], tokens[:, first + 20 :])
    assert not special & set(tokens[:, first:].flatten().tolist())
    assert torch.equal(tokens, default_tokens(gpt2, length=20, batch=5))
    assert not torch.equal(tokens, default_tokens(gpt2, length=20, batch=5, seed=1))
    assert default_tokens(gpt2, length=20, bos=False).shape[1] == 40


def test_a_block_that_does_not_fit_is_shortened_or_refused(gpt2):
    assert default_tokens(gpt2, length=500).shape[1] <= 128
    with pytest.raises(InputError, match="repeat is 500, and this model can repeat a block of at most"):
        default_tokens(gpt2, length=500, exact=True)


def test_windows_of_text_fit_the_model(gpt2):
    words = "the cat sat on the dog " * 40
    assert text_tokens(gpt2, words, 16, 4).shape == (4, 16)
    with pytest.raises(InputError, match="length is 500: this model reads windows of 2 to 128 tokens"):
        text_tokens(gpt2, words, 500, 4)
