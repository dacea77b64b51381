"""The house: rooms import downwards only, nothing goes round in a circle, and no private name crosses a file."""

import ast
import re
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1] / "metaint"
# Each room, and the rooms that it may import beside its own files and `errors`. CONTRIBUTING.md has the same table.
ROOMS: dict[str, set[str]] = {"measures": set(), "tasks": set(), "scans": set()}
ROOMS["toys"] = {"measures"}
ROOMS["models"] = {"measures", "scans", "toys"}
ROOMS["probes"] = {"measures", "models", "scans"}
ROOMS["scanning"] = {"measures", "tasks", "scans", "toys", "models", "probes"}
ROOMS["circuits"] = {*ROOMS["scanning"], "scanning"}
ROOMS["views"] = {*ROOMS["circuits"], "circuits"}
ROOMS["labs"] = {*ROOMS["views"], "views"}
ROOMS["shell"] = {*ROOMS["labs"], "labs"}
# Libraries that only some rooms may touch, so that their files stay what they are.
LIBRARIES = {
    "transformer_lens": {"models", "toys"},
    "plotly": {"views", "labs"},
    "circuitsvis": {"views"},
    "typer": {"shell"},
    "networkx": {"circuits", "views"},
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports_of(tree: ast.Module) -> list[tuple[str, str]]:
    """Module and name of everything a file imports, inside functions too, but not for type checkers alone."""
    hidden = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    pairs = []
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            pairs += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            pairs += [(alias.name, "") for alias in node.names]
    return pairs


def inner_imports(name: str) -> set[str]:
    """The modules of metaint that a file imports."""
    targets = set()
    for module, what in imports_of(TREES[name]):
        if module.split(".")[0] == "metaint":
            targets.add(f"{module}.{what}" if f"{module}.{what}" in FILES else module)
    return targets


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_the_root_holds_the_public_names_and_the_errors_alone():
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["__init__.py", "errors.py"]
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize("name", [name for name in FILES if room_of(name) in ROOMS])
def test_rooms_import_downwards_only(name):
    room = room_of(name)
    for target in inner_imports(name) - {"metaint", "metaint.errors"}:
        assert room_of(target) in {room, *ROOMS[room]}, f"{name} imports {target}"


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_are_touched_where_they_belong(library):
    users = {
        room_of(name)
        for name, tree in TREES.items()
        if any(module.split(".")[0] == library for module, _ in imports_of(tree))
    }
    assert users <= LIBRARIES[library]


def test_nothing_goes_round_in_a_circle():
    graph = nx.DiGraph((name, target) for name in FILES if name != "metaint" for target in inner_imports(name))
    graph.remove_nodes_from(["metaint"])
    assert list(nx.simple_cycles(graph)) == []


def test_no_private_name_crosses_a_file():
    crossing = [
        (name, module, what)
        for name, tree in TREES.items()
        for module, what in imports_of(tree)
        if module.startswith("metaint") and re.match(r"_[^_]", what)
    ]
    assert crossing == []


def test_contributing_has_the_same_rooms():
    text = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `metaint/(\w+)/`", text, re.MULTILINE) == list(ROOMS)
