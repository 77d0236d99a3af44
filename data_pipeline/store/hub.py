"""Models of others: found in a folder or downloaded from the hub, and told apart by their files."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import nn

from data_pipeline.errors import InputMissing

# What older files keep, though networks make it anew.
BUFFERS = ("position_ids", "masked_bias", "inv_freq")


def fetch_model(name: str, patterns: Sequence[str], *, what: str) -> Path:
    """The local folder of a model, downloaded if it is a hub id: those files that match."""
    if Path(name).is_dir():
        return Path(name)
    if ("/" in name and Path(name).parent.is_dir()) or name.startswith((".", "/")):
        raise InputMissing(f"{name}: no such folder; give an {what}'s folder or hub id.")
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        raise InputMissing(
            f"{name}: is no local folder, and the hub does not give it ({reason_of(error)}); "
            f"give a folder that holds the {what}."
        ) from None


def reason_of(error: Exception) -> str:
    """The first sentence of what a library says, with what it announces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")


def refuse_partial(loading: Mapping[str, Any], model: nn.Module) -> None:
    """ValueError unless a network found its weights in a model's files, and has a place for all of
    theirs that belong to its parts: it would compute something else without a word. Heads that it
    does not have are none of its own, and a pooler is not used here."""
    absent = {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}
    absent = sorted(name for name in absent if not name.startswith("pooler."))
    if absent:
        raise ValueError(
            f"{len(absent)} of its weights are missing or of another shape, {absent[0]} first"
        )
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    parts = {name for name, _ in model.named_children()}
    names = sorted(name.removeprefix(prefix) for name in loading["unexpected_keys"])
    unused = [n for n in names if n.partition(".")[0] in parts and not n.endswith(BUFFERS)]
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
