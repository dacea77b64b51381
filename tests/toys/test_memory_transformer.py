"""The simplified transformer of Bietti et al. 2023: against its code's formulas, column vectors and all."""

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
from metaint.models.inputs import watching
from metaint.models.parameters import own_parameters, place_of
from metaint.toys import memory_blocks as module
from metaint.toys.memory_transformer import memory_transformer
from tests.toys.hooked import readings, unreadable

SIZES: dict[str, Any] = {"d_vocab": 30, "n_ctx": 24, "d_model": 16}
TOKENS = torch.randint(30, (3, 12), generator=torch.Generator().manual_seed(5))
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sinusoidal": {"positions": "sinusoidal"},
    "rotary": {"positions": "rotary"},
    "scaled embeddings": {"scaled_embeddings": True},
    "unscaled scores": {"scaled_scores": False, "scaled_embeddings": True},
    "tied": {"tied": True},
    "linear": {"feed_forward": "linear"},
    "mlp": {"feed_forward": "mlp"},
    "both": {"feed_forward": "linear", "first_feed_forward": "mlp"},
    "all": {
        "positions": "rotary",
        "scaled_embeddings": True,
        "scaled_scores": False,
        "tied": True,
        "feed_forward": "mlp",
        "first_feed_forward": "linear",
        "train_embeddings": True,
    },
    "one layer": {"n_layers": 1, "feed_forward": "linear"},
    "three layers": {"n_layers": 3, "feed_forward": "mlp", "positions": "rotary"},
}
every_switch = pytest.mark.parametrize("switch", SWITCHES)


def memory(switch: str = "plain", **settings: Any) -> Any:
    return memory_transformer(**{**SIZES, "dtype": torch.float64, **SWITCHES[switch], **settings})


def heard(activation: Tensor, hook: Any) -> None:
    """A hook that only makes attention show its pattern."""


def listening(model: Any) -> Any:
    return model.hooks(fwd_hooks=[(f"blocks.{i}.attn.hook_pattern", heard) for i in range(model.cfg.n_layers)])


# ---- the reference's formulas, in its own orientation -------------------------------------------------------------


def turned(x: Tensor) -> Tensor:
    """Adjacent pairs as complex numbers, times exp(i t / 10000^(2 pair / d))."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    frequency = 10000.0 ** -(torch.arange(0, x.shape[-1], 2).double() / x.shape[-1])
    angle = torch.outer(torch.arange(x.shape[1]).double(), frequency)
    return torch.view_as_real(pairs * torch.exp(1j * angle)).flatten(-2)


def plain_logits(model: Any, tokens: Tensor) -> Tensor:
    """Every matrix as the transpose that torch's Linear would hold, applied as W h."""
    cfg, state = model.cfg, model.state_dict()
    linear = {name: value.squeeze(0).T for name, value in state.items() if ".W_" in name}
    d = cfg.d_model
    h = state["embed.weight"][tokens]
    h = h if cfg.positions == "rotary" else h + state["pos_embed.weight"][: tokens.shape[1]]
    hidden = torch.full((tokens.shape[1],) * 2, -math.inf).triu(1)
    for layer in range(cfg.n_layers):
        w_k, w_v, w_o = (linear[f"blocks.{layer}.attn.W_{name}"] for name in "KVO")
        q, k = h, F.linear(h, w_k)
        if cfg.positions == "rotary" and layer == 0:
            q, k = turned(q), turned(k)
        scores = q @ k.mT / (math.sqrt(d) if cfg.use_attn_scale else 1)
        h = h + F.linear(F.linear((scores + hidden).softmax(-1) @ h, w_v), w_o)
        inner = {name.rsplit("_", 1)[-1]: w for name, w in linear.items() if name.startswith(f"blocks.{layer}.mlp")}
        if "F" in inner:
            h = h + F.linear(h, inner["F"])
        elif inner:
            h = h + F.linear(F.linear(h, inner["in"]).relu(), inner["out"])
    logits = F.linear(h, state["unembed.weight"])
    return logits / math.sqrt(d) if cfg.tied else logits


@every_switch
def test_logits_are_those_of_the_reference(switch: str) -> None:
    model = memory(switch)
    expected = plain_logits(model, TOKENS)
    torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-12)
    with listening(model):
        torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-12)


@every_switch
def test_the_loss_is_that_of_the_next_token(switch: str) -> None:
    model = memory(switch)
    log_probabilities = model(TOKENS).log_softmax(-1)
    expected = -sum(log_probabilities[b, t, TOKENS[b, t + 1]] for b in range(3) for t in range(11)) / 33
    torch.testing.assert_close(model(TOKENS, return_type="loss"), expected)
    assert model(TOKENS, return_type=None) is None


def test_sinusoidal_positions_are_those_of_the_formula() -> None:
    table = memory("sinusoidal").W_pos
    for t, i in itertools.product(range(24), range(8)):
        angle = t / 10000 ** (2 * i / 16)
        assert table[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-15)
        assert table[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-15)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    model = memory("rotary")
    found = readings(model, torch.full((1, 12), 3))
    scores = found["blocks.0.attn.hook_rot_q"][0, :, 0] @ found["blocks.0.attn.hook_rot_k"][0, :, 0].T
    assert scores.std() > 0.1
    for lag in range(12):
        diagonal = scores.diagonal(-lag)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    later = "blocks.1.attn.hook_"
    assert torch.equal(found[f"{later}rot_q"], found[f"{later}q"])
    assert torch.equal(found[f"{later}rot_k"], found[f"{later}k"])
    assert not hasattr(model, "W_pos")


# ---- fused attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@every_switch
def test_fused_attention_gives_the_same_values_and_gradients(switch: str, dtype: torch.dtype, atol: float) -> None:
    model = memory(switch, dtype=dtype, train_embeddings=True)

    def run() -> list[Tensor]:
        model.zero_grad()
        logits = model(TOKENS)
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    fused = run()
    with listening(model):
        shown = run()
    assert len(fused) == 1 + sum(p.requires_grad for p in model.parameters())
    for ours, theirs in zip(fused, shown, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=atol, atol=atol)


HOOKS = {
    "forward": lambda point: point.add_hook(heard),
    "backward": lambda point: point.add_hook(heard, dir="bwd"),
    "torch": lambda point: point.register_forward_hook(lambda *_: None),
    "torch before": lambda point: point.register_forward_pre_hook(lambda *_: None),
    "torch backward": lambda point: point.register_full_backward_hook(lambda *_: None),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", ["hook_pattern", "hook_attn_scores"])
def test_attention_is_fused_where_nobody_listens(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[int] = []
    original = F.scaled_dot_product_attention

    def count(*args: Any, **kwargs: Any) -> Tensor:
        fused.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", count)
    model = memory()
    model(TOKENS)
    assert len(fused) == 2
    HOOKS[kind](getattr(model.blocks[0].attn, name))
    model(TOKENS, return_type="loss").backward()
    assert len(fused) == 3, "layer 0 is shown, layer 1 is fused"
    model(TOKENS, attention_mask=torch.ones_like(TOKENS))
    assert len(fused) == 3


def test_a_backward_hook_gets_the_gradient_of_the_pattern() -> None:
    model, found = memory(), []
    model.add_hook("blocks.1.attn.hook_pattern", lambda gradient, hook: found.append(gradient), dir="bwd")
    model(TOKENS, return_type="loss").backward()
    assert found[0].shape == (3, 1, 12, 12)
    assert bool((found[0] != 0).any())


# ---- hooks, audit and probes ----------------------------------------------------------------------------------------


@every_switch
def test_every_hook_fires_once(switch: str) -> None:
    model = memory(switch)
    found = readings(model, TOKENS)
    assert set(found) == set(model.hook_dict)
    assert found["blocks.0.attn.hook_q"].shape == (3, 12, 1, 16)
    assert found["blocks.0.attn.hook_pattern"].shape == (3, 1, 12, 12)
    assert ("hook_pos_embed" in found) == ("blocks.0.attn.hook_rot_q" not in found) == (model.cfg.positions != "rotary")
    for layer, kind in enumerate(model.cfg.feed_forwards):
        assert (f"blocks.{layer}.mlp.hook_post" in found) == (kind == "mlp")
        assert (f"blocks.{layer}.hook_mlp_out" in found) != model.cfg.attn_only
        if f"blocks.{layer}.hook_mlp_out" in found:
            assert bool(found[f"blocks.{layer}.hook_mlp_out"].any()) == (kind is not None)


def test_an_edit_where_there_is_no_feed_forward_is_added() -> None:
    model = memory("linear")
    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda x, hook: x + 1)]):
        found = readings(model, TOKENS)
    difference = found["blocks.0.hook_resid_post"] - found["blocks.0.hook_resid_mid"]
    torch.testing.assert_close(difference, torch.ones_like(difference))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@every_switch
def test_the_audit_finds_all_that_can_hold(switch: str, dtype: torch.dtype) -> None:
    model = memory(switch, dtype=dtype)
    found = metaint.audit(model).set_index("check")["status"].to_dict()
    assert found.pop("final_norm") == "unavailable"
    assert found.pop("edit_mlp") == ("unavailable" if model.cfg.attn_only else "holds")
    assert set(found) == set(CHECKS) - {"final_norm", "edit_mlp"}
    assert set(found.values()) == {"holds"}


@every_switch
def test_probes_read_it(switch: str) -> None:
    model = memory(switch)
    probes = [metaint.HeadProbe(), metaint.ResidualProbe(), metaint.WeightProbe(), metaint.InnerProbe()]
    scan: Any = metaint.scan(model, TOKENS, probes)
    layers = model.cfg.n_layers
    assert scan["heads/entropy"].shape == (layers, 1)
    assert bool(scan["heads/entropy"].notnull().all())
    assert bool(scan["residual/attn_write_norm"].notnull().all())
    assert bool(scan["residual/mlp_write_norm"].notnull().all()) != model.cfg.attn_only
    log_probabilities = model(TOKENS).log_softmax(-1)[:, 1:-1]  # the probe leaves position 0 out
    loss = -log_probabilities.detach().gather(-1, TOKENS[:, 2:, None]).mean()
    assert float(scan["inner/loss"][-1]) == pytest.approx(float(loss), rel=1e-9)
    keys = torch.stack([model.state_dict()[f"blocks.{i}.attn.W_K"].norm() for i in range(layers)])
    torch.testing.assert_close(torch.tensor(scan["weights/qk_norm"].values[:, 0]), keys)
    assert bool(scan["weights/full_ov_copying"].notnull().all())


def test_those_who_watch_hear_the_logits_of_a_tied_model() -> None:
    model, found = memory("tied"), []
    with watching(model) as watch:
        watch.readers.append(found.append)
        logits = model(TOKENS)
    assert torch.equal(found[0], logits)


def test_parameters_belong_to_the_parts_they_are_named_for() -> None:
    parts = {name: tuple(place_of(name)) for name in own_parameters(memory("both"))}
    expected = {"embed.weight": (None, "embedding"), "unembed.weight": (None, "unembedding")}
    expected |= {f"blocks.{i}.attn.W_{name}": (i, "attention") for i in range(2) for name in "KVO"}
    expected |= {f"blocks.0.mlp.W_{name}": (0, "mlp") for name in ("in", "out")} | {"blocks.1.mlp.W_F": (1, "mlp")}
    assert parts == expected


def test_stacked_weights_are_the_parameters() -> None:
    model = memory()
    assert torch.equal(model.W_Q, torch.eye(16).double().expand(2, 1, 16, 16))
    for name in ("W_K", "W_V", "W_O"):
        for layer in range(2):
            assert torch.equal(getattr(model, name)[layer], getattr(model.blocks[layer].attn, name))
    assert (model.W_E.shape, model.W_pos.shape, model.W_U.shape) == ((30, 16), (24, 16), (16, 30))
    shapes = {"b_Q": (2, 1, 16), "b_K": (2, 1, 16), "b_V": (2, 1, 16), "b_O": (2, 16), "b_U": (30,)}
    for name, shape in shapes.items():
        assert getattr(model, name).shape == shape
        assert not getattr(model, name).any()


# ---- padding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@every_switch
def test_padding_changes_nothing(switch: str, side: str) -> None:
    model = memory(switch)
    short, pads = TOKENS[:1, :8], torch.full((1, 4), 7)
    padded = torch.cat([pads, short] if side == "left" else [short, pads], 1)
    where = slice(4, None) if side == "left" else slice(8)
    mask = torch.zeros(2, 12, dtype=torch.long)
    mask[0, where] = 1
    mask[1] = 1
    tokens = torch.cat([padded, TOKENS[1:2]])
    logits = model(tokens, attention_mask=mask)
    torch.testing.assert_close(logits[:1, where], model(short))
    torch.testing.assert_close(logits[1:], model(TOKENS[1:2]))
    losses = [model(each, return_type="loss") for each in (short, TOKENS[1:2])]
    expected = (7 * losses[0] + 11 * losses[1]) / 18
    torch.testing.assert_close(model(tokens, return_type="loss", attention_mask=mask), expected)
    scan: Any = metaint.scan(model, padded, [metaint.HeadProbe(["entropy"])], attention_mask=mask[:1])
    bare: Any = metaint.scan(model, short, [metaint.HeadProbe(["entropy"])])
    torch.testing.assert_close(*(torch.tensor(each["heads/entropy"].values) for each in (scan, bare)))


# ---- what is drawn, and what is trained -----------------------------------------------------------------------------


def test_weights_are_drawn_as_the_docstring_says() -> None:
    state = memory("both", d_model=64, d_vocab=200, n_ctx=100).state_dict()
    for name, value in state.items():
        if "embed" in name and not name.startswith("un"):
            assert value.std().item() == pytest.approx(1, abs=0.05)
            assert value.abs().max() > 3
        else:
            inputs = 256 if name.endswith("W_out") else 64
            assert value.abs().max() <= 1 / math.sqrt(inputs)
            assert value.std().item() == pytest.approx(1 / math.sqrt(3 * inputs), rel=0.05)
            assert abs(value.mean().item()) < 0.05 / math.sqrt(inputs)


def test_scaled_and_tied_embeddings() -> None:
    plain, scaled, tied = (memory(switch).state_dict() for switch in ("plain", "scaled embeddings", "tied"))
    for name in ("embed.weight", "pos_embed.weight"):
        torch.testing.assert_close(scaled[name], plain[name] / 4, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(tied["unembed.weight"], plain["embed.weight"] / 4, atol=1e-7, rtol=1e-6)
    waves = memory("sinusoidal"), memory("sinusoidal", scaled_embeddings=True)
    torch.testing.assert_close(waves[1].W_pos, waves[0].W_pos / 4)


CHANGED = {
    "sinusoidal": {"pos_embed.weight"},
    "rotary": set(),
    "scaled embeddings": {"embed.weight", "pos_embed.weight"},
    "tied": {"unembed.weight"},
    "linear": set(),
    "mlp": set(),
    "both": set(),
}


@pytest.mark.parametrize("switch", CHANGED)
def test_a_switch_changes_only_what_it_names(switch: str) -> None:
    plain, other = memory().state_dict(), memory(switch).state_dict()
    changed = {name for name in plain if name in other and not torch.equal(plain[name], other[name])}
    assert changed == CHANGED[switch]
    first = memory("linear").state_dict()["blocks.1.mlp.W_F"]
    assert torch.equal(first, memory("both").state_dict()["blocks.1.mlp.W_F"])


@every_switch
def test_weights_depend_on_the_seed_alone(switch: str) -> None:
    state = torch.get_rng_state()
    model, again, other = (memory(switch, seed=seed) for seed in (1, 1, 2))
    single = memory(switch, seed=1, dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert torch.equal(value.float(), single.state_dict()[name])
        fixed = name == "pos_embed.weight" and model.cfg.positions == "sinusoidal"
        assert torch.equal(value, other.state_dict()[name]) == fixed


TRAINED = {
    "plain": {"blocks.0.attn.W_K", "blocks.1.attn.W_K", "blocks.1.attn.W_O"},
    "linear": {"blocks.0.attn.W_K", "blocks.1.attn.W_K", "blocks.1.attn.W_O", "blocks.1.mlp.W_F"},
    "one layer": {"blocks.0.attn.W_K", "blocks.0.attn.W_O", "blocks.0.mlp.W_F"},
    "three layers": {
        *(f"blocks.{i}.attn.W_K" for i in range(3)),
        "blocks.2.attn.W_O",
        "blocks.2.mlp.W_in",
        "blocks.2.mlp.W_out",
    },
}


@pytest.mark.parametrize("switch", TRAINED)
def test_a_step_moves_what_is_trained_and_nothing_else(switch: str) -> None:
    for settings, more in (
        ({}, set()),
        ({"train_embeddings": True}, {"embed.weight"}),
        ({"train_unembedding": True}, {"unembed.weight"}),
    ):
        model = memory(switch, **settings)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-2)
        model(TOKENS, return_type="loss").backward()
        optimizer.step()
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert moved == TRAINED[switch] | more
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == moved


def test_a_tied_unembedding_stays_when_embeddings_are_trained() -> None:
    model = memory("tied", train_embeddings=True)
    before = model.W_U.clone()
    model(TOKENS, return_type="loss").backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert torch.equal(model.W_U, before)


def test_a_few_steps_lower_the_loss() -> None:
    model = memory("linear", dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(10):
        loss = model(TOKENS, return_type="loss")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"positions": "alibi"}, "positions is 'alibi': choose one of random, sinusoidal, rotary."),
        ({"feed_forward": "gelu"}, "feed_forward is 'gelu': choose one of None, linear, mlp."),
        ({"first_feed_forward": "gelu"}, "first_feed_forward is 'gelu': choose one of None, linear, mlp."),
        ({"n_layers": 0}, "n_layers is 0: give at least 1."),
        ({"d_model": 7, "positions": "rotary"}, "d_model is 7: rotary positions need an even number."),
        (
            {"n_layers": 1, "first_feed_forward": "mlp"},
            "n_layers is 1, and first_feed_forward was given: the only layer's is feed_forward.",
        ),
        (
            {"tied": True, "train_unembedding": True},
            "train_unembedding and tied are both True: a tied unembedding is never trained, choose one.",
        ),
    ],
)
def test_what_cannot_be_built_is_said(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as error:
        memory(**settings)
    assert str(error.value) == sentence


@pytest.mark.parametrize(("tokens", "inputs"), unreadable(TOKENS))
def test_what_cannot_be_read_is_said(tokens: Tensor, inputs: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        memory()(tokens, **inputs)
