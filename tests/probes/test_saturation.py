"""SaturationProbe against separate passes of an edited model, and however the model is run."""

import math

import pytest
import torch

import metaint
from metaint.errors import ActivationError, HookAuditError, InputError
from metaint.measures import saturation
from metaint.models.audit import holds
from metaint.models.describe import shape_of
from metaint.models.heads import repeat_heads
from metaint.models.invariants import pattern_of, score_hooks
from tests.builders import available_kinds, build
from tests.probes.test_heads import random_tokens
from tests.probes.test_inner import assert_same

KAPPAS = (1, 4, math.inf)
ALL = 1000


def readable(model):
    """Skip a model whose attention can't be read in time: its pattern comes after z, and the rotation has no hook."""
    if not holds(model, "pattern_order") and not holds(model, "pattern_from_scores"):
        pytest.skip("the pattern is told of after it was used, and can't be made from hooks")


def saturation_of(model, tokens, kappas=KAPPAS, **arguments):
    options = {k: arguments.pop(k) for k in ("batch_size", "attention_mask") if k in arguments}
    return metaint.scan(model, tokens, [metaint.SaturationProbe(kappas, **arguments)], **options)[
        "saturation"
    ].to_dataset()


def alone(model, tokens, kappa):
    """Streams, logits and attention of one plain pass whose scores are multiplied by kappa at every layer."""
    late = not holds(model, "pattern_order")
    names = score_hooks(model) if late else ()
    kept, held = {}, {}

    def edit(z, hook, layer):
        pattern = pattern_of(model, layer, *(held[name] for name in names)) if late else held["hook_pattern"]
        kept[f"pattern{layer}"], kept[f"z{layer}"] = pattern.clone(), z.clone()
        new = pattern if kappa == 1 else saturation.sharpened(pattern, kappa)
        value = repeat_heads(held["hook_v"], pattern.shape[1], 2)
        kept[f"v{layer}"] = value.clone()
        return z if kappa == 1 else torch.einsum("bhqk,bkhd->bqhd", new, value).reshape(z.shape)

    def hold(name):
        return lambda activation, hook: held.update({name: activation.detach()})

    def keep(layer):
        return lambda stream, hook: kept.update({f"stream{layer}": stream.detach().clone()})

    hooks = []
    for layer in range(model.cfg.n_layers):
        read = ("hook_v", *(names if late else ("hook_pattern",)))
        hooks += [(f"blocks.{layer}.attn.{name}", hold(name)) for name in read]
        hooks.append((f"blocks.{layer}.attn.hook_z", lambda z, hook, layer=layer: edit(z, hook, layer)))
        hooks.append((f"blocks.{layer}.hook_resid_post", keep(layer)))
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    return kept, logits


def close(found, wanted, atol=2e-5):
    torch.testing.assert_close(torch.as_tensor(found.values), wanted.double(), rtol=1e-4, atol=atol, equal_nan=True)


def test_one_pass_over_copies_equals_separate_passes(any_model):
    readable(any_model)
    tokens = random_tokens(any_model, 3, 20)
    found = saturation_of(any_model, tokens, positions=ALL, batch_size=8)
    runs = {kappa: alone(any_model, tokens, kappa) for kappa in KAPPAS}
    base, logits = runs[1]
    causal = shape_of(any_model).causal
    for kappa in KAPPAS:
        kept, changed = runs[kappa]
        at = found.sel(scale=kappa)
        for layer in range(any_model.cfg.n_layers):
            a, b = (torch.nn.functional.normalize(r[f"stream{layer}"].double(), dim=-1) for r in (base, kept))
            cosine = (a * b).sum(-1)
            close(at["similarity"].sel(layer=layer), cosine[:, 1:].mean())
            close(at["similarity_first"].sel(layer=layer), cosine[:, 0].mean())
            a, b = a[:, 1:], b[:, 1:]
            pairs = torch.einsum("ipd,jqd->ijpq", a, b)
            others = ~torch.eye(3, dtype=torch.bool)
            close(at["similarity_null"].sel(layer=layer), pairs[others].mean())
            a, b = (x.flatten(0, 1) - x.mean((0, 1)) for x in (a, b))
            centred = (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()
            close(at["similarity_centred"].sel(layer=layer), centred, atol=1e-4)
        places = slice(1, -1) if causal else slice(1, None)
        p, q = (x[:, places].double().log_softmax(-1) for x in (logits, changed))
        close(at["kl"], (p.exp() * (p - q)).sum(-1).mean(), atol=1e-4)
        close(at["top1_agreement"], (p.argmax(-1) == q.argmax(-1)).double().mean(), atol=0.02)
        if causal:
            targets = tokens[:, 2:, None]
            close(at["loss_change"], (p - q).gather(-1, targets).mean(), atol=1e-4)
        else:
            assert math.isnan(at["loss_change"])


def test_heads_against_plain_arithmetic(any_model):
    readable(any_model)
    tokens = random_tokens(any_model, 3, 20)
    found = saturation_of(any_model, tokens)
    base, _ = alone(any_model, tokens, 1)
    for layer in range(any_model.cfg.n_layers):
        pattern, value, z = (base[f"{name}{layer}"].double() for name in ("pattern", "v", "z"))
        z = z.reshape(*value.shape[:2], *value.shape[2:]).transpose(1, 2)[:, :, 1:]
        for kappa in KAPPAS:
            at = found.sel(scale=kappa, layer=layer)
            new = saturation.sharpened(pattern, kappa)
            apart = saturation.total_variation(new, saturation.saturated(pattern))[:, :, 1:]
            close(at["total_variation"], apart.mean((0, 2)))
            change = torch.einsum("bhqk,bkhd->bhqd", new, value)[:, :, 1:] - z
            wanted = change.norm(dim=-1).sum((0, 2)) / z.norm(dim=-1).sum((0, 2))
            close(at["output_change"], wanted if kappa != 1 else torch.zeros(len(wanted)))
        at = found.sel(layer=layer)
        rows = pattern[:, :, 1:]
        close(at["off_maximum"], (1 - rows.amax(-1)).mean((0, 2)))
        for tau in (0.1, 1.0):
            ties = (rows.clamp(min=1e-300).log() >= rows.amax(-1, keepdim=True).log() - tau).sum(-1).double()
            close(at["tied_keys"].sel(tau=tau), ties.mean((0, 2)))
        assert (at["gap_count"].sum("gap_bin") == 3 * 19).all()
        top = rows.topk(2).values.log()
        close(at["gap_mean"], (top[..., 0] - top[..., 1]).mean((0, 2)), atol=1e-4)


@pytest.mark.parametrize("kind", [k for k in ("gpt2", "llama", "hooked", "hooked-rotary") if k in available_kinds()])
def test_it_is_what_scaling_the_scores_does(kind):
    # On these models hook_attn_scores is before the softmax and can be edited: another way to the same end.
    model = build(kind)
    tokens = random_tokens(model, 2, 16)
    scale = [(f"blocks.{i}.attn.hook_attn_scores", lambda s, hook: 4 * s) for i in range(model.cfg.n_layers)]
    with torch.no_grad():
        logits, changed = model(tokens), model.run_with_hooks(tokens, fwd_hooks=scale)
    p, q = (x[:, 1:-1].double().log_softmax(-1) for x in (logits, changed))
    found = saturation_of(model, tokens, kappas=[4.0])
    assert float(found["kl"][0]) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-5)


def test_histogram_predicts_what_was_measured_at_other_kappas(gpt2, repeated):
    found = saturation_of(gpt2, repeated, kappas=(1, 3, 10, 30))
    counts = [torch.as_tensor(found[f"gap_{name}"].values) for name in ("count", "odds", "tied_share")]
    for kappa in (1, 3, 10, 30):
        low, high = saturation.predicted_variation(*counts, kappa)
        truth = torch.as_tensor(found["total_variation"].sel(scale=kappa).values)
        assert (low - 1e-6 <= truth).all()
        assert (truth <= high + 1e-6).all()


def test_the_sweep_is_monotone_and_one_is_the_model_itself(gpt2, repeated):
    found = saturation_of(gpt2, repeated, kappas=saturation.KAPPAS)
    assert (found["total_variation"].diff("scale") < 0).all()
    assert (found["output_change"].diff("scale") > 0).all()
    one = found.sel(scale=1)
    assert float(abs(one["similarity"] - 1).max()) < 1e-6
    assert float(one["kl"]) == float(one["loss_change"]) == 0
    assert float(one["top1_agreement"]) == 1
    assert (one["output_change"] == 0).all()
    assert float(found["total_variation"].sel(scale=math.inf).max()) == 0
    assert (found["similarity_low"] <= found["similarity"] + 1e-9).all()
    assert (found["similarity"] <= found["similarity_high"] + 1e-9).all()


def test_one_sequence_has_its_own_other_positions_for_a_baseline(gpt2, repeated):
    found = saturation_of(gpt2, repeated[:1])
    a = torch.nn.functional.normalize(alone(gpt2, repeated[:1], 1)[0]["stream1"][0, 1:].double(), dim=-1)
    off = ~torch.eye(len(a), dtype=torch.bool)
    assert float(found["similarity_null"].sel(scale=1, layer=1)) == pytest.approx(
        float((a @ a.mT)[off].mean()), abs=1e-5
    )
    assert found["similarity_low"].isnull().all()


def test_in_the_owners_own_passes(gpt2, repeated):
    probe = metaint.SaturationProbe(KAPPAS)
    with torch.no_grad(), metaint.attach(gpt2, probe):
        logits = gpt2(probe.stacked(repeated))
    assert_same(probe.to_dataset(), saturation_of(gpt2, repeated))
    with torch.no_grad():
        torch.testing.assert_close(logits[: len(repeated)], gpt2(repeated), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"probe\.stacked"), metaint.attach(gpt2, metaint.SaturationProbe(KAPPAS)):
        gpt2(repeated)
    before = gpt2(repeated)
    torch.testing.assert_close(before, gpt2(repeated))  # nothing was left behind


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kappas": [-1.0]}, "kappas has -1"),
        ({"kappas": []}, "kappas is empty"),
        ({"tau": -1.0}, "tau is -1"),
        ({"positions": 0}, "positions is 0"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(InputError, match=words):
        metaint.SaturationProbe(**arguments)


class OtherStack(metaint.SaturationProbe):
    group = "other"


def test_caches_and_different_stacks_are_refused(gpt2, repeated):
    _, cache = gpt2.run_with_cache(repeated[:1])
    with pytest.raises(InputError, match="can't read a cache"):
        metaint.read_cache(cache, repeated[:1], probes=[metaint.SaturationProbe()])
    with pytest.raises(InputError, match="times over"):
        metaint.scan(gpt2, repeated, [metaint.SaturationProbe((1, 2)), OtherStack((1, 2, 3))])
    probe = metaint.SaturationProbe((1, 2))
    with pytest.raises(InputError, match=r"copies|cached positions"), metaint.attach(gpt2, probe):
        gpt2.generate(probe.stacked(repeated[:1, :8]), max_new_tokens=3, stop_at_eos=False, verbose=False)


def test_overflow_is_named(repeated):
    model = build(available_kinds()[0])
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "embed" in n).mul_(float("inf"))
    with pytest.raises((ActivationError, HookAuditError), match=r"NaN|fails"):
        saturation_of(model, repeated)
