"""Fresh models: as the given one in all but the weights, which are the architecture's own first ones."""

import math
from types import SimpleNamespace

import pytest
import torch
import transformer_lens
from torch import nn

from metaint.errors import ModelError
from metaint.models.fresh import fresh_model
from metaint.models.reading import random_tokens
from tests.builders import D_MODEL, N_LAYERS, available_kinds, build

HF_STD = {"gpt2": 0.02, "neox": 0.02, "llama": 0.02, "gemma2": 0.02, "bert": 0.02}
HF_KINDS = [kind for kind in HF_STD if kind in available_kinds()]
HOOKED_KINDS = [kind for kind in available_kinds() if kind.startswith("hooked")]
BRIDGE_KINDS = [kind for kind in available_kinds() if not kind.startswith("hooked")]
needs_gpt2 = pytest.mark.skipif("gpt2" not in available_kinds(), reason="needs a bridge over a Hugging Face model")


@torch.no_grad()
def logits_of(model):
    output = model(random_tokens(model, 2, 12))
    return getattr(output, "logits", output)


@torch.no_grad()
def fired(model):
    return set(model.run_with_cache(random_tokens(model, 2, 12))[1].keys())


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def modules_of(model):
    """All modules, also those of the wrapped model, which a bridge keeps outside its own."""
    wrapped = getattr(model, "original_model", None)
    return [*model.modules(), *(wrapped.modules() if wrapped is not None else [])]


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_model_of_the_same_kind(any_model):
    fresh = fresh_model(any_model)
    assert type(fresh) is type(any_model)
    assert type(getattr(fresh, "original_model", None)) is type(getattr(any_model, "original_model", None))
    assert fired(fresh) == fired(any_model)
    assert fresh.hook_dict.keys() == any_model.hook_dict.keys()
    assert not any(fresh.hook_dict[name] is any_model.hook_dict[name] for name in fresh.hook_dict)
    assert repr(vars(fresh.cfg)) == repr(vars(any_model.cfg))
    assert fresh.cfg is not any_model.cfg
    assert fresh.tokenizer is any_model.tokenizer
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in any_model.parameters()]
    assert not any(module.training for module in modules_of(fresh))


def test_other_weights_and_other_logits(any_model):
    fresh = fresh_model(any_model)
    drawn = [(a, b) for a, b in zip(fresh.parameters(), any_model.parameters(), strict=True) if a.ndim > 1]
    matrices = [(a, b) for a, b in drawn if bool(a.any())]  # a HookedTransformer's biases [head, d_head] are zero
    assert len(matrices) > 3 * N_LAYERS
    assert not any(torch.equal(a, b) for a, b in drawn)
    new, old = logits_of(fresh), logits_of(any_model)
    assert new.shape == old.shape
    assert bool(new.isfinite().all())
    assert not torch.allclose(new, old, atol=0.1)


def test_the_seed_decides(any_model):
    first = weights(fresh_model(any_model, seed=1))
    torch.rand(3)  # the global state has moved on
    assert same(first, weights(fresh_model(any_model, seed=1)))
    assert not same(first, weights(fresh_model(any_model, seed=2)))


def test_the_given_model_and_the_random_state_stay(any_model):
    any_model.train()
    any_model.blocks[0].eval()
    any_model.hook_dict["blocks.0.attn.hook_pattern"].add_hook(lambda pattern, hook: None)
    counts = [len(point._forward_hooks) for point in any_model.hook_dict.values()]
    flags = [module.training for module in modules_of(any_model)]
    cfg, padding = repr(vars(any_model.cfg)), any_model.tokenizer.padding_side
    before, state = weights(any_model), torch.get_rng_state()
    fresh = fresh_model(any_model)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():  # what is done to the fresh one stays with it
        for parameter in fresh.parameters():
            parameter.add_(1.0)
    assert same(before, weights(any_model))
    assert counts == [len(point._forward_hooks) for point in any_model.hook_dict.values()]
    assert flags == [module.training for module in modules_of(any_model)]
    assert cfg == repr(vars(any_model.cfg))
    assert any_model.tokenizer.padding_side == padding
    assert not any(point._forward_hooks for point in fresh.hook_dict.values() if point.name.endswith("hook_pattern"))
    assert not fresh.training


def test_the_given_models_logits_stay(any_model):
    before = logits_of(any_model)
    logits_of(fresh_model(any_model))
    assert torch.equal(logits_of(any_model), before)


@torch.no_grad()
def test_the_spread_is_the_initialisations(any_model, request):
    kind = request.node.callspec.params["any_model"]
    expected = HF_STD.get(kind, 0.8 / math.sqrt(D_MODEL))  # TransformerLens: N(0, 0.64 / d_model)
    fresh = fresh_model(any_model)
    for matrix in (fresh.W_E, fresh.blocks[0].attn.W_Q, fresh.blocks[1].attn.W_V):
        assert float(matrix.detach().mean()) == pytest.approx(0, abs=0.1 * expected)
        assert float(matrix.detach().std()) == pytest.approx(expected, rel=0.08)
    vectors = [p.detach() for p in fresh.parameters() if p.ndim == 1]
    assert all(bool((p == p[0]).all()) and float(p[0]) in (0.0, 1.0) for p in vectors)  # biases, norms


@needs_gpt2
@torch.no_grad()
def test_the_configs_initializer_range_is_kept():
    fresh = fresh_model(build("gpt2", initializer_range=0.05))
    assert float(fresh.W_E.std()) == pytest.approx(0.05, rel=0.05)
    # GPT-2 scales what writes to the stream by 1/sqrt(2 n_layer).
    assert float(fresh.blocks[0].attn.W_O.std()) == pytest.approx(0.05 / math.sqrt(2 * N_LAYERS), rel=0.05)


@pytest.mark.parametrize("kind", HF_KINDS)
def test_bit_for_bit_what_hugging_face_draws(kind):
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    from tests.builders import hf_directory

    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    config = auto.from_pretrained(hf_directory(kind)).config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = auto.from_config(config)
    fresh = fresh_model(build(kind), seed=5).original_model
    found = {name.replace("._original_component", ""): p for name, p in fresh.named_parameters()}
    shared = [name for name, _ in expected.named_parameters() if name in found]
    assert len(shared) > 4 * N_LAYERS
    assert all(torch.equal(found[name], expected.get_parameter(name)) for name in shared)


@pytest.mark.parametrize("kind", HOOKED_KINDS)
def test_bit_for_bit_what_hooked_transformer_draws(kind):
    model = build(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = transformer_lens.HookedTransformer(model.cfg, tokenizer=model.tokenizer)
    assert same(weights(fresh_model(model, seed=5)), weights(expected))


@pytest.mark.parametrize("kind", [kind for kind in BRIDGE_KINDS if kind.startswith("native")])
@torch.no_grad()
def test_init_mode_of_a_native_model(kind):
    fresh = fresh_model(build(kind, init_mode="xavier_uniform", initializer_range=1.0))
    matrix = fresh.blocks[0].attn.q.weight
    bound = math.sqrt(6 / sum(matrix.shape))
    assert 0.95 * bound < float(matrix.abs().max()) <= bound


def test_a_configs_own_seed_does_not_decide():
    kind = next(kind for kind in available_kinds() if kind.startswith(("native", "hooked")))
    model = build(kind)
    model.cfg.seed = 7
    assert not same(weights(fresh_model(model, seed=1)), weights(fresh_model(model, seed=2)))
    assert model.cfg.seed == 7


@torch.no_grad()
def test_half_precision(any_model):
    single = fresh_model(any_model)
    any_model.to(torch.bfloat16)
    fresh = fresh_model(any_model)
    assert {parameter.dtype for parameter in fresh.parameters()} == {torch.bfloat16}
    assert fresh.cfg.dtype == any_model.cfg.dtype
    assert logits_of(fresh).dtype == logits_of(any_model).dtype
    drawn = [p for p in fresh.parameters() if p.ndim > 1 and bool(p.any())]
    before = [p for p in single.parameters() if p.ndim > 1 and bool(p.any())]
    assert [float(p.float().std()) for p in drawn] == pytest.approx([float(p.std()) for p in before], rel=0.3)


@pytest.mark.parametrize("no_processing", [True, False])
@pytest.mark.parametrize("kind", BRIDGE_KINDS)
def test_compatibility_mode(kind, no_processing):
    model = build(kind)
    model.enable_compatibility_mode(disable_warnings=True, no_processing=no_processing)
    before = logits_of(model)
    fresh = fresh_model(model)
    assert fresh.compatibility_mode
    assert fired(fresh) == fired(model)
    assert fresh.hook_dict.keys() == model.hook_dict.keys()
    assert torch.equal(logits_of(model), before)
    # Processing leaves the function as it is: the logits up to one number a position.
    raw = logits_of(fresh_model(build(kind))).log_softmax(-1)
    assert torch.allclose(logits_of(fresh).log_softmax(-1), raw, atol=1e-4)


@needs_gpt2
def test_what_cannot_be_processed_stays_raw(monkeypatch):
    model = build("gpt2")
    model.enable_compatibility_mode(disable_warnings=True)

    def fail(self, **options):
        next(self.parameters()).data.zero_()
        raise RuntimeError("no")

    monkeypatch.setattr(type(model), "enable_compatibility_mode", fail)
    fresh = fresh_model(model)
    assert not fresh.compatibility_mode
    assert same(weights(fresh), weights(fresh_model(build("gpt2"))))


@pytest.mark.parametrize("kind", HOOKED_KINDS)
def test_folded_weights(kind):
    """A fresh model's norms are the identity, so folding them leaves the same function."""
    model = build(kind)
    folded = {"LN": "LNPre", "RMS": "RMSPre", None: None}[model.cfg.normalization_type]
    folded = build(kind, normalization_type=folded)
    fresh = fresh_model(folded)
    assert fresh.cfg.normalization_type == folded.cfg.normalization_type
    assert torch.allclose(logits_of(fresh), logits_of(fresh_model(model)), atol=1e-5)


@pytest.mark.parametrize("switch", ["use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in"])
@pytest.mark.parametrize("kind", [kind for kind in ("gpt2", "llama", "hooked") if kind in available_kinds()])
def test_switches_stay_on(kind, switch):
    model = build(kind)
    without = fired(model)
    getattr(model, f"set_{switch}")(True)
    fresh = fresh_model(model)
    assert getattr(fresh.cfg, switch)
    assert fired(fresh) == fired(model) != without


@pytest.mark.skipif("native-attn-only" not in available_kinds(), reason="the toy needs boot_native")
@torch.no_grad()
def test_the_toy(tmp_path):
    from metaint.toys.embedded import boot_toy, load_toy, save_toy

    shape = {"n_layers": 2, "n_heads": 1, "d_model": 64, "d_head": 64, "n_ctx": 16, "d_vocab": 4}
    toy = load_toy(save_toy(boot_toy(shape), ["a", "b", " ", "\n"], {"accuracy": 0.9}, tmp_path)).eval()
    fresh = fresh_model(toy, seed=3)
    assert fired(fresh) == fired(toy)
    assert fresh.cfg.model_name == "toy"
    assert fresh.cfg.info == {"accuracy": 0.9}
    assert fresh.cfg.default_prepend_bos is False
    assert torch.equal(fresh.to_tokens("ab a"), toy.to_tokens("ab a"))
    assert not same(weights(fresh), weights(toy))
    assert float(fresh.blocks[0].attn.q.weight.std()) == pytest.approx(0.8 / 8, rel=0.05)


def test_without_a_tokenizer(any_model):
    attribute = "_tokenizer" if hasattr(any_model, "_tokenizer") else "tokenizer"
    setattr(any_model, attribute, None)
    assert fresh_model(any_model).tokenizer is None


class Strange(nn.Module):
    """Something with a cfg and weights that TransformerLens doesn't know."""

    def __init__(self):
        super().__init__()
        self.cfg = SimpleNamespace(model_name="strange")
        self.layer = nn.Linear(2, 2)


def test_a_kind_that_is_not_known():
    with pytest.raises(ModelError, match=r"^model 'strange' can't be made anew: its initialisation is known for "):
        fresh_model(Strange())


def test_quantised_weights(any_model):
    parameter = next(any_model.parameters())
    parameter.requires_grad_(False)
    parameter.data = torch.zeros_like(parameter, dtype=torch.int8)
    with pytest.raises(ModelError, match=r"can't be made anew: its weights are quantised: open it in a floating dtype"):
        fresh_model(any_model)


def test_weights_that_are_nowhere(any_model):
    meta = nn.Module.to(any_model, "meta")
    with pytest.raises(
        ModelError, match=r"can't be made anew: its weights are on (cpu, )?meta: put them on one device"
    ):
        fresh_model(meta)


def test_what_the_library_says_is_passed_on():
    kind = next(kind for kind in available_kinds() if kind.startswith(("native", "hooked")))
    model = build(kind)
    model.cfg.n_layers = "many"
    state = torch.get_rng_state()
    with pytest.raises(ModelError, match=r"^model '\w+' can't be made anew \(") as caught:
        fresh_model(model)
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), state)
