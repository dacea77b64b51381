"""ResidualProbe against plain arithmetic on what the hooks carried, and however the model is run."""

import math

import numpy as np
import pytest
import torch

import metaint
from metaint.errors import InputError
from metaint.measures import norms
from metaint.measures.positions import BUCKETS
from metaint.models.audit import holds
from metaint.models.describe import shape_of
from tests.builders import available_kinds, build
from tests.descent import Descent
from tests.probes.test_heads import random_tokens
from tests.probes.test_inner import assert_same, streams_of

ALL = 1000


def residual_of(model, tokens, **arguments):
    options = {k: arguments.pop(k) for k in ("batch_size", "attention_mask") if k in arguments}
    return metaint.scan(model, tokens, [metaint.ResidualProbe(**arguments)], **options)["residual"].to_dataset()


def stack_of(model, tokens):
    """Streams [layer, batch, position, d_model], and the writes by hook name."""
    kept, _ = streams_of(model, tokens)
    n_layers = model.cfg.n_layers
    streams = [kept[f"blocks.{i}.hook_resid_pre"] for i in range(n_layers)]
    return torch.stack([*streams, kept[f"blocks.{n_layers - 1}.hook_resid_post"]]).double(), kept


def close(found, wanted, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(torch.as_tensor(found.values), wanted.double(), rtol=rtol, atol=atol, equal_nan=True)


def test_every_architecture_equals_plain_arithmetic(any_model):
    tokens = random_tokens(any_model, 3, 70)
    found = residual_of(any_model, tokens, positions=ALL, batch_size=2)
    x, kept = stack_of(any_model, tokens)
    length = x.norm(dim=-1)
    slices = [slice(0, 1), slice(1, 4), slice(4, 16), slice(16, 64), slice(64, 70)]
    close(found["norm_mean"], torch.stack([length[:, :, s].mean((1, 2)) for s in slices], 1))
    close(found["norm_geometric"], torch.stack([length[:, :, s].log().mean((1, 2)).exp() for s in slices], 1))
    assert found["norm_count"].values.tolist() == [[3, 9, 36, 144, 18]] * (any_model.cfg.n_layers + 1)
    assert (found["norm_histogram"].sum("bin") == found["norm_count"]).all()
    quantiles = torch.as_tensor(found["quantile"].values)
    wanted = length[:, :, 16:64].flatten(1).quantile(quantiles, dim=1)
    within = torch.as_tensor(found["norm_quantile"].sel(position="16-63").values) / wanted
    assert 1 / 1.1 < float(within.min()) <= float(within.max()) < 1.1

    x, length = x[:, :, 1:], length[:, :, 1:]  # position 0 is left out below
    step = x[1:] - x[:-1]
    close(found["growth"], (length[1:] / length[:-1]).mean((1, 2)))
    close(found["growth_geometric"], (length[1:] / length[:-1]).log().mean((1, 2)).exp())
    orthogonal = (length[:-1] ** 2 + step.norm(dim=-1) ** 2).sqrt() / length[:-1]
    close(found["growth_orthogonal"], orthogonal.mean((1, 2)))
    radial = (step * x[:-1]).sum(-1) / length[:-1]
    close(found["radial"], radial.mean((1, 2)), atol=1e-4)
    across = step - radial[..., None] * x[:-1] / length[:-1][..., None]
    close(found["tangential"], across.norm(dim=-1).mean((1, 2)), atol=1e-4)
    close(found["cos_to_final"], torch.cosine_similarity(x, x[-1:], dim=-1).mean((1, 2)))
    flat = x.flatten(1, 2)
    covariance = torch.stack([rows.mT.cov(correction=0) for rows in flat])
    close(found["effective_rank"], norms.participation_ratio(covariance), rtol=1e-4)
    logs = length.log().mean((1, 2))
    slope, _ = np.polyfit(np.arange(len(logs)), logs, 1)
    assert float(found["growth_rate"]) == pytest.approx(math.exp(slope), rel=1e-5)
    for layer in range(len(x)):  # per sequence, then averaged, as the median of an even count is the lower one
        assert float(found["median_magnitude"][layer]) == pytest.approx(
            float(torch.stack([rows.abs().flatten().median() for rows in x[layer]]).mean()), rel=1e-5
        )
    writes_add_up(any_model, found, x, kept)


def writes_add_up(model, found, x, kept):
    sublayers = shape_of(model).sublayers
    if not shape_of(model).causal:  # BERT: a norm follows each addition
        assert found["attn_write_norm"].isnull().all()
        assert found["cos_stream_mlp"].isnull().all()
        return
    for block in range(model.cfg.n_layers):
        attn = kept[f"blocks.{block}.hook_attn_out"][:, 1:].double()
        start = x[block]
        assert float(found["attn_write_norm"][block]) == pytest.approx(float(attn.norm(dim=-1).mean()), rel=1e-5)
        cosine = torch.cosine_similarity(start, attn, dim=-1).mean()
        assert float(found["cos_stream_attn"][block]) == pytest.approx(float(cosine), abs=1e-5)
        if sublayers == "attention":
            assert math.isnan(found["mlp_write_norm"][block])
            continue
        mlp = kept[f"blocks.{block}.hook_mlp_out"][:, 1:].double()
        into = start if sublayers == "parallel" else start + attn
        cosine = torch.cosine_similarity(into, mlp, dim=-1).mean()
        assert float(found["mlp_write_norm"][block]) == pytest.approx(float(mlp.norm(dim=-1).mean()), rel=1e-5)
        assert float(found["cos_stream_mlp"][block]) == pytest.approx(float(cosine), abs=1e-5)
        # Heimersheim & Turner: a stream grows at most by what is written to it.
        grown = x[block + 1].norm(dim=-1) / start.norm(dim=-1) - 1
        assert (grown <= (attn.norm(dim=-1) + mlp.norm(dim=-1)) / start.norm(dim=-1) + 1e-6).all()


def test_the_squared_norm_is_accounted_for(any_model):
    found = residual_of(any_model, random_tokens(any_model, 4, 30))
    change, parts = found["norm_squared_change"], found["norm_squared_cross"] + found["norm_squared_step"]
    scale = float((found["norm_mean"] ** 2).max())
    assert float(abs(change - parts).max()) < 1e-5 * scale


def test_the_scale_of_the_final_norm_tells_the_length(any_model):
    tokens = random_tokens(any_model, 2, 12)
    if not holds(any_model, "final_norm"):
        pytest.skip("no final norm of the last stream")
    kept = {}
    with torch.no_grad():
        any_model.run_with_hooks(
            tokens, fwd_hooks=[("ln_final.hook_scale", lambda scale, hook: kept.update(scale=scale.clone()))]
        )
    x, _ = stack_of(any_model, tokens)
    last = x[-1]
    kind = str(any_model.cfg.normalization_type)
    last = last - last.mean(-1, keepdim=True) if kind.startswith("LN") else last
    found = norms.norm_from_scale(kept["scale"].squeeze(-1).double(), any_model.cfg.d_model, any_model.cfg.eps)
    torch.testing.assert_close(found, last.norm(dim=-1), rtol=1e-4, atol=1e-4)


def test_the_final_norm_is_reported_apart(gpt2, repeated):
    found = residual_of(gpt2, repeated)
    with torch.no_grad():
        after = gpt2.ln_final(stack_of(gpt2, repeated)[0][-1].float())
    wanted = after.norm(dim=-1)[:, 4:16].mean()
    assert float(found["norm_final_mean"].sel(position="4-15")) == pytest.approx(float(wanted), rel=1e-5)
    assert float(found["norm_mean"][-1].sel(position="4-15")) > 1.5 * float(wanted)
    bare = next((k for k in available_kinds() if k.endswith("attn-only")), None)
    if bare:
        assert residual_of(build(bare), repeated)["norm_final_mean"].isnull().all()


@pytest.mark.parametrize("kind", [k for k in ("hooked", "gpt2", "llama", "gemma2", "neox") if k in available_kinds()])
def test_generation_with_a_cache_equals_the_whole_pass(kind):
    model = build(kind)
    prompt = random_tokens(model, 2, 10)
    with torch.no_grad(), metaint.attach(model, metaint.ResidualProbe()) as probe:
        out = model.generate(prompt, max_new_tokens=8, do_sample=False, stop_at_eos=False, verbose=False)
    assert len(probe.sums) == 1
    whole = residual_of(model, out[:, :-1])
    names = [name for name in whole.data_vars if name not in ("median_magnitude", "massive")]
    assert_same(probe.to_dataset(), whole, names=names, atol=1e-4)
    assert int(probe.to_dataset()["massive_position"].max()) > 9  # found among generated tokens too


def test_the_largest_magnitudes_are_found_where_they_are(gpt2):
    tokens = random_tokens(gpt2, 3, 20)

    def plant(activation, hook):
        activation = activation.clone()
        activation[1, 7, 3], activation[2, 0, 5], activation[0, 9, 3] = -5000.0, 800.0, 300.0
        return activation

    with torch.no_grad(), gpt2.hooks(fwd_hooks=[("blocks.0.hook_resid_post", plant)]):
        found = residual_of(gpt2, tokens, top=4)
    layer = found.sel(layer=1)
    assert layer["massive_value"].values[:3].tolist() == [5000.0, 800.0, 300.0]
    assert layer["massive_dimension"].values[:3].tolist() == [3, 5, 3]
    assert layer["massive_position"].values[:3].tolist() == [7, 0, 9]
    assert layer["massive_token"].values[:3].tolist() == [int(tokens[1, 7]), int(tokens[2, 0]), int(tokens[0, 9])]
    median = float(layer["median_magnitude"])
    assert layer["massive"].values[:4].tolist() == [1000 * median <= 5000, 1000 * median <= 800, False, False]
    assert found["massive_mean"].sel(layer=1, rank=1) == pytest.approx((5000 + 800 + 300) / 3)
    assert not found["massive"].sel(layer=0).any()


def test_a_massive_activation_every_sequence_has_is_listed_once(gpt2, repeated):
    def plant(activation, hook):
        activation = activation.clone()
        activation[:, 0, 4] = 3000.0 + torch.arange(len(activation))
        return activation

    with torch.no_grad(), gpt2.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", plant)]):
        found = residual_of(gpt2, repeated).sel(layer=0)
    places = list(zip(found["massive_dimension"].values, found["massive_position"].values, strict=True))
    assert places[0] == (4, 0)
    assert len(set(places)) == len(places)
    assert bool(found["massive"][0])


def test_exact_descent_lengthens_the_stream_and_random_steps_as_long_do_too():
    """Which is why growth alone is no evidence of an inner optimisation."""
    tokens = torch.randint(60, (8, 30), generator=torch.Generator().manual_seed(0))
    for random in (False, True):
        found = residual_of(Descent(2.0, random=random, parallel=True), tokens)
        assert (found["growth"] > 1.01)[0]
        assert (found["norm_squared_step"] > 0).all()
        if not random:  # a gradient is across the stream, so that the whole step goes into its length
            assert (abs(found["norm_squared_cross"]) < 1e-4 * found["norm_squared_step"]).all()
            assert (found["growth"] > 1).all()


def test_growth_over_chosen_layers(gpt2, repeated):
    found = residual_of(gpt2, repeated, growth_layers=(1, 2))
    length = stack_of(gpt2, repeated)[0].norm(dim=-1)[:, :, 1:].log().mean((1, 2))
    assert float(found["growth_rate"]) == pytest.approx(float((length[2] - length[1]).exp()), rel=1e-5)
    assert list(found.attrs["growth_layers"]) == [1, 2]
    assert found["growth_rate"].dims == ()


def test_a_wide_stream_is_sketched_and_still_right():
    model = build(available_kinds()[0], d_model=512, d_head=128)
    tokens = random_tokens(model, 8, 60)
    found = residual_of(model, tokens, positions=ALL)
    rows = stack_of(model, tokens)[0][:, :, 1:].flatten(1, 2)
    wanted = norms.participation_ratio(torch.stack([layer.mT.cov(correction=0) for layer in rows]))
    assert found["effective_rank"].values == pytest.approx(wanted.numpy(), rel=0.05)


def test_the_contract_of_names(gpt2, repeated):
    found = residual_of(gpt2, repeated)
    for name in ("norm_mean", "norm_geometric", "norm_mean_low"):
        assert found[name].dims == ("layer", "position")
    assert set(found["norm_quantile"].dims) == {"quantile", "layer", "position"}
    assert set(found["norm_histogram"].dims) == {"bin", "layer", "position"}
    block = ("growth", "attn_write_norm", "mlp_write_norm", "cos_stream_attn", "cos_stream_mlp", "radial", "tangential")
    assert all(found[name].dims == ("block",) for name in block)
    assert all(found[name].dims == ("layer",) for name in ("cos_to_final", "effective_rank"))
    assert found["massive_value"].dims == ("layer", "rank")
    assert {"massive_dimension", "massive_position", "massive_token"} <= set(found["massive_value"].coords)
    assert found["position"].values.tolist() == list(BUCKETS)
    for name in ("growth", "norm_mean", "cos_to_final"):
        inside = (found[f"{name}_low"] <= found[name] + 1e-12) & (found[name] <= found[f"{name}_high"] + 1e-12)
        assert (inside | found[name].isnull()).all()
    assert found["growth"].attrs["description"].startswith("mean over tokens")
    assert found.attrs["tokens_seen"] == 6 * 64


def test_half_precision_is_summed_in_full(gpt2, repeated):
    narrow = build(available_kinds()[0]).to(torch.bfloat16)
    found = residual_of(narrow, repeated)
    x, _ = stack_of(narrow, repeated)
    wanted = x.norm(dim=-1)[:, :, 4:16].mean((1, 2))
    assert found["norm_mean"].sel(position="4-15").values == pytest.approx(wanted.numpy(), rel=1e-5)


def test_bad_arguments_are_one_sentence(gpt2, repeated):
    with pytest.raises(InputError, match=r"^positions is 0 and top is 5: both must be at least 1\.$"):
        metaint.ResidualProbe(positions=0)
    with pytest.raises(InputError, match=r"^growth_layers is \(1, 9\): the layers are 0 to 2\.$"):
        residual_of(gpt2, repeated, growth_layers=(1, 9))


def test_a_pass_cut_short_counts_the_layers_it_reached(gpt2, repeated):
    with torch.no_grad(), metaint.attach(gpt2, metaint.ResidualProbe()) as probe:
        gpt2(repeated, stop_at_layer=1)
        gpt2(repeated)
    found = probe.to_dataset()
    whole = residual_of(gpt2, repeated)
    assert (found["norm_count"][0] == 2 * whole["norm_count"][0]).all()
    assert (found["norm_count"][2] == whole["norm_count"][2]).all()
    assert_same(found, whole, names=["norm_mean", "growth", "cos_to_final"])
