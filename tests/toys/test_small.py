"""The small transformer: against the same model written out plainly, under the audit, scanned, scaled and trained."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import metaint
from metaint.errors import InputError
from metaint.models.audit import CHECKS
from metaint.models.describe import shape_of
from metaint.models.parameters import own_parameters, place_of
from metaint.toys.small import SmallTransformer, small_transformer
from tests.toys.hooked import readings, unreadable

SIZES: dict[str, Any] = {"n_layers": 2, "n_heads": 4, "d_model": 16, "d_mlp": 24, "d_vocab": 40, "n_ctx": 32}
PLACEMENTS = ("pre", "output", "post")
TOKENS = torch.randint(40, (3, 12), generator=torch.Generator().manual_seed(5))


def small(norm: Any, **settings: Any) -> SmallTransformer:
    """A model in float64 whose every parameter is random: gains about 1, the rest with std 0.25."""
    model = small_transformer(norm=norm, **{**SIZES, "dtype": torch.float64, **settings})
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        noise = 0.25 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (noise + (place_of(name).kind == "norm" and name.endswith(".w"))).to(parameter.dtype)
    return model


# ---- the same model, written out plainly ------------------------------------------------------------------------


def plain_logits(
    weights: dict[str, Tensor], norm: str, act: Any, gated: bool, tokens: Tensor, parallel: bool = False
) -> Tensor:
    def layer_norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.w"], weights.get(f"{name}.b"))

    def bias(name: str) -> Tensor | float:
        return weights.get(name, 0.0)

    def attention(block: str, x: Tensor) -> Tensor:
        heads = []
        for h in range(SIZES["n_heads"]):
            q, k, v = (
                x @ weights[f"{block}.attn.W_{n}"][h] + (weights[f"{block}.attn.b_{n}"][h] if biased else 0.0)
                for n in "QKV"
            )
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            heads.append(z @ weights[f"{block}.attn.W_O"][h])
        return sum(heads) + bias(f"{block}.attn.b_O")

    def mlp(block: str, x: Tensor) -> Tensor:
        inner = x @ weights[f"{block}.mlp.W_in"] + bias(f"{block}.mlp.b_in")
        inner = act(x @ weights[f"{block}.mlp.W_gate"]) * inner if gated else act(inner)
        return inner @ weights[f"{block}.mlp.W_out"] + bias(f"{block}.mlp.b_out")

    biased = "blocks.0.attn.b_Q" in weights
    x = weights["embed.weight"][tokens] + weights["pos_embed.weight"][: tokens.shape[1]]
    for layer in range(SIZES["n_layers"]):
        block, start = f"blocks.{layer}", x
        for sublayer, name in ((attention, "ln1"), (mlp, "ln2")):
            if parallel:
                x = x + sublayer(block, layer_norm(f"{block}.{name}", start))
            elif norm == "pre":
                x = x + sublayer(block, layer_norm(f"{block}.{name}", x))
            elif norm == "output":
                x = x + layer_norm(f"{block}.{name}", sublayer(block, x))
            else:
                x = layer_norm(f"{block}.{name}", x + sublayer(block, x))
    x = layer_norm("ln_final", x) if "ln_final.w" in weights else x
    return x @ weights["unembed.weight"].T


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("act", "function"), [("relu", F.relu), ("gelu", F.gelu)])
@pytest.mark.parametrize("norm", PLACEMENTS)
def test_logits_are_those_of_the_model_written_out(norm: str, act: Any, function: Any, gated: bool) -> None:
    model = small(norm, act=act, gated=gated)
    expected = plain_logits(model.state_dict(), norm, function, gated, TOKENS)
    torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_parallel_logits_are_those_of_the_model_written_out(gated: bool, biases: bool) -> None:
    model = small("pre", gated=gated, biases=biases, parallel=True)
    expected = plain_logits(model.state_dict(), "pre", F.relu, gated, TOKENS, parallel=True)
    torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("norm", PLACEMENTS)
def test_without_biases_and_with_either_final_norm(norm: str, final_norm: bool) -> None:
    model = small(norm, biases=False, final_norm=final_norm)
    names = dict(model.named_parameters())
    assert not any(name.rsplit(".", 1)[-1].startswith("b") for name in names)
    assert ("ln_final.w" in names) == final_norm
    assert not model.b_Q.any()
    assert not model.b_U.any()
    torch.testing.assert_close(model(TOKENS), plain_logits(model.state_dict(), norm, F.relu, False, TOKENS))


def test_a_final_norm_comes_with_pre_and_output_by_default() -> None:
    assert [small_transformer(norm=norm, **SIZES).ln_final is not None for norm in PLACEMENTS] == [True, True, False]


# ---- hooks, audit and probes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("norm", PLACEMENTS)
def test_every_hook_fires_once_with_what_its_name_says(norm: str, gated: bool) -> None:
    model = small(norm, gated=gated)
    found = readings(model, TOKENS)
    assert set(found) == set(model.hook_dict)
    assert found["blocks.1.attn.hook_q"].shape == (3, 12, 4, 4)
    assert found["blocks.1.attn.hook_pattern"].shape == (3, 4, 12, 12)
    assert found["blocks.1.mlp.hook_post"].shape == (3, 12, 24)
    assert found["blocks.1.ln1.hook_scale"].shape == (3, 12, 1)
    assert ("blocks.0.mlp.hook_pre_linear" in found) == gated
    pattern = found["blocks.0.attn.hook_attn_scores"].softmax(-1)
    torch.testing.assert_close(found["blocks.0.attn.hook_pattern"], pattern)
    for part in ("attn", "mlp"):
        raw, added = found[f"blocks.0.{part}.hook_out"], found[f"blocks.0.hook_{part}_out"]
        assert torch.equal(raw, added) == (norm != "output")


def test_parallel_sublayers_read_the_stream_before_the_block() -> None:
    model = small("pre", parallel=True)
    assert shape_of(model).sublayers == "parallel"
    found = readings(model, TOKENS)
    assert set(found) == set(model.hook_dict)
    assert not any(name.endswith("hook_resid_mid") for name in found)
    before = found["blocks.1.hook_resid_pre"]
    for norm in ("ln1", "ln2"):
        expected = F.layer_norm(before, before.shape[-1:])
        torch.testing.assert_close(found[f"blocks.1.{norm}.hook_normalized"], expected)
    assert (metaint.audit(model)["status"] == "holds").all()


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("norm", PLACEMENTS)
def test_the_audit_finds_all_that_can_hold(norm: str, gated: bool, biases: bool) -> None:
    table = metaint.audit(small(norm, gated=gated, biases=biases)).set_index("check")
    # After a post-norm what a block writes does not add up or reach later heads, and there is no final norm.
    missing = {"attention_input", "residual", "final_norm"} if norm == "post" else set()
    expected = {check: "unavailable" if check in missing else "holds" for check in CHECKS}
    assert table["status"].to_dict() == expected
    if norm == "post":
        assert "post-norm" in table["note"]["residual"]
        assert table["note"]["final_norm"] == "The model has no final norm."


def test_a_final_norm_after_post_norm_is_audited() -> None:
    table = metaint.audit(small("post", final_norm=True)).set_index("check")
    assert (table["status"].drop(["attention_input", "residual"]) == "holds").all()


@pytest.mark.parametrize("norm", PLACEMENTS)
def test_the_fresh_model_passes_the_audit_in_float32(norm: str) -> None:
    statuses = metaint.audit(small_transformer(norm=norm, **SIZES))["status"]
    assert (statuses == "fails").sum() == 0


@pytest.mark.parametrize(("norm", "parallel"), [("pre", False), ("pre", True), ("output", False)])
def test_scans_read_heads_stream_and_inner_loss(norm: str, parallel: bool) -> None:
    model = small(norm, parallel=parallel)
    probes = [metaint.HeadProbe(), metaint.ResidualProbe(), metaint.InnerProbe()]
    scan = metaint.scan(model, TOKENS, probes)
    assert scan.attrs["model"] == f"small-{norm}"
    assert scan["heads/entropy"].shape == (2, 4)
    assert bool(scan["heads/entropy"].notnull().all())
    for name in ("attn_write_norm", "mlp_write_norm"):
        assert bool(scan[f"residual/{name}"].notnull().any())
    with torch.no_grad():
        log_probabilities = model(TOKENS).log_softmax(-1)[:, 1:-1]  # the probe leaves position 0 out
    loss = -log_probabilities.gather(-1, TOKENS[:, 2:, None]).mean()
    assert float(scan["inner/loss"][-1]) == pytest.approx(float(loss), rel=1e-6)


def test_scans_of_post_norm_leave_out_what_does_not_add_up() -> None:
    model = small("post")
    scan = metaint.scan(model, TOKENS, [metaint.HeadProbe(), metaint.ResidualProbe()])
    assert bool(scan["heads/entropy"].notnull().all())
    assert bool(scan["residual/norm_mean"].notnull().any())
    assert bool(scan["residual/attn_write_norm"].isnull().all())
    scan = metaint.scan(model, TOKENS, [metaint.InnerProbe()])
    assert bool(scan["inner/loss"].notnull().all())


def test_scaled_weights_belong_to_the_parts_they_are_named_for() -> None:
    model = small("pre", gated=True)
    parts = {name: place_of(name) for name in own_parameters(model)}
    assert set(parts) == set(dict(model.named_parameters()))
    kinds = {
        "embed.weight": (None, "embedding"),
        "pos_embed.weight": (None, "embedding"),
        "unembed.weight": (None, "unembedding"),
        "ln_final.w": (None, "norm"),
        "ln_final.b": (None, "norm"),
    }
    for layer in range(2):
        block = f"blocks.{layer}"
        kinds |= {f"{block}.ln{i}.{name}": (layer, "norm") for i in (1, 2) for name in "wb"}
        kinds |= {f"{block}.attn.{kind}_{name}": (layer, "attention") for kind in "Wb" for name in "QKVO"}
        kinds |= {f"{block}.mlp.{name}": (layer, "mlp") for name in ("W_in", "W_gate", "b_in", "W_out", "b_out")}
    assert {name: tuple(part) for name, part in parts.items()} == kinds


def test_stacked_weights_are_the_parameters() -> None:
    model = small("pre")
    assert model.W_Q.shape == model.W_K.shape == model.W_V.shape == (2, 4, 16, 4)
    assert model.W_O.shape == (2, 4, 4, 16)
    assert model.b_Q.shape == (2, 4, 4)
    assert model.b_O.shape == (2, 16)
    assert torch.equal(model.W_O[1], model.blocks[1].attn.W_O)
    assert (model.W_E.shape, model.W_pos.shape, model.W_U.shape) == ((40, 16), (32, 16), (16, 40))


# ---- degrees of homogeneity -------------------------------------------------------------------------------------

DEGREES = {
    ("pre", False): {"scores": 4, "attn": 3, "mlp": 3, "attn_added": 3, "mlp_added": 3, "stream": 3},
    ("pre", True): {"scores": 4, "attn": 3, "mlp": 5, "attn_added": 3, "mlp_added": 5, "stream": 5},
    ("output", False): {"scores": 4, "attn": 3, "mlp": 3, "attn_added": 1, "mlp_added": 1, "stream": 1},
    ("output", True): {"scores": 4, "attn": 3, "mlp": 5, "attn_added": 1, "mlp_added": 1, "stream": 1},
    ("post", False): {"scores": 4, "attn": 3, "mlp": 3, "attn_added": 3, "mlp_added": 3, "stream": 1},
    ("post", True): {"scores": 4, "attn": 3, "mlp": 5, "attn_added": 3, "mlp_added": 5, "stream": 1},
}
HOOKS = {
    "scores": "attn.hook_attn_scores",
    "attn": "attn.hook_out",
    "mlp": "mlp.hook_out",
    "attn_added": "hook_attn_out",
    "mlp_added": "hook_mlp_out",
    "stream": "hook_resid_post",
}


def scaled_readings(model: SmallTransformer, c: float) -> dict[str, Tensor]:
    large = copy.deepcopy(model)
    for parameter in large.parameters():
        parameter.data *= c
    return readings(large, TOKENS)


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize(("norm", "gated"), DEGREES)
def test_activations_grow_with_all_parameters_by_their_degree(norm: str, gated: bool, act: Any) -> None:
    model = small(norm, act=act, gated=gated)
    below, above = (scaled_readings(model, c) for c in (1e3, 1e4))

    def slope(name: str) -> float:
        finite = below[name].isfinite()  # scores of hidden keys are -inf
        return math.log10(above[name][finite].norm() / below[name][finite].norm())

    assert slope("hook_embed") == pytest.approx(1)
    for layer, (kind, degree) in itertools.product(range(2), DEGREES[norm, gated].items()):
        assert slope(f"blocks.{layer}.{HOOKS[kind]}") == pytest.approx(degree, abs=0.02), (layer, kind)


@pytest.mark.parametrize("norm", PLACEMENTS)
def test_with_queries_and_keys_alone_scores_grow_by_their_square(norm: str) -> None:
    model = small(norm)
    before = readings(model, TOKENS)
    with metaint.scaled(model, 8.0, "attention"):
        after = readings(model, TOKENS)
    name = "blocks.0.attn.hook_attn_scores"
    torch.testing.assert_close(after[name], 64 * before[name])


# ---- padding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("norm", PLACEMENTS)
def test_padding_changes_nothing(norm: str, side: str) -> None:
    model = small(norm)
    short, long = TOKENS[:1, :8], TOKENS[1:2]
    pads = torch.full((1, 4), 7)
    padded = torch.cat([pads, short] if side == "left" else [short, pads], 1)
    where = slice(4, None) if side == "left" else slice(8)
    mask = torch.zeros(2, 12, dtype=torch.long)
    mask[0, where] = 1
    mask[1] = 1
    tokens = torch.cat([padded, long])
    logits = model(tokens, attention_mask=mask)
    torch.testing.assert_close(logits[:1, where], model(short))
    torch.testing.assert_close(logits[1:], model(long))
    losses = model(short, return_type="loss"), model(long, return_type="loss")
    expected = (7 * losses[0] + 11 * losses[1]) / 18
    torch.testing.assert_close(model(tokens, return_type="loss", attention_mask=mask), expected)
    pattern = readings(model, tokens, attention_mask=mask)["blocks.0.attn.hook_pattern"]
    assert not pattern[0][:, where][..., mask[0] == 0].any()
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_probes_hear_of_padding(side: str) -> None:
    model, pads = small("output"), torch.full((3, 4), 7)
    padded = torch.cat([pads, TOKENS] if side == "left" else [TOKENS, pads], 1)
    mask = torch.cat([pads * 0, TOKENS * 0 + 1] if side == "left" else [TOKENS * 0 + 1, pads * 0], 1)
    expected = metaint.scan(model, TOKENS, [metaint.HeadProbe(), metaint.ResidualProbe()])
    found = metaint.scan(model, padded, [metaint.HeadProbe(), metaint.ResidualProbe()], attention_mask=mask)
    for name in ("heads/entropy", "heads/previous_token", "residual/norm_mean"):
        torch.testing.assert_close(
            torch.tensor(found[name].values), torch.tensor(expected[name].values), equal_nan=True
        )


# ---- training, seeds and bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("norm", PLACEMENTS)
def test_gradients_reach_every_parameter_also_beside_padding(norm: str, gated: bool) -> None:
    model = small(norm, gated=gated)
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    model(TOKENS, return_type="loss", attention_mask=mask).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all()), name
        # A bias of the keys adds the same to all scores of a query, which changes no pattern.
        assert bool((parameter.grad.abs() > 1e-12).any()) != name.endswith("b_K"), name


@pytest.mark.parametrize("norm", PLACEMENTS)
def test_a_few_steps_lower_the_loss(norm: Any) -> None:
    model = small_transformer(norm=norm, **SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(TOKENS, return_type="loss")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(40), abs=0.5)
    assert losses[-1] < losses[0] - 0.3


def test_weights_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    model, same, other = (small_transformer(norm="pre", seed=seed, **SIZES) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in same.state_dict().items())
    assert not torch.equal(model.W_E, other.W_E)


def test_weights_are_drawn_as_the_docstring_says() -> None:
    model = small_transformer(norm="post", **{**SIZES, "d_model": 64, "d_mlp": 128, "d_vocab": 200, "gated": True})
    for name, parameter in model.named_parameters():
        kind = name.rsplit(".", 1)[-1]
        if kind == "w" or kind.startswith("b"):
            assert bool((parameter == float(kind == "w")).all()), name
        else:
            std = 0.02 / 2 if kind in ("W_O", "W_out") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.1), name


def test_states_can_be_kept_and_loaded() -> None:
    model, other = small("output"), small_transformer(norm="output", dtype=torch.float64, **SIZES)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(TOKENS), other(TOKENS))
    assert model(TOKENS, return_type=None) is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"norm": "rms"}, "norm is 'rms': choose one of pre, output, post."),
        ({"act": "tanh"}, "act is 'tanh': choose one of relu, gelu."),
        ({"n_layers": 0}, "n_layers is 0: give at least 1."),
        ({"d_model": 18}, "d_model is 18: give a multiple of the 4 heads."),
        ({"norm": "post", "parallel": True}, "parallel is True, and norm is 'post': only \"pre\" has a parallel form."),
    ],
)
def test_what_cannot_be_built_is_said(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as error:
        small_transformer(**{"norm": "pre", **SIZES, **settings})
    assert str(error.value) == sentence


@pytest.mark.parametrize(("tokens", "inputs"), unreadable(TOKENS))
def test_what_cannot_be_read_is_said(tokens: Tensor, inputs: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        small("pre")(tokens, **inputs)
