"""What public calls refuse at the door, and what they take."""

import math

import pytest
import torch
from transformer_lens import ActivationCache

import metaint
from metaint.errors import InputError
from tests.builders import available_kinds, build

KIND = available_kinds()[0]
TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture
def model():
    return build(KIND)


@pytest.mark.parametrize(
    "mask", [2 * torch.ones(2, 12), torch.full((2, 12), 0.5), -torch.ones(2, 12, dtype=torch.long)]
)
def test_a_mask_of_other_than_0_and_1_is_refused(mask, model):
    for call in (metaint.scan, metaint.saturate):
        with pytest.raises(InputError, match=r"attention_mask holds .*: give 1 for a real token and 0 for padding"):
            call(model, TOKENS, attention_mask=mask)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_tokens_of_every_kind_of_integer_are_read_alike(dtype, model):
    wanted = metaint.scan(model, TOKENS)["heads"].to_dataset()
    assert metaint.scan(model, TOKENS.to(dtype))["heads"].to_dataset().identical(wanted)


def test_two_probes_of_one_group_are_refused(model):
    probe = metaint.HeadProbe(["entropy"])
    with pytest.raises(InputError, match="probes holds 2 probes of /heads, and a scan holds one"):
        metaint.scan(model, TOKENS, [probe, metaint.HeadProbe(["induction"])])
    with pytest.raises(InputError, match="the same probe twice"), metaint.attach(model, probe, probe):
        pass


def test_a_cache_with_ids_beyond_the_vocabulary_is_refused(model):
    cache = ActivationCache(model.run_with_cache(TOKENS)[1], model)
    with pytest.raises(InputError, match="tokens holds id 1023, and the model's vocabulary is"):
        metaint.read_cache(cache, TOKENS + 1000)


def test_recalls_of_weights_that_are_no_numbers_are_refused(model):
    with torch.no_grad():
        next(iter(torch.nn.Module.parameters(model))).view(-1)[0] = math.nan
    with pytest.raises(InputError, match="model has NaN or infinity in embed"):
        metaint.scan(model, TOKENS, [metaint.MemoryProbe()])
