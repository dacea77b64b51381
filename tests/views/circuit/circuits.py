"""Made-up circuits to draw: of a toy's size, dense, of a large model, and with many heads in one layer."""

import networkx
import numpy as np

WHY = (
    "83 % (79 to 88 %) of what all heads bring to in_context_loss is there with the circuit alone; 94 % (91 to 97 %) "
    "is lost without it; of 50 random circuits of other heads, as many in each layer, 0 bring as much alone and 1 lose "
    "as much."
)
SCORES = ("previous_token", "first_token", "induction", "averaging", "max_weight", "entropy")


def effect(share):
    """The four attributes of what cutting something does, where all heads bring 5 nats."""
    found = 5 * share
    return {"effect": found, "effect_low": found - 0.1, "effect_high": found + 0.1, "share": share}


def empty(layers=2, **attributes):
    """A circuit of the embedding and the logits alone, with what `trace_circuit` says of a graph."""
    graph = networkx.DiGraph(
        model="made up", metric="in_context_loss", target="induction", how="mean", found=True, why=WHY, paths="",
        threshold=0.02, n_layers=layers, parallel_attn_mlp=False, faithfulness=0.83, faithfulness_low=0.79,
        faithfulness_high=0.88, completeness=0.94, completeness_low=0.91, completeness_high=0.97,
    )  # fmt: skip
    graph.graph.update(attributes)
    graph.add_node("embedding", kind="embedding", layer=-1)
    graph.add_node("logits", kind="logits", layer=layers)
    return graph


def add_head(graph, name, share=0.1, labels="", **attributes):
    layer, head = map(int, name.split("."))
    graph.add_node(name, kind="head", layer=layer, head=head, labels=labels, **effect(share), **attributes)


def small():
    """A previous-token head that an induction head reads by its keys."""
    graph = empty()
    add_head(graph, "0.0", 1.42, "argmax, previous_token", previous_token=0.725)
    add_head(graph, "1.0", 0.998, "induction", induction=0.663, effective_keys=2.93, distance_mean=28.4)
    graph.add_edge("embedding", "0.0", by="v", effect_v=7.0, **effect(1.4))
    graph.add_edge("embedding", "1.0", by="q", effect_q=5.0, **effect(1.0))
    recall = {"key_composition_recall": 1.0, "key_composition_recall_chance": 0.015}
    composed = {"k_composition": 0.11, "k_composition_z": 18.7}
    graph.add_edge("0.0", "1.0", by="k", effect_q=-0.104, effect_k=6.9, **composed, **recall, **effect(1.39))
    graph.add_edge("1.0", "logits", by="", **effect(0.998))
    return graph


def random_circuit(layers, heads, mlps, edges, seed=0):
    """So many heads and MLPs anywhere, and paths between them; one in ten is harmful."""
    rng = np.random.default_rng(seed)
    graph = empty(layers)
    labels = ("", "sink", "induction", "previous_token", "argmax, induction")
    for i in rng.permutation(layers * 64)[:heads]:
        scores = dict(zip(SCORES, rng.random(len(SCORES)).tolist(), strict=True))
        add_head(graph, f"{i // 64}.{i % 64}", _share(rng), str(rng.choice(labels)), **scores)
    for layer in rng.permutation(layers)[:mlps]:
        graph.add_node(f"mlp {layer}", kind="mlp", layer=int(layer), **effect(_share(rng)))
    depth = {name: 2 * data["layer"] + (data["kind"] == "mlp") for name, data in graph.nodes(data=True)}
    pairs = [(a, b) for a in graph for b in graph if depth[a] < depth[b]]
    for i in rng.permutation(len(pairs))[:edges]:
        _join(graph, *pairs[i], rng)
    return graph


def wide(count=40):
    """So many heads in one layer."""
    rng = np.random.default_rng(0)
    graph = empty(4)
    add_head(graph, "0.3", 0.5, "previous_token")
    add_head(graph, "3.2", 0.1)
    _join(graph, "embedding", "0.3", rng)
    _join(graph, "3.2", "logits", rng)
    for head in range(count):
        add_head(graph, f"1.{head}", _share(rng), "induction" if head % 7 == 0 else "")
        for ends in (("embedding", f"1.{head}"), ("0.3", f"1.{head}"), (f"1.{head}", "logits"), (f"1.{head}", "3.2")):
            if rng.random() < 0.6:
                _join(graph, *ends, rng)
    return graph


def _share(rng):
    return float(rng.exponential(0.1) + 0.02) * (-0.2 if rng.random() < 0.1 else 1)


def _join(graph, writer, reader, rng):
    by = str(rng.choice(list("qkv"))) if graph.nodes[reader]["kind"] == "head" else ""
    found = effect(_share(rng))
    if by:
        found |= {f"effect_{letter}": found["effect"] * (0.95 if letter == by else 0.1) for letter in "qkv"}
    if by and graph.nodes[writer]["kind"] == "head":
        found |= {f"{letter}_composition": 0.1 for letter in "qkv"}
        found |= {f"{letter}_composition_z": float(8 * rng.normal()) for letter in "qkv"}
    graph.add_edge(writer, reader, by=by, **found)


CIRCUITS = {
    "small": small,
    "dense": lambda: random_circuit(12, 12, 4, 66),
    "large": lambda: random_circuit(80, 25, 5, 90, seed=1),
    "wide": wide,
}


def of_gpt2():
    """Heads of the tiny GPT-2."""
    graph = empty()
    for name in ("0.1", "1.2", "1.3"):
        add_head(graph, name)
    graph.add_edge("0.1", "1.2", by="k", share=0.3)
    graph.add_edge("0.1", "1.3", by="v", share=-0.3)
    return graph
