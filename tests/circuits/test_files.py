"""Circuits on disk: GraphML there and back, MIB's JSON as EAP-IG's `Graph` would list it, and what can't be read."""

import json

import networkx
import pytest

import metaint
from metaint.circuits.circuit import trace_circuit
from metaint.circuits.files import importances, load_circuit, save_circuit
from metaint.errors import InputError, StoreError
from metaint.tasks import repeated_tokens
from tests.builders import available_kinds, build
from tests.circuits.planted import circuit_model, own_choice
from tests.planted import VOCAB


@pytest.fixture(scope="module")
def planted():
    return trace_circuit(circuit_model(), repeated_tokens(VOCAB, 16, batch=4), random=5)


def with_mlps(kind):
    model, tokens = build(kind), repeated_tokens(96, 8, batch=6, ids=(5, 95))
    return trace_circuit(model, tokens, target=own_choice(model, tokens), random=2)


def test_graphml_there_and_back(planted, tmp_path):
    path = save_circuit(planted, tmp_path / "circuit.graphml")
    found = load_circuit(path)
    assert found.graph == planted.graph
    assert list(found.nodes(data=True)) == list(planted.nodes(data=True))
    assert list(found.edges(data=True)) == list(planted.edges(data=True))
    assert type(found.graph["found"]) is bool
    assert type(found.nodes["1.0"]["head"]) is int
    assert networkx.is_directed_acyclic_graph(found)
    assert [file.name for file in tmp_path.iterdir()] == ["circuit.graphml"]


def test_names_from_outside_are_text(planted, tmp_path):
    graph = planted.copy()
    graph.graph["model"] = "</graphml><script>alert(1)</script>&\"'"
    assert load_circuit(save_circuit(graph, tmp_path / "a.graphml")).graph["model"] == graph.graph["model"]


def edges_by_definition(cfg):
    """Every edge of the model in MIB's names: the stream grows by a layer's heads, then its MLP (or both at once)."""
    stream, edges = ["input"], []
    for layer in range(cfg["n_layers"]):
        heads, mlp = [f"a{layer}.h{head}" for head in range(cfg["n_heads"])], f"m{layer}"
        edges += [f"{writer}->{head}<{by}>" for head in heads for writer in stream for by in "qkv"]
        if not cfg["parallel_attn_mlp"]:
            stream += heads
        edges += [f"{writer}->{mlp}" for writer in stream]
        stream += [mlp] if not cfg["parallel_attn_mlp"] else [*heads, mlp]
    return [*edges, *(f"{writer}->logits" for writer in stream)], [*stream, "logits"]


@pytest.mark.parametrize("kind", ["planted", *sorted({"gpt2", "neox", "native-gqa"} & set(available_kinds()))])
def test_importances_list_the_whole_model(kind, planted):
    graph = planted if kind == "planted" else with_mlps(kind)
    found = json.loads(json.dumps(importances(graph), allow_nan=False))
    edges, nodes = edges_by_definition(found["cfg"])
    assert sorted(found["edges"]) == sorted(edges)
    assert sorted(found["nodes"]) == sorted(nodes)
    assert found["cfg"]["parallel_attn_mlp"] is (kind == "neox")
    assert all(set(edge) == {"score", "in_graph"} for edge in found["edges"].values())
    ours = {"input": "embedding", "logits": "logits"}
    ours |= {f"a{i}.h{j}": f"{i}.{j}" for i in range(2) for j in range(found["cfg"]["n_heads"])}
    ours |= {f"m{i}": f"mlp {i}" for i in range(2)}
    for name, node in found["nodes"].items():
        assert node["in_graph"] == (ours[name] in graph)
        if name not in ("input", "logits"):
            assert node["score"] == graph.nodes.get(ours[name], {}).get("effect", 0)
    for name, edge in found["edges"].items():
        writer, reader = name.split("->")
        reader, _, by = reader.rstrip(">").partition("<")
        data = graph.edges.get((ours[writer], ours[reader]), {})
        assert edge["score"] == data.get(f"effect_{by}" if by else "effect", 0)
    assert any(edge["in_graph"] for edge in found["edges"].values())


def test_the_planted_path_is_marked(planted):
    edges = importances(planted)["edges"]
    marked = {name for name, edge in edges.items() if edge["in_graph"]}
    assert {"a0.h0->a1.h0<k>", "a1.h0->logits", "input->a1.h0<q>", "input->a0.h0<v>"} <= marked
    assert not {"a0.h0->a1.h0<q>", "a0.h0->a1.h0<v>", "a0.h0->logits", "a0.h3->logits"} & marked


def test_json_is_written(planted, tmp_path):
    path = save_circuit(planted, tmp_path / "importances.json")
    assert json.loads(path.read_text()) == importances(planted)


def test_an_earlier_file_outlives_a_failure(planted, tmp_path):
    path = save_circuit(planted, tmp_path / "circuit.graphml")
    before, wrong = path.read_text(), planted.copy()
    wrong.nodes["1.0"]["pattern"] = [0.5]
    with pytest.raises(Exception):  # noqa: B017 - networkx's own, of a type it can't write
        save_circuit(wrong, path)
    assert path.read_text() == before


@pytest.mark.parametrize("name", ["circuit.pkl", "circuit"])
def test_other_endings(planted, tmp_path, name):
    with pytest.raises(InputError) as error:
        save_circuit(planted, tmp_path / name)
    assert str(error.value) == (
        f"path is {str(tmp_path / name)!r}: choose a name that ends in .graphml, or in .json for MIB's format."
    )


def test_what_is_no_circuit(tmp_path):
    with pytest.raises(InputError, match="graph is a Graph: give a circuit, as trace_circuit makes it"):
        save_circuit(networkx.path_graph(3), tmp_path / "a.graphml")
    networkx.write_graphml(networkx.path_graph(3), tmp_path / "other.graphml")
    (tmp_path / "torn.graphml").write_text("<graphml><graph")
    (tmp_path / "text.graphml").write_text("no XML at all")
    sentences = {
        "other": "other.graphml holds a graph that is no circuit",
        "torn": "torn.graphml is not GraphML, or damaged",
        "text": "text.graphml is not GraphML, or damaged",
        "none": "none.graphml does not exist",
    }
    for name, sentence in sentences.items():
        with pytest.raises(StoreError) as error:
            load_circuit(tmp_path / f"{name}.graphml")
        assert sentence in str(error.value)
    with pytest.raises(StoreError, match="could not be written"):
        save_circuit(trace_stub(), tmp_path / "nowhere" / "a.graphml")


def trace_stub():
    graph = networkx.DiGraph()
    graph.add_nodes_from(["embedding", "logits"])
    return graph


def test_they_are_exported():
    assert (metaint.save_circuit, metaint.load_circuit) == (save_circuit, load_circuit)
