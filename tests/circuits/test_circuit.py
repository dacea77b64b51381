"""`trace_circuit`: the planted circuit is found, no other is, and the graph says what was measured."""

import numpy as np
import pytest
import torch

import metaint
from metaint.circuits import tracing
from metaint.circuits.ablation import ablate
from metaint.circuits.circuit import trace_circuit
from metaint.circuits.metrics import in_context_loss, next_token_loss
from metaint.circuits.subject import subject_of
from metaint.errors import InputError
from metaint.measures.composition import composition, read_factor, write_factor
from metaint.models.folded import folded_weights
from metaint.models.reading import Unavailable
from metaint.tasks import bigram, repeated_tokens
from metaint.toys.memory_transformer import memory_transformer
from tests.builders import available_kinds, build
from tests.circuits.planted import circuit_model, doubled_model, own_choice, traces, written_model
from tests.planted import VOCAB

TOKENS = repeated_tokens(VOCAB, 20, batch=6)


@pytest.fixture(scope="module")
def planted():
    return circuit_model()


@pytest.fixture(scope="module")
def traced(planted):
    return trace_circuit(planted, TOKENS, random=20)


def test_the_planted_circuit_is_found(traced):
    assert list(traced) == ["embedding", "0.0", "1.0", "logits"]
    assert set(traced.edges) == {("embedding", "0.0"), ("embedding", "1.0"), ("0.0", "1.0"), ("1.0", "logits")}
    assert traced.graph["found"] is True
    assert traced.graph["faithfulness_low"] > 0.9
    assert traced.graph["completeness_low"] > 0.9
    assert max(traced.graph["random_faithfulness_max"], traced.graph["random_completeness_max"]) < 0.1
    assert "0 bring as much alone and 0 lose as much" in traced.graph["why"]


def test_nodes_tell_of_labels_scores_and_effects(planted, traced):
    assert traced.nodes["embedding"] == {"kind": "embedding", "layer": -1}
    assert traced.nodes["logits"] == {"kind": "logits", "layer": 2}
    expected = ablate(planted, TOKENS, how="mean")
    scan = metaint.scan(planted, TOKENS)["heads"].to_dataset()
    for layer, label in ((0, "previous_token"), (1, "induction")):
        node, at = traced.nodes[f"{layer}.0"], {"layer": layer, "head": 0}
        assert (node["kind"], node["layer"], node["head"]) == ("head", layer, 0)
        assert label in node["labels"].split(", ")
        for name in ("effect", "effect_low", "effect_high"):
            assert node[name] == pytest.approx(float(expected[name].sel(at)), abs=1e-6)
        assert node["share"] == pytest.approx(1, abs=0.2)
        assert node["induction"] == float(scan["induction"].sel(at))
        assert not any(name.endswith(("_null_mean", "_count", "_uniform")) for name in node)


def test_edges_tell_of_effects_and_composition(planted, traced):
    edge = traced.edges["0.0", "1.0"]
    assert edge["by"] == "k"
    assert edge["effect"] == pytest.approx(edge["effect_k"], rel=1e-2)
    assert edge["effect_low"] <= edge["effect"] <= edge["effect_high"]
    assert max(abs(edge["effect_q"]), abs(edge["effect_v"])) < 0.01 * edge["effect"]
    writer, reader = (folded_weights(planted, layer) for layer in (0, 1))
    read = {"q": (reader.W_Q, reader.W_K), "k": (reader.W_K, reader.W_Q), "v": (reader.W_V, reader.W_O.mT)}
    for letter, (left, right) in read.items():
        score = composition(write_factor(writer.W_V, writer.W_O), read_factor(left, right.mT))
        assert edge[f"{letter}_composition"] == pytest.approx(float(score.score[0, 0]), abs=1e-6)
        assert edge[f"{letter}_composition_z"] == pytest.approx(float(score.z[0, 0]), rel=1e-4)
    assert edge["k_composition_z"] > 20 > max(edge["q_composition_z"], edge["v_composition_z"])
    assert edge["key_composition_recall"] == 1
    assert edge["key_composition_recall_chance"] == pytest.approx(1 / VOCAB)
    assert traced.edges["1.0", "logits"]["by"] == ""
    assert "k_composition" not in traced.edges["embedding", "1.0"]


def test_the_papers_model():
    """One head a layer: previous-token head, by keys, to the induction head, to the logits."""
    found = trace_circuit(written_model())
    assert set(found.edges) == {("embedding", "0.0"), ("embedding", "1.0"), ("0.0", "1.0"), ("1.0", "logits")}
    assert found.edges["0.0", "1.0"]["by"] == "k"
    assert found.graph["found"] is True
    assert found.graph["why"].endswith("every head is in it, so that it is compared with no other.")


@pytest.mark.slow
def test_the_papers_model_trained():
    from metaint.labs.birth.training import held_out_sample, train

    text = "".join(np.random.default_rng(0).choice(list("abcdefghijklmnop "), 6000))
    task = bigram(text, trigger_count=12, no_repeat=True)
    trained = train(task, length=48, d=96, batch=32, target=0.9, steps=600)
    tokens = held_out_sample(task, 24, 48, 1).tokens[:, :48]
    found = trace_circuit(trained.model, tokens)
    assert {("0.0", "1.0"), ("1.0", "logits")} <= set(found.edges)
    assert found.edges["0.0", "1.0"]["by"] == "k"
    assert "induction" in found.nodes["1.0"]["labels"]
    assert "previous_token" in found.nodes["0.0"]["labels"]
    assert found.graph["found"] is True
    accuracy = ablate(trained.model, tokens, metric="induction_accuracy")
    assert float(accuracy["clean"]) > 0.8
    assert float(accuracy["clean"] + accuracy["effect"].max()) < 0.5


def test_an_untrained_model_has_none(gpt2, repeated):
    for model in (gpt2, memory_transformer(d_vocab=96, n_ctx=64, d_model=32)):
        found = trace_circuit(model, repeated, random=4)
        assert found.graph["found"] is False
        assert found.graph["why"].endswith(".")


# ---- targets -----------------------------------------------------------------------------------------------------


def test_around_previous_token_heads(planted):
    found = trace_circuit(planted, TOKENS, target="previous_token", random=10)
    assert list(found) == ["embedding", "0.0", "1.0", "logits"]
    assert found.graph["target"] == "previous_token"
    assert found.graph["metric"] == "in_context_loss"


def test_averaging_heads_that_write_to_nothing_are_no_circuit():
    found = trace_circuit(circuit_model(strength=4.0), TOKENS, target="averaging", random=4)
    assert list(found) == ["embedding", "logits"]
    assert found.graph["found"] is False
    assert found.graph["why"] == "The one head labelled averaging doesn't count for next_token_loss."


def test_heads_that_stand_in_for_each_other_are_tried_together():
    model = doubled_model(40.0)
    found = trace_circuit(model, TOKENS, random=4)
    assert {"1.0", "1.3"} <= set(found)
    assert found.graph["verdict"] == "found"
    assert {found.nodes[name].get("group") for name in ("1.0", "1.3")} == {1}
    assert max(found.nodes[name]["share"] for name in ("1.0", "1.3")) < 0.02
    assert sorted(found.nodes[name]["gain_share"] > 0.5 for name in ("1.0", "1.3")) == [False, True]
    together = ablate(model, TOKENS, sets=[["1.0", "1.3"]], how="mean")["set_effect"].item()
    brings = ablate(model, TOKENS, sets={"all": [f"{i}.{j}" for i in range(2) for j in range(8)]}, how="mean")
    share = round(100 * together / brings["set_effect"].item())
    assert share > 80
    assert "1.0" in (told := found.graph["groups"])
    assert f"stand in for each other: ablated together they take {share} % (" in told


def test_labelled_heads_that_count_apart_are_no_group(traced):
    assert "groups" not in traced.graph
    assert not any("group" in data for _, data in traced.nodes(data=True))


def test_a_metric_of_ones_own(planted, traced):
    def loss(logits, tokens):
        return in_context_loss(logits, tokens)

    found = trace_circuit(planted, TOKENS, target=loss, random=10)
    assert set(found.edges) == set(traced.edges)
    assert found.graph["target"] == found.graph["metric"] == "loss"
    for ends in traced.edges:
        assert found.edges[ends]["effect"] == pytest.approx(traced.edges[ends]["effect"], abs=1e-5)


# ---- every kind of model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in available_kinds() if kind != "bert"])
def test_every_kind(kind):
    """Of random weights too some parts matter: they are traced, MLPs among them, and the graph holds together."""
    model, tokens = build(kind), repeated_tokens(96, 8, batch=6, ids=(5, 95))
    found = trace_circuit(model, tokens, target=own_choice(model, tokens), random=3)
    assert found.graph["paths"] == ""
    kinds = {found.nodes[node]["kind"] for node in found}
    assert {"embedding", "logits", "head"} <= kinds
    assert ("mlp" in kinds) == subject_of(model).has_mlps
    depth = {node: (found.nodes[node]["layer"], found.nodes[node]["kind"] == "mlp") for node in found}
    assert all(depth[writer] < depth[reader] for writer, reader in found.edges)
    for writer, reader, edge in found.edges(data=True):
        assert edge["effect_low"] > 0 or edge["effect_high"] < 0
        assert edge["share"] >= 0.02
        heads = [found.nodes[node]["kind"] == "head" for node in (writer, reader)]
        assert ("k_composition_z" in edge) == all(heads)
        assert (edge["by"] in ("q", "k", "v")) == heads[1]
    values = [value for _, data in [*found.nodes(data=True), ("", found.graph)] for value in data.values()]
    assert {type(value) for value in values} <= {str, int, float, bool}


def test_hooks_of_the_owner(planted):
    """An owner who takes the previous-token head out has no circuit left, and keeps the hook."""

    def without(z, hook):
        z = z.clone()
        z[:, :, 0] = 0
        return z

    with planted.hooks(fwd_hooks=[("blocks.0.attn.hook_z", without)]):
        before = traces(planted)
        found = trace_circuit(planted, TOKENS, random=4)
        assert traces(planted) == before
    assert found.graph["found"] is False
    assert found.graph["passes"].startswith("whole")


def test_no_trace_is_left_nor_after_an_exception(planted, monkeypatch):
    planted(TOKENS)
    before = traces(planted)
    trace_circuit(planted, TOKENS, random=2)
    assert traces(planted) == before

    def fail(*args, **kwargs):
        raise RuntimeError("on purpose")

    monkeypatch.setattr("metaint.circuits.variants.edit_z", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        trace_circuit(planted, TOKENS, random=2)
    assert traces(planted) == before


def test_where_paths_can_not_be_followed(planted, monkeypatch):
    def unavailable(*args):
        raise Unavailable("weights are not to be trusted")

    monkeypatch.setattr(tracing, "wiring_of", unavailable)
    found = trace_circuit(planted, TOKENS, random=10)
    assert list(found) == ["embedding", "0.0", "1.0", "logits"]
    assert not found.edges
    assert found.graph["paths"] == "not followed: weights are not to be trusted"
    assert found.graph["found"] is True


# ---- what can't be used ------------------------------------------------------------------------------------------


@pytest.mark.skipif("bert" not in available_kinds(), reason="no BERT here")
def test_bert_is_refused_in_a_sentence():
    with pytest.raises(InputError) as error:
        trace_circuit(build("bert"), torch.randint(4, 90, (2, 8)), target=next_token_loss)
    assert str(error.value) == (
        "model attends in both directions: circuits are traced in models that predict the next token."
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"target": "copying"},
            "target is 'copying': choose induction, previous_token, averaging, sink, or give a function (logits, "
            "tokens).",
        ),
        ({"how": "pattern_preserving"}, "how is 'pattern_preserving': choose one of zero, mean, resample."),
        (
            {"threshold": 1.5},
            "threshold is 1.5, most 16 and random 50: give a share between 0 and 1, and whole numbers of parts and of "
            "random circuits.",
        ),
        ({"tokens": TOKENS[:1]}, "tokens is one sequence: intervals are over sequences, so give two or more."),
    ],
)
def test_bad_input(planted, arguments, sentence):
    with pytest.raises(InputError) as error:
        trace_circuit(planted, **{"tokens": TOKENS, **arguments})
    assert str(error.value) == sentence


def test_a_scan_of_another_model(planted, repeated_scan):
    with pytest.raises(InputError) as error:
        trace_circuit(planted, TOKENS, repeated_scan)
    assert str(error.value) == (
        "scan holds 2 layers x 4 heads, and the model has 2 x 8: give a scan of this model, of one checkpoint."
    )


def test_a_scan_that_is_given_is_used(planted, traced):
    scan = metaint.scan(planted, TOKENS)
    found = trace_circuit(planted, TOKENS, scan, random=20)
    assert found.graph == traced.graph
    assert dict(found.nodes(data=True)) == dict(traced.nodes(data=True))


def test_it_is_exported():
    assert metaint.trace_circuit is trace_circuit
