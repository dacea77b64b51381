"""Models on vectors against the same sums in plain loops, and their weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metaint.errors import InputError
from metaint.models.parameters import own_parameters, place_of
from metaint.toys.linear_attention import (
    gradient_step,
    linear_attention,
    regression_attention,
    regression_step,
    vector_transformer,
)
from metaint.toys.vector_model import VectorModel
from tests.toys.hooked import readings
from tests.toys.vector_models import CONTEXT, SIZES, D, T, close, made, plain_tokens, vectors

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


# ---- weights, and what can't be built -------------------------------------------------------------------------------


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
