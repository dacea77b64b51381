import string

import pytest
import torch

from metaint.errors import ModelError
from metaint.toys.embedded import FILE, boot_toy, character_tokenizer, load_toy, save_toy, toy_folder
from tests.builders import available_kinds

VOCABULARY = sorted(string.ascii_lowercase + " \n.,")
SHAPE = {"n_layers": 2, "n_heads": 1, "d_model": 8, "d_head": 8, "n_ctx": 16, "d_vocab": len(VOCABULARY)}

pytestmark = pytest.mark.skipif("native-attn-only" not in available_kinds(), reason="the toy needs boot_native")


@pytest.fixture
def model():
    model = boot_toy(SHAPE)
    generator = torch.Generator().manual_seed(0)
    model.load_state_dict(
        {k: torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()}, strict=False
    )
    return model


def test_round_trip_is_bit_for_bit(model, tmp_path):
    assert save_toy(model, VOCABULARY, {"accuracy": 0.9}, tmp_path) == tmp_path
    again = load_toy(tmp_path)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    tokens = torch.arange(16)[None] % len(VOCABULARY)
    assert torch.equal(model(tokens), again(tokens))
    assert again.cfg.model_name == "toy"
    assert again.cfg.default_prepend_bos is False
    assert again.cfg.info == {"accuracy": 0.9}
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_text_becomes_one_token_a_character(model, tmp_path):
    model = load_toy(save_toy(model, VOCABULARY, {}, tmp_path))
    tokens = model.to_tokens("Hé llo,\n")
    assert "".join(VOCABULARY[i] for i in tokens[0]) == "h  llo,\n"
    assert model.to_string(tokens[0]) == "h  llo,\n"
    padded = model.to_tokens(["ab", "abcd"], prepend_bos=True)
    assert padded.shape == (2, 5)
    assert int(padded.max()) < len(VOCABULARY)


def test_capitals_stay_where_the_vocabulary_has_them():
    tokenizer = character_tokenizer(["a", "A", "b"])
    assert tokenizer("aAb?B")["input_ids"] == [0, 1, 2, 0, 0]


def test_dtype(model, tmp_path):
    loaded = load_toy(save_toy(model, VOCABULARY, {}, tmp_path), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_global_random_state_stays(model, tmp_path):
    before = torch.random.get_rng_state()
    load_toy(save_toy(model, VOCABULARY, {}, tmp_path))
    assert torch.equal(before, torch.random.get_rng_state())


def test_default_folder(monkeypatch, tmp_path, model):
    monkeypatch.setenv("METAINT_CACHE", str(tmp_path))
    assert toy_folder() == tmp_path / "toy"
    save_toy(model, VOCABULARY, {})
    assert load_toy().cfg.d_model == 8
    monkeypatch.delenv("METAINT_CACHE")
    assert toy_folder().name == "toy"
    assert "metaint" in toy_folder().parts


def test_absent(tmp_path):
    with pytest.raises(ModelError) as caught:
        load_toy(tmp_path)
    assert str(caught.value) == (
        f"there is no toy model at {tmp_path / FILE}: run `metaint demo` first, which trains and keeps one."
    )


def _cut(data: bytes) -> bytes:
    return data[:-7]


def _garbage(data: bytes) -> bytes:
    return b"\x93not a model"


def _other_vocabulary(data: bytes) -> bytes:
    return data.replace(b'"vocabulary"', b'"vocabulari"')


def _other_shape(data: bytes) -> bytes:
    return data.replace(rb"\"n_ctx\": 16", rb"\"n_ctx\": 17")


@pytest.mark.parametrize("damage", [_cut, _garbage, _other_vocabulary, _other_shape])
def test_damaged(model, tmp_path, damage):
    path = save_toy(model, VOCABULARY, {}, tmp_path) / FILE
    data = path.read_bytes()
    path.write_bytes(damage(data))
    assert path.read_bytes() != data
    with pytest.raises(ModelError) as caught:
        load_toy(tmp_path)
    assert str(caught.value).startswith(f"the toy model at {path} is damaged (")
    assert str(caught.value).endswith("): delete it and run `metaint demo` again.")


def test_a_failed_save_leaves_the_earlier_model(model, tmp_path, monkeypatch):
    path = save_toy(model, VOCABULARY, {}, tmp_path) / FILE
    data = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("metaint.toys.embedded.save_file", full_disk)
    with pytest.raises(ModelError, match=r"cannot be written to .*No space left on device.*give another folder"):
        save_toy(model, VOCABULARY, {}, tmp_path)
    assert path.read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_vocabulary_must_fit(model, tmp_path):
    with pytest.raises(ModelError, match=r"^vocabulary has 29 entries: give one single character for each"):
        save_toy(model, VOCABULARY[:-1], {}, tmp_path)
