"""Twelve architectures in every cell, a form of attention each; `make architectures` has all of them."""

from importlib.metadata import version

import pytest

if int(version("transformer-lens").split(".")[0]) < 4:
    pytest.skip("TransformerLens 4 names these architectures", allow_module_level=True)

from tests.architectures.cells import cells_of

# What is not equal, and why.
KNOWN = {
    "GPT-2": {},
    "GPT-J": {},  # tells of its pattern too late to change it
    "BLOOM": {},  # ALiBi, and a norm on the embeddings
    "Llama": {},  # grouped keys, rotation
    "Gemma 2": {},  # soft cap, windows, norms after attention
    "GPT-NeoX": {},  # attention and MLP side by side
    "Granite": {},  # sublayers times a factor
    "gpt-oss": {},  # learnt sinks
    "Jamba": {},  # state-space layers between
    "LFM2": {},  # convolutions between
    "Qwen3-Next": {"recalls": "nan", "saturation": "refused"},  # gated attention: heads' outputs are not A v
    "BERT": {"recalls": "nan"},  # a norm after each addition
}


@pytest.mark.parametrize("name", KNOWN)
def test_every_cell_agrees_with_transformers(name):
    cells = dict(cells_of(name))
    other = {cell: outcome.status for cell, outcome in cells.items() if outcome.status != "equal"}
    assert other == KNOWN[name], {cell: outcome.note for cell, outcome in cells.items() if cell in other}
