"""Pictures of circuits: everything is drawn and told, texts stay texts, and what is no circuit is refused."""

import html
import re
from itertools import pairwise

import networkx
import numpy as np
import pytest
import torch

from metaint.circuits.circuit import trace_circuit
from metaint.circuits.files import load_circuit, save_circuit
from metaint.errors import InputError
from metaint.tasks import repeated_tokens
from metaint.views.attention.canvas import canvas_script
from metaint.views.circuit.graph import circuit_script, show_circuit
from metaint.views.drawing.view import View
from tests.circuits.planted import circuit_model
from tests.planted import VOCAB
from tests.views.attention.test_canvas import HOSTILE, Elements, view_of
from tests.views.circuit.circuits import CIRCUITS, WHY, add_head, effect, empty, small, wide

TOKENS = torch.arange(5, 29)


def of_class(view, name):
    """The attributes of all elements of a class."""
    return [data for _, data in Elements(view.body).found if data.get("class") == name]


def titles(view):
    """What is told of each part and of each path, by its name or its ends."""
    found = {}
    for attributes, title in re.findall(r'<g class="(?:part|path)"([^>]*)><title>([^<]*)</title>', view.body):
        data = dict(re.findall(r'data-(\w+)="([^"]*)"', attributes))
        found[data.get("name") or (data["from"], data["to"])] = html.unescape(title).split("\n")
    return found


@pytest.mark.parametrize("make", CIRCUITS.values(), ids=CIRCUITS)
def test_every_part_and_path_is_drawn_and_layers_go_upwards(make):
    graph = make()
    view = show_circuit(graph)
    parts, paths = of_class(view, "part"), of_class(view, "path")
    assert sorted(data["data-name"] for data in parts) == sorted(graph)
    assert sorted((data["data-from"], data["data-to"]) for data in paths) == sorted(graph.edges)
    tops = {part["data-name"]: float(box["y"]) for part, box in zip(parts, of_class(view, "box"), strict=True)}
    layers = sorted({data["layer"] for _, data in graph.nodes(data=True)})
    for lower, upper in pairwise(layers):
        below, above = ([tops[n] for n, d in graph.nodes(data=True) if d["layer"] == layer] for layer in (lower, upper))
        assert max(above) < min(below)
    for writer, reader in graph.edges:
        assert tops[reader] < tops[writer]
    assert re.findall(r">layer (\d+)<", view.body) == [str(layer) for layer in layers[1:-1]]


def test_widths_go_with_shares_and_harmful_ones_are_broken():
    graph = empty(3)
    shares = {"0.0": 0.02, "0.1": 0.5, "0.2": -0.25}
    for name, share in shares.items():
        add_head(graph, name, share)
        graph.add_edge(name, "logits", by="", **effect(share))
    graph.add_edge("embedding", "0.1", by="k")
    lines = dict(zip(graph_ends(show_circuit(graph)), of_class(show_circuit(graph), "line"), strict=True))
    widths = [float(lines[name, "logits"]["stroke-width"]) for name in ("0.0", "0.2", "0.1")]
    assert widths == pytest.approx([1 + 6 * share / 0.5 for share in (0.02, 0.25, 0.5)], abs=0.01)
    assert lines["0.2", "logits"]["stroke-dasharray"] == "5 3"
    assert "stroke-dasharray" not in lines["0.1", "logits"]
    assert lines["embedding", "0.1"]["stroke-dasharray"] == "1 3"
    assert "#D55E00" in lines["embedding", "0.1"]["stroke"]
    boxes = [data.get("stroke-dasharray") for data in of_class(show_circuit(graph), "box")]
    assert boxes == [None, None, None, "5 3", None]
    body = show_circuit(graph).body
    for told in ("read by keys (k)", "read as a whole", "share 2.0 %", "share 50 %", "better without", "share unknown"):
        assert told in body
    assert "read by queries" not in body


def graph_ends(view):
    return [(data["data-from"], data["data-to"]) for data in of_class(view, "path")]


def test_everything_measured_is_told_with_its_unit():
    told = titles(show_circuit(small()))
    assert told["1.0"] == [
        "head 1.0",
        "labels: induction",
        "effect of ablating (mean): +4.99 nats (95 %: 4.89 to 5.09)",
        "share of all heads: 100 %, helpful",
        "induction: 0.663 of its attention",
        "effective keys: 2.93 tokens",
        "mean distance back: 28.4 tokens",
    ]
    assert told["0.0", "1.0"] == [
        "0.0 → 1.0, by keys",
        "effect of cutting (mean): +6.95 nats (95 %: 6.85 to 7.05)",
        "share of all heads: 139 %, helpful",
        "cut for queries alone: −0.104 nats",
        "cut for keys alone: +6.9 nats",
        "composition with keys: 0.11 (z +18.7)",
        "key composition recall: 100 % of tokens (chance 1.5 %)",
    ]
    graph = small()
    graph.graph["metric"] = "my_metric"
    graph.nodes["1.0"].update(effect(-0.004))
    graph.nodes["1.0"]["my_score"] = np.float32(0.25)
    lines = titles(show_circuit(graph))["1.0"]
    assert lines[2:4] == [
        "effect of ablating (mean): −0.02 of my_metric (95 %: −0.12 to 0.08)",
        "share of all heads: −0.4 %, harmful",
    ]
    assert lines[-1] == "my score: 0.25"


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({}, ["found", f"<p>{WHY}</p>", "Circuit for induction, by in_context_loss, in made up"]),
        ({"found": False, "why": "No."}, ["not found", "<p>No.</p>"]),
        ({"found": 1}, [">found<"]),
        ({"found": "yes", "metric": "loss", "target": "loss"}, ["not tested", "Circuit for loss, in made up"]),
        ({"paths": "not followed: no weights"}, ["Direct paths: not followed: no weights."]),
        ({"faithfulness": float("nan")}, ["<p>Completeness 94 % (95 % interval 91 to 97 %).</p>"]),
    ],
)
def test_the_heading_says_what_was_found(attributes, said):
    graph = small()
    graph.graph.update(attributes)
    for words in said:
        assert words in show_circuit(graph).body
    middle = "Faithfulness 83 % (95 % interval 79 to 88 %), completeness 94 % (95 % interval 91 to 97 %)."
    assert (middle in show_circuit(graph).body) == ("faithfulness" not in attributes)


def test_what_is_missing_is_left_out():
    bare = networkx.DiGraph()
    for name, kind, layer in (("embedding", "embedding", -1), ("0.0", "head", 0), ("mlp 0", "mlp", 0)):
        bare.add_node(name, kind=kind, layer=layer)
    bare.add_node("logits", kind="logits", layer=1)
    networkx.add_path(bare, bare)
    told = titles(show_circuit(bare))
    assert told["0.0"] == ["head 0.0", "labels: none"]
    assert told["0.0", "mlp 0"] == ["0.0 → mlp 0"]
    assert "not tested" in show_circuit(bare).body
    assert "Circuit for an unnamed target" in show_circuit(bare).body
    odd = bare.copy()
    odd.nodes["0.0"].update(share=float("nan"), labels=7, effect="much", induction=10**400, entropy=float("inf"))
    odd.edges["embedding", "0.0"].update(share=float("inf"), by="Q", effect_q=None, k_composition=True)
    assert titles(show_circuit(odd)) == told
    assert "read as a whole, or not told apart" in show_circuit(odd).body
    assert len(of_class(show_circuit(empty()), "part")) == 2
    assert of_class(show_circuit(empty()), "legend") == []


def hostile():
    """A circuit with text that is markup wherever a file may hold text."""
    graph = networkx.relabel_nodes(small(), {"1.0": f"1.0{HOSTILE}"})
    graph.graph |= dict.fromkeys(("model", "metric", "target", "why", "paths", "how"), HOSTILE)
    graph.nodes["0.0"].update({"labels": f"{HOSTILE}, \u202esink\n", f"score{HOSTILE}": 1.0})
    graph.edges["embedding", "0.0"]["by"] = HOSTILE
    return graph


def test_texts_stay_texts():
    view = show_circuit(hostile())
    tags = {tag for tag, _ in Elements(view.body).found}
    assert tags == {"div", "style", "h4", "span", "p", "svg", "g", "rect", "text", "title", "path", "script"}
    assert {data["data-name"] for data in of_class(view, "part")} >= {f"1.0{HOSTILE}"}
    assert "\u202e" not in view.body
    assert titles(view)["0.0"][1] == f"labels: {HOSTILE}, \ufffdsink"


def test_a_circuit_from_a_file_is_drawn_the_same(tmp_path):
    for make in (small, wide, hostile):
        graph = make()
        found = show_circuit(load_circuit(save_circuit(graph, tmp_path / "c.graphml")))
        assert found.body == show_circuit(graph).body


def test_the_order_of_parts_and_paths_makes_no_difference():
    graph = CIRCUITS["dense"]()
    other = networkx.DiGraph(**graph.graph)
    other.add_nodes_from(reversed(list(graph.nodes(data=True))))
    other.add_edges_from(reversed(list(graph.edges(data=True))))
    assert show_circuit(other).html == show_circuit(graph).html


def test_a_row_of_many_heads_is_broken_into_several():
    boxes = of_class(show_circuit(wide(40)), "box")
    middle = {float(box["y"]) for box in boxes[2:-2]}
    assert 3 <= len(middle) <= 6
    assert len({float(box["y"]) for box in of_class(show_circuit(wide(8)), "box")}) == 5


def test_size():
    view = show_circuit(small())
    assert isinstance(view, View)
    assert len(view.html) < 30_000
    assert len(show_circuit(CIRCUITS["dense"]()).html) < 150_000


# ---- with the attention of its heads -----------------------------------------------------------------------------


def of_gpt2():
    graph = empty()
    for name in ("1.3", "0.2", "1.0"):
        add_head(graph, name)
    return graph


def test_the_heads_of_the_circuit_are_shown_below(gpt2):
    view = show_circuit(of_gpt2(), gpt2, TOKENS, window=(4, 20))
    facts, _ = view_of(view.body[view.body.index('<div class="metaint-attention"') :])
    assert (facts["heads"], facts["start"], len(facts["labels"])) == (["0.2", "1.0", "1.3"], 4, 16)
    assert [data.get("data-head") for data in of_class(view, "part")] == [None, "0.2", "1.0", "1.3", None]
    assert view.scripts == (circuit_script(), canvas_script())
    assert "press Enter" in view.body


def test_without_a_model_or_heads_there_is_nothing_to_click(gpt2):
    for view in (show_circuit(of_gpt2()), show_circuit(empty(), gpt2, TOKENS)):
        assert "metaint-attention" not in view.body
        assert "press Enter" not in view.body
        assert view.scripts == (circuit_script(),)
        assert not any("data-head" in data for data in of_class(view, "part"))


def test_a_traced_circuit():
    model, tokens = circuit_model(), repeated_tokens(VOCAB, 20, batch=6)
    graph = trace_circuit(model, tokens, random=5)
    view = show_circuit(graph, model, tokens[0])
    told = titles(view)
    assert set(told) == {*graph, *graph.edges}
    assert f"effect of cutting (mean): {graph.edges['0.0', '1.0']['effect']:+.3g} nats" in told["0.0", "1.0"][1]
    assert any(line.startswith("key composition recall: 100 % of tokens") for line in told["0.0", "1.0"])


# ---- what can't be drawn -----------------------------------------------------------------------------------------

ASK = "give a graph that trace_circuit made."


def changed(**nodes):
    graph = small()
    for name, attributes in nodes.items():
        graph.nodes[name.replace("_", ".")].clear()
        graph.nodes[name.replace("_", ".")].update(attributes)
    return graph


def renamed(old, new):
    return networkx.relabel_nodes(small(), {old: new})


def joined(writer, reader):
    graph = small()
    graph.add_edge(writer, reader)
    return graph


@pytest.mark.parametrize(
    ("graph", "sentence"),
    [
        (None, f"circuit is a NoneType: {ASK}"),
        (networkx.Graph(small()), f"circuit is a Graph: {ASK}"),
        (networkx.MultiDiGraph(small()), f"circuit is a MultiDiGraph: {ASK}"),
        (networkx.DiGraph(), f"circuit has no node 'embedding', or others of that kind: {ASK}"),
        (renamed("logits", "out"), f"circuit has no node 'logits', or others of that kind: {ASK}"),
        *[
            (graph, f"circuit has a node {name} without a kind (embedding, head, mlp, logits) or a layer: {ASK}")
            for graph, name in [
                (changed(**{"0_0": {"layer": 0}}), "'0.0'"),
                (changed(**{"0_0": {"kind": "head"}}), "'0.0'"),
                (changed(**{"0_0": {"kind": ["head"], "layer": 0}}), "'0.0'"),
                (changed(**{"0_0": {"kind": "head", "layer": 0.5}}), "'0.0'"),
                (changed(**{"0_0": {"kind": "head", "layer": float("nan")}}), "'0.0'"),
                (renamed("0.0", 7), "'7'"),
            ]
        ],
        (joined("1.0", "0.0"), f"circuit has an edge from '1.0' to '0.0', which doesn't come later: {ASK}"),
        (joined("1.0", "1.0"), f"circuit has an edge from '1.0' to '1.0', which doesn't come later: {ASK}"),
    ],
)
def test_what_is_no_circuit_is_refused_in_a_sentence(graph, sentence):
    with pytest.raises(InputError) as caught:
        show_circuit(graph)
    assert str(caught.value) == sentence


def test_an_mlp_reads_the_heads_of_its_layer_unless_both_read_the_same():
    graph = small()
    graph.add_node("mlp 0", kind="mlp", layer=0)
    graph.add_edge("0.0", "mlp 0")
    show_circuit(graph)
    graph.graph["parallel_attn_mlp"] = True
    with pytest.raises(InputError, match=r"edge from '0\.0' to 'mlp 0'"):
        show_circuit(graph)
    graph.remove_edge("0.0", "mlp 0")
    boxes = dict(zip(sorted(["embedding", "0.0", "mlp 0", "1.0", "logits"]), [None] * 5, strict=True))
    for part, box in zip(of_class(show_circuit(graph), "part"), of_class(show_circuit(graph), "box"), strict=True):
        boxes[part["data-name"]] = box["y"]
    assert boxes["0.0"] == boxes["mlp 0"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"model": True}, "tokens is missing, and model given"),
        ({"tokens": TOKENS}, "model is missing, and tokens or window given"),
        ({"window": (0, 3)}, "model is missing, and tokens or window given"),
        ({"model": True, "window": (0, 3)}, "tokens is missing, and model given"),
    ],
)
def test_model_and_tokens_come_together(gpt2, arguments, sentence):
    arguments = arguments | ({"model": gpt2} if "model" in arguments else {})
    with pytest.raises(InputError) as caught:
        show_circuit(small(), **arguments)
    assert str(caught.value) == f"{sentence}: attention is shown with both model and tokens."


def test_the_circuit_of_another_model(gpt2):
    graph = of_gpt2()
    add_head(graph, "0.7")
    with pytest.raises(InputError) as caught:
        show_circuit(graph, gpt2, TOKENS)
    assert str(caught.value) == ("model has no head '0.7', which circuit holds: give the model that it was traced in.")
    with pytest.raises(InputError, match="tokens holds 3 sequences"):
        show_circuit(of_gpt2(), gpt2, TOKENS.repeat(3, 1))
