"""Opening GGUF files, on a tiny Llama: its weights, its tokenizer, what is recorded, and what can't be opened."""

import builtins
import hashlib

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

import metaint
from metaint.errors import InputError, ModelError
from metaint.models.parameters import quantised
from tests.builders import available_kinds
from tests.models.ggufs import HEADS, KV_HEADS, halved, tensors_of, tiny_llama, vocabulary, write_gguf

pytestmark = pytest.mark.skipif("llama" not in available_kinds(), reason="a GGUF opens with TransformerBridge")

TOKENS = torch.arange(40)[None] * 7 % 263


def weights(model):
    """The parameters of the opened model by their names in transformers."""
    return {name.replace("_original_component.", ""): value for name, value in model.original_model.named_parameters()}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def opened(file):
    return metaint.open_model(file, device="cpu")


def test_unquantised_it_computes_what_the_model_does(opened):
    want = tiny_llama()(TOKENS).logits
    assert not opened.training
    assert opened.cfg.model_name == "tiny"
    torch.testing.assert_close(opened(TOKENS), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_weights_are_those_that_gguf_dequantises(tmp_path, kind):
    kind = GGMLQuantizationType[kind]
    model = metaint.open_model(write_gguf(tmp_path / "tiny.gguf", kind=kind), device="cpu")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    raw = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    found = model.original_model.state_dict()
    found = {name.replace("_original_component.", ""): value.numpy() for name, value in found.items()}
    for side, heads in (("q", HEADS), ("k", KV_HEADS)):
        want = halved(raw[f"blk.1.attn_{side}.weight"], heads)
        assert np.array_equal(found[f"model.layers.1.self_attn.{side}_proj.weight"], want)
    for ours, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        assert np.array_equal(found[f"model.layers.0.{ours}.weight"], raw[f"blk.0.{theirs}.weight"])
    assert np.array_equal(found["model.embed_tokens.weight"], raw["token_embd.weight"])
    assert not np.array_equal(raw["blk.0.ffn_down.weight"], tensors_of(tiny_llama())["blk.0.ffn_down.weight"])
    assert metaint.scan(model).attrs["quantisation"] == kind.name


def test_a_scan_records_where_the_weights_come_from(file, opened, tmp_path):
    scan = metaint.scan(opened)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    want = {"model": "tiny", "quantisation": "F32", "source_file": "tiny.gguf", "source_sha256": digest}
    assert {name: scan.attrs[name] for name in want} == want
    metaint.save(scan, tmp_path / "scan.zarr")
    assert metaint.load(tmp_path / "scan.zarr").attrs["source_sha256"] == digest


def test_without_a_file_type_the_tensors_tell(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", kind=GGMLQuantizationType.Q8_0, file_type=False)
    assert metaint.scan(metaint.open_model(path, device="cpu")).attrs["quantisation"] == "Q8_0"


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtype(file, dtype):
    model = metaint.open_model(file, device="cpu", dtype=dtype)
    assert {str(parameter.dtype) for parameter in model.parameters()} == {f"torch.{dtype}"}


def test_no_trace_of_quantisation_is_left(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", kind=GGMLQuantizationType.Q8_0)
    model = metaint.open_model(path, device="cpu")
    assert not quantised(model, weights(model))
    with metaint.scaled(model, 2.0):
        pass
    inner = model.original_model
    assert not hasattr(inner, "hf_quantizer")
    assert not hasattr(inner, "quantization_method")
    assert not getattr(inner, "is_quantized", False)
    assert "quantization_config" not in inner.config.to_dict()


def test_what_was_opened_can_be_saved_and_opened_again(tmp_path):
    from metaint.models.gguf import open_gguf

    path = write_gguf(tmp_path / "tiny.gguf", kind=GGMLQuantizationType.Q8_0)
    model, tokenizer, _ = open_gguf(path, torch.float32)
    model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    again, direct = metaint.open_model(tmp_path / "folder", device="cpu"), metaint.open_model(path, device="cpu")
    assert torch.equal(again(TOKENS), direct(TOKENS))
    texts = ["hello world", "hé"]
    for bos in (None, True, False):
        assert torch.equal(direct.to_tokens(texts, prepend_bos=bos), again.to_tokens(texts, prepend_bos=bos))
    assert direct.cfg.tokenizer_prepends_bos == again.cfg.tokenizer_prepends_bos


def test_text_becomes_tokens_of_the_file(opened):
    tokens, _ = vocabulary()
    ids = opened.to_tokens("hello h")[0].tolist()
    assert ids == [0, tokens.index("hello"), tokens.index("Ġ"), tokens.index("h")]
    assert opened.to_string(torch.tensor(ids[1:])) == "hello h"


def test_a_folder_that_holds_one(file, opened, tmp_path):
    write_gguf(tmp_path / "a.gguf")
    assert torch.equal(metaint.open_model(str(tmp_path), device="cpu")(TOKENS), opened(TOKENS))
    write_gguf(tmp_path / "b.gguf")
    with pytest.raises(InputError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\): name one of them\.$"):
        metaint.open_model(str(tmp_path))


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.01, 0.2, 0.9, 0.9999])
def test_a_file_cut_off_is_one_sentence(file, tmp_path, share):
    data = file.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match=r"cut\.gguf' is (cut off or damaged|not a GGUF file)") as caught:
        metaint.open_model(path)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_kind_and_none(tmp_path):
    (tmp_path / "text.gguf").write_text("a text, and no weights")
    with pytest.raises(ModelError, match=r"text\.gguf' is not a GGUF file: it does not begin with the letters GGUF"):
        metaint.open_model(tmp_path / "text.gguf")
    with pytest.raises(ModelError, match=r"absent\.gguf' is not a file: give the path of a GGUF"):
        metaint.open_model(str(tmp_path / "absent.gguf"))


NAN = np.zeros((96, 64), dtype=np.float32)
NAN[3, 5] = np.nan


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"architecture": "abacus"}, r"could not be opened by transformers \(.*abacus.*\): give a GGUF of an archit"),
        ({"tokenizer": "abacus"}, r"^no tokenizer could be made from .*tiny\.gguf'"),
        ({"tensors": {"blk.0.ffn_up.weight": NAN}}, r"^tensor model\.layers\.0\.mlp\.up_proj\.weight of tiny\.gguf ho"),
        ({"facts": {"split.count": 3}}, r"^tiny\.gguf is one of 3 parts of a model: join them"),
        ({"facts": {"llama.rope.scaling.type": "yarn"}}, r"^tiny\.gguf stretches its rotary positions"),
        ({"tensors": {"rope_freqs.weight": np.ones(8, "float32")}}, r"^tiny\.gguf stretches its rotary positions"),
    ],
)
def test_what_cannot_be_opened_is_one_sentence(tmp_path, options, sentence):
    path = write_gguf(tmp_path / "tiny.gguf", **options)
    with pytest.raises(ModelError, match=sentence) as caught:
        metaint.open_model(path, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_missing_tensor_is_not_drawn_at_random(tmp_path, monkeypatch):
    whole = tensors_of(tiny_llama())
    whole.pop("blk.1.ffn_gate.weight")
    monkeypatch.setattr("tests.models.ggufs.tensors_of", lambda model: whole)
    path = write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(ModelError, match=r"lacks 1 tensors of its model, such as model\.layers\.1\.mlp\.gate_proj"):
        metaint.open_model(path, device="cpu")


def test_without_the_package(file, monkeypatch):
    real = builtins.__import__

    def no_gguf(name, *rest, **options):
        if name == "gguf":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", no_gguf)
    with pytest.raises(ModelError) as caught:
        metaint.open_model(file)
    assert str(caught.value) == 'tiny.gguf needs the package gguf: pip install "metaint[gguf]" brings it.'


@pytest.mark.parametrize("options", [{"revision": "main"}, {"checkpoint": 3}])
def test_a_file_has_no_states_of_training(file, options):
    with pytest.raises(InputError, match=r"tiny\.gguf', which is local, has no revisions or checkpoints: leave"):
        metaint.open_model(file, **options)


def test_the_global_random_state_stays(file):
    before = torch.random.get_rng_state()
    metaint.open_model(file, device="cpu")
    assert torch.equal(before, torch.random.get_rng_state())
