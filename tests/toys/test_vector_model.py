"""Every model on vectors under hooks, audit and probes, differentiated, trained, and given bad input."""

from typing import Any

import pytest
import torch
from torch import Tensor

import metaint
from metaint.errors import HookAuditError, InputError
from metaint.models.audit import CHECKS
from metaint.toys.linear_attention import linear_attention, vector_transformer
from tests.toys.hooked import readings
from tests.toys.vector_models import MAKERS, SIZES, D, T, close, made, plain_tokens, vectors

# ---- hooks, audit and probes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_every_hook_fires_once_with_what_its_name_says(name: str) -> None:
    model = made(name)
    inputs = vectors(model)
    found = readings(model, inputs)
    assert set(found) == set(model.hook_dict)
    heads, d_model = model.cfg.n_heads, model.cfg.d_model
    assert found["hook_embed"].shape == (2, T, d_model)
    for layer in range(2):
        block = f"blocks.{layer}"
        assert found[f"{block}.attn.hook_q"].shape == (2, T, heads, model.cfg.d_head)
        assert found[f"{block}.attn.hook_pattern"].shape == (2, heads, T, T)
        assert found[f"{block}.hook_resid_post"].shape == (2, T, d_model)
        if name != "transformer":
            scores, pattern = (found[f"{block}.attn.hook_{hook}"] for hook in ("attn_scores", "pattern"))
            assert torch.equal(scores, pattern)
    if name in ("linear", "released"):
        assert torch.equal(found["hook_embed"][0], torch.stack(plain_tokens(inputs[0])))
    if name == "regression":
        assert torch.equal(found["hook_embed"], inputs)


@pytest.mark.parametrize("hook", ["hook_pattern", "hook_z", "hook_attn_scores", "hook_q", "hook_k", "hook_v"])
@pytest.mark.parametrize("name", MAKERS)
def test_edits_take_effect_and_leave_no_trace(name: str, hook: str) -> None:
    model = made(name)
    inputs = vectors(model)
    before = model(inputs)
    for layer in range(2):
        edited = model.run_with_hooks(inputs, fwd_hooks=[(f"blocks.{layer}.attn.{hook}", lambda x, hook: 0.5 * x)])
        assert (edited - before).abs()[:, -1].max() > 1e-4
    assert torch.equal(model(inputs), before)
    out, cache = model.run_with_cache(inputs)
    assert torch.equal(out, before)
    assert set(cache) == set(model.hook_dict)
    assert not any(point._forward_hooks for point in model.hook_dict.values())


STATUSES = {
    "linear": {
        "pattern_rows": "fails",
        "pattern_from_scores": "fails",
        "final_norm": "unavailable",
        "edit_mlp": "unavailable",
    },
    "transformer": {},
}
STATUSES["released"] = STATUSES["linear"]
STATUSES["regression"] = {**STATUSES["linear"], "pattern_causal": "unavailable"}


@pytest.mark.parametrize("name", MAKERS)
def test_the_audit_finds_what_the_docstring_says(name: str) -> None:
    found = metaint.audit(made(name)).set_index("check")["status"].to_dict()
    # They take vectors, which nothing unembeds, and no attention_mask.
    without = dict.fromkeys(["unembedding", "attention_mask", "left_padding"], "unavailable")
    assert found == dict.fromkeys(CHECKS, "holds") | STATUSES[name] | without


@pytest.mark.parametrize("name", MAKERS)
def test_a_residual_probe_reads_vectors_and_ids(name: str) -> None:
    model = made(name)
    inputs = vectors(model)
    with metaint.attach(model, metaint.ResidualProbe()) as probe:
        for _ in range(2):
            model(inputs)
    data, found = probe.to_dataset(), readings(model, inputs)
    assert data.attrs["tokens_seen"] == 2 * inputs[..., 0].numel()
    for layer in range(2):
        writes = found[f"blocks.{layer}.hook_attn_out"][:, 1:].norm(dim=-1).mean()
        assert float(data["attn_write_norm"][layer]) == pytest.approx(float(writes), rel=1e-6)
    first = found["blocks.1.hook_resid_post"][:, 0].norm(dim=-1).mean()
    assert float(data["norm_mean"][-1, 0]) == pytest.approx(float(first), rel=1e-6)
    ids = torch.arange(2 * T).view(2, T)
    data = metaint.scan(model, ids, [metaint.ResidualProbe()])["residual"].to_dataset()
    embedded = readings(model, model.embed(ids))["blocks.1.hook_resid_post"][:, 0].norm(dim=-1).mean()
    assert float(data["norm_mean"][-1, 0]) == pytest.approx(float(embedded), rel=1e-6)


def test_a_head_probe_reads_a_softmax_and_refuses_a_linear_pattern() -> None:
    model = made("transformer")
    with metaint.attach(model, metaint.HeadProbe(["previous_token", "entropy"])) as probe:
        model(vectors(model))
    pattern = readings(model, vectors(model))["blocks.1.attn.hook_pattern"]
    expected = pattern.diagonal(-1, 2, 3)[..., 1:].mean((0, 2))  # key 0 is no target of this measure
    torch.testing.assert_close(torch.tensor(probe.to_dataset()["previous_token"].values)[1], expected)
    with pytest.raises(HookAuditError, match="pattern_rows"), metaint.attach(made("linear"), metaint.HeadProbe()):
        pass
    with pytest.raises(HookAuditError, match="W_U"):
        metaint.scan(model, torch.zeros(1, 4, dtype=torch.long), [metaint.InnerProbe()])


def test_ids_stand_for_the_same_vectors_in_every_model_of_a_width() -> None:
    models = [linear_attention(D, seed=1), vector_transformer(d_in=D, d_out=1, **SIZES)]
    assert torch.equal(models[0].embed.vectors, models[1].embed.vectors)
    assert models[0].embed.vectors.norm(dim=-1).mean().item() == pytest.approx(1, abs=0.2)


# ---- derivatives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_forward_and_backward_derivatives_agree_through_hooks(name: str) -> None:
    model = made(name)
    inputs = vectors(model)
    hooks: list[Any] = [
        ("blocks.0.attn.hook_z", lambda z, hook: 0.5 * z),
        ("blocks.1.hook_resid_pre", lambda x, hook: None),
    ]

    def last(sequence: Tensor) -> Tensor:
        return model.run_with_hooks(sequence[None], fwd_hooks=hooks)[0, -1, 0]

    gradients = torch.func.vmap(torch.func.grad(last))(inputs)
    leaf = inputs.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model.run_with_hooks(leaf, fwd_hooks=hooks)[:, -1, 0].sum(), leaf)
    close(gradients, expected)
    direction = vectors(model).flip(0)
    for sequence, tangent, gradient in zip(inputs, direction, gradients, strict=True):
        close(torch.func.jvp(last, (sequence,), (tangent,))[1], (gradient * tangent).sum())


# ---- training, seeds and bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_reach_every_parameter(name: str) -> None:
    model = made(name)
    model(vectors(model))[:, -2:].square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert bool(parameter.grad.isfinite().all())
        # A bias of the keys changes no softmax.
        idle = name == "transformer" and parameter_name.endswith("b_K")
        assert bool((parameter.grad.abs() > 1e-12).any()) != idle, parameter_name


@pytest.mark.parametrize(
    ("name", "lr"), [("linear", 0.01), ("released", 0.01), ("regression", 0.01), ("transformer", 0.01)]
)
def test_a_few_steps_lower_the_loss(name: str, lr: float) -> None:
    model = MAKERS[name]()
    inputs = vectors(model, torch.float32)
    targets = -inputs[:, :, :1] if name == "regression" else inputs.roll(1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    for _ in range(40):
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", MAKERS)
def test_weights_depend_on_the_seed_alone(name: str) -> None:
    state = torch.get_rng_state()
    model, same, other = (MAKERS[name](seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    weights = model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in same.state_dict().items())
    assert not torch.equal(model.W_Q, other.W_Q)
    other.load_state_dict(weights)
    inputs = vectors(model, torch.float32)
    assert torch.equal(model(inputs), other(inputs))


@pytest.mark.parametrize(
    ("inputs", "options", "sentence"),
    [
        (torch.zeros(2, 10, D), {}, "inputs is (2, 10, 3): give vectors [batch, 1 to 9 positions, 3]."),
        (torch.zeros(2, 4, 2), {}, "inputs is (2, 4, 2): give vectors [batch, 1 to 9 positions, 3]."),
        (torch.zeros(4, D), {}, "inputs is (4, 3): give vectors [batch, 1 to 9 positions, 3]."),
        (
            torch.zeros(2, 4, D, dtype=torch.complex64),
            {},
            "inputs is torch.complex64, and the model computes in torch.float32: convert one of them.",
        ),
        (torch.zeros(2, 4, D), {"return_type": "loss"}, "return_type is 'loss': choose \"logits\" or None."),
    ],
)
def test_what_cannot_be_read_is_said(inputs: Tensor, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as error:
        MAKERS["transformer"]()(inputs, **options)
    assert str(error.value) == sentence


def test_a_pass_may_give_nothing() -> None:
    model = MAKERS["linear"]()
    assert model(vectors(model, torch.float32), return_type=None) is None
