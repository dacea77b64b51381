"""A model that transformers has loaded: what is opened, what stays as it was, and one sentence where it is not open."""

import copy

import pytest
import torch

import metaint
from metaint.errors import InputError, ModelError
from tests.builders import available_kinds, hf_directory, tokenizer

needs_bridge = pytest.mark.skipif("gpt2" not in available_kinds(), reason="opens with TransformerBridge")
KINDS = [kind for kind in ("gpt2", "neox", "llama", "gemma2") if kind in available_kinds()]
TOKENS = torch.arange(40)[None] * 7 % 96 + 4


def loaded(kind):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(hf_directory(kind))


@needs_bridge
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_the_same_and_the_owners_stays(kind):
    theirs = loaded(kind)
    want = theirs(TOKENS).logits
    theirs.train()
    modules = {name: (id(module), type(module), module.training) for name, module in theirs.named_modules()}
    config, names = theirs.config.to_dict(), list(theirs.state_dict())
    attention, parameters = theirs.config._attn_implementation, {id(p): p.clone() for p in theirs.parameters()}

    model = metaint.open_model(theirs, tokenizer=tokenizer())

    assert not model.training
    torch.testing.assert_close(model(TOKENS), want, rtol=1e-4, atol=1e-4)
    assert bool(metaint.scan(model)["heads"]["previous_token"].notnull().all())
    assert {name: (id(m), type(m), m.training) for name, m in theirs.named_modules()} == modules
    assert (theirs.config.to_dict(), list(theirs.state_dict())) == (config, names)
    assert theirs.config._attn_implementation == attention
    assert all(torch.equal(parameters[id(p)], p) and p.requires_grad for p in theirs.parameters())
    assert model.original_model.config._attn_implementation == "eager"
    torch.testing.assert_close(theirs.eval()(TOKENS).logits, want, rtol=0, atol=0)


@needs_bridge
@pytest.mark.parametrize(
    ("kind", "name"), [("gpt2", "transformer.h.0.attn.c_attn"), ("llama", "model.layers.0.self_attn.q_proj")]
)
def test_weights_are_shared(kind, name):
    theirs = loaded(kind)
    model = metaint.open_model(theirs, tokenizer=tokenizer())
    before = model(TOKENS)
    with torch.no_grad():
        theirs.get_submodule(name).weight.mul_(2)
    assert not torch.allclose(model(TOKENS), before)
    torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, rtol=1e-4, atol=1e-4)


@needs_bridge
def test_dtype_and_name_are_its_own():
    theirs = loaded("gpt2").to(torch.bfloat16)
    model = metaint.open_model(theirs, tokenizer=tokenizer())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.cfg.dtype == torch.bfloat16
    assert metaint.scan(model).attrs["model"] == theirs.config.name_or_path


@needs_bridge
def test_the_tokenizer_of_its_folder_is_found():
    model = metaint.open_model(loaded("gpt2"))
    assert model.to_tokens("w5 w6").tolist() == [[0, 5, 6]]


@needs_bridge
def test_a_tokenizer_that_was_never_saved_is_left_as_it_was():
    from tests.builders import _new_tokenizer

    theirs = _new_tokenizer()
    theirs.padding_side = "left"
    before = copy.deepcopy(theirs.init_kwargs)
    model = metaint.open_model(loaded("gpt2"), tokenizer=theirs)
    assert model.to_tokens("w5 w6").tolist() == [[0, 5, 6]]
    assert theirs("w5 w6")["input_ids"] == [5, 6]
    assert theirs.padding_side == "left"
    assert theirs.init_kwargs == before


@needs_bridge
def test_no_tokenizer_to_be_found_is_one_sentence():
    theirs = loaded("gpt2")
    theirs.config.name_or_path = ""
    with pytest.raises(ModelError, match=r"^model 'GPT2LMHeadModel' could not be opened .*: pass the tokenizer it was"):
        metaint.open_model(theirs)


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        ("toy", {"tokenizer": object()}, r"^tokenizer was given with the name 'toy': it goes with a loaded model"),
        (7, {}, r"^model is a int: give a name, a path, or a model that transformers has loaded\."),
        (torch.nn.Linear(2, 2), {}, r"^model is a Linear: give a name, a path, or a model that transformers has"),
    ],
)
def test_arguments_that_make_no_sense(model, options, sentence):
    with pytest.raises(InputError, match=sentence):
        metaint.open_model(model, **options)


@needs_bridge
@pytest.mark.parametrize("option", ["revision", "checkpoint", "device", "dtype"])
def test_what_is_loaded_is_not_changed(option):
    value = {"revision": "main", "checkpoint": 1, "device": "cpu", "dtype": "float32"}[option]
    with pytest.raises(InputError, match=rf"^{option} is {value!r}, and model is loaded already: leave it out\."):
        metaint.open_model(loaded("gpt2"), tokenizer=tokenizer(), **{option: value})


def test_what_is_open_is_not_opened_again(gpt2):
    with pytest.raises(InputError, match=r"^model is a \w+, which is open already: use it as it is\."):
        metaint.open_model(gpt2)


DOORS = {
    "scan": metaint.scan,
    "scan of text": lambda model: metaint.scan(model, "a text"),
    "scan of tokens": lambda model: metaint.scan(model, TOKENS),
    "attach": lambda model: metaint.attach(model, metaint.HeadProbe()).__enter__(),
    "hooks": lambda model: metaint.HeadProbe().hooks(model, None),
    "audit": metaint.audit,
    "ablate": metaint.ablate,
    "ablate by a metric": lambda model: metaint.ablate(model, TOKENS, metric=lambda logits, tokens: logits[:, 0, 0]),
    "check_circuit": lambda model: metaint.check_circuit(model, ["0.1"]),
    "trace_circuit": metaint.trace_circuit,
    "saturate": metaint.saturate,
    "scaled": lambda model: metaint.scaled(model, 2.0).__enter__(),
    "recur": lambda model: metaint.recur(model, torch.zeros(2, 5, 3), torch.zeros(2, 3, 3)),
    "show_attention": lambda model: metaint.show_attention(model, "a text"),
    "ov_recall": lambda model: metaint.ov_recall(model, ["0.1"]),
    "recorder": lambda model: metaint.Recorder(model, [metaint.HeadProbe()], every=1, path="somewhere.zarr"),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_model_that_is_not_open_is_told_so(door):
    from transformers import GPT2Config, GPT2LMHeadModel

    plain = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=128, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(InputError) as caught:
        DOORS[door](plain)
    assert str(caught.value) == (
        "model is a GPT2LMHeadModel of transformers: open it with metaint.open_model(model, tokenizer=...)."
    )
