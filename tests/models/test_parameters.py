"""The parameters a model computes with, and scaling them for a while."""

import copy
import math

import pytest
import torch

import metaint
from metaint.errors import InputError
from metaint.models.parameters import own_parameters, place_of
from tests.builders import available_kinds, build
from tests.probes.test_heads import random_tokens

BRIDGES = [kind for kind in ("gpt2", "neox", "llama", "gemma2") if kind in available_kinds()]


def bits(model):
    return {name: parameter.detach().clone() for name, parameter in torch.nn.Module.named_parameters(model)}


def same_bits(model, before):
    for name, parameter in torch.nn.Module.named_parameters(model):
        assert torch.equal(parameter.view(torch.int32), before[name].view(torch.int32)), name


@pytest.mark.parametrize("c", [2.0, 1024.0, 2.0**-3, 1000.0, 1.0, 1.7])
def test_scaling_is_undone_bit_for_bit(any_model, c):
    before = bits(any_model)
    with metaint.scaled(any_model, c) as model:
        assert model is any_model
        if c != 1:
            assert any(not torch.equal(p, before[n]) for n, p in torch.nn.Module.named_parameters(any_model))
    same_bits(any_model, before)
    with pytest.raises(KeyError, match="out"), metaint.scaled(any_model, c):
        raise KeyError("out")
    same_bits(any_model, before)


def test_every_parameter_is_scaled_once(any_model):
    """Whatever shares memory: each tensor is exactly c times itself inside (Gemma's gains c (1 + w) - 1)."""
    offset = bool(getattr(any_model.cfg, "rmsnorm_uses_offset", False))
    own = {id(parameter) for parameter in own_parameters(any_model).values()}
    before = bits(any_model)
    with metaint.scaled(any_model, 4.0):
        for name, parameter in torch.nn.Module.named_parameters(any_model):
            if id(parameter) not in own:
                continue  # a fused projection beside the ones it was split into
            gain = offset and place_of(name.replace("_original_component.", "")).kind == "norm"
            wanted = 4 * (before[name] + 1) - 1 if gain else 4 * before[name]
            assert torch.equal(parameter, wanted), name


@pytest.mark.parametrize("kind", BRIDGES)
def test_a_scaled_bridge_computes_what_the_scaled_hugging_face_model_does(kind):
    from transformers import AutoModelForCausalLM

    from tests.builders import hf_directory

    plain = AutoModelForCausalLM.from_pretrained(hf_directory(kind), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            gain = kind == "gemma2" and "norm" in name
            parameter.copy_(1.5 * (parameter + 1) - 1 if gain else 1.5 * parameter)
        model = build(kind)
        tokens = random_tokens(model, 2, 10)
        with metaint.scaled(model, 1.5):
            found = model(tokens)
        torch.testing.assert_close(found, plain(tokens).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, model(tokens), rtol=1e-2)


def test_attention_alone_scales_the_scores(any_model):
    """Queries and keys times c: what they make is c² what it was, and nothing else changed."""
    names = [f"blocks.0.attn.{name}" for name in ("hook_q", "hook_k", "hook_v")]
    tokens, kept = random_tokens(any_model, 2, 8), []

    def read():
        found = {}
        hooks = [(n, lambda x, hook, n=n: found.update({n: x.detach().clone()})) for n in names]
        with torch.no_grad():
            any_model.run_with_hooks(tokens, fwd_hooks=hooks)
        kept.append(found)

    read()
    with metaint.scaled(any_model, 2.0, "attention"):
        read()
    for name, factor in zip(names, (2, 2, 1), strict=True):
        torch.testing.assert_close(kept[1][name], factor * kept[0][name], rtol=1e-5, atol=1e-6)


def test_a_backward_pass_that_was_built_before_works_after_it(any_model):
    tokens = random_tokens(any_model, 2, 6)

    def gradients(between):
        any_model.zero_grad()
        loss = any_model(tokens, return_type="logits").square().sum()
        between()
        loss.backward()
        return {n: p.grad for n, p in torch.nn.Module.named_parameters(any_model) if p.grad is not None}

    def scale():
        with metaint.scaled(any_model, 2.0):
            pass

    wanted, given = gradients(lambda: None), gradients(scale)
    any_model.zero_grad()
    assert wanted.keys() == given.keys()
    assert all(torch.equal(given[name], gradient) for name, gradient in wanted.items())


def test_values_that_a_power_of_two_would_lose_come_back_too():
    model = build(available_kinds()[0])
    name, parameter = next(iter(own_parameters(model).items()))
    extremes = torch.tensor([1e-42, 3e38, -0.0, 0.0, math.nan, math.inf])
    with torch.no_grad():
        parameter.view(-1)[: len(extremes)] = extremes
    before = bits(model)
    for c in (2.0**20, 2.0**-20):
        with metaint.scaled(model, c, lambda n, p, name=name: n == name):
            pass
        same_bits(model, before)


def test_a_function_selects(gpt2):
    before = bits(gpt2)
    with metaint.scaled(gpt2, 3.0, lambda name, parameter: place_of(name).kind == "mlp"):
        named = torch.nn.Module.named_parameters(gpt2)
        changed = {n.replace("_original_component.", "") for n, p in named if not torch.equal(p, before[n])}
    assert changed
    assert all(".mlp." in name for name in changed)


def test_parts_of_every_parameter(any_model):
    kinds = {name: place_of(name) for name in own_parameters(any_model)}
    for name, (layer, kind) in kinds.items():
        inside = "blocks." in name
        assert (layer is not None) == inside
        assert kind in (("attention", "mlp", "norm") if inside else ("norm", "embedding", "unembedding"))
        assert (kind == "norm") == any(word in name.lower() for word in ("ln", "norm")), name
    assert any(part.kind == "attention" for part in kinds.values())


def test_bad_arguments(gpt2):
    for c in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="c is"), metaint.scaled(gpt2, c):
            pass
    with pytest.raises(InputError, match="chose none"), metaint.scaled(gpt2, 2.0, lambda name, parameter: False):
        pass
    with pytest.raises(InputError, match="select is 'everything'"), metaint.scaled(gpt2, 2.0, "everything"):  # type: ignore[arg-type]
        pass


def test_folded_weights_are_refused_unless_allowed():
    kind = "gpt2" if "gpt2" in available_kinds() else "hooked"
    model = build(kind)
    if kind == "gpt2":
        model.enable_compatibility_mode(disable_warnings=True)
    else:
        model.cfg.normalization_type = "LNPre"
    with pytest.raises(InputError, match="folded"), metaint.scaled(model, 2.0):
        pass
    with metaint.scaled(model, 2.0, "attention"):
        pass
    before = bits(model)
    with metaint.scaled(model, 2.0, allow_folded=True):
        pass
    same_bits(model, before)


def test_quantised_weights_are_refused(gpt2):
    model = copy.copy(gpt2)
    model.__dict__["_parameters"] = {
        "packed": torch.nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    }
    with pytest.raises(InputError, match="quantised"), metaint.scaled(model, 2.0):
        pass
