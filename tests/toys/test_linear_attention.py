"""Models on vectors: against the same sums in plain loops, under the audit and probes, differentiated and trained."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import metaint
from metaint.errors import HookAuditError, InputError
from metaint.models.audit import CHECKS
from metaint.models.parameters import own_parameters, place_of
from metaint.toys.linear_attention import (
    gradient_step,
    linear_attention,
    regression_attention,
    regression_step,
    vector_transformer,
)
from metaint.toys.vector_model import VectorModel

D, T, CONTEXT = 3, 7, 6
SIZES: dict[str, Any] = {"n_ctx": 9, "n_layers": 2, "n_heads": 2, "d_model": 8, "d_mlp": 12}
MAKERS: dict[str, Callable[..., VectorModel]] = {
    "linear": lambda **s: linear_attention(D, n_layers=2, n_heads=2, **s),
    "released": lambda **s: linear_attention(D, n_layers=2, as_released=True, **s),
    "regression": lambda **s: regression_attention(D, CONTEXT, n_layers=2, n_heads=2, **s),
    "transformer": lambda **s: vector_transformer(d_in=D, d_out=D, **SIZES, **s),
}


def made(name: str) -> VectorModel:
    """A model in float64 whose weights are large enough to tell, the zeros and ones among them too."""
    model = MAKERS[name](dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def vectors(model: VectorModel, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, T, model.cfg.d_in, dtype=dtype, generator=torch.Generator().manual_seed(1))


def readings(model: VectorModel, inputs: Tensor) -> dict[str, Tensor]:
    """What each hook carried in one forward pass."""
    found: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        assert hook.name not in found
        found[hook.name] = activation.detach()

    model.run_with_hooks(inputs, fwd_hooks=[(name, keep) for name in model.hook_dict])
    return found


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-10)


# ---- against plain loops ----------------------------------------------------------------------------------------


def plain_stream(model: VectorModel, tokens: list[Tensor], keys: Callable[[int], range], scale: float) -> list[Tensor]:
    """The last stream of linear attention, sum by sum."""
    for block in model.blocks:
        heads = [
            [getattr(block.attn, f"W_{n}")[h].to(tokens[0].dtype) for n in "QKVO"] for h in range(model.cfg.n_heads)
        ]
        biases = [[getattr(block.attn, f"b_{n}")[h] for n in "QKV"] for h in range(model.cfg.n_heads)]
        added = []
        for t in range(len(tokens)):
            write = block.attn.b_O.to(tokens[0].dtype)
            for (W_Q, W_K, W_V, W_O), (b_Q, b_K, b_V) in zip(heads, biases, strict=True):
                for k in keys(t):
                    query, key = tokens[t] @ W_Q + b_Q, tokens[k] @ W_K + b_K
                    write = write + (query * key.conj()).sum() / scale * (tokens[k] @ W_V + b_V) @ W_O
            if block.ln1 is not None:
                write = F.layer_norm(write, write.shape, block.ln1.w, block.ln1.b)
            added.append(write)
        tokens = [token + write for token, write in zip(tokens, added, strict=True)]
    return tokens


def plain_tokens(sequence: Tensor) -> list[Tensor]:
    zero = torch.zeros_like(sequence[0])
    return [torch.cat([zero, sequence[t], sequence[t - 1] if t else zero]) for t in range(len(sequence))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_linear_attention_is_its_sum(dtype: torch.dtype) -> None:
    model = made("linear")
    sequences = vectors(model, dtype)
    for sequence, found in zip(sequences, model(sequences), strict=True):
        stream = plain_stream(model, plain_tokens(sequence), lambda t: range(t + 1), 1.0)
        close(found, torch.stack([token[:D] for token in stream]))


def test_the_released_model_is_its_sum() -> None:
    model = made("released")
    sequences, linear = vectors(model), model.unembed
    for sequence, found in zip(sequences, model(sequences), strict=True):
        stream = plain_stream(model, plain_tokens(sequence), lambda t: range(t + 1), (3 * D) ** 0.5)
        close(found, torch.stack([token @ linear.W_U + linear.b_U for token in stream]))


def test_regression_attention_is_its_sum() -> None:
    model = made("regression")
    batch = vectors(model)
    for tokens, found in zip(batch, model(batch), strict=True):
        stream = plain_stream(model, list(tokens), lambda t: range(CONTEXT), 1.0)
        close(found, torch.stack([-token[-1:] for token in stream]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradient_step_predicts_by_its_formula(dtype: torch.dtype) -> None:
    model = gradient_step(D, 0.3, dtype=torch.float64)
    sequences = vectors(model, dtype)
    found = model(sequences)
    for s, predicted in zip(sequences, found, strict=True):
        for last in range(T):
            expected = torch.zeros_like(s[0])
            for t in range(1, last + 1):
                expected = expected + 0.3 * s[t] * (s[t - 1].conj() * s[last]).sum()
            close(predicted[last], expected)


def test_gradient_step_is_a_step_down_the_inner_loss() -> None:
    model = gradient_step(D, 0.3, dtype=torch.float64)
    sequences = vectors(model)
    for s, predicted in zip(sequences, model(sequences), strict=True):
        W = torch.zeros(D, D, dtype=torch.float64, requires_grad=True)
        (0.5 * (s[1:] - s[:-1] @ W.T).square().sum()).backward()
        assert W.grad is not None
        close(predicted[-1], -0.3 * W.grad @ s[-1])


def test_regression_step_predicts_by_its_formula() -> None:
    model = regression_step(D, CONTEXT, 2.0, dtype=torch.float64)
    tokens = vectors(model)
    tokens[:, -1, -1] = 0
    for sequence, predicted in zip(tokens, model(tokens), strict=True):
        x, y = sequence[:-1, :-1], sequence[:-1, -1]
        query, expected = sequence[-1, :-1], torch.zeros((), dtype=torch.float64)
        for i in range(CONTEXT):
            expected = expected + 2.0 / CONTEXT * y[i] * (x[i] @ query)
        close(predicted[-1, 0], expected)
        w = torch.zeros(D, dtype=torch.float64, requires_grad=True)
        (0.5 / CONTEXT * (y - x @ w).square().sum()).backward()
        assert w.grad is not None
        close(predicted[-1, 0], -2.0 * w.grad @ query)


def test_the_transformer_is_the_one_written_out() -> None:
    model = made("transformer")
    inputs, W = vectors(model), dict(model.named_parameters())

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], W[f"{name}.w"], W[f"{name}.b"])

    x = inputs @ W["project.W_in"] + W["project.b_in"] + W["pos_embed.table"][:T]
    for layer in range(2):
        block = f"blocks.{layer}"
        normed, write = norm(f"{block}.ln1", x), W[f"{block}.attn.b_O"]
        for h in range(2):
            q, k, v = (normed @ W[f"{block}.attn.W_{n}"][h] + W[f"{block}.attn.b_{n}"][h] for n in "QKV")
            write = write + F.scaled_dot_product_attention(q, k, v, is_causal=True) @ W[f"{block}.attn.W_O"][h]
        x = x + write
        hidden = torch.relu(norm(f"{block}.ln2", x) @ W[f"{block}.mlp.W_in"] + W[f"{block}.mlp.b_in"])
        x = x + hidden @ W[f"{block}.mlp.W_out"] + W[f"{block}.mlp.b_out"]
    close(model(inputs), norm("ln_final", x) @ W["unembed.W_U"] + W["unembed.b_U"])


@pytest.mark.parametrize("name", ["linear", "released", "transformer"])
def test_predictions_depend_on_nothing_later(name: str) -> None:
    model = made(name)
    inputs = vectors(model)
    torch.testing.assert_close(model(inputs)[:, :4], model(inputs[:, :4]))


def test_the_query_of_a_regression_is_no_key() -> None:
    model = made("regression")
    tokens = vectors(model)
    other = tokens.clone()
    other[:, -1] += 1
    assert torch.equal(model(tokens)[:, :-1], model(other)[:, :-1])
    assert not torch.equal(model(tokens)[:, -1], model(other)[:, -1])


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


# ---- derivatives ------------------------------------------------------------------------------------------------


def effective_matrices(predict: Callable[[Tensor], Tensor], sequences: Tensor) -> Tensor:
    """d prediction(T) / d s_T at the last position [batch, out, d], by vectorised forward derivatives."""
    tangents = torch.zeros(D, *sequences.shape, dtype=sequences.dtype)
    for i in range(D):
        tangents[i, :, -1, i] = 1
    columns = torch.func.vmap(lambda t: torch.func.jvp(lambda x: predict(x)[:, -1], (sequences,), (t,))[1])(tangents)
    return columns.movedim(0, -1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_effective_matrix_of_a_gradient_step(dtype: torch.dtype) -> None:
    model = gradient_step(D, 0.3, dtype=torch.float64)
    sequences = vectors(model, dtype)
    found = readings(model, sequences)
    held: list[Any] = [(f"blocks.0.attn.{name}", lambda _, hook: found[hook.name]) for name in ("hook_k", "hook_v")]
    whole = effective_matrices(model, sequences)
    applied = effective_matrices(lambda x: model.run_with_hooks(x, fwd_hooks=held), sequences)
    for s, J, J_held in zip(sequences, whole, applied, strict=True):
        step = torch.zeros(D, D, dtype=dtype)
        for t in range(1, T):
            step = step + 0.3 * torch.outer(s[t], s[t - 1].conj())
        close(J_held, step)
        close(J, step + 0.3 * (s[-2].conj() * s[-1]).sum() * torch.eye(D, dtype=dtype))


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


def test_weights_are_drawn_as_the_docstrings_say() -> None:
    linear = linear_attention(10, n_layers=2, as_released=True)
    for name, parameter in linear.named_parameters():
        if ".ln1." in name:
            assert bool((parameter == float(name.endswith("w"))).all())
        else:
            assert parameter.abs().max().item() <= 30**-0.5
            assert parameter.abs().max().item() > 0.8 * 30**-0.5
    regression = regression_attention(20, 9, n_layers=2, n_heads=4)
    assert regression.W_V.std().item() == pytest.approx((0.001 / 21) ** 0.5, rel=0.05)
    assert regression.W_O.std().item() == pytest.approx((0.001 / 84) ** 0.5, rel=0.05)
    transformer = vector_transformer(d_in=2, d_out=2, **{**SIZES, "d_model": 64, "n_ctx": 100})
    assert transformer.pos_embed.table.std().item() == pytest.approx(1 / 8, rel=0.05)


def test_what_only_picks_coordinates_is_no_parameter() -> None:
    model = linear_attention(D)
    assert set(own_parameters(model)) == {f"blocks.0.attn.W_{n}" for n in "QKVO"}
    assert model.W_Q.shape == (1, 1, 3 * D, 3 * D)
    assert not model.b_O.any()
    parts = {name: place_of(name) for name in own_parameters(made("transformer"))}
    kinds = {name: part.kind for name, part in parts.items() if part.layer is None}
    assert kinds == {
        **dict.fromkeys(("project.W_in", "project.b_in", "pos_embed.table"), "embedding"),
        **dict.fromkeys(("unembed.W_U", "unembed.b_U"), "unembedding"),
        **dict.fromkeys(("ln_final.w", "ln_final.b"), "norm"),
    }


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: linear_attention(0), "d is 0: give at least 1."),
        (lambda: gradient_step(0, 0.1), "d is 0: give at least 1."),
        (lambda: linear_attention(2, n_heads=0), "n_heads is 0: give at least 1."),
        (lambda: regression_attention(2, 0), "context is 0: give at least 1."),
        (lambda: vector_transformer(d_in=2, d_out=0, **SIZES), "d_out is 0: give at least 1."),
        (
            lambda: vector_transformer(d_in=2, d_out=2, **{**SIZES, "d_model": 9}),
            "d_model is 9: give a multiple of the 2 heads.",
        ),
    ],
)
def test_what_cannot_be_built_is_said(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert str(error.value) == sentence


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
