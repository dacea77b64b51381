"""Checkpoints that are not whole: refused by the names of their weights, or opened and recorded."""

import json
import shutil

import pytest
import torch

import metaint
from metaint.errors import InputError, ModelError
from tests.builders import available_kinds, hf_directory

pytestmark = pytest.mark.skipif("gpt2" not in available_kinds(), reason="folders open with TransformerBridge")
QUERY = "model.layers.1.self_attn.q_proj.weight"


def folder(where, kind, lacks=(), has=()):
    """A copy of the folder of a kind, without some weights and with others, given by their shapes."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(hf_directory(kind), where, dirs_exist_ok=True)
    weights = load_file(where / "model.safetensors")
    assert set(lacks) <= set(weights)
    whole = {name: weight for name, weight in weights.items() if name not in lacks}
    whole.update({name: torch.zeros(shape) for name, shape in dict(has).items()})
    save_file(whole, where / "model.safetensors", metadata={"format": "pt"})
    return where


def sentence_encoder(where):
    """A BERT without the head that names masked tokens, as sentence encoders are saved."""
    from transformers import AutoModelForMaskedLM

    shutil.copytree(hf_directory("bert"), where, dirs_exist_ok=True)
    AutoModelForMaskedLM.from_pretrained(where).bert.save_pretrained(where)
    return where


def test_a_missing_projection_is_named_and_refused(tmp_path):
    with pytest.raises(ModelError) as caught:
        metaint.open_model(folder(tmp_path, "llama", lacks=[QUERY]))
    assert str(caught.value) == (
        f"the checkpoint '{tmp_path}' lacks {QUERY}: give the whole checkpoint of this kind of model, or pass "
        'missing="allow" to open it with such weights drawn at random or left out.'
    )


def test_a_missing_untied_head_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"lacks lm_head\.weight: give the whole"):
        metaint.open_model(folder(tmp_path, "llama", lacks=["lm_head.weight"]))


def test_a_tied_head_is_not_missing(tmp_path):
    from safetensors.torch import load_file

    assert "lm_head.weight" not in load_file(hf_directory("gpt2") / "model.safetensors")
    assert "random_weights" not in metaint.scan(metaint.open_model(hf_directory("gpt2"))).attrs


def test_a_sentence_encoder_is_refused_and_opens_if_it_is_allowed(tmp_path):
    with pytest.raises(ModelError, match=r"lacks cls\.predictions\.bias, .*, cls\.predictions\.\S+ and \d more: give"):
        metaint.open_model(sentence_encoder(tmp_path))
    model = metaint.open_model(tmp_path, missing="allow")
    recorded = metaint.scan(model).attrs["random_weights"]
    assert recorded.startswith("cls.predictions.bias, ")
    assert recorded.endswith(" more")


def test_a_weight_of_another_shape_is_named_with_both(tmp_path):
    with pytest.raises(ModelError, match=r"has in another shape model\.norm\.weight \[7\] for \[32\]: give the whole"):
        metaint.open_model(folder(tmp_path, "llama", lacks=["model.norm.weight"], has={"model.norm.weight": [7]}))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.2.self_attn.q_proj.weight",
        "lm_head.bias",
    ],
)
def test_a_weight_that_its_part_has_no_place_for_is_refused(tmp_path, name):
    folder(tmp_path, "llama", has={name: [4]})
    with pytest.raises(ModelError, match=f"has, unlike this model, {name}: give"):
        metaint.open_model(tmp_path)
    assert metaint.scan(metaint.open_model(tmp_path, missing="allow")).attrs["unused_weights"] == name


def test_the_head_of_another_task_is_recorded_and_nothing_more(tmp_path):
    model = metaint.open_model(folder(tmp_path, "llama", has={"score.weight": [2, 32]}))
    assert metaint.scan(model).attrs["unused_weights"] == "score.weight"


def test_masks_of_old_checkpoints_are_no_weights(tmp_path):
    computed = {f"model.layers.0.self_attn.{name}": [4] for name in ("masked_bias", "rotary_emb.inv_freq")}
    assert "unused_weights" not in metaint.scan(metaint.open_model(folder(tmp_path, "llama", has=computed))).attrs


@pytest.mark.parametrize("with_base", [False, True])
def test_an_adapter_is_named_as_such(tmp_path, with_base):
    if with_base:
        folder(tmp_path, "llama")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(
        ModelError, match=r"holds an adapter \(adapter_config\.json\), such as LoRA makes: merge it into"
    ):
        metaint.open_model(tmp_path)


def test_another_word_for_missing():
    with pytest.raises(InputError, match=r'^missing is \'perhaps\': choose "refuse" or "allow"\.'):
        metaint.open_model("toy", missing="perhaps")


def test_a_folder_of_a_config_and_a_gguf_opens_the_gguf(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.gguf").write_bytes(b"none of ours")
    with pytest.raises(ModelError, match=r"model\.gguf' is not a GGUF file"):
        metaint.open_model(tmp_path)
