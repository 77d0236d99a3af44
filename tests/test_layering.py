"""Imports point one way: cluster -> t2v -> data_pipeline; commands (`t2v.cli*`) are the roof."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = ("data_pipeline", "t2v", "cluster")  # each may import itself and those before it


def modules() -> dict[str, ast.Module]:
    """Every module of the three packages, parsed."""
    parsed = {}
    for layer in LAYERS:
        for path in sorted((ROOT / layer).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            parsed[name] = ast.parse(path.read_text())
    return parsed


def imports(tree: ast.Module, known: set[str], typing_only: bool) -> set[str]:
    """Modules of ours that a module imports, at its top or inside functions; those that only a
    type checker imports are left out unless asked for."""
    found: set[str] = set()
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped |= {inner for branch in node.body for inner in ast.walk(branch)}
    for node in ast.walk(tree):
        if node in skipped and not typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in inner]
        else:
            continue
        found |= {name for name in names if name in known}
    return found


MODULES = modules()


def layer(name: str) -> int:
    """How high a module stands; the roof is above all layers."""
    return len(LAYERS) if name.startswith("t2v.cli") else LAYERS.index(name.partition(".")[0])


def test_imports_point_one_way():
    for name, tree in MODULES.items():
        for other in imports(tree, set(MODULES), typing_only=True):
            assert layer(other) <= layer(name), f"{name} imports {other}"


def test_there_is_no_cycle():
    graph = {name: imports(tree, set(MODULES), typing_only=False) for name, tree in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names it
    assert set(order) == set(MODULES)


def test_nothing_imports_the_roof():
    for name, tree in MODULES.items():
        assert "t2v.cli" not in imports(tree, set(MODULES), typing_only=True), name


def test_no_module_is_a_drawer():
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    for name in MODULES:
        assert not drawers & set(name.split(".")), name


def test_packages_have_empty_init_files():
    for layer in LAYERS:
        for path in (ROOT / layer).rglob("__init__.py"):
            assert path.read_text() == "", path


def test_every_module_says_what_it_is_for():
    for name, tree in MODULES.items():
        assert not tree.body or ast.get_docstring(tree), name
