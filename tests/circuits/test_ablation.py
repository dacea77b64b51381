"""`ablate` against the plain loop of one pass a head, and on a model whose circuit is known."""

import numpy as np
import pytest
import torch

import metaint
from metaint.circuits.ablation import ablate
from metaint.circuits.metrics import in_context_loss, next_token_loss
from metaint.errors import HookAuditError, InputError
from metaint.tasks import repeated_tokens
from tests.builders import available_kinds, build
from tests.circuits.planted import circuit_model, traces, written_model
from tests.models.handmade import HandMade
from tests.planted import VOCAB

TOKENS = repeated_tokens(96, 8, batch=5, ids=(5, 95), seed=1)
NAMES = ("effect", "effect_low", "effect_high")


def loop(model, tokens, metric, stand, sets):
    """The metric of each set, each in a pass of its own, minus the clean one: [set, sequence]; and the clean one."""
    with torch.no_grad():
        clean = metric(model(tokens), tokens)
        rows = []
        for heads in sets:
            hooks = []
            for layer in {layer for layer, _ in heads}:

                def edit(z, hook, layer=layer, heads=heads):
                    z = z.clone()
                    for head in [j for i, j in heads if i == layer]:
                        z[:, :, head] = stand(layer, head)
                    return z

                hooks.append((f"blocks.{layer}.attn.hook_z", edit))
            rows.append(metric(model.run_with_hooks(tokens, fwd_hooks=hooks), tokens) - clean)
    return torch.stack(rows), clean


def z_of(model, tokens):
    kept = {}
    hooks = [
        (f"blocks.{i}.attn.hook_z", lambda z, hook: kept.update({int(hook.name.split(".")[1]): z.clone()}))
        for i in range(model.cfg.n_layers)
    ]
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    return kept


def every(model):
    return [[(i, j)] for i in range(model.cfg.n_layers) for j in range(model.cfg.n_heads)]


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_every_head_like_the_plain_loop(any_model, how):
    """Grouped-query attention, rotations, norms after attention: all kinds, heads one by one and together."""
    causal = "Bert" not in str(getattr(any_model.cfg, "architecture", ""))
    metric = "next_token_loss" if causal else lambda logits, tokens: logits[:, 1:].logsumexp(-1).mean(1)
    plain = next_token_loss if causal else metric
    z = z_of(any_model, TOKENS)
    stand = (lambda i, j: z[i][:, :, j].mean((0, 1))) if how == "mean" else (lambda i, j: 0.0)
    expected, clean = loop(any_model, TOKENS, plain, stand, [*every(any_model), [(0, 1), (1, 2)]])
    found = ablate(any_model, TOKENS, how=how, metric=metric, batch_size=4)
    np.testing.assert_allclose(found["effect"].values.ravel(), expected[:-1].mean(1), atol=1e-5)
    np.testing.assert_allclose(found["clean"], clean.mean(), atol=1e-5)
    assert float(expected.abs().max()) > 0.01
    assert found.attrs["passes"] == "from the ablated layer" or not causal
    together = ablate(any_model, TOKENS, ["0.1"], how, metric, sets={"both": ["0.1", "1.2"]}, batch_size=16)
    np.testing.assert_allclose(together["set_effect"].sel(set="both"), expected[-1].mean(), atol=1e-5)
    np.testing.assert_allclose(together["effect"].sel(layer=0, head=1), expected[1].mean(), atol=1e-5)
    assert int(together["effect"].notnull().sum()) == 1


def test_resampled_heads_are_another_sequences(gpt2):
    """The same whatever the batches, and like swapping every sequence's z for that of the one it is told."""
    found = [ablate(gpt2, TOKENS, how="resample", batch_size=size, seed=3) for size in (2, 5, 40)]
    for other in found[1:]:
        np.testing.assert_allclose(other["effect"], found[0]["effect"], atol=1e-5)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(3)).tolist()
    donor = {order[i]: order[i - 1] for i in range(5)}
    assert sorted(donor.values()) == list(range(5))
    assert all(giver != taker for taker, giver in donor.items())
    z = z_of(gpt2, TOKENS)
    giver = [donor[i] for i in range(5)]
    expected, _ = loop(gpt2, TOKENS, in_context_loss, lambda i, j: z[i][giver, :, j], every(gpt2))
    np.testing.assert_allclose(found[0]["effect"].values.ravel(), expected.mean(1), atol=1e-5)
    other = ablate(gpt2, TOKENS, how="resample", seed=4)["effect"]
    assert float(abs(other - found[0]["effect"]).max()) > 1e-4


def test_intervals_are_over_sequences(gpt2):
    """Against resampling by hand, and none for a single sequence."""
    expected, clean = loop(gpt2, TOKENS, in_context_loss, lambda i, j: 0.0, every(gpt2))
    draws = np.random.default_rng(0).multinomial(5, np.full(5, 0.2), size=1000)
    means = draws @ expected.double().numpy().T / 5
    found = ablate(gpt2, TOKENS)
    for name, level in (("effect_low", 0.025), ("effect_high", 0.975)):
        np.testing.assert_allclose(found[name].values.ravel(), np.quantile(means, level, axis=0), atol=1e-5)
    cleans = draws @ clean.double().numpy() / 5
    np.testing.assert_allclose(found["clean_low"], np.quantile(cleans, 0.025), atol=1e-5)
    alone = ablate(gpt2, TOKENS[:1])
    assert bool(alone["effect_low"].isnull().all())
    assert bool(alone["effect"].notnull().all())


def test_sequences_without_a_place_do_not_count(gpt2):
    """A sequence in which nothing repeats adds nothing to the mean over the others."""
    other = torch.arange(10, 26)[None]
    found = ablate(gpt2, torch.cat([TOKENS, other]))
    np.testing.assert_allclose(found["effect"], ablate(gpt2, TOKENS)["effect"], atol=1e-5)
    assert found.attrs["positions"] == ablate(gpt2, TOKENS).attrs["positions"] == 5 * 7


# ---- a known circuit ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    return circuit_model()


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
def test_the_circuit_destroys_and_the_rest_does_not(planted, how):
    tokens = repeated_tokens(VOCAB, 20, batch=6)
    found = ablate(planted, tokens, how=how, metric="induction_accuracy")
    assert float(found["clean"]) > 0.95
    effect = found["effect"].values.copy()
    assert effect[0, 0] < -0.8
    assert effect[1, 0] < -0.8
    effect[:, 0] = 0
    assert abs(effect).max() < 0.05
    high = found["effect_high"].values
    assert high[0, 0] < -0.5
    assert high[1, 0] < -0.5


def test_patterns_preserved_tell_what_is_moved_from_where_it_is_looked_for(planted):
    """The previous-token head works through the induction head's keys alone, which the clean pattern keeps."""
    tokens = repeated_tokens(VOCAB, 20, batch=4)
    found = ablate(planted, tokens, ["0.0", "1.0"], "pattern-preserving", sets=[["0.0", "1.0"]])
    assert abs(float(found["effect"].sel(layer=0, head=0))) < 0.01
    assert float(found["effect"].sel(layer=1, head=0)) > 2
    assert float(found["set_effect"].sel(set="0.0+1.0")) > 2


def test_the_papers_model():
    found = ablate(written_model(), metric="induction_accuracy")
    assert float(found["clean"]) > 0.95
    assert float(found["effect"].max()) < -0.8
    assert found["effect"].shape == (2, 1)


# ---- beside others -----------------------------------------------------------------------------------------------


def test_hooks_of_the_owner_stay_and_count(gpt2):
    """An owner's edit is part of the model: what is measured is the edited model, in whole passes of whole batches."""
    seen = []

    def edit(stream, hook):
        seen.append(len(stream))
        return stream * 1.5

    with gpt2.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", edit)]):
        point = gpt2.hook_dict["blocks.1.hook_resid_pre"]
        before = list(point._forward_hooks)
        found = ablate(gpt2, TOKENS)
        assert list(point._forward_hooks) == before
        expected, _ = loop(gpt2, TOKENS, in_context_loss, lambda i, j: 0.0, every(gpt2))
    assert set(seen) == {5}
    assert found.attrs["passes"].startswith("whole (hooks are on the model")
    np.testing.assert_allclose(found["effect"].values.ravel(), expected.mean(1), atol=1e-5)
    assert float(abs(found["effect"] - ablate(gpt2, TOKENS)["effect"]).max()) > 1e-3


def test_no_trace_is_left(gpt2):
    gpt2(TOKENS)
    ablate(gpt2, TOKENS, how="pattern-preserving")
    gpt2.train()
    try:
        before, state = traces(gpt2), torch.random.get_rng_state()
        for how in ("zero", "mean", "resample", "pattern-preserving"):
            ablate(gpt2, TOKENS, how=how)
        assert traces(gpt2) == before
        assert torch.equal(torch.random.get_rng_state(), state)

        def fail(logits, tokens):
            raise ValueError("on purpose")

        with pytest.raises(ValueError, match="on purpose"):
            ablate(gpt2, TOKENS, metric=fail)
        assert traces(gpt2) == before
    finally:
        gpt2.eval()


def test_half_precision_is_close():
    model = build("gpt2") if "gpt2" in available_kinds() else build(available_kinds()[0])
    expected = ablate(model, TOKENS, metric="next_token_loss")["effect"]
    found = ablate(model.to(torch.bfloat16), TOKENS, metric="next_token_loss")
    assert float(abs(found["effect"] - expected).max()) < 0.02
    assert found.attrs["passes"] == "from the ablated layer"


# ---- what can't be used ------------------------------------------------------------------------------------------


@pytest.mark.skipif("bert" not in available_kinds(), reason="no BERT here")
def test_bert_is_refused_in_a_sentence():
    with pytest.raises(InputError) as error:
        ablate(build("bert"), TOKENS)
    assert str(error.value) == (
        "model attends in both directions, and metric is 'in_context_loss', a prediction of the next token: give a "
        "causal model, or a metric of your own."
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"how": "noise"}, "how is 'noise': choose one of zero, mean, resample, pattern-preserving."),
        ({"heads": ["2.0"]}, "head is '2.0': name one from 0.0 to 1.3."),
        ({"heads": "0.1"}, 'heads is \'0.1\': give a list of names such as ["5.1", "5.5"], or None for every head.'),
        ({"sets": {"none": []}}, 'sets has [] for \'none\': give each as a list of heads, such as ["0.1", "5.1"].'),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1."),
        (
            {"tokens": TOKENS[:1], "how": "resample"},
            "tokens is one sequence, and resampling takes another's activations: give two or more.",
        ),
        (
            {"tokens": torch.arange(10)},
            "tokens hold no position where in_context_loss is defined (the next token being what followed the current "
            "one before): give tokens that repeat, or another metric.",
        ),
    ],
)
def test_bad_input(gpt2, arguments, sentence):
    with pytest.raises(InputError) as error:
        ablate(gpt2, **{"tokens": TOKENS, **arguments})
    assert str(error.value) == sentence


def test_edits_that_do_nothing_are_refused():
    with pytest.raises(HookAuditError, match="edit_z"):
        ablate(HandMade("late_z"), torch.randint(30, (2, 8)), metric="next_token_loss")


def test_it_is_exported():
    assert metaint.ablate is ablate
