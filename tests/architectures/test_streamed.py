"""Every architecture is streamed with the eager way's numbers, or is known not to be and says why."""

from importlib.metadata import version

import pytest
import torch

if int(version("transformer-lens").split(".")[0]) < 4:
    pytest.skip("TransformerLens 4 names these architectures", allow_module_level=True)

import metaint
from tests.architectures.zoo import build, tokenizer
from tests.builders import quiet
from tests.scanning.test_streamed import assert_same, padded

# A form of attention each: windows, a soft cap, sinks, norms of queries and keys, latent attention, no rotation, one
# key head, both directions, layers that do not attend, a gate, a norm on what heads give.
STREAMED = ("Cohere 2", "Gemma 3", "gpt-oss", "Qwen 3", "DeepSeek-V3", "OPT", "GPT-BigCode", "RoBERTa", "LFM2")
STREAMED += ("Qwen3-Next", "BitNet", "Granite")
# An attention of their own, or positions that enter the scores.
NOT = ("BLOOM", "Falcon", "Falcon, ALiBi", "GPT-1", "GPT-J", "GPT-Neo", "MPT", "XGLM")


def opened(name):
    with quiet():
        return metaint.open_model(build(name), tokenizer=tokenizer())


@pytest.mark.parametrize("name", STREAMED)
def test_streamed_is_eager(name):
    model = opened(name)
    tokens = torch.randint(3, 100, (3, 60), generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    for mask in (None, padded(tokens)):
        streamed = metaint.scan(model, tokens, attention_mask=mask, attention="streamed")
        assert_same(streamed, metaint.scan(model, tokens, attention_mask=mask))


@pytest.mark.parametrize("name", NOT)
def test_others_say_so(name):
    scan = metaint.scan(opened(name), attention="auto")
    assert scan.attrs["attention_way"] == "eager"
    assert "AttentionInterface" in scan.attrs["attention_reason"]
