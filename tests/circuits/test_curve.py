"""`ablation_curve` against plain hooks point by point, and its verdict where it is known which heads matter."""

import numpy as np
import pytest
import torch
import xarray as xr

import metaint
from metaint.circuits import curve as module
from metaint.circuits.beside import drawn_from, random_orders
from metaint.circuits.curve import ablation_curve
from metaint.circuits.metrics import in_context_loss, next_token_loss
from metaint.circuits.subject import subject_of
from metaint.errors import InputError
from metaint.tasks import repeated_tokens
from metaint.toys.small import small_transformer
from tests.builders import available_kinds, build
from tests.circuits.planted import circuit_model, traces
from tests.circuits.test_ablation import loop, z_of
from tests.planted import VOCAB

TOKENS = repeated_tokens(96, 8, batch=5, ids=(5, 95), seed=1)
SHARES = [0.1, 0.3, 0.6]
CAUSAL = [kind for kind in available_kinds() if kind != "bert"]


def head(name):
    layer, number = str(name).split(".")
    return int(layer), int(number)


def orders_of(model, random=4, seed=3):
    return random_orders(subject_of(model).shape, random, seed)


@pytest.fixture(scope="module")
def planted():
    return circuit_model()


@pytest.fixture(scope="module")
def repeats():
    return repeated_tokens(VOCAB, 20, batch=6)


# ---- point by point ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CAUSAL)
def test_every_point_is_that_of_plain_hooks(kind):
    """The ranking, the heads that write most, and each draw: sets ablated together, by their mean, in plain passes."""
    model = build(kind)
    scan = metaint.scan(model, TOKENS)
    curve = ablation_curve(
        model, scan, "first_token", SHARES, tokens=TOKENS, metric="next_token_loss", random=4, seed=3
    )
    heads = [(i, j) for i in range(model.cfg.n_layers) for j in range(model.cfg.n_heads)]
    scores = scan["heads"]["first_token"].values
    ranking = sorted(heads, key=lambda place: -scores[place])
    counts = [max(1, round(share * len(heads))) for share in SHARES]
    assert curve["count"].values.tolist() == counts
    assert [head(name) for name in curve["top"].values] == ranking[: max(counts)]
    norms = [head(name) for name in curve["norm_top"].values]
    sets = [ranking[:count] for count in counts] + [norms[:count] for count in counts]
    sets += [sorted(drawn_from(order, ranking[:count])) for count in counts for order in orders_of(model)] + [heads]
    z = z_of(model, TOKENS)
    expected, clean = loop(model, TOKENS, next_token_loss, lambda i, j: z[i][:, :, j].mean((0, 1)), sets)
    expected = expected.mean(1).numpy()
    np.testing.assert_allclose(curve["effect"], expected[:3], atol=2e-5)
    np.testing.assert_allclose(curve["norm_effect"], expected[3:6], atol=2e-5)
    np.testing.assert_allclose(curve["random_effect"].values.ravel(), expected[6:18], atol=2e-5)
    np.testing.assert_allclose(curve["random_mean"], expected[6:18].reshape(3, 4).mean(1), atol=2e-5)
    assert float(curve["all_heads"]) == pytest.approx(expected[18], abs=2e-5)
    assert float(curve["clean"]) == pytest.approx(float(clean.mean()), abs=1e-5)
    assert len(set(expected.round(6))) > 8
    assert curve.attrs["passes"] == "from the ablated layer"


def test_intervals_and_areas_are_over_sequences(gpt2):
    """By hand: paired differences, resampled by sequence; the trapezoid rule along the logarithm of the share."""
    scan = metaint.scan(gpt2, TOKENS)
    curve = ablation_curve(gpt2, scan, "first_token", SHARES, tokens=TOKENS, random=4, seed=3)
    names, z = curve["top"].values, z_of(gpt2, TOKENS)
    tops = [[head(name) for name in names[:count]] for count in curve["count"].values]
    sets = tops + [sorted(drawn_from(order, top)) for top in tops for order in orders_of(gpt2)]
    rows, _ = loop(gpt2, TOKENS, in_context_loss, lambda i, j: z[i][:, :, j].mean((0, 1)), sets)
    rows = rows.double().numpy()
    drawn = rows[3:].reshape(3, 4, -1)
    differences = rows[:3] - drawn.mean(1)
    draws = np.random.default_rng(0).multinomial(5, np.full(5, 0.2), size=1000) / 5

    def area(values):
        places = np.log(SHARES)
        return np.trapezoid(values, places, axis=0) / (places[-1] - places[0])

    for name, of in {"difference": differences, "effect": rows[:3], "random_mean": drawn.mean(1)}.items():
        np.testing.assert_allclose(curve[name], of.mean(1), atol=1e-5)
        for end, level in (("low", 0.025), ("high", 0.975)):
            np.testing.assert_allclose(curve[f"{name}_{end}"], np.quantile(draws @ of.T, level, axis=0), atol=1e-5)
    of_each = area(differences)
    assert float(curve["area"]) == pytest.approx(of_each.mean(), abs=1e-5)
    assert float(curve["area_low"]) == pytest.approx(np.quantile(draws @ of_each, 0.025), abs=1e-5)
    expected = area(drawn.mean(2) - drawn.mean((1, 2))[:, None])
    np.testing.assert_allclose(curve["random_area"], expected, atol=1e-5)
    assert float(curve["random_area"].sum()) == pytest.approx(0, abs=1e-9)


def test_heads_that_write_most_by_the_scan_or_by_these_tokens(gpt2):
    """The same where the scan read these tokens; a plain version; and the scan's word where they differ."""
    scan = metaint.scan(gpt2, TOKENS, [metaint.HeadProbe(), metaint.OutputProbe()])
    options = {"tokens": TOKENS, "random": 2, "batch_size": 3}
    measured = ablation_curve(gpt2, scan["heads"], shares=[1.0], **options)
    assert measured.attrs["norm_from"] == "these tokens"
    z, weights = z_of(gpt2, TOKENS), gpt2.W_O.detach()
    lengths = {
        f"{i}.{j}": float((z[i][:, 1:, j] @ weights[i, j]).norm(dim=-1).mean()) for i in range(2) for j in range(4)
    }
    assert measured["norm_top"].values.tolist() == sorted(lengths, key=lambda name: -lengths[name])
    read = ablation_curve(gpt2, scan, shares=[1.0], **options)
    assert read.attrs["norm_from"] == "the scan"
    assert read["norm_top"].values.tolist() == measured["norm_top"].values.tolist()
    scan["outputs"]["output_norm"][:] = -scan["outputs"]["output_norm"]
    turned = ablation_curve(gpt2, scan, "output_norm", shares=[1.0], **options)
    assert turned["norm_top"].values.tolist() == measured["norm_top"].values.tolist()[::-1]
    assert turned["top"].values.tolist() == turned["norm_top"].values.tolist()


@pytest.mark.parametrize("against", ["random-same-layers", "random"])
def test_draws_are_other_heads_as_long_as_there_are_any(gpt2, against, monkeypatch):
    """As many in each layer, or in all; each set is run once; draws follow the seed alone."""
    sets = []
    run = module.run
    monkeypatch.setattr(module, "run", lambda experiment, some: sets.append(list(some)) or run(experiment, some))
    scan = metaint.scan(gpt2, TOKENS)
    options = {"tokens": TOKENS, "against": against, "random": 30, "shares": [0.25, 0.5, 0.75, 1.0]}
    curve = ablation_curve(gpt2, scan, **options)
    assert len(sets[0]) == len(set(sets[0])) < 4 * 30
    every = [(i, j) for i in range(2) for j in range(4)]
    for i, count in enumerate(curve["count"].values):
        top = {head(name) for name in curve["top"].values[:count]}
        for order in orders_of(gpt2, 30, 0):
            drawn = drawn_from(order, top, against == "random-same-layers")
            assert len(drawn) == count
            rest = set(every) - top
            if against == "random":
                assert len(drawn & top) == max(0, count - len(rest))
            for layer in range(2):
                asked, free = (sum(place[0] == layer for place in some) for some in (top, rest))
                if against != "random":
                    assert sum(place[0] == layer for place in drawn) == asked
                    assert sum(place[0] == layer for place in drawn & top) == max(0, asked - free)
        expected = max(0.0, 2 * count - 8) / count
        if against == "random":
            assert float(curve["overlap"][i]) == pytest.approx(expected)
    assert curve["random_effect"][-1].isnull().all()
    assert curve["random_effect"][:-1].notnull().all()
    xr.testing.assert_identical(curve, ablation_curve(gpt2, scan, **options))
    assert not curve["random_effect"].equals(ablation_curve(gpt2, scan, seed=1, **options)["random_effect"])


# ---- verdicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "answer"),
    [("induction", "yes"), ("previous_token", "yes"), ("first_token", "no"), ("averaging", "no"), ("entropy", "no")],
)
def test_the_scores_of_a_planted_circuit_are_load_bearing_and_others_are_not(planted, repeats, score, answer):
    scan = metaint.scan(planted, repeats)
    curve = ablation_curve(planted, scan, score, [0.05, 0.1, 0.2, 0.3], tokens=repeats)
    assert curve.attrs["load_bearing"] == answer
    assert (float(curve["effect"][0]) > 2) == (answer == "yes")
    assert float(curve["random_effect"][0].max()) < 0.2 or answer == "no"
    said = f"{score} is {'' if answer == 'yes' else 'not '}load-bearing in native for in_context_loss: "
    assert curve.attrs["verdict"].startswith(f"{said}ablating its 1 to 5 highest heads changes it by ")
    assert "it would be refuted by tokens" in curve.attrs["verdict"]


def test_harm_goes_the_way_of_the_metric(planted, repeats):
    """An accuracy falls, and of a metric of one's own ablating all heads tells which way is worse."""
    scan = metaint.scan(planted, repeats)

    def right(logits, tokens):
        return (logits[:, :-1].argmax(-1) == tokens[:, 1:]).double()[:, 20:].mean(1)

    for metric in ("induction_accuracy", right):
        options = {"tokens": repeats, "metric": metric, "shares": [0.05, 0.1, 0.2]}
        curve = ablation_curve(planted, scan, "induction", **options)
        assert float(curve["area_high"]) < -0.5
        assert curve.attrs["load_bearing"] == "yes"
        assert " nats" not in curve.attrs["verdict"]
        assert ablation_curve(planted, scan, "entropy", **options).attrs["load_bearing"] == "no"


@pytest.mark.parametrize("seed", range(4))
def test_no_score_is_load_bearing_in_a_random_model(seed):
    torch.manual_seed(seed)
    sizes = {"n_layers": 2, "n_heads": 6, "d_model": 24, "d_mlp": 48, "d_vocab": 96, "n_ctx": 20}
    model = small_transformer(norm="pre", **sizes)
    scan = metaint.scan(model, TOKENS)
    for score in ("induction", "previous_token", "first_token"):
        curve = ablation_curve(model, scan, score, [0.1, 0.2, 0.4], tokens=TOKENS)
        assert curve.attrs["load_bearing"] == "no"


def test_few_heads_are_no_comparison(trained):
    """The toy has one head a layer: its induction head breaks the prediction, and nothing stands beside it."""
    tokens = metaint.default_tokens(trained)
    scan = metaint.scan(trained, tokens)
    curve = ablation_curve(trained, scan, shares=[0.5], tokens=tokens)
    alone = metaint.ablate(trained, tokens, ["1.0"])
    assert curve["top"].values.tolist() == ["1.0"]
    assert curve["effect"].item() == pytest.approx(float(alone["effect"][1, 0]), abs=1e-6)
    assert curve["effect_low"].item() > 1
    assert curve[["random_effect", "random_mean", "area", "difference"]].to_array().isnull().all()
    assert curve.attrs["load_bearing"] == "unknown"
    sentence = "whether induction is load-bearing in toy for in_context_loss cannot be told: "
    assert curve.attrs["verdict"] == f"{sentence}no other heads are left to compare with."
    other = ablation_curve(trained, scan, shares=[0.5], against="random", tokens=tokens)
    assert other["random_effect"].notnull().all()
    assert other.attrs["verdict"] == f"{sentence}there are fewer than 5 different draws of other heads to compare with."


@pytest.fixture(scope="module")
def trained():
    return metaint.open_model("toy")


def test_induction_heads_of_a_real_model_are_load_bearing(smollm2):
    """Five heads of 270 cost nats; as many of the same layers do not."""
    tokens = metaint.default_tokens(smollm2, length=25, batch=2)
    scan = metaint.scan(smollm2, tokens)
    curve = ablation_curve(smollm2, scan, shares=[0.02], tokens=tokens, random=5)
    assert curve["count"].item() == 5
    assert curve["effect_low"].item() > 2
    assert float(curve["random_effect"].max()) < 1.5
    assert curve.attrs["load_bearing"] == "yes"


# ---- beside others -----------------------------------------------------------------------------------------------


def test_a_score_of_any_group_and_a_group_alone(gpt2):
    scan = metaint.scan(gpt2, TOKENS, [metaint.HeadProbe(), metaint.WeightProbe()])
    options = {"tokens": TOKENS, "shares": [0.3], "random": 2}
    by_weights = ablation_curve(gpt2, scan, "ov_norm", **options)
    assert by_weights["top"].values[0] == "{}.{}".format(*np.unravel_index(scan["weights"]["ov_norm"].argmax(), (2, 4)))
    alone = ablation_curve(gpt2, scan["heads"].to_dataset(), "entropy", **options)
    xr.testing.assert_equal(alone, ablation_curve(gpt2, scan, "entropy", **options))


def test_heads_whose_score_is_unknown_are_not_ranked(gpt2):
    scan = metaint.scan(gpt2, TOKENS)["heads"].to_dataset()
    scan["induction"][0] = np.nan
    curve = ablation_curve(gpt2, scan, shares=[0.9], tokens=TOKENS, random=2)
    assert curve["count"].item() == 4
    assert all(name.startswith("1.") for name in curve["top"].values)


def test_no_trace_is_left(gpt2):
    scan = metaint.scan(gpt2, TOKENS)
    gpt2.train()
    try:
        before, state = traces(gpt2), torch.random.get_rng_state()
        ablation_curve(gpt2, scan, shares=[0.3], tokens=TOKENS, random=2)
        assert traces(gpt2) == before
        assert torch.equal(torch.random.get_rng_state(), state)

        def fail(logits, tokens):
            raise ValueError("on purpose")

        with pytest.raises(ValueError, match="on purpose"):
            ablation_curve(gpt2, scan, shares=[0.3], tokens=TOKENS, metric=fail, random=2)
        assert traces(gpt2) == before
    finally:
        gpt2.eval()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"score": "inducing"},
            r"score is 'inducing': choose a variable \(layer, head\) of the scan \(.*previous_token",
        ),
        ({"against": "others"}, "against is 'others': choose one of random-same-layers, random."),
        ({"shares": []}, r"shares is \[\]: give shares of all heads above 0 and at most 1, such as \[0.01, 0.1\]"),
        ({"shares": [0.1, 3]}, r"shares is \[0.1, 3\]: give shares"),
        ({"shares": [float("nan")]}, r"shares is \[nan\]: give shares"),
        ({"shares": 0.1}, "shares is 0.1: give shares"),
        ({"random": 0}, "random is 0: give how many random heads or sets stand beside each, 1 or more."),
        ({"tokens": TOKENS[:1]}, "tokens is one sequence: intervals are over sequences, so give two or more."),
        ({"how": "noise"}, "how is 'noise': choose one of"),
        ({"scan": {}}, "scan is a dict: give a scan of the model, or a group of it."),
        (
            {"scan": xr.Dataset()},
            r"score is 'induction': choose a variable \(layer, head\) of the scan \(which has none\)",
        ),
    ],
)
def test_bad_input(gpt2, arguments, sentence):
    options = {"scan": metaint.scan(gpt2, TOKENS), "tokens": TOKENS, **arguments}
    with pytest.raises(InputError, match=f"^{sentence}"):
        ablation_curve(gpt2, options.pop("scan"), **options)


def test_a_scan_that_does_not_fit(gpt2, planted, repeats):
    with pytest.raises(InputError, match=r"^scan holds 2 layers x 8 heads, and the model has 2 x 4"):
        ablation_curve(gpt2, metaint.scan(planted, repeats), tokens=TOKENS)
    scan = metaint.scan(gpt2, torch.arange(5, 25).view(2, 10))
    with pytest.raises(InputError, match=r"^score is 'induction', which this scan knows of no head"):
        ablation_curve(gpt2, scan, tokens=TOKENS)
    over_steps = scan["heads"].to_dataset().expand_dims(step=[0, 1])
    with pytest.raises(InputError, match=r"^scan is a recording over steps"):
        ablation_curve(gpt2, over_steps, tokens=TOKENS)


def test_it_is_exported():
    assert metaint.ablation_curve is ablation_curve
