"""Circuits as files: GraphML, which keeps everything, and the `importances.json` of MIB, which scores a whole model.

In: a graph of `trace_circuit`. Out: a file, written aside and renamed. GraphML is networkx's own, without pickles. The
JSON is what EAP-IG's `Graph.from_json` reads (github.com/hannamw/EAP-IG, `src/eap/graph.py`) and MIB's circuit track
takes in (Mueller et al. 2025, "MIB: A Mechanistic Interpretability Benchmark").
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx

from metaint.errors import InputError, StoreError, door
from metaint.scans.outgoing import xml_writable
from metaint.scans.whole import write_text

_BY = ("q", "k", "v")


@door
def save_circuit(graph: networkx.DiGraph, path: str | Path) -> Path:
    """Write a circuit: to GraphML by a name that ends in .graphml, to MIB's format by one that ends in .json.

    The JSON lists every node and edge of the model, embedding ("input"), heads ("a5.h1"), MLPs ("m5") and "logits",
    edges into a head by its "q", "k" and "v". `in_graph` tells which are the circuit's. The `score` of an edge is the
    effect of cutting it and that of a node the effect of ablating it, both 0 for what the circuit left out. Everything
    else is left out, so `load_circuit` reads GraphML alone.

    Raises InputError for another ending or a graph that is not a circuit, StoreError where it cannot be written.

    >>> import metaint, networkx, tempfile
    >>> graph = networkx.DiGraph([("embedding", "0.1"), ("0.1", "logits")])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = metaint.save_circuit(graph, f"{folder}/circuit.graphml")
    ...     list(metaint.load_circuit(path))
    ['embedding', '0.1', 'logits']
    """
    path = Path(path)
    if not isinstance(graph, networkx.DiGraph) or not {"embedding", "logits"} <= set(graph):
        raise InputError(f"graph is a {type(graph).__name__}: give a circuit, as trace_circuit makes it.")
    if path.suffix not in (".graphml", ".json"):
        raise InputError(f"path is {str(path)!r}: choose a name that ends in .graphml, or in .json for MIB's format.")
    if path.suffix == ".json":
        text = json.dumps(importances(graph), allow_nan=False)
    else:
        text = "\n".join(networkx.generate_graphml(_xml_safe(graph), named_key_ids=False))
    write_text(path, text)
    return path


def _xml_safe(graph: networkx.DiGraph) -> networkx.DiGraph:
    """A copy whose texts XML can hold: a token may be any character."""

    def safe(values: dict[str, Any]) -> None:
        values |= {name: xml_writable(value) for name, value in values.items() if isinstance(value, str)}

    copy = graph.copy()
    for values in (copy.graph, *(of for _, of in copy.nodes(data=True)), *(of for *_, of in copy.edges(data=True))):
        safe(values)
    return copy


@door
def load_circuit(path: str | Path) -> networkx.DiGraph:
    """Read a circuit that `save_circuit` wrote to GraphML; StoreError for anything else.

    >>> import metaint
    >>> metaint.load_circuit("none.graphml")
    Traceback (most recent call last):
    metaint.errors.StoreError: none.graphml does not exist: give the file that save_circuit wrote.
    """
    path = Path(path)
    try:
        graph = networkx.read_graphml(path)
    except FileNotFoundError as error:
        raise StoreError(f"{path} does not exist: give the file that save_circuit wrote.") from error
    except Exception as error:  # networkx and the XML parser each raise their own for what is torn
        raise StoreError(
            f"{path} is not GraphML, or damaged ({type(error).__name__}): save the circuit again."
        ) from error
    if not isinstance(graph, networkx.DiGraph) or not {"embedding", "logits"} <= set(graph):
        raise StoreError(f"{path} holds a graph that is no circuit: give the file that save_circuit wrote.")
    for name in ("node_default", "edge_default"):  # which networkx adds
        graph.graph.pop(name, None)
    return graph


def importances(graph: networkx.DiGraph) -> dict[str, Any]:
    """The scores of every node and edge of the model that a circuit is of, in MIB's form."""
    cfg = {name: graph.graph[name] for name in ("n_layers", "n_heads", "parallel_attn_mlp", "d_model")}
    nodes = {name: _node(graph, ours) for name, ours, _ in _places(cfg)}
    nodes["logits"] = {"in_graph": True}
    edges = {f"{writer}->{reader}": _edge(graph, *ends) for writer, reader, ends in _edges(cfg)}
    return {"cfg": cfg, "nodes": nodes, "edges": edges}


def _places(cfg: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    """Each writer by MIB's name and ours, with where in the model it stands: readers read what stands before."""
    yield "input", "embedding", -1
    for layer in range(cfg["n_layers"]):
        for head in range(cfg["n_heads"]):
            yield f"a{layer}.h{head}", f"{layer}.{head}", 2 * layer
        yield f"m{layer}", f"mlp {layer}", 2 * layer + (not cfg["parallel_attn_mlp"])


def _edges(cfg: dict[str, Any]) -> Iterator[tuple[str, str, tuple[str, str, str]]]:
    """Each edge: writer and reader by MIB's names, and both by ours with what of a head reads."""
    places = list(_places(cfg))
    for reader, ours, at in [*places[1:], ("logits", "logits", 2 * cfg["n_layers"])]:
        for by in _BY if "." in ours else ("",):
            name = f"{reader}<{by}>" if by else reader
            yield from ((writer, name, (theirs, ours, by)) for writer, theirs, before in places if before < at)


def _node(graph: networkx.DiGraph, name: str) -> dict[str, Any]:
    if name == "embedding":
        return {"in_graph": True}
    score = float(graph.nodes[name]["effect"]) if name in graph else 0.0
    return {"in_graph": name in graph, "score": score}


def _edge(graph: networkx.DiGraph, writer: str, reader: str, by: str) -> dict[str, Any]:
    known = graph.edges.get((writer, reader), {})
    effect = known.get(f"effect_{by}" if by else "effect", 0.0)
    share = effect * known["share"] / known["effect"] if effect else 0.0
    return {"score": float(effect), "in_graph": share >= graph.graph["threshold"]}
