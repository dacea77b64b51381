"""The picture of a circuit as SVG that needs no script, with the names of the layers beside it and a legend.

In: the parts of a circuit in their rows, its paths, and its own attributes. Out: HTML in which all text is escaped.
Parts (class "part") and paths ("path") carry what is told of them as their title, where browsers show it.
"""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from metaint.views.circuit import words
from metaint.views.circuit.layered import PORT, Box, Layout, Line, Point, arrange

Nodes = Mapping[str, dict[str, Any]]
Edge = tuple[str, str, dict[str, Any]]
Graph = Mapping[str, Any]
# Okabe and Ito's colours, as in `panels.py`, by what of a head reads a path, and grey where nothing tells; on dark
# pages the style has brighter ones.
_COLOURS = {"q": "var(--q,#0072B2)", "k": "var(--k,#D55E00)", "v": "var(--v,#009E73)", "": "var(--all,#808080)"}
_DASHES = {"harmful": "5 3", "unknown": "1 3"}
_FONT = "system-ui, Arial, sans-serif"
# Pixels: thinnest and widest line; the most of a row of heads; the widest picture that has its legend beside it.
_THIN, _WIDE, _ROW, _BESIDE = 1.0, 7.0, 940, 620
# Pixels: around the text of a box, the longest label, a line of text, sizes of names and of other text.
_PAD, _LONGEST, _STEP, _NAME, _TEXT = 9, 96, 13, 13.0, 10.5
# How bold the two sizes of letters are.
_WEIGHTS = {_NAME: 700, _TEXT: 400}


def picture(nodes: Nodes, rows: Sequence[Sequence[str]], edges: Sequence[Edge], graph: Graph, linked: bool) -> str:
    """Names of layers, picture and legend; heads are marked as `linked` to their attention by data-head."""
    rows = [part for row in rows for part in _parted(row, nodes, graph)]
    order = {name: i for i, name in enumerate(nodes)}
    edges = sorted(edges, key=lambda edge: (order[edge[1]], order[edge[0]]))
    most = max((abs(share) for *_, data in edges if not math.isnan(share := _share(data))), default=0.0)
    lines = []
    for writer, reader, data in edges:
        by = _by(data) if nodes[reader]["kind"] == "head" else ""
        lines.append(Line(writer, reader, by, _width(_share(data), most)))
    widths = {name: _room(_written(name, data, graph)) for name, data in nodes.items()}
    layout = arrange(rows, widths, lines, ("embedding", "logits"))
    parts = "".join(_part(name, data, layout.boxes[name], graph, linked) for name, data in nodes.items())
    paths = [_path(*drawn, graph) for drawn in zip(edges, lines, layout.routes, strict=True)]
    bands, names = _layers(nodes, layout)
    return (
        f'<div class="graph"><div class="layers">{_svg(58, layout.height)}{names}</svg><div class="scroll">'
        f"{_svg(layout.width, layout.height)}<g>{bands}</g><g>{parts}</g><g>{''.join(paths)}</g></svg></div></div>"
        f"{_legend(nodes, edges, lines, most, layout.width > _BESIDE)}</div>"
    )


def _parted(row: Sequence[str], nodes: Nodes, graph: Graph) -> list[Sequence[str]]:
    """The heads of a layer in as many rows as it takes for each to be seen at once; none reads another."""
    room = sum(_room(_written(name, nodes[name], graph)) + 30 for name in row)
    count = math.ceil(len(row) / math.ceil(room / _ROW))
    return [row[i : i + count] for i in range(0, len(row), count)]


def _svg(width: float, height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="{_FONT}" fill="currentColor">'
    )


def _layers(nodes: Nodes, layout: Layout) -> tuple[str, str]:
    """A band behind each layer; and the names of the layers, which stay when the picture is scrolled sideways."""
    spans: dict[int, tuple[float, float]] = {}
    for name, data in nodes.items():
        if data["kind"] in ("head", "mlp"):
            box = layout.boxes[name]
            top, bottom = spans.get(data["layer"], (math.inf, -math.inf))
            spans[data["layer"]] = (min(top, box.top), max(bottom, box.top + box.height))
    bands, names, last = [], [], None
    for layer, (top, bottom) in sorted(spans.items()):
        bands.append(
            f'<rect x="0" y="{top - 8:.1f}" width="{layout.width:.0f}" height="{bottom - top + PORT + 11:.1f}" rx="6" '
            'fill-opacity="0.05"/>'
        )
        names.append(f'<text y="{(top + bottom) / 2 + 4:.1f}" font-size="12">layer {layer}</text>')
        if last and layer - last[0] > 1:
            y = (bottom + last[1]) / 2 + 8
            names.append(f'<text x="16" y="{y:.1f}" font-size="12" fill-opacity="0.6">⋮</text>')
        last = (layer, top)
    return "".join(bands), "".join(names)


# ---- parts -------------------------------------------------------------------------------------------------------


def _part(name: str, data: Mapping[str, Any], box: Box, graph: Graph, linked: bool) -> str:
    share = _share(data)
    known = 0.0 if math.isnan(share) else min(abs(share), 1.0)
    dash = f' stroke-dasharray="{_DASHES["harmful"]}"' if share < 0 else ""
    corner = {"head": 10, "mlp": 2}.get(data["kind"], 6)
    shape = (
        f'<rect class="box" x="{box.left:.1f}" y="{box.top:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" '
        f'rx="{corner}" fill-opacity="{0.05 + 0.11 * known:.2f}" stroke="currentColor" '
        f'stroke-width="{1.2 + 2 * known:.2f}"{dash}/>'
    )
    lines = _written(name, data, graph)
    # A rail wider than what is seen without scrolling has its name where it is seen.
    x, y = box.left + min(box.width, _ROW) / 2, box.top + box.height / 2 + 4.5 - _STEP * (len(lines) - 1) / 2
    texts = "".join(_text(x, y + _STEP * i, text, size, _WEIGHTS[size]) for i, (text, size) in enumerate(lines))
    ports = "".join(_port(port, ends, box.top + box.height) for port, ends in box.ports.items())
    head = f' data-head="{escape(name)}"' if linked and data["kind"] == "head" else ""
    tip = escape("\n".join(words.node_lines(words.plain(name), data, graph)))
    return (
        f'<g class="part" tabindex="0" role="img" data-name="{escape(name)}"{head}><title>{tip}</title>{shape}{ports}'
        f"{texts}</g>"
    )


def _port(port: str, ends: Point, top: float) -> str:
    left, right = ends
    return (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{PORT}" rx="3" '
        f'fill="{_COLOURS[port]}" fill-opacity="0.25"/>{_text((left + right) / 2, top + 10, port, 11, 700)}'
    )


def _text(x: float, y: float, text: str, size: float, weight: int) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" font-size="{size}" font-weight="{weight}">{escape(text)}'
        "</text>"
    )


def _written(name: str, data: Mapping[str, Any], graph: Graph) -> list[tuple[str, float]]:
    """The lines in a box, each with its size: name, label, where it matters if at one position alone, share."""
    lines = [(_cut(words.plain(name), _NAME), _NAME)]
    if labels := words.labels_of(data):
        target = graph.get("target")
        # What a head looks for tells more than how sharply it does.
        first = min(labels, key=lambda label: (label != target, label in ("argmax", "averaging", "local"), label))
        more = f" +{len(labels) - 1}" if len(labels) > 1 else ""
        lines.append((_cut(first, _TEXT) + more, _TEXT))
    if data.get("positions") == "first":
        lines.append(("at position 0", _TEXT))
    if not math.isnan(share := _share(data)):
        lines.append((words.percent(share), _TEXT))
    return lines


def _cut(text: str, size: float) -> str:
    if _length(text, size) <= _LONGEST:
        return text
    while text and _length(f"{text}…", size) > _LONGEST:
        text = text[:-1]
    return f"{text}…"


def _length(text: str, size: float) -> float:
    """About how wide text gets, rather too much than too little: nothing can measure it before it is drawn."""
    return size * sum(map(_width_of, text))


def _width_of(character: str) -> float:
    if unicodedata.east_asian_width(character) in "WF" or character in "mwMW%@…":
        return 1.05
    return 0.75 if character.isupper() else 0.6


def _room(lines: Sequence[tuple[str, float]]) -> float:
    return 2 * _PAD + max(_length(text, size) * (1.12 if size == _NAME else 1) for text, size in lines)


# ---- paths -------------------------------------------------------------------------------------------------------


def _path(edge: Edge, line: Line, route: Sequence[Point], graph: Graph) -> str:
    writer, reader, data = edge
    share, d = _share(data), _curve(route)
    dash = "harmful" if share < 0 else ""
    if math.isnan(share):
        dash = "unknown"
    dashed = f' stroke-dasharray="{_DASHES[dash]}"' if dash else ""
    tip = escape("\n".join(words.edge_lines(words.plain(writer), words.plain(reader), data, graph)))
    # The second path is there to be met by the pointer: a line may be thin.
    return (
        f'<g class="path" tabindex="0" role="img" data-from="{escape(writer)}" data-to="{escape(reader)}" fill="none">'
        f'<title>{tip}</title><path class="line" d="{d}" stroke="{_COLOURS[line.port]}" '
        f'stroke-width="{line.width:.2f}"{dashed}/><path d="{d}" stroke="currentColor" stroke-opacity="0" '
        f'stroke-width="{max(9, line.width):.1f}"/></g>'
    )


def _curve(route: Sequence[Point]) -> str:
    (x, y), *others = route
    parts = [f"M{_short(x)} {_short(y)}"]
    for i, (to_x, to_y) in enumerate(others):
        if i % 2 or abs(to_x - x) < 0.05:
            parts.append(f"V{_short(to_y)}")
        else:
            middle = _short((y + to_y) / 2)
            parts.append(f"C{_short(x)} {middle} {_short(to_x)} {middle} {_short(to_x)} {_short(to_y)}")
        x, y = to_x, to_y
    return "".join(parts)


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


def _share(data: Mapping[str, Any]) -> float:
    return words.value(data, "share")


def _by(data: Mapping[str, Any]) -> str:
    by = data.get("by")
    return by if isinstance(by, str) and by in _COLOURS else ""


def _width(share: float, most: float) -> float:
    return _THIN if math.isnan(share) or not most else _THIN + (_WIDE - _THIN) * abs(share) / most


# ---- legend ------------------------------------------------------------------------------------------------------


def _legend(nodes: Nodes, edges: Sequence[Edge], lines: Sequence[Line], most: float, below: bool) -> str:
    """What is drawn, as far as it is there."""
    if not edges:
        return ""
    ports = {line.port for line in lines}
    entries = [_entry(f"read by {word} ({by})", _COLOURS[by], 3) for by, word in words.BY.items() if by in ports]
    if "" in ports:
        heads = any(not line.port and nodes[line.reader]["kind"] == "head" for line in lines)
        entries.append(_entry(f"read as a whole{', or not told apart' if heads else ''}", _COLOURS[""], 3))
    shares = [_share(data) for *_, data in edges]
    known = sorted({abs(share) for share in shares if not math.isnan(share)})
    entries += [
        _entry(f"share {words.percent(share)}", "currentColor", _width(share, most))
        for share in dict.fromkeys([*known[:1], *known[-1:]])
    ]
    if any(share < 0 for share in [*shares, *map(_share, nodes.values())]):
        entries.append(_entry("harmful: better without", "currentColor", 2, "harmful"))
    if any(map(math.isnan, shares)):
        entries.append(_entry("share unknown", "currentColor", 1, "unknown"))
    return f'<div class="legend{" below" * below}">{"".join(entries)}</div>'


def _entry(label: str, colour: str, width: float, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{_DASHES[dash]}"' if dash else ""
    line = f'<path d="M2 6H32" fill="none" stroke="{colour}" stroke-width="{width:.1f}"{dashed}/>'
    return f'<span><svg width="34" height="12">{line}</svg>{label}</span>'
