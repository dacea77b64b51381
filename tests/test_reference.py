"""GPT-2 small against published tables; needs a hub that answers, or the model in the local cache."""

import json
from pathlib import Path

import pytest
import torch

import metaint
from metaint.errors import ModelError

TABLES = json.loads((Path(__file__).parent / "data" / "gpt2_small_heads.json").read_text())


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        try:
            return metaint.open_model("gpt2", device="cpu")
        except ModelError as reason:
            pytest.skip(f"gpt2 can't be had: {reason}")


@pytest.fixture(scope="module")
def heads(small):
    block = torch.randint(100, 20000, (2, 100), generator=torch.Generator().manual_seed(0))
    return metaint.scan(small, torch.cat([block, block], 1))


@pytest.mark.hub
@pytest.mark.parametrize("name", ["previous_token", "duplicate_token", "induction"])
def test_published_tables(heads, name):
    # The tables average a few pairs that are none of the kind (position 0, the diagonal's first entry): up to 1/101.
    published = torch.tensor(TABLES[name], dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(heads["heads"][name].values), published, rtol=0, atol=0.015)


@pytest.mark.hub
def test_known_heads_are_labelled(heads):
    table = metaint.label_heads(heads)
    by_label = {label: set(part["head"]) for label, part in table.groupby("label")}
    assert {"5.1", "5.5", "6.9", "7.2", "7.10"} <= by_label["induction"]
    assert "4.11" in by_label["previous_token"]
    assert {"0.5", "3.0"} <= by_label["duplicate_token"]
