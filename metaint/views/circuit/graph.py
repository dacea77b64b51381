"""A circuit as a picture: layers upwards, parts as boxes, direct paths as lines as wide as what they bring.

In: a graph of `trace_circuit` or `load_circuit`, and if wanted the model and a sequence. Out: a `View`: SVG that needs
no script (`circuit_picture.py`), which `circuit.js` makes answer to pointer and keyboard, with the attention of the
circuit's heads below. All text of graphs is escaped.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

import networkx
from jaxtyping import Int
from torch import Tensor

from metaint.errors import InputError, door
from metaint.models.heads import head_of
from metaint.models.protocol import Model
from metaint.views.attention.patterns import show_attention
from metaint.views.circuit.picture import Nodes, picture
from metaint.views.circuit.words import heading, plain, value
from metaint.views.drawing.view import View

_KINDS = ("embedding", "head", "mlp", "logits")
_SOURCE = (
    "Cut paths, faithfulness and completeness: Wang et al. 2022, Interpretability in the Wild (arXiv 2211.00593); "
    "composition: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits (transformer-circuits.pub)."
)


@door
def show_circuit(
    circuit: networkx.DiGraph,
    model: Model | None = None,
    tokens: Int[Tensor, "*position"] | str | None = None,
    *,
    window: tuple[int, int] | None = None,
) -> View:
    """Draw a circuit of `trace_circuit` or `load_circuit`.

    The embedding is at the bottom, each layer above the one before, the logits on top. A line is a direct path, as wide
    as its share of what all heads bring, coloured by what of a head reads it (queries, keys, values), and broken where
    the model does better without it. The pointer on a part or a line, or the keyboard's focus, shows all that was
    measured of it. What a circuit made by hand or read from a file lacks is left out.

    - `model`, `tokens`: with both, the attention of the circuit's heads on one sequence is below, as `show_attention`
      draws it on its canvas, and a click on a head, or Enter, enlarges that head's.
    - `window`: the positions shown of it.

    Raises InputError for a graph that is no circuit, for a model without tokens or the other way round, for a model
    that lacks a head of the circuit, and as `show_attention` does.

    >>> import metaint, networkx
    >>> circuit = networkx.DiGraph(metric="in_context_loss")
    >>> circuit.add_node("embedding", kind="embedding", layer=-1)
    >>> circuit.add_node("0.1", kind="head", layer=0, head=1)
    >>> circuit.add_node("logits", kind="logits", layer=1)
    >>> circuit.add_edges_from([("embedding", "0.1"), ("0.1", "logits")])
    >>> "0.1" in metaint.show_circuit(circuit).body
    True
    """
    if (model is None) != (tokens is None) or (model is None and window is not None):
        missing, given = ("tokens", "model") if model is not None else ("model", "tokens or window")
        raise InputError(f"{missing} is missing, and {given} given: attention is shown with both model and tokens.")
    nodes = _nodes(circuit)
    heads = [name for name, data in nodes.items() if data["kind"] == "head"]
    attention = View("")
    if model is not None and tokens is not None and heads:
        attention = show_attention(model, tokens, _of_model(model, heads), window=window, how="canvas")
    linked = bool(attention.body)
    body = (
        f'<div class="metaint-circuit"><style>{_STYLE}</style>{_heading(circuit.graph)}'
        f"{picture(nodes, _rows(circuit, nodes), list(circuit.edges(data=True)), circuit.graph, linked)}"
        f"{_notes(circuit.graph, linked)}{attention.body}</div>"
        '<script>window[Symbol.for("metaint.circuit")]()</script>'
    )
    return View(body, (circuit_script(), *attention.scripts), _SOURCE)


@cache
def circuit_script() -> str:
    """The script element that makes every circuit on its page answer."""
    return f"<script>{files('metaint.views.circuit').joinpath('circuit.js').read_text('utf-8')}</script>"


# ---- what is a circuit -------------------------------------------------------------------------------------------

_ASK = "give a graph that trace_circuit made."


def _nodes(circuit: Any) -> Nodes:
    """Each part with its attributes, in the order in which the model computes them. InputError for what is no
    circuit."""
    if not isinstance(circuit, networkx.DiGraph) or circuit.is_multigraph():
        raise InputError(f"circuit is a {type(circuit).__name__}: {_ASK}")
    nodes = {name: _checked(name, data) for name, data in circuit.nodes(data=True)}
    for kind in ("embedding", "logits"):
        if [name for name, data in nodes.items() if data["kind"] == kind] != [kind]:
            raise InputError(f"circuit has no node {kind!r}, or others of that kind: {_ASK}")
    depth = _depths(circuit, nodes)
    for writer, reader in circuit.edges:
        if depth[writer] >= depth[reader]:
            ends = f"{plain(writer)!r} to {plain(reader)!r}"
            raise InputError(f"circuit has an edge from {ends}, which doesn't come later: {_ASK}")
    order = sorted(nodes, key=lambda name: (depth[name], nodes[name]["kind"], _number(name), name))
    return {name: nodes[name] for name in order}


def _checked(name: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    layer = value(data, "layer")
    if not isinstance(name, str) or data.get("kind") not in _KINDS or not layer.is_integer():
        kinds = ", ".join(_KINDS)
        raise InputError(f"circuit has a node {plain(name)!r} without a kind ({kinds}) or a layer: {_ASK}")
    return {**data, "layer": int(layer)}


def _depths(circuit: networkx.DiGraph, nodes: Nodes) -> dict[str, float]:
    """Where in the model a part reads: an MLP after the heads of its layer, unless both read the same stream."""
    late = circuit.graph.get("parallel_attn_mlp") is not True

    def depth(kind: str, layer: int) -> float:
        if kind in ("embedding", "logits"):
            return -math.inf if kind == "embedding" else math.inf
        return 2 * layer + (late and kind == "mlp")

    return {name: depth(data["kind"], data["layer"]) for name, data in nodes.items()}


def _number(name: str) -> float:
    """The number of a head, so that 5.2 comes before 5.10."""
    last = name.rsplit(".", 1)[-1]
    return int(last) if last.isascii() and last.isdigit() else math.inf


def _rows(circuit: networkx.DiGraph, nodes: Nodes) -> list[list[str]]:
    """Parts that read at the same depth, from the bottom."""
    rows: dict[float, list[str]] = {}
    for name, depth in _depths(circuit, nodes).items():
        rows.setdefault(depth, []).append(name)
    return list(rows.values())


def _of_model(model: Model, heads: Sequence[str]) -> list[str]:
    """The heads as they are; InputError for one that the model hasn't."""
    for name in heads:
        try:
            head_of(model, name)
        except InputError:
            raise InputError(
                f"model has no head {plain(name)!r}, which circuit holds: give the model that it was traced in."
            ) from None
    return list(heads)


# ---- around the picture ------------------------------------------------------------------------------------------


def _heading(graph: Mapping[str, Any]) -> str:
    title, verdict, said = heading(graph)
    mark = {"found": "good", "not found": "bad"}.get(verdict, "")
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in said)
    return f'<h4>{escape(title)} <span class="badge {mark}">{verdict}</span></h4><div class="said">{sentences}</div>'


def _notes(graph: Mapping[str, Any], linked: bool) -> str:
    metric = escape(plain(graph.get("metric") or "the metric"))
    click = "; click a head, or press Enter on it, to enlarge its pattern below" if linked else ""
    return (
        '<p class="notes">How to read: the model runs upwards; a line is a direct path from a part that writes to one '
        f"that reads it, as wide as the share of what all heads bring to {metric} that is lost when this path alone is "
        "cut. A box is shaded and rimmed the more, the more is lost without the part; where line or rim is broken the "
        "model does better without. Point at a part or a line, or move to it with Tab, for all that was measured"
        f"{click}. It misleads where parts stand in for each other: cutting one of two shows little, and shares need "
        "not add up to 100 %.</p>"
    )


_STYLE = """
.metaint-circuit { position: relative; font: 13px/1.4 system-ui, sans-serif; color: inherit; margin: 12px 0;
 text-align: left }
.metaint-circuit.dark { --q: #56b4e9; --k: #e8772e; --v: #2db98f; --all: #999 }
.metaint-circuit h4 { font-size: 15px; margin: 0 0 4px; overflow-wrap: anywhere }
.metaint-circuit .badge { font-size: 12px; font-weight: 600; border: 1px solid; border-radius: 9px; padding: 1px 8px;
 margin-left: 4px; white-space: nowrap }
.metaint-circuit .good { background: #009e7333; border-color: #009e73 }
.metaint-circuit .bad { background: #d55e0033; border-color: #d55e00 }
.metaint-circuit .said { max-width: 900px }
.metaint-circuit .said p { margin: 2px 0; overflow-wrap: anywhere }
.metaint-circuit .graph { display: flex; flex-wrap: wrap; gap: 8px 28px; align-items: flex-start; margin: 14px 0 8px }
.metaint-circuit .layers { display: flex; min-width: 0; max-width: 100% }
.metaint-circuit .scroll { overflow-x: auto; overflow-y: hidden }
.metaint-circuit svg { display: block; max-width: none; flex: none }
.metaint-circuit .legend { display: flex; flex-direction: column; gap: 2px 18px; font-size: 12px }
.metaint-circuit .below { flex-flow: row wrap }
.metaint-circuit .legend span { display: flex; align-items: center; gap: 8px; white-space: nowrap }
.metaint-circuit .notes { max-width: 900px; font-size: 12px; opacity: 0.85; margin: 6px 0 0 }
.metaint-circuit .part, .metaint-circuit .path { outline: none; cursor: default }
.metaint-circuit .part[role=button] { cursor: pointer }
.metaint-circuit .part:hover .box, .metaint-circuit .part:focus-visible .box { stroke-width: 3.5 }
.metaint-circuit .path:hover, .metaint-circuit .path:focus-visible { filter: drop-shadow(0 0 2px currentColor) }
.metaint-circuit [aria-pressed=true] .box { stroke: #d55e00; stroke-width: 3 }
.metaint-circuit .lit .part:not(.on), .metaint-circuit .lit .path:not(.on) { opacity: 0.15 }
.metaint-circuit .panel { position: absolute; z-index: 9; box-sizing: border-box; width: max-content; max-width: 340px;
 padding: 8px 12px; border: 1px solid #8888; border-radius: 6px; background: #fff; color: #222; font-size: 12px;
 box-shadow: 0 3px 12px #0004; pointer-events: none; overflow-wrap: anywhere }
.metaint-circuit.dark .panel { background: #1d2530; color: #e8edf2 }
.metaint-circuit .panel dl { display: grid; grid-template-columns: auto auto; gap: 1px 12px; margin: 4px 0 0 }
.metaint-circuit .panel dt { opacity: 0.8; margin: 0; font-weight: 400 }
.metaint-circuit .panel dd { margin: 0; font-variant-numeric: tabular-nums }
"""
