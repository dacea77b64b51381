"""InnerProbe against autograd through the model's own modules, on planted descent, and however the model is run."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from torch.nn.functional import cross_entropy

import metaint
from metaint.errors import ActivationError, HookAuditError, InputError
from metaint.models.describe import shape_of
from metaint.models.readout import setting
from tests.builders import available_kinds, build
from tests.descent import D_VOCAB, N_LAYERS, Descent
from tests.probes.test_heads import random_tokens

CAUSAL = [kind for kind in available_kinds() if kind != "bert"]
ALL = 1000  # more positions than any sequence here


def inner_of(model, tokens, **arguments):
    options = {k: arguments.pop(k) for k in ("batch_size", "attention_mask") if k in arguments}
    return metaint.scan(model, tokens, [metaint.InnerProbe(**arguments)], **options)["inner"].to_dataset()


def assert_same(left, right, atol=1e-5, names=None):
    for name in names or left.data_vars:
        a, b = (torch.as_tensor(d[name].values) for d in (left, right))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


def streams_of(model, tokens):
    """Points and writes of one pass, by hook name."""
    kept = {}

    def keep(name):
        return lambda activation, hook: kept.update({name: activation.detach().clone()})

    parts = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
    names = [n for n in model.hook_dict if n.split(".")[-1] in parts and n.count(".") == 2]
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[(n, keep(n)) for n in names])
    return kept, logits


def lens(model, z):
    """Logits of the stream z through the model's own modules."""
    normed = model.ln_final(z) if getattr(model, "ln_final", None) is not None else z
    logits = model.unembed(normed)
    cap = setting(model, "final_logit_softcapping")
    if cap and "Gemma" in str(getattr(model.cfg, "architecture", "")):
        logits = cap * torch.tanh(logits / cap)
    return logits


def read_at(model, z, targets):
    """Loss of each target, its gradient, and log probabilities, by autograd."""
    leaf = z.clone().requires_grad_()
    logits = lens(model, leaf)
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0], logits.detach().log_softmax(-1)


@pytest.mark.parametrize("kind", CAUSAL)
def test_every_architecture_equals_autograd_through_its_own_modules(kind):
    model = build(kind)
    tokens = random_tokens(model, 3, 14)
    found = inner_of(model, tokens, positions=ALL)
    kept, logits = streams_of(model, tokens)
    n_layers, sublayers = model.cfg.n_layers, shape_of(model).sublayers
    streams = [kept[f"blocks.{i}.hook_resid_pre"] for i in range(n_layers)]
    streams.append(kept[f"blocks.{n_layers - 1}.hook_resid_post"])
    rows = slice(1, 13)  # neither position 0 nor the last, which has no next token
    targets = tokens[:, 2:14]
    others = targets.roll(-6, 1)  # half the sample away
    final = logits[:, rows].log_softmax(-1)
    torch.testing.assert_close(lens(model, streams[-1])[:, rows].detach().log_softmax(-1), final, rtol=1e-4, atol=1e-4)

    def close(name, index, value, atol=2e-5):
        assert float(found[name][index]) == pytest.approx(float(value), rel=1e-4, abs=atol), (name, index)

    for layer, stream in enumerate(streams):
        loss, gradient, log_p = read_at(model, stream[:, rows], targets)
        at_target = log_p.gather(-1, targets[..., None])
        rank = 1 + (log_p > at_target).sum(-1)
        length = stream[:, rows].norm(dim=-1)
        close("loss", layer, loss.mean())
        close("loss_null", layer, read_at(model, stream[:, rows], others)[0].mean())
        close("target_rank", layer, rank.double().log().mean().exp())
        close("top1", layer, (rank == 1).double().mean())
        close("prediction_entropy", layer, -(log_p.exp() * log_p).sum(-1).mean())
        close("kl_to_final", layer, (final.exp() * (final - log_p)).sum(-1).mean())
        close("gradient_norm", layer, gradient.norm(dim=-1).mean())
        close("norm_wrong", layer, length[rank > 1].mean())
        ranked = [pd.Series(v.flatten().numpy()).rank() for v in (length, loss)]
        close("norm_loss_spearman", layer, np.corrcoef(*ranked)[0, 1], atol=1e-3)
    for block in range(n_layers):
        start, stop = streams[block], streams[block + 1]
        attn, mlp = (kept.get(f"blocks.{block}.hook_{part}_out") for part in ("attn", "mlp"))
        steps = {"": (start, stop)}
        steps["_attn"] = (start, stop) if sublayers == "attention" else (start, start + attn)
        if sublayers != "attention":
            steps["_mlp"] = (start, start + mlp) if sublayers == "parallel" else (start + attn, stop)
        for part, (a, b) in steps.items():
            for null, ids in (("", targets), ("_null", others)):
                loss, g, _ = read_at(model, a[:, rows], ids)
                after = read_at(model, b[:, rows], ids)[0]
                step = (b - a)[:, rows]
                descent = -(g * step).sum(-1)
                close(f"loss_decrease{null}{part}", block, (loss - after).mean())
                close(f"improved{null}{part}", block, (loss > after).double().mean(), atol=0.03)
                close(f"step_gradient_cosine{null}{part}", block, -torch.cosine_similarity(g, step, dim=-1).mean())
                fidelity = descent.sum() / (loss - after).sum()
                close(f"fidelity{null}{part}", block, fidelity, atol=1e-3 * (1 + abs(float(fidelity))) ** 2)
                if not null:
                    close(f"learning_rate{part}", block, (descent / g.square().sum(-1)).flatten().nanmedian(), 1e-4)
        if sublayers == "attention":
            assert math.isnan(found["loss_decrease_mlp"][block])


@pytest.mark.parametrize("norm", ["LN", "RMS"])
@pytest.mark.parametrize("parallel", [False, True])
def test_planted_descent_is_read_as_descent(norm, parallel):
    model = Descent(0.01, norm=norm, parallel=parallel)
    tokens = torch.randint(D_VOCAB, (6, 20), generator=torch.Generator().manual_seed(2))
    found = inner_of(model, tokens, positions=ALL)
    for part in ("_attn", "_mlp"):
        assert found[f"step_gradient_cosine{part}"].values == pytest.approx(1.0, abs=1e-9)
        assert found[f"learning_rate{part}"].values == pytest.approx(0.01, rel=1e-6)
        assert found[f"fidelity{part}"].values == pytest.approx(1.0, abs=0.02)
        assert (found[f"improved{part}"] == 1).all()
    assert found["step_gradient_cosine"].values == pytest.approx(1.0, abs=2e-3)
    assert (found["step_gradient_cosine_null"] < 0.5).all()
    assert (found["loss"].diff("layer") < 0).all()


def test_random_steps_of_the_same_length_read_the_baseline():
    model = Descent(0.05, random=True)
    tokens = torch.randint(D_VOCAB, (40, 20), generator=torch.Generator().manual_seed(2))
    found = inner_of(model, tokens, positions=ALL)
    for part in ("", "_attn", "_mlp"):
        cosine, null = (found[f"step_gradient_cosine{n}{part}"] for n in ("", "_null"))
        assert (abs(cosine) < 0.03).all()
        assert (abs(cosine - null) < 0.04).all()
        assert abs(found[f"improved{part}"] - 0.5).max() < 0.08
        covers = (found[f"step_gradient_cosine{part}_low"] < 0) & (found[f"step_gradient_cosine{part}_high"] > 0)
        assert covers.sum() >= N_LAYERS - 1


def test_the_last_loss_is_the_model_s_own(gpt2, repeated):
    found = inner_of(gpt2, repeated, positions=ALL)
    logits = gpt2(repeated).detach()
    own = cross_entropy(logits[:, 1:-1].flatten(0, 1), repeated[:, 2:].flatten())
    assert float(found["loss"][-1]) == pytest.approx(float(own), rel=1e-5)
    assert float(found["kl_to_final"][-1]) == 0
    assert found.attrs["samples"] == 6 * 62


def test_generation_reads_the_prompt(gpt2):
    prompt = random_tokens(gpt2, 2, 10)
    with torch.no_grad(), metaint.attach(gpt2, metaint.InnerProbe()) as probe:
        gpt2.generate(prompt, max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False)
    assert_same(probe.to_dataset(), inner_of(gpt2, prompt))


def test_the_sample_tells_about_the_whole(gpt2):
    tokens = random_tokens(gpt2, 30, 60)
    few, whole = inner_of(gpt2, tokens, positions=20), inner_of(gpt2, tokens, positions=ALL)
    assert few.attrs["samples"] == 600
    for name in ("loss", "step_gradient_cosine"):
        assert ((few[f"{name}_low"] - 0.1 <= whole[name]) & (whole[name] <= few[f"{name}_high"] + 0.1)).all()
    assert not np.allclose(few["loss"], inner_of(gpt2, tokens, positions=20, seed=1)["loss"])


def test_a_sequence_of_one_sample_has_no_baseline(gpt2):
    found = inner_of(gpt2, random_tokens(gpt2, 4, 10), positions=1)
    assert found["loss"].notnull().all()
    for name in ("loss_null", "step_gradient_cosine_null", "improved_null"):
        assert found[name].isnull().all()


def identity_lens(model, scale=0.0):
    d_model = model.cfg.d_model
    shift = scale * torch.randn(d_model, generator=torch.Generator().manual_seed(0))
    return [(torch.zeros(d_model, d_model), shift)] * model.cfg.n_layers


def test_translators_that_do_nothing_are_the_logit_lens(gpt2, repeated):
    plain, tuned = inner_of(gpt2, repeated), inner_of(gpt2, repeated, lens=identity_lens(gpt2))
    split = [name for name in plain.data_vars if "_attn" in name or "_mlp" in name]
    assert_same(tuned, plain, names=[name for name in plain.data_vars if name not in split])
    assert all(tuned[name].isnull().all() for name in split)
    assert tuned.attrs["lens"] == "tuned lens"
    moved = inner_of(gpt2, repeated, lens=identity_lens(gpt2, 1.0))
    assert not np.allclose(moved["loss"][:-1], plain["loss"][:-1])
    assert float(moved["loss"][-1]) == pytest.approx(float(plain["loss"][-1]))


def test_translators_of_another_model_are_refused(gpt2, repeated):
    with pytest.raises(InputError):
        inner_of(gpt2, repeated, lens=identity_lens(gpt2)[:1])


def test_half_precision_is_read_in_full(gpt2):
    tokens = random_tokens(gpt2, 4, 20)
    narrow = build(available_kinds()[0]).to(torch.bfloat16)
    found = inner_of(narrow, tokens)
    assert found["loss"].notnull().all()
    assert float(found["kl_to_final"][-1]) == 0


@pytest.mark.parametrize("kind", [k for k in CAUSAL if not k.startswith("hooked")])
def test_folded_weights_predict_the_same(kind):
    raw, folded = build(kind), build(kind)
    folded.enable_compatibility_mode(disable_warnings=True)
    tokens = random_tokens(raw, 3, 20)
    left, right = inner_of(raw, tokens), inner_of(folded, tokens)
    if kind != "gemma2":  # its soft cap is no function of differences of logits, which centring keeps
        assert_same(left, right, atol=1e-3, names=["loss", "prediction_entropy", "kl_to_final", "target_rank"])
    assert float(right["loss"][-1]) == pytest.approx(float(cross_entropy_of(folded, tokens)), rel=1e-4)


def cross_entropy_of(model, tokens):
    return cross_entropy(model(tokens).detach()[:, 1:-1].flatten(0, 1), tokens[:, 2:].flatten())


def test_the_contract_of_names(gpt2, repeated):
    found = inner_of(gpt2, repeated)
    layer = ("loss", "target_rank", "top1", "prediction_entropy", "kl_to_final", "gradient_norm", "norm_loss_spearman")
    block = ("loss_decrease", "improved", "step_gradient_cosine", "step_gradient_cosine_null", "learning_rate")
    assert all(found[name].dims == ("layer",) for name in layer)
    for name in (*block, "fidelity"):
        for part in ("", "_attn", "_mlp"):
            assert found[name + part].dims == ("block",)
    assert found["layer"].values.tolist() == [0, 1, 2]
    for name in ("loss", "improved", "fidelity", "step_gradient_cosine_null"):
        assert (found[f"{name}_low"] <= found[name]).all()
        assert (found[name] <= found[f"{name}_high"]).all()
    assert found["step_gradient_cosine"].attrs["description"].startswith("mean cosine")


def test_a_store_keeps_it(gpt2, repeated, tmp_path):
    scan = metaint.scan(gpt2, repeated, [metaint.ResidualProbe(), metaint.InnerProbe()])
    metaint.save(scan, tmp_path / "s.zarr")
    back = metaint.load(tmp_path / "s.zarr")
    for group in ("residual", "inner"):
        xr.testing.assert_allclose(back[group].to_dataset(), scan[group].to_dataset())


def test_bad_input_is_one_sentence(gpt2, repeated):
    with pytest.raises(InputError, match=r"^positions is 0: at least 1 position of each sequence must be sampled\.$"):
        metaint.InnerProbe(positions=0)
    if "bert" in available_kinds():
        with pytest.raises(HookAuditError, match=r"^InnerProbe needs a model that predicts the next token, and this"):
            inner_of(build("bert"), repeated)
    if hasattr(gpt2, "original_model"):
        with (
            torch.no_grad(),
            pytest.raises(InputError, match="was fed embeddings, and InnerProbe needs the tokens"),
            metaint.attach(gpt2, metaint.InnerProbe()),
        ):
            gpt2(gpt2.embed(repeated).detach())


def test_a_head_that_is_not_what_it_says_is_refused(monkeypatch, gpt2, repeated):
    model = build(available_kinds()[0])
    wrong = model.W_U.detach().flip(0)
    monkeypatch.setattr(type(model), "W_U", property(lambda self: wrong))
    with pytest.raises(HookAuditError, match=r"^The hook audit's unembedding fails at W_U"):
        inner_of(model, repeated)


def test_nan_is_named_with_its_hook():
    model = build(available_kinds()[0])
    tokens = random_tokens(model)
    for probe in (metaint.InnerProbe(), metaint.ResidualProbe()):

        def spoil(activation, hook):
            return activation * torch.nan

        with (
            torch.no_grad(),
            metaint.attach(model, probe),
            model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", spoil)]),
            pytest.raises(ActivationError, match=r"^blocks\.1\.hook_resid_pre holds NaN or infinity: "),
        ):
            model(tokens)


def test_passes_in_inference_mode_mix_with_others(gpt2, repeated):
    whole = inner_of(gpt2, repeated)
    with metaint.attach(gpt2, metaint.InnerProbe()) as probe:
        with torch.inference_mode():
            gpt2(repeated[:3])
        with torch.no_grad():
            gpt2(repeated[3:])
    assert_same(probe.to_dataset(), whole)


def test_a_pass_cut_short_is_left_out(gpt2, repeated):
    with torch.no_grad(), metaint.attach(gpt2, metaint.InnerProbe()) as probe:
        gpt2(repeated, stop_at_layer=1)
        gpt2(repeated)
    assert_same(probe.to_dataset(), inner_of(gpt2, repeated))
