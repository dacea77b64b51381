"""WeightProbe against whole matrices, one long vector of parameters, and what Hugging Face saved."""

import math

import pytest
import torch
from safetensors.torch import load_file

import metaint
from metaint.errors import InputError
from metaint.measures import growth
from metaint.measures.composition import composition, read_factor, write_factor
from metaint.models.audit import holds
from metaint.models.folded import folded_weights
from metaint.models.parameters import own_parameters, place_of
from metaint.probes import weights
from metaint.probes.weights import PARTS, WeightProbe
from tests.builders import available_kinds, build, hf_directory
from tests.models.handmade import HandMade
from tests.probes.test_inner import assert_same

PAIRS = tuple(f"{kind}_composition{end}" for kind in "qkv" for end in ("", "_z"))
STEPS = ("step_norm", "alignment", "direction_cosine")
NATIVE = next(kind for kind in ("native-mlp-ln", "hooked") if kind in available_kinds())
BARE = next(kind for kind in ("native-attn-only", "hooked-attn-only") if kind in available_kinds())
FROM_HUB = [kind for kind in ("gpt2", "neox", "llama", "gemma2") if kind in available_kinds()]


def read(model, probe=None):
    probe = WeightProbe() if probe is None else probe
    with metaint.attach(model, probe):
        pass
    return probe.to_dataset()


def flat(tensors):
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(tensor.detach().double().flatten() for tensor in tensors)])


def perturb(model, scale=0.02):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in own_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def plain_score(circuit):
    values = torch.linalg.eigvals(circuit)
    return float(values.real.sum() / values.abs().sum())


def test_every_architecture_equals_plain_arithmetic(any_model):
    probe = WeightProbe(compare=True)
    read(any_model, probe)
    before = {name: p.detach().clone() for name, p in own_parameters(any_model).items()}
    perturb(any_model)
    found = read(any_model, probe)
    after = own_parameters(any_model)

    def chosen(named, layer=None, part=None):
        return flat(p for name, p in named.items() if part is None or place_of(name) == (layer, part))

    for layer in range(any_model.cfg.n_layers):
        for part in PARTS:
            value = found.sel(layer=layer, part=part)
            theta, new = (chosen(named, layer, part) for named in (before, after))
            delta = new - theta
            if len(new) == 0:
                assert all(value[name].isnull() for name in ("parameter_norm", *STEPS))
                continue
            assert float(value["parameter_norm"]) == pytest.approx(float(new.norm()), rel=1e-12)
            assert float(value["step_norm"]) == pytest.approx(float(delta.norm()), rel=1e-9)
            assert float(value["alignment"]) == pytest.approx(float(torch.cosine_similarity(theta, delta, 0)), abs=1e-9)
            cosine = float(torch.cosine_similarity(theta, new, 0))
            assert float(value["direction_cosine"]) == pytest.approx(cosine, abs=1e-12)
    theta, new = chosen(before), chosen(after)
    assert found.attrs["parameters"] == len(new)
    assert float(found["total_norm"]) == pytest.approx(float(new.norm()), rel=1e-12)
    assert float(found["total_step_norm"]) == pytest.approx(float((new - theta).norm()), rel=1e-9)
    assert float(found["total_direction_cosine"]) == pytest.approx(float(torch.cosine_similarity(theta, new, 0)))
    outside = float((found[["embedding_norm", "unembedding_norm"]].to_array() ** 2).sum())
    rest = float(found["total_norm_without_embeddings"]) ** 2
    assert rest + outside == pytest.approx(float(found["total_norm"]) ** 2, rel=1e-12)
    heads_are_those_of_whole_matrices(any_model, found)
    pairs_are_those_of_whole_matrices(any_model, found)


def heads_are_those_of_whole_matrices(model, found):
    letters = {letter: getattr(model, f"W_{letter}").detach().double() for letter in "QKVOEU"}
    n_heads = model.cfg.n_heads
    for layer, head in [(0, 0), (0, 1), (1, n_heads - 1)]:
        value = found.sel(layer=layer, head=head)
        query, key, values, output = (
            letters[letter][layer][head * letters[letter].shape[1] // n_heads] for letter in "QKVO"
        )
        assert float(value["qk_norm"]) == pytest.approx(float(torch.linalg.matrix_norm(query @ key.T)), rel=1e-9)
        assert float(value["ov_norm"]) == pytest.approx(float(torch.linalg.matrix_norm(values @ output)), rel=1e-9)
        assert float(value["ov_copying"]) == pytest.approx(plain_score(values @ output), abs=1e-6)
        if holds(model, "unembedding"):
            full = plain_score(letters["E"] @ values @ output @ letters["U"])
            assert float(value["full_ov_copying"]) == pytest.approx(full, abs=1e-5)
        else:
            assert value["full_ov_copying"].isnull()
    loop = letters["U"] @ letters["E"] if holds(model, "unembedding") else None
    for name, between in (("ov_copying", None), ("full_ov_copying", loop)):
        null = growth.copying_null(model.cfg.d_model, model.cfg.d_head, between)
        null = (math.nan, math.nan) if name == "full_ov_copying" and loop is None else null
        for end, wanted in zip(("mean", "std"), null, strict=True):
            assert found[f"{name}_null_{end}"].values == pytest.approx(wanted, abs=1e-9, nan_ok=True)


def pairs_are_those_of_whole_matrices(model, found):
    for name in PAIRS:
        between = found[name].sel(layer=0, layer_to=1)
        assert between.notnull().all() if holds(model, "attention_input") else between.isnull().all()
        assert found[name].sel(layer=1).isnull().all()
        assert found[name].sel(layer=0, layer_to=0).isnull().all()
    assert float(found["composition_chance"]) == pytest.approx(model.cfg.d_model**-0.5, rel=1e-12)
    if not holds(model, "attention_input"):
        return
    (_, _, value, out), (query, key, value_to, out_to) = (
        [weight.double() for weight in folded_weights(model, layer)] for layer in (0, 1)
    )
    reads = {"q": query @ key.mT, "k": key @ query.mT, "v": value_to @ out_to}
    for kind, read_by in reads.items():
        for head, head_to in [(0, 0), (1, 3), (3, 2)]:
            norm = torch.linalg.matrix_norm
            written, wanted = value[head] @ out[head], read_by[head_to]
            score = float(norm(written @ wanted) / (norm(written) * norm(wanted)))
            value_of = {"layer": 0, "head": head, "layer_to": 1, "head_to": head_to}
            assert float(found[f"{kind}_composition"].sel(value_of)) == pytest.approx(score, rel=1e-6)
            pair = composition(write_factor(value, out), read_factor(wanted[None], torch.eye(len(wanted))[None]))
            z = float(found[f"{kind}_composition_z"].sel(value_of))
            assert z == pytest.approx(float(pair.z[head, 0]), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", FROM_HUB)
def test_the_norm_is_that_of_what_hugging_face_saved(kind):
    """Which holds fused projections once, as GPT-2's bridge doesn't: its q, k and v are views into them."""
    saved = load_file(hf_directory(kind) / "model.safetensors")
    found = read(build(kind))
    assert float(found["total_norm"]) == pytest.approx(float(flat(saved.values()).norm()), rel=1e-6)
    for layer in range(2):
        inside = {name.split(f".{layer}.", 1)[1]: p for name, p in saved.items() if f".{layer}." in name}
        of_part = {
            "norm": [p for name, p in inside.items() if "norm" in name or name.startswith("ln_")],
            "attention": [p for name, p in inside.items() if "attn." in name or name.startswith("attention.")],
            "mlp": [p for name, p in inside.items() if name.startswith("mlp.")],
        }
        for part, tensors in of_part.items():
            norm = float(found["parameter_norm"].sel(layer=layer, part=part))
            assert norm == pytest.approx(float(flat(tensors).norm()), rel=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in ("gpt2", "gemma2") if kind in available_kinds()])
def test_tied_weights_are_an_embedding_and_counted_once(kind):
    model = build(kind)
    found = read(model)
    assert found["unembedding_norm"].isnull()
    tables = [p for name, p in own_parameters(model).items() if name in ("embed.weight", "pos_embed.weight")]
    assert float(found["embedding_norm"]) == pytest.approx(float(flat(tables).norm()), rel=1e-12)
    assert "tied" in found["unembedding_norm"].description


def test_parts_outside_the_blocks():
    model = build(NATIVE)
    found = read(model)
    named = own_parameters(model)
    for name, starts in (("embedding", ("embed", "pos_embed")), ("unembedding", "unembed"), ("final_norm", "ln_final")):
        wanted = flat(p for key, p in named.items() if key.startswith(starts)).norm()
        assert float(found[f"{name}_norm"]) == pytest.approx(float(wanted), rel=1e-12)
    if "bert" in available_kinds():
        found, named = read(build("bert")), own_parameters(build("bert"))
        wanted = flat(p for key, p in named.items() if "embed" in key and "unembed" not in key)
        assert float(found["embedding_norm"]) == pytest.approx(float(wanted.norm()))
        assert not found["unembedding_norm"].isnull()


def test_what_a_model_lacks_is_not_a_number():
    found = read(build(BARE))
    assert found["parameter_norm"].sel(part=["mlp", "norm"]).isnull().all()
    assert found["final_norm_norm"].isnull()
    assert not found["total_norm"].isnull()


def test_doubling_is_a_step_along_the_parameters_and_a_frozen_part_takes_none():
    model, probe = build(NATIVE), WeightProbe(compare=True)
    first = read(model, probe)
    assert all(first[name].isnull().all() for step in STEPS for name in (step, f"total_{step}"))
    frozen = [name for name in own_parameters(model) if place_of(name) == (1, "mlp")]
    with torch.no_grad():
        for name, parameter in own_parameters(model).items():
            parameter.mul_(1 if name in frozen else 2)
    probe.reset()
    found = read(model, probe)
    still = found.sel(layer=1, part="mlp")
    assert float(still["step_norm"]) == 0
    assert still["alignment"].isnull()
    moved = found.sel(layer=0)
    assert moved["step_norm"].values == pytest.approx(first["parameter_norm"].sel(layer=0).values, rel=1e-9)
    for name in ("alignment", "direction_cosine"):
        assert moved[name].values == pytest.approx(1, abs=1e-12)
    assert first["total_norm"] < found["total_norm"] < 2 * first["total_norm"]
    again = read(model, probe)
    assert float(again["total_step_norm"]) == 0


def test_without_compare_no_step_is_told_and_no_copy_kept(gpt2):
    probe = WeightProbe()
    assert not any(name.removeprefix("total_") in STEPS for name in read(gpt2, probe))
    assert not probe._previous


def test_the_last_reading_counts_and_merging_adds_nothing_up(gpt2):
    whole = read(gpt2)
    probes = [WeightProbe() for _ in range(2)]
    for probe in probes:
        read(gpt2, probe)
        assert_same(read(gpt2, probe), whole, atol=0)
    probes[0].merge_state(probes[1])
    assert_same(probes[0].to_dataset(), whole, atol=0)
    empty = WeightProbe()
    empty.merge_state(probes[0])
    assert_same(empty.to_dataset(), whole, atol=0)
    probes[0].merge_state(WeightProbe())
    assert_same(probes[0].to_dataset(), whole, atol=0)
    assert_same(read(gpt2, probes[0]), whole, atol=0)


@pytest.mark.parametrize("mine", [0, 1])
def test_a_step_survives_merging_with_a_first_reading(mine):
    model = build(NATIVE)
    probes = [WeightProbe(compare=True) for _ in range(2)]
    read(model, probes[0])
    perturb(model)
    whole = read(model, probes[0])
    read(model, probes[1])
    probes[mine].merge_state(probes[1 - mine])
    assert_same(probes[mine].to_dataset(), whole, atol=0)


def test_a_reading_follows_each_attach_and_hooks_nothing(gpt2, repeated, monkeypatch):
    readings, plain = [], WeightProbe._read_heads
    monkeypatch.setattr(WeightProbe, "_read_heads", lambda self, model: readings.append(1) or plain(self, model))
    probe = WeightProbe()
    probe.prepare(gpt2)
    assert readings == []
    with metaint.attach(gpt2, probe):
        assert readings == [1]
        assert not any(point._forward_hooks for point in gpt2.hook_dict.values())
        with torch.no_grad():
            gpt2(repeated)
    assert readings == [1]
    scan = metaint.scan(gpt2, repeated, [probe, metaint.ResidualProbe()], batch_size=2)
    assert readings == [1, 1]
    assert_same(scan["weights"].to_dataset(), probe.to_dataset(), atol=0)
    assert probe.hook_names(probe.shape) == []


def test_a_copying_head_and_its_opposite():
    model = build(BARE)
    with torch.no_grad():
        eye = torch.eye(model.cfg.d_model)[:, : model.cfg.d_head]
        if hasattr(model.blocks[0].attn, "W_V"):
            places = [(w[0], w[1]) for w in (model.blocks[0].attn.W_V, model.blocks[0].attn.W_O)]
        else:
            value, output = model.blocks[0].attn.v.weight, model.blocks[0].attn.o.weight
            d = model.cfg.d_head
            places = [(value[:d].mT, value[d : 2 * d].mT), (output[:, :d].mT, output[:, d : 2 * d].mT)]
        for place, sign in zip(places[0], (1, -1), strict=True):
            place.copy_(sign * eye)
        for place in places[1]:
            place.copy_(eye.mT)
        named = own_parameters(model)
        table, unembed = (
            next(p for name, p in named.items() if name.startswith(part)) for part in ("embed", "unembed")
        )
        unembed.copy_(table if unembed.shape == table.shape else table.mT)
    found = read(model)
    for name in ("ov_copying", "full_ov_copying"):
        assert found[name].values[0, :2] == pytest.approx([1, -1], abs=1e-9)
        assert abs(found[name].values[1]).max() < 0.9
        null = (found[f"{name}_null_mean"] + 3 * found[f"{name}_null_std"]).values
        assert null.max() < 1.1


def test_a_planted_pair_composes_through_the_gain_of_a_norm():
    """Head 2 of layer 0 writes what head 1 of layer 1 reads for its keys, once the gain has weighed it."""
    model = build("gpt2") if "gpt2" in available_kinds() else build(NATIVE)
    block, writer = model.blocks[1], model.blocks[0].attn
    gain = next(p for name, p in block.ln1.named_parameters() if name.endswith(("weight", "w")))
    with torch.no_grad():
        gain.copy_(torch.linspace(0.2, 3, len(gain)))
        written = model.W_O[0, 2].clone()
        if hasattr(writer, "W_O") and isinstance(block.attn.W_K, torch.nn.Parameter):
            block.attn.W_K[1] = (written / gain).mT
        else:
            d = model.cfg.d_head
            block.attn.k.weight[d : 2 * d].copy_(written / gain)
    found = read(model)
    z = found["k_composition_z"].sel(layer=0, layer_to=1)
    assert int(z.argmax()) == 2 * 4 + 1
    assert float(z.max()) > 4
    assert float(z.sel(head=2, head_to=1)) == float(z.max())


def test_pairs_of_many_heads_are_left_out_and_said_to_be(gpt2, monkeypatch):
    monkeypatch.setattr(weights, "MOST_HEADS", 7)
    found = read(gpt2)
    assert not set(found) & {*PAIRS, "composition_chance"}
    assert set(found.dims) == {"layer", "head", "part"}
    assert found.attrs["composition"] == "left out: 8 heads, and pairs are read of at most 7"
    monkeypatch.setattr(weights, "MOST_HEADS", 8)
    found = read(gpt2)
    assert set(PAIRS) <= set(found)
    assert "composition" not in found.attrs


def test_heads_whose_weights_fail_the_audit_are_not_a_number():
    model = HandMade("not_a_number")
    assert not holds(model, "output_sum")
    found = read(model)
    assert found["qk_norm"].notnull().all()
    assert all(found[name].isnull().all() for name in [*PAIRS, *(name for name in found if "ov_" in name)])
    assert found["parameter_norm"].isnull().all()  # all it has lies outside its blocks
    whole = read(HandMade())
    assert whole["full_ov_copying"].notnull().all()
    assert all(whole[name].sel(layer=0, layer_to=1).notnull().all() for name in PAIRS)


def test_diverged_weights_are_told_and_not_left_out():
    model = build(NATIVE)
    read(model)  # the audit, while it holds
    with torch.no_grad():
        next(p for name, p in own_parameters(model).items() if name.startswith("blocks.1.attn"))[:] = math.nan
    found = read(model)
    assert found["total_norm"].isnull()
    assert found["parameter_norm"].sel(layer=1, part="attention").isnull()
    assert found["parameter_norm"].sel(layer=0).notnull().all()
    assert found["ov_copying"].sel(layer=0).notnull().all()
    assert all(found[name].isnull().all() for name in PAIRS if name[0] != "v")


def test_one_layer_and_one_head_keep_their_dimensions():
    found = read(build(BARE, n_layers=1, n_heads=1, d_head=32))
    assert found["qk_norm"].shape == (1, 1)
    assert found["parameter_norm"].shape == (1, 3)
    assert found["k_composition_z"].shape == (1, 1, 1, 1)


def test_the_contract_of_names(gpt2):
    found = read(gpt2, WeightProbe(compare=True))
    for name in ("parameter_norm", *STEPS):
        assert found[name].dims == ("layer", "part")
    for name in ("qk_norm", "ov_norm", "ov_copying", "full_ov_copying", "ov_copying_null_mean", "ov_copying_null_std"):
        assert found[name].dims == ("layer", "head")
    assert all(found[name].dims == ("layer", "head", "layer_to", "head_to") for name in PAIRS)
    scalars = (
        "composition_chance",
        "embedding_norm",
        "unembedding_norm",
        "final_norm_norm",
        "total_norm",
        "total_norm_without_embeddings",
    )
    assert all(found[name].dims == () for name in (*scalars, *(f"total_{step}" for step in STEPS)))
    assert found["part"].values.tolist() == ["attention", "mlp", "norm"]
    for name in found:
        assert found[name].dtype == ("float32" if name in PAIRS else "float64")
        assert found[name].attrs["description"]
    assert set(found) == set(weights.DESCRIPTIONS)


def test_folded_weights_are_refused():
    model = build("gpt2") if "gpt2" in available_kinds() else build("hooked", normalization_type="LNPre")
    if hasattr(model, "enable_compatibility_mode"):
        model.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(InputError, match=r"^model has its norms folded into its weights, .* open it with raw weights"):
        read(model)


def test_quantised_weights_are_refused(gpt2, monkeypatch):
    monkeypatch.setattr(weights, "own_parameters", lambda model: {"table": torch.ones(3, dtype=torch.int8)})
    with pytest.raises(InputError, match=r"^model has quantised weights \(table\), .* open it in float32"):
        read(gpt2)


def test_quantisation_is_seen_in_the_configuration(gpt2, monkeypatch):
    if not hasattr(gpt2, "original_model"):
        pytest.skip("no Hugging Face configuration")
    monkeypatch.setattr(gpt2.original_model.config, "quantization_config", {"bits": 4}, raising=False)
    with pytest.raises(InputError, match=r"^model has quantised weights \(by its configuration\)"):
        read(gpt2)


def test_another_model_is_not_compared_with():
    probe = WeightProbe(compare=True)
    whole = read(build(NATIVE), probe)
    with pytest.raises(
        InputError, match=r"^this WeightProbe compares with what .* is \[.*64.*\], and in this .* \[.*48"
    ):
        read(build(NATIVE, d_mlp=48), probe)
    assert_same(probe.to_dataset(), whole, atol=0)
    with pytest.raises(InputError, match=r"^this WeightProbe has read a model of 2 layers x 4 heads"):
        read(build(NATIVE, n_layers=1), probe)
