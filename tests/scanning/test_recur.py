"""`recur` on models whose matrices are known, on every architecture against passes by hand, and without a trace."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

import metaint
from metaint.errors import InputError
from metaint.measures import autoregression, recurrence
from metaint.models.parameters import own_parameters
from metaint.tasks import autoregressive
from metaint.toys.diagonal_attention import unitary_minimum
from metaint.toys.linear_attention import gradient_step, linear_attention, regression_attention, vector_transformer
from tests.builders import available_kinds, build
from tests.probes.test_inner import assert_same

D, LENGTH, ETA = 3, 7, 0.15
CAUSAL = [kind for kind in available_kinds() if kind != "bert"]
EVERY = range(1, LENGTH)
PROCESSES = [("haar", torch.float64), ("unitary", torch.complex128)]


def sample(kind: Any = "haar", dtype=torch.float64, batch=20, **options):
    return autoregressive(kind, D, LENGTH, batch, dtype=dtype, **options)


def group(scan):
    return scan["recurrence"].to_dataset()


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- models whose matrices are known ----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), PROCESSES)
def test_the_gradient_step_is_one_gradient_step(kind, dtype):
    scan = metaint.recur(gradient_step(D, ETA, dtype=torch.float64), *sample(kind, dtype), eta=ETA, positions=EVERY)
    data = group(scan).sel(reference="gradient_step")
    assert float(data["prediction_difference"].max()) < 1e-10
    later = data.sel(position=slice(2, None))
    assert np.abs(later["effective_matrix_cosine"] - 1).max() < 1e-10
    assert float(later["effective_matrix_error"].max()) < 1e-10
    assert np.abs(later["step_size"] - ETA).max() < 1e-10
    assert np.abs(later["sensitivity_cosine"] - 1).max() < 1e-6  # the source adds 1e-8 to each length
    assert float(data["model_difference"].max()) < 1e-10
    np.testing.assert_allclose(data["loss"], data["loss_gradient_step"], atol=1e-12)
    assert scan.attrs["eta"] == ETA
    assert scan.attrs["values_held"] == 1
    assert scan.attrs["derivative"] == "forward"


@pytest.mark.parametrize(("kind", "dtype"), PROCESSES)
def test_held_are_keys_and_values_of_all_layers(kind, dtype):
    model, (vectors, matrices) = linear_attention(D, n_layers=2, n_heads=2, dtype=torch.float64), sample(kind, dtype)
    kept = {}
    names = [f"blocks.{layer}.attn.hook_{part}" for layer in range(2) for part in "kv"]
    with torch.no_grad():
        model.run_with_hooks(
            vectors, fwd_hooks=[(name, lambda x, hook: kept.update({hook.name: x.detach()})) for name in names]
        )

    def by_queries(x):
        return model.run_with_hooks(x, fwd_hooks=[(name, lambda _, hook: kept[hook.name]) for name in names])

    data = group(metaint.recur(model, vectors, matrices, positions=[3, 6], batch_size=7))
    for T, J in zip((3, 6), recurrence.effective_matrix(by_queries, vectors, [2, 5]).unbind(1), strict=True):
        wanted = float(recurrence.relative_error(J, matrices).mean())
        found = float(data["effective_matrix_error"].sel(reference="truth", position=T))
        assert found == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize(("kind", "dtype"), PROCESSES)
def test_without_held_values_the_last_vector_is_a_value_too(kind, dtype):
    vectors, matrices = sample(kind, dtype)
    model = gradient_step(D, ETA, dtype=torch.float64)
    data = group(metaint.recur(model, vectors, matrices, eta=ETA, positions=[4, 2], hold_values=False))
    for T in (2, 4):
        step = autoregression.gradient_descent(vectors, ETA)[:, T - 1]
        own = ETA * (vectors[:, T - 2].conj() * vectors[:, T - 1]).sum(-1)
        wanted = D**0.5 * own.abs() / torch.linalg.matrix_norm(step)
        found = data["effective_matrix_error"].sel(reference="gradient_step", position=T)
        assert float(found) == pytest.approx(float(wanted.mean()))
    assert data["effective_matrix_error"].sel(position=3).isnull().all()


def least_squares_hook(model):
    """A hook that turns the model into least squares on its context, which is held: s_T is a query alone."""

    def solve(write, hook):
        stream = hook.stream
        s, known = stream[..., D : 2 * D], stream.detach()[..., D : 2 * D]
        fits = [torch.zeros_like(s[:, 0])]
        for T in range(2, s.shape[1] + 1):
            W = known[:, 1:T].mT @ torch.linalg.pinv(known[:, : T - 1].mT)
            fits.append((W @ s[:, T - 1, :, None])[..., 0])
        return torch.cat([torch.stack(fits, 1), torch.zeros_like(s), torch.zeros_like(s)], -1)

    def keep(stream, hook):
        model.hook_dict["blocks.0.hook_attn_out"].stream = stream

    return [("blocks.0.hook_resid_pre", keep), ("blocks.0.hook_attn_out", solve)]


def test_a_model_of_least_squares_is_seen_as_that():
    model = gradient_step(D, ETA, dtype=torch.float64)
    with model.hooks(fwd_hooks=least_squares_hook(model)):
        data = group(metaint.recur(model, *sample(), positions=EVERY))
    own = data.sel(reference="least_squares")
    assert float(own["reference_prediction_difference"].max()) < 1e-9
    assert np.abs(own["effective_matrix_cosine"].sel(position=slice(2, None)) - 1).max() < 1e-9
    assert np.abs(own["reference_sensitivity_cosine"].sel(position=slice(D + 1, None)) - 1).max() < 1e-6
    assert float(own["effective_matrix_error"].sel(position=slice(2, None)).max()) < 1e-9
    # From T = D + 1 on that is W; before it is not, and one step never is.
    assert np.abs(data["effective_matrix_cosine"].sel(reference="truth", position=slice(D + 1, None)) - 1).max() < 1e-9
    assert float(data["loss"].sel(position=slice(D + 1, None)).max()) < 1e-18
    assert float(data["effective_matrix_cosine"].sel(reference="truth", position=2)) < 0.8
    assert float(data["effective_matrix_cosine"].sel(reference="gradient_step", position=6)) < 0.99


def test_beside_the_matrices_of_other_sequences_cosines_fall_to_the_null():
    vectors, matrices = sample(batch=60)
    model = gradient_step(D, ETA, dtype=torch.float64)
    own, other = (group(metaint.recur(model, vectors, W, positions=[6])) for W in (matrices, matrices.roll(1, 0)))
    truth = {"reference": "truth", "position": 6}
    null = float(own["effective_matrix_cosine_null"].sel(truth))
    assert float(own["effective_matrix_cosine_low"].sel(truth)) > 0.5 > null + 0.3
    low, high = (float(other[f"effective_matrix_cosine{end}"].sel(truth)) for end in ("_low", "_high"))
    assert low < null < high < 0.3
    rest = ["gradient_step", "gradient_steps_1", "least_squares"]
    assert_same(own.sel(reference=rest), other.sel(reference=rest), names=["effective_matrix_cosine", "loss"])


def test_diagonal_heads_apply_twice_their_w_since_the_query_is_the_vector_before():
    """conj(s_{T-1}) s_T s_T is W s_T for unit phases, and its derivative in s_T is 2 W."""
    data = group(metaint.recur(unitary_minimum(D, D, LENGTH, dtype=torch.float64), *sample(*PROCESSES[1])))
    later = data.sel(reference="truth", position=slice(2, None))
    assert float(later["loss"].max()) < 1e-20
    assert np.abs(later["effective_matrix_cosine"] - 1).max() < 1e-10
    assert np.abs(later["effective_matrix_error"] - 1).max() < 1e-10


# ---- derivatives ------------------------------------------------------------------------------------------------


class Tanh(torch.autograd.Function):
    """tanh with a backward derivative alone."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * (1 - y**2)


@pytest.mark.parametrize("held", [True, False])
def test_a_model_without_forward_derivatives_is_read_backwards(held):
    model = gradient_step(D, ETA, dtype=torch.float64)
    scans = []
    for function in (torch.tanh, Tanh.apply):
        with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook, f=function: f(x))]):
            scans.append(metaint.recur(model, *sample(), hold_values=held, batch_size=8))
    assert [scan.attrs["derivative"] for scan in scans] == ["forward", "backward"]
    assert_same(group(scans[0]), group(scans[1]), atol=1e-12)


# ---- models of tokens -------------------------------------------------------------------------------------------


def by_hand(model, vectors, embedding):
    """The last stream of a pass with embeddings replaced, from a pass of its own."""
    kept = {}
    hooks = [
        ("hook_embed", lambda x, hook: vectors @ embedding),
        (f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", lambda x, hook: kept.update(stream=x.detach().clone())),
    ]
    with torch.no_grad():
        model.run_with_hooks(torch.full(vectors.shape[:2], 7), fwd_hooks=hooks)
    return kept["stream"]


@pytest.mark.parametrize("kind", CAUSAL)
def test_every_architecture_is_fed_and_differentiated(kind):
    model = build(kind).to(torch.float64)
    vectors, matrices = sample(batch=4)
    embedding, out = draw(D, 32), draw(32, D, seed=1)
    scan = metaint.recur(
        model, vectors, matrices, embedding=embedding, readout=lambda x: x @ out, positions=[5], batch_size=3
    )
    data = group(scan)
    predicted = by_hand(model, vectors[:, :-1], embedding) @ out
    wanted = (predicted - vectors[:, 1:]).square().mean((0, 2))
    np.testing.assert_allclose(data["loss"], wanted, rtol=1e-6)
    columns = []
    for j in range(D):
        moved = torch.zeros_like(vectors[:, :-1])
        moved[:, 4, j] = 1e-4
        ends = [(by_hand(model, vectors[:, :-1] + sign * moved, embedding) @ out)[:, 4] for sign in (1, -1)]
        columns.append((ends[0] - ends[1]) / 2e-4)
    J = torch.stack(columns, -1)
    for name, reference in (("truth", matrices), ("least_squares", autoregression.least_squares(vectors)[:, 4])):
        found = data["effective_matrix_error"].sel(reference=name, position=5)
        # RMS norms compute in float32, whatever the weights are.
        tolerance = 2e-3 if kind in ("native-rms-rotary", "llama", "gemma2") else 1e-6
        wanted = float(recurrence.relative_error(J, reference).mean())
        assert float(found) == pytest.approx(wanted, rel=tolerance)
    assert (scan.attrs["fed"], scan.attrs["fitted_sequences"], scan.attrs["d"]) == ("embeddings", 0, D)
    assert data["decodability"].sizes["layer"] == model.cfg.n_layers + 1


def test_a_readout_is_ridge_regression_on_the_first_half(gpt2):
    vectors, matrices = sample(batch=50, dtype=torch.float32)
    scan = metaint.recur(gpt2, vectors, matrices, positions=(), batch_size=9, seed=3)
    embedding = torch.linalg.qr(draw_map(32, D, 3)).Q.T.float()
    stream = by_hand(gpt2, vectors[:, :-1], embedding).double()
    x = stream / stream.square().mean(-1, keepdim=True).sqrt()
    y = vectors[:, 1:].double()

    def ridge(rows, penalty):
        features, targets = x[:rows].flatten(0, 1), y[:rows].flatten(0, 1)
        centred, mean = features - features.mean(0), targets.mean(0)
        strength = penalty * centred.square().sum() / 32
        weights = torch.linalg.solve(centred.T @ centred + strength * torch.eye(32), centred.T @ (targets - mean))
        return lambda at: (at - features.mean(0)) @ weights + mean

    penalties = [10.0**power for power in range(-8, 3)]
    errors = [float((ridge(20, penalty)(x[20:25]) - y[20:25]).square().sum()) for penalty in penalties]
    best = penalties[int(np.argmin(errors))]
    assert penalties[0] < best < penalties[-1]
    wanted = (ridge(25, best)(x[25:]) - y[25:]).square().mean((0, 2))
    np.testing.assert_allclose(group(scan)["loss"], wanted, rtol=1e-4)
    assert scan.attrs["fitted_sequences"] == group(scan).attrs["sequences"] == 25


def draw_map(width, d, seed):
    return torch.randn(width, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_readout_finds_a_prediction_that_is_there(gpt2):
    """With W = 1 the next vector is the last, which the stream still holds, and it is read whatever its length is."""
    vectors = draw(60, 1, D).float().expand(-1, LENGTH, -1).contiguous()
    matrices = torch.eye(D).expand(60, D, D)
    hooks = [
        (f"blocks.{i}.{part}", lambda x, hook: 0 * x) for i in range(2) for part in ("hook_attn_out", "hook_mlp_out")
    ]
    hooks += [("hook_pos_embed", lambda x, hook: 0 * x)] if "hook_pos_embed" in gpt2.hook_dict else []
    with gpt2.hooks(fwd_hooks=hooks):
        data = group(metaint.recur(gpt2, vectors, matrices, positions=[6]))
    assert float(data["loss"].mean()) < 0.7 * float(data["loss_zero"].mean())
    assert float(data["effective_matrix_cosine"].sel(reference="truth", position=6)) > 0.6


# ---- what does not matter, and what is left ---------------------------------------------------------------------


@pytest.mark.parametrize("fed", ["vectors", "embeddings"])
def test_batches_give_the_same(fed, gpt2):
    model, dtype = (linear_attention(D), torch.float32) if fed == "vectors" else (gpt2, torch.float32)
    given = sample(batch=24, dtype=dtype)
    whole = group(metaint.recur(model, *given, positions=[3, 6], batch_size=50))
    for size in (5, 1):
        assert_same(group(metaint.recur(model, *given, positions=[3, 6], batch_size=size)), whole, atol=1e-4)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("fed", ["vectors", "embeddings"])
def test_the_model_is_as_it_was(fed, fails):
    model = vector_transformer(d_in=D, d_out=D, n_ctx=9, n_layers=2, n_heads=2, d_model=8, d_mlp=12)
    model = model if fed == "vectors" else build(CAUSAL[0])
    model.train()
    model.blocks[1].eval()
    calls = []

    def own(tensor: Any, *, hook: Any) -> None:
        calls.append(any(module.training for module in model.modules()))
        if fails and len(calls) > 4:
            raise RuntimeError("stop")

    model.hook_dict["blocks.1.hook_resid_post"].add_hook(own)
    before = copy.deepcopy({name: parameter.detach() for name, parameter in own_parameters(model).items()})
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    hooks = {name: len(point._forward_hooks) for name, point in model.hook_dict.items()}
    given = sample(batch=24, dtype=torch.float32)
    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            metaint.recur(model, *given, batch_size=8)
    else:
        metaint.recur(model, *given, batch_size=8)
    assert calls
    assert not any(calls)
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert {name: len(point._forward_hooks) for name, point in model.hook_dict.items()} == hooks
    for name, parameter in own_parameters(model).items():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_whatever_mode_it_is_called_in():
    model = linear_attention(D)
    given = sample(dtype=torch.float32)
    plain = group(metaint.recur(model, *given))
    with torch.inference_mode():
        assert_same(group(metaint.recur(model, *given)), plain)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert_same(group(metaint.recur(model, *given)), plain)


def test_the_default_positions_are_few_and_even():
    known = lambda data: data["position"][data["step_size"].notnull()].values.tolist()  # noqa: E731
    model = gradient_step(2, ETA)
    for length, wanted in ((5, [2, 3, 4]), (25, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24])):
        assert known(group(metaint.recur(model, *autoregressive("haar", 2, length, 3)))) == wanted
    assert known(group(metaint.recur(model, *autoregressive("haar", 2, 6, 3), positions=()))) == []


def test_a_scan_tells_what_was_done():
    options = {"steps": (2, 5), "seed": 4, "decode_at": 2, "attributes": {"kind": "haar"}}
    scan = metaint.recur(linear_attention(D), *sample(dtype=torch.float32), **options)
    wanted = {"kind": "haar", "d": D, "vectors_shape": [20, LENGTH, D], "seed": 4, "fed": "vectors", "values_held": 1}
    assert {name: scan.attrs[name] for name in wanted} == wanted
    data = group(scan)
    references = ["truth", "gradient_step", "gradient_steps_2", "gradient_steps_5", "least_squares"]
    assert data["reference"].values.tolist() == references
    assert scan.attrs["eta"] == float(data["eta"].sel(reference="gradient_step", position=3))
    assert data.attrs["decoded_at"] == 2
    plain = metaint.recur(vector_transformer(d_in=D, d_out=D, n_ctx=9, **SIZES), *sample(dtype=torch.float32))
    assert plain.attrs["values_held"] == 0


SIZES: dict[str, Any] = {"n_layers": 1, "n_heads": 1, "d_model": 8, "d_mlp": 8}


# ---- bad input --------------------------------------------------------------------------------------------------


def refused(sentence, model, vectors, matrices, **options):
    with pytest.raises(InputError) as error:
        metaint.recur(model, vectors, matrices, **options)
    assert str(error.value) == sentence


def test_what_is_no_sequence_is_said():
    model, (vectors, matrices) = linear_attention(D), sample(dtype=torch.float32)
    refused("vectors is [20, 3] of torch.float32: give numbers [batch, position, d].", model, vectors[:, 0], matrices)
    refused("vectors is [20, 7, 3] of torch.int64: give numbers [batch, position, d].", model, vectors.long(), matrices)
    refused("vectors is empty: give finite sequences.", model, vectors[:0], matrices[:0])
    refused("vectors hold NaN or infinity: give finite sequences.", model, vectors / 0, matrices)
    refused(
        "vectors has 4 positions, and d is 3: give at least 5, since least squares needs d + 1 to tell W, and one must "
        "follow.",
        model,
        vectors[:, :4],
        matrices,
    )
    refused(
        "matrices is [19, 3, 3] of torch.float32: give the W of each sequence, [20, 3, 3] of torch.float32.",
        model,
        vectors,
        matrices[1:],
    )
    refused("batch_size is 0: it must be at least 1.", model, vectors, matrices, batch_size=0)
    refused(
        "positions is [2, 7]: give lengths of contexts from 1 to 6, each once.",
        model,
        vectors,
        matrices,
        positions=[2, 7],
    )


def test_a_model_that_cannot_be_fed_is_said(gpt2):
    given = sample(dtype=torch.float32)
    refused("model is a Linear: give one with TransformerLens's hooks.", torch.nn.Linear(D, D), *given)
    refused("vectors have d = 3, and the model leads from 4 to 4: give its own.", linear_attention(4), *given)
    refused(
        "model is bidirectional, and sees what it should predict: give a causal one.",
        regression_attention(2, 6),
        *given,
    )
    refused(
        "inputs is torch.float64, and the model computes in torch.float32: convert one of them.",
        linear_attention(D),
        *sample(),
    )
    complex_ = autoregressive("unitary", D, LENGTH, 20)
    transformer = vector_transformer(d_in=D, d_out=D, n_ctx=9, **SIZES)
    refused(
        "inputs is torch.complex64, and the model computes in torch.float32: convert one of them.",
        transformer,
        *complex_,
    )
    refused(
        "vectors are complex, and the model is real: give the real form, such as kind 'orthogonal'.", gpt2, *complex_
    )
    refused(
        "hold_values is True, and the model takes no vectors: leave it out, for the whole derivative.",
        gpt2,
        *given,
        hold_values=True,
    )
    refused("embedding is [3, 8]: give a map [d, d_model], [3, 32].", gpt2, *given, embedding=torch.zeros(3, 8))
    refused(
        "vectors has too few sequences to fit a readout on half: give 20, or a readout.", gpt2, *(x[:19] for x in given)
    )
    long = autoregressive("haar", D, 130, 2)
    refused("vectors has 130 positions, and the model reads 128: give at most one more.", gpt2, *long)
    wide = autoregressive("haar", 33, 36, 2)
    refused("vectors have d = 33, and the stream of the model is 32 wide: give a smaller d.", gpt2, *wide)
    with gpt2.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: 0 * x)]):
        refused(
            "model doesn't go by what stands at hook_embed, so no vectors can be fed: give another model.", gpt2, *given
        )


@pytest.mark.skipif("bert" not in available_kinds(), reason="no BERT")
def test_bert_is_refused():
    sentence = "model is bidirectional, and sees what it should predict: give a causal one."
    refused(sentence, build("bert"), *sample(dtype=torch.float32))
