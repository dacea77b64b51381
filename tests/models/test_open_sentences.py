"""What is said of models that can't be opened or read: what is missing, and no more than is known."""

from importlib.metadata import version

import pytest

import metaint
from metaint.errors import InputError, ModelError
from metaint.models import loading
from tests.builders import hf_directory
from tests.models.architectures import bridged, needs_bridge

pytestmark = needs_bridge
LENS = version("transformer-lens")


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("t5", "model is a T5ForConditionalGeneration, an encoder and a decoder, whose attention lies in two stacks"),
        (
            "bart",
            "model is a BartForConditionalGeneration, an encoder and a decoder, whose attention lies in two stacks",
        ),
        ("marian", "model is a MarianMTModel, an encoder and a decoder, whose attention lies in two stacks"),
        ("vit", "model is a ViTForImageClassification, which reads images"),
    ],
)
def test_a_model_that_reads_something_else(kind, sentence):
    with pytest.raises(InputError) as caught:
        bridged(kind)
    assert str(caught.value) == f"{sentence}: give one that reads one sequence of token ids."


@pytest.mark.parametrize(("kind", "name"), [("falcon40", "FalconForCausalLM"), ("phimoe", "PhimoeForCausalLM")])
def test_a_whole_folder_without_a_bridge_for_it(kind, name):
    with pytest.raises(ModelError, match=rf": TransformerLens {LENS} has no bridge that fits this {name}\.$") as caught:
        bridged(kind)
    assert "Available architectures" not in str(caught.value)


def test_a_folder_without_a_tokenizer(tmp_path):
    for file in hf_directory("llama").iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match=r"backend tokenizer from one of: \(1\) .*\): its tokenizer can't be opened, "):
        metaint.open_model(tmp_path)


@pytest.mark.parametrize(
    ("kind", "check", "note"),
    [
        ("opt350", "unembedding", "The shapes of what the check needs don't fit each other in this model."),
        ("deepseek2", "weights_query", "The model does not have what the check needs (W_Q is not available on MLA"),
    ],
)
def test_the_audit_says_what_does_not_fit_without_an_error_of_pytorch(kind, check, note):
    row = metaint.audit(bridged(kind)).set_index("check").loc[check]
    assert row["status"] == "unavailable"
    assert row["note"].startswith(note)


def test_a_bridge_with_other_logits_than_transformers_is_refused(monkeypatch):
    reference = loading.reference_logits
    monkeypatch.setattr(loading, "reference_logits", lambda model: reference(model).flip(-1))
    with pytest.raises(ModelError, match=rf"^TransformerLens {LENS} gives a LlamaForCausalLM other logits than trans"):
        metaint.open_model(hf_directory("llama"))


def test_cohere_is_right_or_refused():
    """TransformerLens 3.9 turns its queries and keys by other angles than transformers."""
    if LENS.startswith("3."):
        with pytest.raises(ModelError, match="gives a CohereForCausalLM other logits than transformers does"):
            bridged("cohere")
    else:
        bridged("cohere")
