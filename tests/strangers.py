"""Files of others in a folder, and whether they are as they were."""

import os
from pathlib import Path

from t2v.cli import main

Tree = dict[str, str | bytes]


def tree(folder: Path) -> Tree:
    """All that lies below a folder: a file's bytes, a link's target, of a folder nothing."""
    found: Tree = {}
    for root, folders, files in os.walk(folder):
        for path in (Path(root, name) for name in (*folders, *files)):
            name = str(path.relative_to(folder))
            if path.is_symlink():
                found[name] = f"-> {os.readlink(path)}"
            else:
                found[name] = "" if path.is_dir() else path.read_bytes()
    return found


def seen(folder: Path) -> Tree:
    """A folder's tree, and that of the folder outside to which `settle` leads links."""
    outside = folder.parent / f"outside {folder.name}"
    return tree(folder) | {f"../{outside.name}/{k}": v for k, v in tree(outside).items()}


def settle(folder: Path, *names: str) -> Tree:
    """Put a stranger's files, folders and links into a folder, and some under given names."""
    before, outside = tree(folder), folder.parent / f"outside {folder.name}"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "film.mp4").write_bytes(b"a film")
    (folder / "their folder" / "shards").mkdir(parents=True)
    (folder / "their folder" / "shards" / "000000.idx").write_bytes(b"theirs")
    (folder / "empty folder").mkdir()
    (folder / "link").symlink_to(outside, target_is_directory=True)
    (folder / ".staging-mine").symlink_to(outside, target_is_directory=True)
    (folder / "notes.txt").write_bytes(b"notes")
    (folder / ".download.part").write_bytes(b"half of theirs")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"their {name}".encode())
    return {name: content for name, content in seen(folder).items() if name not in before}


def untouched(folder: Path, theirs: Tree) -> bool:
    """Whether all that strangers had is there as it was."""
    return theirs.items() <= seen(folder).items()


def alone(folder: Path, theirs: Tree) -> bool:
    """Whether that is all there is, and folders that lead to it."""
    return all(any(f"{own}/".startswith(f"{name}/") for own in theirs) for name in seen(folder))


def refused(capsys, *command: str | Path, code: int = 78) -> str:
    """The one line with which a command refuses."""
    capsys.readouterr()
    assert main([str(word) for word in command]) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said
