"""Faithfulness, completeness and random circuits: on a model whose circuit is known, and against plain passes."""

import math

import numpy as np
import pytest
import torch

import metaint
from metaint.circuits.checks import check_circuit
from metaint.circuits.metrics import in_context_loss
from metaint.circuits.parts import all_heads
from metaint.circuits.random_circuits import ENOUGH, KINDS, random_circuits
from metaint.errors import InputError
from metaint.models.describe import shape_of
from metaint.tasks import repeated_tokens
from tests.circuits.planted import circuit_model, written_model
from tests.circuits.test_ablation import loop
from tests.models.handmade import HandMade
from tests.planted import VOCAB

TOKENS = repeated_tokens(VOCAB, 16, batch=5)


@pytest.fixture(scope="module")
def planted():
    return circuit_model()


@pytest.fixture(scope="module")
def checked(planted):
    return check_circuit(planted, ["0.0", "1.0"], TOKENS, random=20)


def test_the_planted_circuit_is_found(checked):
    assert checked.attrs["found"] == 1
    for name in ("faithfulness", "completeness"):
        assert 0.9 < float(checked[f"{name}_low"]) <= float(checked[name]) <= float(checked[f"{name}_high"]) < 1.2
        assert checked[f"random_{name}"].shape == (20,)
        assert float(abs(checked[f"random_{name}"]).max()) < 0.1
    assert checked.attrs["why"].endswith(
        "of 20 random circuits of other heads, as many in each layer, 0 bring as much alone and 0 lose as much."
    )
    assert checked.attrs["heads"] == "0.0, 1.0"


@pytest.mark.parametrize("heads", [["0.0"], ["1.0"], ["0.3", "1.4"], ["0.1", "0.2", "1.0"]])
def test_others_are_not(planted, heads):
    found = check_circuit(planted, heads, TOKENS, random=20)
    assert found.attrs["found"] == 0
    assert abs(float(found["faithfulness"])) < 0.2


def test_shares_like_plain_passes(planted):
    """(alone - empty) / (clean - empty) and (clean - without) / (clean - empty), with the bootstrap of the ratio."""
    every = [(i, j) for i in range(2) for j in range(8)]
    circuit = [(0, 0), (1, 0), (1, 3)]
    rest = [head for head in every if head not in circuit]
    changes, clean = loop(planted, TOKENS, in_context_loss, lambda i, j: 0.0, [every, rest, circuit])
    empty, alone, without = (changes + clean).double()
    found = check_circuit(planted, ["1.0", "0.0", "1.3"], TOKENS, "zero", random=0)
    brings = (clean - empty).numpy()
    weights = np.random.default_rng(0).multinomial(5, np.full(5, 0.2), size=1000)
    for name, part in (("faithfulness", alone - empty), ("completeness", clean - without)):
        assert float(found[name]) == pytest.approx(float(part.mean() / brings.mean()), abs=1e-5)
        ratios = (weights @ part.numpy()) / (weights @ brings)
        for suffix, level in (("_low", 0.025), ("_high", 0.975)):
            assert float(found[name + suffix]) == pytest.approx(np.quantile(ratios, level), abs=1e-4)
    assert float(found["clean"]) == pytest.approx(float(clean.mean()), abs=1e-5)
    assert float(found["ablated"]) == pytest.approx(float(empty.mean()), abs=1e-5)
    assert found.attrs["why"].endswith("no random circuit was asked for, so that it is compared with no other.")
    assert found.attrs["found"] == 1
    assert check_circuit(planted, ["0.3", "1.3"], TOKENS, random=0).attrs["found"] == 0


def test_shares_do_not_depend_on_which_way_a_metric_is_better(planted):
    """A metric and its negative, of one's own: the same shares and the same verdict."""
    found = [
        check_circuit(planted, ["0.0", "1.0"], TOKENS, metric=metric, random=8)
        for metric in (in_context_loss, lambda logits, tokens: 3 - 2 * in_context_loss(logits, tokens))
    ]
    for name in ("faithfulness", "completeness", "faithfulness_low", "random_faithfulness"):
        np.testing.assert_allclose(found[0][name], found[1][name], atol=1e-6)
    assert [part.attrs["found"] for part in found] == [1, 1]


def test_a_model_that_learnt_nothing_has_nothing_to_explain():
    found = check_circuit(HandMade(), ["0.0"], torch.randint(30, (8, 20), generator=torch.Generator().manual_seed(0)),
                          metric=lambda logits, tokens: torch.arange(8) % 2 + 0.0 * logits[:, 0, 0])  # fmt: skip
    assert found.attrs["found"] == 0
    assert found.attrs["why"].startswith("Taking out all heads changes <lambda> by no more than chance")


def test_heads_that_harm_have_no_circuit(planted):
    """Sequences in which what followed before never follows again: an induction head is wrong each time."""
    tokens = TOKENS.clone()
    tokens[:, 16:] = TOKENS[:, :16].flip(1)
    found = check_circuit(planted, ["0.0", "1.0"], tokens, metric="next_token_loss", random=4)
    assert found.attrs["why"] == "Taking out all heads makes next_token_loss better, so there is nothing to explain."
    assert found.attrs["found"] == 0


# ---- random circuits ---------------------------------------------------------------------------------------------


def test_random_circuits_are_like_the_circuit(planted):
    circuit = [(0, 0), (0, 3), (1, 0)]
    found, kind = random_circuits(all_heads(shape_of(planted)), circuit, 30, 0)
    assert kind == KINDS[0]
    assert len({frozenset(some) for some in found}) == 30
    assert all([layer for layer, _ in some] == [0, 0, 1] and not set(some) & set(circuit) for some in found)
    assert random_circuits(all_heads(shape_of(planted)), circuit, 30, 0)[0] == found
    assert random_circuits(all_heads(shape_of(planted)), circuit, 30, 1)[0] != found
    every, _ = random_circuits(all_heads(shape_of(planted)), circuit, 1000, 0)
    assert len(every) == len({frozenset(some) for some in every}) == math.comb(6, 2) * 7


def test_where_few_are_left_any_layers_will_do(planted):
    circuit = [(0, j) for j in range(8)] + [(1, 0)]
    found, kind = random_circuits(all_heads(shape_of(planted)), circuit, 50, 0)
    assert kind == KINDS[2]  # nine of the seven other heads there are none
    assert all(len(set(some)) == 9 and set(some) != set(circuit) for some in found)
    circuit = [(0, j) for j in range(7)]
    found, kind = random_circuits(all_heads(shape_of(planted)), circuit, 50, 0)
    assert kind == KINDS[1]
    assert len(found) == math.comb(9, 7) >= ENOUGH
    assert not any(set(some) & set(circuit) for some in found)


def test_a_model_that_is_all_circuit():
    model = written_model()
    assert random_circuits(all_heads(shape_of(model)), [(0, 0), (1, 0)], 50, 0) == ([], KINDS[2])
    found = check_circuit(model, ["0.0", "1.0"])
    assert found.attrs["found"] == 1
    assert found.attrs["why"].endswith("every head is in it, so that it is compared with no other.")
    assert float(found["faithfulness"]) == float(found["completeness"]) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"heads": []}, 'heads is []: give a list of names such as ["0.1", "5.1"].'),
        ({"random": -1}, "random is -1: give how many random circuits to compare with, or 0."),
        ({"heads": ["0.9"]}, "head is '0.9': name one from 0.0 to 1.7."),
    ],
)
def test_bad_input(planted, arguments, sentence):
    with pytest.raises(InputError) as error:
        check_circuit(planted, **{"heads": ["0.0"], "tokens": TOKENS, **arguments})
    assert str(error.value) == sentence


def test_it_is_exported():
    assert metaint.check_circuit is check_circuit
