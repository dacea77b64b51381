"""Opening models: folders, and what can't be opened."""

import json

import pytest
import torch

import metaint
from metaint.errors import InputError, ModelError
from tests.builders import available_kinds

needs_bridge = pytest.mark.skipif("gpt2" not in available_kinds(), reason="folders open with TransformerBridge")
FOLDERS = [k for k in ("gpt2", "neox", "llama", "gemma2", "bert") if k in available_kinds()]


@needs_bridge
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_local_folder_opens_and_scans(kind):
    from tests.builders import hf_directory

    model = metaint.open_model(str(hf_directory(kind)), device="cpu")
    assert not model.training
    found = metaint.scan(model)
    assert found.attrs["attention"] == ("bidirectional" if kind == "bert" else "causal")
    assert found["heads"]["window"].values.tolist() == ([16, 0] if kind == "gemma2" else [0, 0])
    induction = found["heads"]["induction"].isel(layer=slice(1 if kind == "gemma2" else 0, None))
    assert bool(induction.notnull().all())  # a window of 16 does not reach the copy before


@needs_bridge
def test_dtype_by_name():
    from tests.builders import hf_directory

    model = metaint.open_model(str(hf_directory("gpt2")), dtype="bfloat16", device="cpu")
    assert next(model.parameters()).dtype == torch.bfloat16
    found = metaint.scan(model)
    assert found.attrs["dtype"] == "bfloat16"
    rows = found["heads"]["entropy"]
    assert bool(((rows > 0) & (rows <= 1.001)).all())


@needs_bridge
def test_a_damaged_folder_is_one_sentence(tmp_path):
    with pytest.raises(ModelError, match=r"is a folder without config\.json: give one in Hugging Face's format"):
        metaint.open_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ModelError, match=r"could not be opened .*: check that the folder holds config\.json") as caught:
        metaint.open_model(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("toy", {"revision": "main"}, "the toy has no revisions or checkpoints"),
        ("x", {"revision": "a", "checkpoint": 1}, "revision and checkpoint were both given"),
        ("x", {"dtype": "float8"}, "dtype is 'float8': choose one of float32, float64, float16, bfloat16"),
        ("x", {"device": "abacus"}, "device is 'abacus': choose cpu, cuda or mps"),
    ],
)
def test_arguments_that_make_no_sense(name, options, sentence):
    with pytest.raises(InputError, match=sentence):
        metaint.open_model(name, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none():
    with pytest.raises(InputError, match="device is 'cuda', and this machine has no CUDA: choose cpu"):
        metaint.open_model("x", device="cuda")
