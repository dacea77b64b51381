import math
import random
from itertools import pairwise

import pytest
import torch

from metaint.errors import InputError
from metaint.labs.birth import TRAINED, build, head_loss, restore, train, trained_matrices
from metaint.tasks import bigram
from tests.builders import available_kinds

TEXT = "".join(random.Random(0).choices("abcdefghijkl ", k=3000))

pytestmark = pytest.mark.skipif("native-attn-only" not in available_kinds(), reason="the toy needs boot_native")


def test_architecture():
    model = build(13, length=12, d=16, seed=3)
    state = model.state_dict()
    assert torch.equal(model.W_Q, torch.eye(16).expand(2, 1, 16, 16))
    assert all((value == 0).all() for name, value in state.items() if name.endswith("bias"))
    assert state["embed.weight"].std() == pytest.approx(1, abs=0.2)
    for name in (*TRAINED, "blocks.0.attn.v.weight", "unembed.weight"):
        assert state[name].abs().max() <= 1 / math.sqrt(16)
        assert state[name].std() == pytest.approx(1 / math.sqrt(3 * 16), rel=0.2)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == len(TRAINED)


def test_forward_is_the_formula_of_the_paper():
    """Bietti et al. 2023, the simplified architecture as coded in transformer-birth, in its own orientation."""
    length, d = 12, 16
    model = build(13, length, d)
    state = model.state_dict()
    tokens = torch.randint(13, (3, length), generator=torch.Generator().manual_seed(0))
    h = state["embed.weight"][tokens] + state["pos_embed.weight"]
    for layer in range(2):
        k, v, o = (state[f"blocks.{layer}.attn.{name}.weight"] for name in "kvo")
        scores = h @ (h @ k.T).mT / math.sqrt(d)
        mask = torch.ones(length, length).triu(1).bool()
        h = h + scores.masked_fill(mask, -torch.inf).softmax(-1) @ h @ v.T @ o.T
    assert torch.allclose(model(tokens), h @ state["unembed.weight"].T, atol=1e-4)


def test_seed_decides_and_global_state_stays():
    before = torch.random.get_rng_state()
    first, again, other = (build(13, 12, 16, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    assert torch.equal(before, torch.random.get_rng_state())


def test_loss_counts_only_positions_known_from_the_context():
    task = bigram(TEXT)
    model, sample = build(task.vocab, 24, 16), task.sample(8, 24)
    loss, right, copies = head_loss(model, sample)
    log_probability = model(sample.tokens[:, :-1]).log_softmax(-1)
    known = [(b, t) for b in range(8) for t in range(24) if sample.outs[b, t] >= 2]
    expected = -sum(log_probability[b, t, sample.tokens[b, t + 1]] for b, t in known) / len(known)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(right) == len(copies) == len(known)


def test_quick_training():
    task = bigram(TEXT, no_repeat=True)
    steps, before = [], torch.random.get_rng_state()
    options = {"length": 24, "d": 32, "batch": 32, "steps": 60, "learning_rate": 0.2, "every": 5, "keep": 6}
    training = train(task, on_step=lambda step, model: steps.append(step), **options)
    assert torch.equal(before, torch.random.get_rng_state())
    history = training.history
    assert history.loss[-1] < history.loss[0] - 0.3
    assert history.accuracy[-1] > history.accuracy[0] + 0.1
    assert history.attrs["passed_at"] == -1
    assert steps == list(range(61))

    kept = [step for step, _ in training.checkpoints]
    assert len(kept) == 6
    assert (kept[0], kept[-1]) == (0, 60)
    gaps = [after - before for before, after in pairwise(kept)]
    assert gaps == sorted(gaps)
    start = build(task.vocab, 24, 32)
    assert all(torch.equal(value, training.checkpoints[0][1][name]) for name, value in _state(start).items())
    restored = restore(start, training.checkpoints[-1])
    tokens = task.sample(2, 24, 9).tokens[:, :-1]
    assert torch.equal(restored(tokens), training.model(tokens))
    again = train(task, **options)
    assert torch.equal(again.model(tokens), training.model(tokens))


def test_training_goes_on_for_a_while_after_the_target():
    options = {"length": 24, "d": 16, "batch": 8, "steps": 200, "every": 5, "learning_rate": 0.1}
    history = train(bigram(TEXT), target=0.01, settle=2, **options).history
    passed = history.attrs["passed_at"]
    assert history.step[-1] == 2 * passed


def _state(model):
    return {name: value.detach() for name, value in trained_matrices(model).items()}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 0}, "steps is 0; give at least 1."),
        ({"length": 0}, "length is 0; give at least 1."),
        ({"keep": 1}, "keep is 1; give at least 2, for the first and the last state."),
        ({"target": 85}, "target is 85; give an accuracy above 0 and up to 1."),
        ({"settle": 0.5}, "settle is 0.5; give at least 1, which stops once the target is passed."),
        (
            {"length": 1},
            "length is 1, too short for a trigger to come twice; give more, or more triggers.",
        ),
    ],
)
def test_bad_input_gets_one_sentence(options, sentence):
    with pytest.raises(InputError) as caught:
        train(bigram(TEXT), **{"d": 8, "batch": 2, "length": 16, **options})
    assert str(caught.value) == sentence


def test_divergence_is_named():
    with pytest.raises(InputError, match=r"^learning_rate is 1e\+30, with which the loss was no longer finite at"):
        train(bigram(TEXT), length=24, d=8, batch=4, learning_rate=1e30)


@pytest.mark.slow
def test_an_induction_head_is_born():
    """Passes 0.85 in-context accuracy on the default text, as its settings promise."""
    training = train(bigram(trigger_count=48, no_repeat=True))
    assert training.history.attrs["passed_at"] > 0
    assert training.history.accuracy[-1] > 0.9
    assert 18 <= len(training.checkpoints) <= 20
