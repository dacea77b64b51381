"""Sweeps over scales of the scores and of all parameters, against separate models and the expected slopes."""

import copy
import math
from functools import partial

import pytest
import torch

import metaint
from metaint.errors import ActivationError, InputError
from metaint.measures.saturation import EXPECTED_SLOPES
from metaint.models.audit import holds
from metaint.toys.small import small_transformer
from tests.builders import available_kinds, build
from tests.probes.test_heads import random_tokens
from tests.probes.test_inner import assert_same

ACTIVATIONS = {"embedding": "embedding", "scores": "score", "attn_write": "attn_write", "mlp_write": "mlp_write"}
FAR = (512.0, 1024.0)


def sweep(model, tokens, scales=FAR, **arguments):
    return metaint.saturate(model, tokens, scales, **arguments)["saturation"].to_dataset()


def randomised(model, seed=0):
    """Every parameter drawn at random, gains about 1, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            gain = bool((parameter == 1).all())
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.25 + gain)
    return model


def small(norm, **overrides):
    sizes = {"n_layers": 2, "n_heads": 2, "d_model": 16, "d_mlp": 32, "d_vocab": 50, "n_ctx": 32}
    return randomised(small_transformer(norm=norm, dtype=torch.float64, **{**sizes, **overrides}))


def check_slopes(found, expected):
    at = found.sel(scale=FAR[0])
    for name, ours in ACTIVATIONS.items():
        slopes = at[f"{ours}_slope"].values
        assert abs(slopes - expected[name]).max() < 0.02, (name, slopes)
    assert abs(at["stream_slope"].values - expected["stream"]).max() < 0.02


STYLES = {"gpt2": "pre", "native-mlp-ln": "pre", "native-gqa": "pre", "llama": "pre, gated"}
STYLES |= {"hooked": "pre", "hooked-gqa": "pre", "hooked-rotary": "pre, gated"}


@pytest.mark.parametrize("kind", [kind for kind in STYLES if kind in available_kinds()])
def test_slopes_of_pre_norm_models(kind):
    model = build(kind).to(torch.float64)
    found = sweep(model, random_tokens(model, 2, 12))
    check_slopes(found, EXPECTED_SLOPES[STYLES[kind]])
    assert float(found["embedding_share"].sel(scale=1024).max()) < 1e-4  # the embedding has dropped out
    assert float(found["embedding_share"].sel(scale=1).min()) > 0.05


@pytest.mark.parametrize(("norm", "style"), [("pre", "pre"), ("output", "output"), ("post", "post")])
@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_slopes_of_each_placement_of_the_norm(norm, style, act):
    model = small(norm, act=act)
    found = sweep(model, random_tokens(model, 2, 12))
    expected = dict(EXPECTED_SLOPES[style])
    if norm == "post":  # what is added before the norm isn't what adds up: no writes are read
        assert "attn_write_slope" not in found
        for name in ("attn_write", "mlp_write"):
            expected.pop(name)
        at = found.sel(scale=FAR[0])
        assert abs(at["stream_slope"] - 1).max() < 0.02
        assert abs(at["score_slope"] - 4).max() < 0.02
        return
    check_slopes(found, expected)


@pytest.mark.skipif("hooked" not in available_kinds(), reason="no HookedTransformer")
@pytest.mark.parametrize(("kind", "norm", "style"), [("hooked", "LNPre", ""), ("hooked-rotary", "RMSPre", ", gated")])
def test_slopes_of_folded_gains(kind, norm, style):
    model = build(kind, normalization_type=norm).to(torch.float64)
    with pytest.raises(InputError, match="folded"):
        sweep(model, random_tokens(model, 2, 12))
    check_slopes(sweep(model, random_tokens(model, 2, 12), allow_folded=True), EXPECTED_SLOPES[f"folded{style}"])


@pytest.mark.parametrize("kind", [k for k in ("gpt2", "hooked") if k in available_kinds()])
def test_slopes_where_queries_and_keys_alone_are_scaled(kind):
    model = build(kind).to(torch.float64)
    tokens, lengths = random_tokens(model, 2, 12), []
    for c in FAR:
        kept = {}

        def keep(x, hook, name, kept=kept):
            kept[name] = x.norm()

        hooks = [(f"blocks.1.{n}", partial(keep, name=n)) for n in ("hook_attn_out", "attn.hook_q")]
        with metaint.scaled(model, c, "attention"), torch.no_grad():
            model.run_with_hooks(tokens, fwd_hooks=hooks)
        lengths.append(kept)
    expected = EXPECTED_SLOPES["queries and keys"]
    for name, slope in (("hook_attn_out", expected["attn_write"]), ("attn.hook_q", expected["scores"] / 2)):
        assert math.log2(float(lengths[1][name] / lengths[0][name])) == pytest.approx(slope, abs=0.02)


def test_the_sweep_equals_models_that_were_scaled_by_hand(any_model):
    if not holds(any_model, "stream"):
        pytest.skip("no stream")
    tokens = random_tokens(any_model, 3, 14)
    found = sweep(any_model, tokens, (2.0, 8.0), positions=1000)
    causal = "loss_change" in found and not math.isnan(float(found["loss_change"][0]))
    places = slice(1, -1) if causal else slice(1, None)

    def run(c):
        kept = {}
        names = [f"blocks.{i}.hook_resid_post" for i in range(any_model.cfg.n_layers)]
        hooks = [(n, lambda x, hook, n=n: kept.update({n: x.detach().clone()})) for n in names]
        with metaint.scaled(any_model, c), torch.no_grad():
            logits = any_model.run_with_hooks(tokens, fwd_hooks=hooks)
        stack = torch.stack([kept[name][:, places] for name in names]).double()
        return (
            torch.nn.functional.normalize(stack, dim=-1),
            stack.norm(dim=-1),
            logits[:, places].double().log_softmax(-1),
        )

    runs = {c: run(c) for c in (1.0, 2.0, 8.0)}
    for c, (units, lengths, log_q) in runs.items():
        at = found.sel(scale=c)
        for name, other in (("similarity", 1.0), ("similarity_to_limit", 8.0)):
            wanted = (units * runs[other][0]).sum(-1).mean((1, 2))
            torch.testing.assert_close(torch.tensor(at[name].values), wanted, rtol=1e-4, atol=1e-5)
        wanted = lengths.log().mean((1, 2)).exp()
        torch.testing.assert_close(torch.tensor(at["stream_norm"].values), wanted, rtol=1e-4, atol=1e-6)
        log_p = runs[1.0][2]
        kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        assert float(at["kl"]) == pytest.approx(kl, rel=1e-3, abs=1e-5)
        pairs = torch.einsum("libd,ljcd->lijbc", runs[1.0][0], units)
        null = pairs[:, ~torch.eye(3, dtype=torch.bool)].mean((1, 2, 3))
        torch.testing.assert_close(torch.tensor(at["similarity_null"].values), null, rtol=1e-4, atol=1e-5)


def test_the_model_is_as_it_was(gpt2, repeated):
    before = {name: parameter.detach().clone() for name, parameter in torch.nn.Module.named_parameters(gpt2)}
    state = torch.get_rng_state()
    sweep(gpt2, repeated, (2.0, 1000.0))
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in torch.nn.Module.named_parameters(gpt2):
        assert torch.equal(parameter, before[name])
    assert not any(point._forward_hooks for point in gpt2.hook_dict.values())


def test_batches_give_the_same(gpt2, repeated):
    whole = sweep(gpt2, repeated, (4.0,), positions=16)
    assert_same(sweep(gpt2, repeated, (4.0,), positions=16, batch_size=2), whole)


def test_padding_does_not_count(gpt2):
    tokens = random_tokens(gpt2, 3, 16)
    ones, zeros = torch.ones(3, 16, dtype=torch.long), torch.zeros(3, 5, dtype=torch.long)
    padded, mask = torch.cat([zeros + 1, tokens], 1), torch.cat([zeros, ones], 1)
    found = sweep(gpt2, padded, (4.0,), attention_mask=mask)
    assert_same(found, sweep(gpt2, tokens, (4.0,)), atol=2e-3)


def test_the_published_count_shows_its_artefact():
    """A head with negative scores everywhere: the published mask sends it to the later keys, a true one to a single."""
    model = small("output", n_layers=1, n_heads=2, n_ctx=83)
    with torch.no_grad():
        attention = model.blocks[0].attn
        attention.W_Q[0], attention.W_K[0] = 0, 0
        attention.b_Q[0], attention.b_K[0] = 1.0, 0.0
        attention.W_K[0, 0] = 1.0  # keys read one dimension, negative and different at every position
        model.embed.weight[:, 0], model.pos_embed.weight[:, 0] = 0.0, -1 - 0.01 * torch.arange(83.0)
    tokens = random_tokens(model, 4, 83)
    found = sweep(model, tokens, (2.0,), faithful=True)
    assert float(found["attended_mean"][0, 0]) == pytest.approx(41.0120, abs=5e-5)
    assert float(found["attended_split"][0, 0]) == pytest.approx(0.9759, abs=5e-5)
    assert float(found["attended_std"][0, 0]) == pytest.approx(23.938, abs=5e-4)
    assert float(found["attended_mean_causal"][0, 0]) == 1
    assert float(found["attended_split_causal"][0, 0]) == 0
    assert float(found["similarity_published"][0]) <= 1


def test_faithful_is_what_a_model_with_that_mask_computes():
    """Against the small transformer with its mask replaced by the published one, run at c = 1 and c = 1000."""
    model = small("output", n_layers=2)
    tokens = random_tokens(model, 2, 20)
    found = sweep(model, tokens, (2.0,), faithful=True)

    def run(c):
        kept, scaled = {}, copy.deepcopy(model)
        with torch.no_grad():
            for parameter in scaled.parameters():
                parameter.mul_(c)

        def attend(z, hook, layer):
            held = kept[layer]
            scores = torch.einsum("bqhd,bkhd->bhqk", held["q"], held["k"]) / math.sqrt(model.cfg.d_head)
            pattern = (scores * torch.ones(20, 20).tril()).softmax(-1)
            held["n"] = (pattern > 1e-5).sum(-1).double()
            return torch.einsum("bhqk,bkhd->bqhd", pattern, held["v"])

        hooks = []
        for layer in range(2):
            kept[layer] = {}
            for name in "qkv":
                keep = lambda x, hook, name=name, layer=layer: kept[layer].update({name: x.detach()})  # noqa: E731
                hooks.append((f"blocks.{layer}.attn.hook_{name}", keep))
            hooks.append((f"blocks.{layer}.attn.hook_z", lambda z, hook, layer=layer: attend(z, hook, layer)))
            keep = lambda x, hook, layer=layer: kept[layer].update({"x": x.detach()})  # noqa: E731
            hooks.append((f"blocks.{layer}.hook_resid_post", keep))
        with torch.no_grad():
            scaled.run_with_hooks(tokens, fwd_hooks=hooks)
        return kept

    before, after = run(1.0), run(1000.0)
    for layer in range(2):
        cosine = torch.cosine_similarity(before[layer]["x"], after[layer]["x"], dim=-1).mean()
        assert float(found["similarity_published"][layer]) == pytest.approx(float(cosine), abs=1e-6)
        n = after[layer]["n"]
        for head in range(2):
            assert float(found["attended_mean"][layer, head]) == pytest.approx(float(n[:, head].mean()))
            assert float(found["attended_std"][layer, head]) == pytest.approx(
                float(n[:, head].std(correction=0)), abs=1e-6
            )


def test_overflow_names_the_hook_and_the_factor():
    model = build("llama" if "llama" in available_kinds() else "hooked-rotary")
    with pytest.raises(ActivationError, match=r"blocks\.\d\..* with all parameters times 1e\+12: float32 .* float64"):
        sweep(model, random_tokens(model, 2, 8), (1e12,))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scales": (-1.0, 2.0)}, "scales has -1"),
        ({"scales": (math.inf,)}, "scales has inf"),
        ({"scales": (1.0,)}, "no factor other than 1"),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5: it must be an integer"),
        ({"positions": 0}, "positions is 0: it must be at least 1"),
        ({"seed": None}, "seed is None: it must be an integer"),
    ],
)
def test_bad_arguments(gpt2, repeated, arguments, words):
    with pytest.raises(InputError, match=words):
        metaint.saturate(gpt2, repeated, **arguments)


def test_half_precision_is_refused(repeated):
    model = build(available_kinds()[0]).to(torch.bfloat16)
    with pytest.raises(InputError, match="half precision"):
        sweep(model, repeated)
