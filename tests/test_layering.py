"""The law of the house: which room may know which, and how large a file may grow."""

import ast
import re
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
# From the ground, which is the files of data_pipeline/ itself, to the roof, those of t2v/ itself.
ROOMS = (
    "data_pipeline",
    *(f"data_pipeline/{room}" for room in ("store", "media", "shards", "text", "latents")),
    *(
        "data_pipeline/making",
        "data_pipeline/feeding",
        "t2v/network",
        "t2v/engine",
        "t2v/methods",
        "t2v/checkpoint",
    ),
    *(f"t2v/{room}" for room in ("train", "attempt", "watching", "recipe")),
    *(f"t2v/{room}" for room in ("sampling", "evaluation", "plan")),
    *("cluster", "t2v/commands", "t2v"),
)
MOST_LINES, MOST_LINES_OF_A_CLASS = 400, 120
DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc"}
OURS = r"(?<![\w./-])(?:t2v|data_pipeline|cluster|benchmarks|tests|configs|docs)/"


class Import(NamedTuple):
    """A line of a file that imports another one of ours, wherever it stands in it."""

    file: str
    line: int
    imported: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: imports {self.imported}"


def python(*folders: str) -> dict[str, str]:
    """The text of every Python file in some folders, by its path."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


FILES = python("data_pipeline", "t2v", "cluster")
TREES = {file: ast.parse(text) for file, text in FILES.items()}


def imports(file: str) -> Iterator[Import]:
    """What a file imports of ours: at its top, inside functions and for type checking alone."""
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            choices = [(alias.name,) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            assert not node.level, f"{file}:{node.lineno}: imports {module}, which is relative"
            choices = [(f"{module}.{alias.name}", module) for alias in node.names]
        else:
            continue
        for names in choices:
            paths = [name.replace(".", "/") for name in names]
            known = [f for path in paths for f in (f"{path}.py", f"{path}/__init__.py")]
            if found := next((f for f in known if f in FILES), None):
                yield Import(file, node.lineno, found)


IMPORTS = sorted({found for file in FILES for found in imports(file)})


def folder(file: str) -> str:
    return file.rpartition("/")[0]


def room(file: str) -> int:
    """The place of a file's room in the order of rooms."""
    return ROOMS.index("/".join(folder(file).split("/")[:2]))


def refuse(broken: list) -> None:
    """Fail with a line for each place where a law is broken."""
    if broken:
        pytest.fail("\n".join(map(str, broken)), pytrace=False)


def test_a_room_imports_only_what_stands_below_it():
    refuse([found for found in IMPORTS if room(found.imported) > room(found.file)])


@pytest.mark.parametrize("unit", [str, folder])
def test_neither_files_nor_folders_import_each_other_in_a_circle(unit: Callable[[str], str]):
    lines = {(unit(found.file), unit(found.imported)): found for found in IMPORTS}
    graph: dict[str, set[str]] = {}
    for user, used in lines:
        graph.setdefault(user, set()).update({used} - {user})
    circle: list[str] = []
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = error.args[1]  # each is imported by the next
    refuse([lines[user, used] for used, user in pairwise(circle)])


def test_nothing_but_the_recipe_looks_into_a_method():
    refuse([
        found for found in IMPORTS
        if re.match(r"t2v/methods/\w+/", found.imported)
        and not found.file.startswith((f"{folder(found.imported)}/", "t2v/recipe/"))
    ])  # fmt: skip


def test_rooms_below_the_recipe_do_not_name_the_whole_of_it():
    below = (file for file in FILES if room(file) < ROOMS.index("t2v/recipe"))
    refuse([
        f"{file}:{number}: names RunConfig; take a section of it, or plain values"
        for file in below
        for number, line in enumerate(FILES[file].splitlines(), start=1)
        if re.search(r"\bRunConfig\b", line)
    ])  # fmt: skip


def test_files_and_classes_hold_one_idea():
    sizes = {
        file: text.count("\n") for file, text in (FILES | python("benchmarks", "tests")).items()
    }
    long = [f"{file}: has {lines} lines" for file, lines in sizes.items() if lines > MOST_LINES]
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MOST_LINES_OF_A_CLASS:
                    long.append(f"{file}:{node.lineno}: {node.name} has {lines} lines")
    refuse(long)


def test_every_module_has_a_purpose_and_says_it():
    inits = [file for file in FILES if file.endswith("__init__.py")]
    refuse([f"{file}: is not empty" for file in inits if FILES[file]])
    refuse([f"{file}: is a drawer" for file in FILES if DRAWERS & set(re.split(r"[/.]", file))])
    untold = [file for file in FILES if file not in inits and not ast.get_docstring(TREES[file])]
    refuse([f"{file}:1: has no docstring" for file in untold])


def test_readme_tells_of_every_room_in_its_order():
    told = re.findall(r"^\| `([\w/]+)/` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert told == list(reversed(ROOMS))
    refuse([f"{name}: is no folder" for name in ROOMS if not (ROOT / name).is_dir()])


def test_documents_name_files_that_exist():
    named = re.compile(rf"{OURS}[\w./-]*\w|(?<![\w./*-])[\w/]+\.py\b")
    refuse([
        f"{path.relative_to(ROOT)}:{number}: there is no {name}"
        for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        for name in named.findall(line)
        if not (ROOT / name).exists()
    ])  # fmt: skip
