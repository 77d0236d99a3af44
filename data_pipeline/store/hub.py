"""Models of others: found in a folder or downloaded from the hub, and told apart by their files."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from data_pipeline.errors import InputMissing


def fetch_model(name: str, patterns: Sequence[str], *, what: str) -> Path:
    """The local folder of a model, downloaded if it is a hub id: those files that match."""
    if Path(name).is_dir():
        return Path(name)
    if ("/" in name and Path(name).parent.is_dir()) or name.startswith((".", "/")):
        raise InputMissing(f"{name}: no such folder; give an {what}'s folder or hub id.")
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputMissing(
            f"{name}: is no local folder, and the hub does not give it ({reason}); "
            f"give a folder that holds the {what}."
        ) from None


def refuse_partial(loading: Mapping[str, Any], *, ours: str | tuple[str, ...] = "") -> None:
    """ValueError unless a network found all of its weights in a model's files, and has a place for
    all of theirs whose names begin with `ours`: it would compute something else without a word."""
    absent = sorted([*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])])
    if absent:
        raise ValueError(
            f"{len(absent)} of its weights are missing or of another shape, {absent[0]} first"
        )
    unused = sorted(name for name in loading["unexpected_keys"] if name.startswith(ours))
    if unused:
        raise ValueError(f"{len(unused)} of its weights have no place in it, {unused[0]} first")


def digest_files(folder: Path, patterns: Sequence[str]) -> str:
    """sha256 over names and content of the files that match."""
    digest = sha256()
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()
