"""RecurrenceProbe against plain loops over sequences, positions and references, and in parts."""

import math
from typing import Any

import numpy as np
import pytest
import torch

import metaint
from metaint.errors import ActivationError, InputError
from metaint.measures import autoregression, recurrence
from metaint.probes.descents import Descent, tuned_descents
from metaint.probes.recurrence import RecurrenceProbe
from metaint.tasks import autoregressive
from metaint.toys.linear_attention import gradient_step
from tests.probes.test_inner import assert_same

D, LENGTH, BATCH = 3, 6, 12
REAL, COMPLEX = ("haar", torch.float64), ("unitary", torch.complex128)
DESCENTS = {
    "gradient_step": Descent(1, torch.full((LENGTH - 1,), 0.2, dtype=torch.float64)),
    "gradient_steps_2": Descent(2, autoregression.step_sizes(0.6, LENGTH - 1)),
}
MODEL = gradient_step(D, 0.1, dtype=torch.float64)


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def sample(process=REAL, batch=BATCH, seed=0):
    kind, dtype = process
    return autoregressive(kind, D, LENGTH, batch, dtype=dtype, noise=0.1, seed=seed)


def feed(probe, vectors, matrices, predicted=None, effective=None, positions=None):
    with torch.no_grad(), metaint.attach(MODEL, probe):
        own = MODEL(vectors[:, :-1])
    probe.read_predictions(vectors, matrices, own if predicted is None else predicted, effective, positions)
    return probe


def anything(process, batch=BATCH) -> Any:
    """Sequences, and predictions and matrices that have nothing to do with them."""
    vectors, matrices = sample(process, batch)
    own = {"dtype": vectors.dtype}
    return vectors, matrices, draw(batch, LENGTH - 1, D, seed=1, **own), draw(batch, 3, D, D, seed=2, **own), (2, 5, 3)


def flat(matrix):
    return torch.view_as_real(matrix).flatten() if matrix.is_complex() else matrix.flatten()


@pytest.mark.parametrize("process", [REAL, COMPLEX])
def test_every_variable_is_a_plain_mean(process):
    vectors, matrices, predicted, found, positions = anything(process)
    data = feed(RecurrenceProbe(DESCENTS), vectors, matrices, predicted, found, positions).to_dataset()
    references = {
        "truth": matrices[:, None].expand(-1, LENGTH - 1, -1, -1),
        "gradient_step": autoregression.gradient_descent(vectors[:, :-1], 0.2),
        "gradient_steps_2": autoregression.gradient_descent(vectors[:, :-1], DESCENTS["gradient_steps_2"].eta, 2),
        "least_squares": autoregression.least_squares(vectors[:, :-1]),
    }
    assert data["reference"].values.tolist() == list(references)

    def close(name, wanted, **where):
        assert float(data[name].sel(**where)) == pytest.approx(float(torch.stack(list(wanted)).mean()), rel=1e-9), name

    for T in range(1, LENGTH):
        contexts, s, target, guess = vectors[:, :T], vectors[:, T - 1], vectors[:, T], predicted[:, T - 1]
        before = contexts[:, -2] if T > 1 else torch.zeros_like(s)
        guesses = {"": guess, "_zero": 0 * s, "_persistence": s, "_extrapolation": 2 * s - before}
        for name, reference in references.items():
            own = torch.stack([W[T - 1] @ v for W, v in zip(reference, s, strict=True)])
            guesses[f"_{name}"] = own
            close("reference_prediction_difference", (guess - own).abs(), reference=name, position=T)
        for name, values in guesses.items():
            close(f"loss{name}", (values - target).abs().square(), position=T)
        if T not in positions:
            assert data["effective_matrix_cosine"].sel(position=T).isnull().all()
            continue
        J = found[:, positions.index(T)]
        for name, reference in references.items():
            where, pairs = {"reference": name, "position": T}, list(zip(J, reference[:, T - 1], strict=True))
            close(
                "effective_matrix_cosine",
                (flat(j) @ flat(r) / flat(j).norm() / flat(r).norm() for j, r in pairs),
                **where,
            )
            close("effective_matrix_error", ((flat(j) - flat(r)).norm() / flat(r).norm() for j, r in pairs), **where)
            rows = [(a, b) for j, r in pairs for a, b in zip(j, r, strict=True)]
            close("reference_model_difference", (flat(a - b).norm() for a, b in rows), **where)
            cosines = (flat(a) @ flat(b) / (flat(a).norm() + 1e-8) / (flat(b).norm() + 1e-8) for a, b in rows)
            close("reference_sensitivity_cosine", cosines, **where)
        cross = [sum(torch.outer(c[t], c[t - 1].conj()) for t in range(1, T)) for c in contexts]
        scales = (flat(c) @ flat(j) / flat(c).norm() ** 2 for j, c in zip(J, cross, strict=True))
        close("step_size", scales, position=T)


@pytest.mark.parametrize("process", [REAL, COMPLEX])
def test_the_null_is_the_mean_over_all_pairs_of_sequences(process):
    vectors, matrices, predicted, found, positions = anything(process, 5)
    data = feed(RecurrenceProbe(DESCENTS), vectors, matrices, predicted, found, positions).to_dataset()
    fit = autoregression.least_squares(vectors[:, :-1])
    for i, T in enumerate(positions):
        for name, reference in (("truth", matrices), ("least_squares", fit[:, T - 1])):
            cosines = [
                float(torch.cosine_similarity(flat(found[a, i]), flat(reference[b]), dim=0))
                for a in range(5)
                for b in range(5)
                if a != b
            ]
            null = float(data["effective_matrix_cosine_null"].sel(reference=name, position=T))
            assert null == pytest.approx(np.mean(cosines), abs=1e-12)
    first: Any = [x[:1] for x in (vectors, matrices, predicted, found)]
    alone = feed(RecurrenceProbe(DESCENTS), *first, positions=positions)
    assert alone.to_dataset()["effective_matrix_cosine_null"].isnull().all()


def test_a_matrix_or_reference_of_zeros_has_no_cosine_and_does_not_count():
    vectors, matrices, predicted, found, _ = anything(REAL)
    found[:4] = 0
    data = feed(RecurrenceProbe(DESCENTS), vectors, matrices, predicted, found, (1, 2, 3)).to_dataset()
    first = data.sel(position=1, reference="least_squares")  # no transition yet
    assert first["effective_matrix_cosine"].isnull()
    assert first["effective_matrix_cosine_null"].isnull()
    wanted = recurrence.matrix_cosine(found[4:, 1], matrices[4:]).mean()
    at = data.sel(position=2, reference="truth")
    assert float(at["effective_matrix_cosine"]) == pytest.approx(float(wanted))
    null = [recurrence.matrix_cosine(found[a, 1], matrices[b]) for a in range(4, BATCH) for b in range(BATCH) if a != b]
    assert float(at["effective_matrix_cosine_null"]) == pytest.approx(float(torch.stack(null).mean()))


@pytest.mark.parametrize("process", [REAL, COMPLEX])
def test_merged_halves_equal_the_whole(process):
    parts = anything(process, 24)
    tensors, positions = parts[:-1], parts[-1]
    whole = feed(RecurrenceProbe(DESCENTS), *tensors, positions=positions).to_dataset()
    halves = [RecurrenceProbe(DESCENTS) for _ in range(2)]
    for probe, half in zip(halves, (slice(10), slice(10, 24)), strict=True):
        feed(probe, *[x[half] for x in tensors], positions=positions)
    halves[0].merge_state(halves[1])
    empty = RecurrenceProbe(DESCENTS)
    empty.merge_state(halves[0])
    in_parts = RecurrenceProbe(DESCENTS)
    for part in range(0, 24, 7):
        feed(in_parts, *[x[part : part + 7] for x in tensors], positions=positions)
    for probe in (halves[0], empty, in_parts):
        found = probe.to_dataset()
        assert_same(found, whole, atol=1e-10)
        assert found.attrs == whole.attrs


def streams_of(vectors):
    kept = {}

    def keep(x, hook):
        kept[hook.name] = x.detach()

    hooks: list[Any] = [(f"blocks.0.hook_resid_{part}", keep) for part in ("pre", "post")]
    with torch.no_grad():
        MODEL.run_with_hooks(vectors[:, :-1], fwd_hooks=hooks)
    return list(kept.values())


@pytest.mark.parametrize("at", [None, 3])
def test_w_is_decoded_from_the_rows_that_were_read(at):
    vectors, matrices = sample(batch=60)
    data = feed(RecurrenceProbe(DESCENTS, at, seed=3), vectors, matrices).to_dataset()
    T, targets = at or LENGTH - 1, matrices.flatten(1)
    assert data.attrs["decoded_at"] == T
    for layer, stream in enumerate(streams_of(vectors)):
        wanted = recurrence.decodability(stream[:, T - 1], targets, seed=3)
        assert float(data["decodability"][layer]) == pytest.approx(wanted.r2)
        null = recurrence.decodability(stream[:, T - 1], targets.roll(1, 0), wanted.penalty, seed=3)
        assert float(data["decodability_null"][layer]) == pytest.approx(null.r2)
    raw = recurrence.decodability(vectors[:, :T].flatten(1), targets, seed=3).r2
    assert float(data["decodability_raw"]) == pytest.approx(raw)


def test_what_a_stream_holds_is_decoded_and_its_null_is_not():
    """The rows of W, turned, in the last stream; of complex ones the real parts are in the stream's imaginary ones."""
    for process, unit in ((REAL, 1), (COMPLEX, 1j)):
        vectors, matrices = sample(process, 200)
        turn = torch.linalg.qr(draw(9, 9, seed=4))[0].to(matrices.dtype)
        held = unit * (matrices.flatten(1) @ turn)[:, None].expand(-1, LENGTH - 1, -1)
        with MODEL.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook, held=held: held)]):
            data = feed(RecurrenceProbe(DESCENTS), vectors, matrices).to_dataset()
        assert float(data["decodability"][1]) > 1 - 1e-9
        assert float(data["decodability_null"][1]) < 0.05
        assert float(data["decodability"][0]) < 0.9


def test_of_few_sequences_nothing_is_decoded():
    data = feed(RecurrenceProbe(DESCENTS), *sample(batch=9)).to_dataset()
    for name in ("decodability", "decodability_null", "decodability_raw"):
        assert data[name].isnull().all()
    assert data["loss"].notnull().all()
    assert feed(RecurrenceProbe(DESCENTS), *sample(batch=10)).to_dataset()["decodability"].notnull().all()


def test_only_the_last_pass_before_an_update_is_read():
    probe, (vectors, matrices) = RecurrenceProbe(DESCENTS), sample(batch=20)
    other = sample(batch=4, seed=9).vectors
    with torch.no_grad(), metaint.attach(MODEL, probe):
        MODEL(other[:, :3])
        predicted = MODEL(vectors[:, :-1])
    probe.read_predictions(vectors, matrices, predicted)
    assert_same(probe.to_dataset(), feed(RecurrenceProbe(DESCENTS), vectors, matrices).to_dataset())


def test_the_contract_of_names():
    vectors, matrices, predicted, found, positions = anything(REAL)
    data = feed(RecurrenceProbe(DESCENTS), vectors, matrices, predicted, found, positions).to_dataset()
    to_one_step = ("prediction_difference", "sensitivity_cosine", "model_difference")
    losses = ("loss", "loss_gradient_step", "loss_least_squares", "loss_zero", "loss_persistence")
    for name in (*losses, "step_size", *to_one_step):
        assert data[name].dims == ("position",)
    for name in to_one_step:
        one_step = data[f"reference_{name}"].sel(reference="gradient_step", drop=True)
        np.testing.assert_allclose(data[name], one_step, rtol=1e-12)
    compared = (*(f"reference_{name}" for name in to_one_step), "effective_matrix_cosine")
    for name in (*compared, "effective_matrix_error", "effective_matrix_cosine_null", "eta"):
        assert data[name].dims == ("reference", "position")
    assert data["decodability"].dims == data["decodability_null"].dims == ("layer",)
    assert data["position"].values.tolist() == [1, 2, 3, 4, 5]
    assert data["layer"].values.tolist() == [0, 1]
    assert data.attrs == {"sequences": BATCH, "tokens_seen": 5 * BATCH, "d": D, "decoded_at": 5}
    for name in ("loss", *compared):
        inside = (data[f"{name}_low"] <= data[name] + 1e-12) & (data[name] <= data[f"{name}_high"] + 1e-12)
        assert (inside | data[name].isnull()).all()
        assert data[f"{name}_low"].notnull().any()
    assert data["eta"].sel(reference="gradient_steps_2", position=4) == pytest.approx(0.2)
    assert all("description" in v.attrs for n, v in data.items() if not str(n).endswith(("_low", "_high")))
    assert RecurrenceProbe(DESCENTS).to_dataset().attrs == {"tokens_seen": 0, "sequences": 0}


# ---- the descents of a comparison -------------------------------------------------------------------------------


def error_of(vectors, eta, steps=1):
    contexts = vectors[:, :-1]
    own = autoregression.predictions(autoregression.gradient_descent(contexts, eta, steps), contexts)
    return float((own - vectors[:, 1:]).abs().square().mean())


@pytest.mark.parametrize("process", [REAL, COMPLEX])
def test_the_shared_step_is_the_best_of_all(process):
    vectors = sample(process, 300).vectors  # more than are tuned at once
    steps, eta = tuned_descents(vectors)["gradient_step"]
    assert steps == 1
    assert eta.unique().numel() == 1
    best = float(eta[0])
    assert all(error_of(vectors, best * factor) > error_of(vectors, best) for factor in (0.99, 1.01))
    assert float(tuned_descents(vectors, eta=0.3)["gradient_step"].eta[2]) == 0.3


@pytest.mark.parametrize("scale", [0.01, 1, 30])
@pytest.mark.parametrize("steps", [1, 4])
def test_steps_on_the_mean_loss_are_nearly_the_best_at_any_scale_of_the_vectors(scale, steps):
    vectors = scale * autoregressive("haar", 4, 12, 100, dtype=torch.float64).vectors
    found = tuned_descents(vectors, [steps])[f"gradient_steps_{steps}"]
    assert found.steps == steps
    c = float(found.eta[-1] * 10)
    torch.testing.assert_close(found.eta, autoregression.step_sizes(c, 11))
    least = min(error_of(vectors, autoregression.step_sizes(c * 1.02**i, 11), steps) for i in range(-60, 60))
    assert error_of(vectors, found.eta, steps) < 1.005 * least


def test_a_step_for_zeros_is_zero():
    assert not tuned_descents(torch.zeros(2, 4, 2))["gradient_step"].eta.any()


# ---- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"matrices": torch.zeros(BATCH, D)}, "matrices is [12, 3]: give one W for each sequence, [12, 3, 3]."),
        (
            {"predicted": torch.zeros(BATCH, 4, D)},
            "predicted is [12, 4, 3]: give a prediction for each context of vectors, [12, 5, 3].",
        ),
        ({"positions": (2, 2, 3)}, "positions is [2, 2, 3]: give lengths of contexts from 1 to 5, each once."),
        ({"positions": (2, 3, 6)}, "positions is [2, 3, 6]: give lengths of contexts from 1 to 5, each once."),
    ],
)
def test_updates_that_do_not_fit_get_one_sentence(change, sentence):
    names = ("vectors", "matrices", "predicted", "effective", "positions")
    given = dict(zip(names, anything(REAL), strict=True)) | change
    with pytest.raises(InputError) as error:
        feed(RecurrenceProbe(DESCENTS), **given)
    assert str(error.value) == sentence


def test_what_was_not_read_is_said():
    vectors, matrices = sample()
    predicted = torch.zeros(BATCH, LENGTH - 1, D, dtype=torch.float64)
    missing = r"^no pass on these vectors was read: run the model inside metaint\.attach, then read_predictions\.$"
    with pytest.raises(InputError, match=missing):
        RecurrenceProbe(DESCENTS).read_predictions(vectors, matrices, predicted)
    probe = feed(RecurrenceProbe(DESCENTS), vectors, matrices)
    with pytest.raises(InputError, match=missing):
        probe.read_predictions(vectors, matrices, predicted)
    with pytest.raises(InputError, match=r"^decode_at is 6, and the pass has 5 positions: give one of them\.$"):
        feed(RecurrenceProbe(DESCENTS, 6), vectors, matrices)
    with pytest.raises(InputError, match=r"^decode_at is 0: give the length of a context, at least 1\.$"):
        RecurrenceProbe(DESCENTS, 0)
    with pytest.raises(
        InputError, match=r"^descents isn't made for 4 contexts: give tuned_descents of such vectors\.$"
    ):
        feed(RecurrenceProbe(DESCENTS), vectors[:, :-1], matrices)
    with pytest.raises(InputError, match=r"^vectors has 5 positions, and earlier ones had 6: give as many\.$"):
        feed(probe, vectors[:, :-1], matrices)
    with pytest.raises(
        InputError, match=r"^vectors has 2 positions: give at least 3: a transition, and what comes next"
    ):
        tuned_descents(vectors[:, :2])
    with pytest.raises(
        ActivationError, match=r"^the predictions hold NaN or infinity: the weights or activations overf"
    ):
        feed(RecurrenceProbe(DESCENTS), vectors, matrices, predicted + math.inf)
