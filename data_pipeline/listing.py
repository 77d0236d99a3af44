"""Finding captioned media in a folder: a `captions.jsonl`, or a .txt/.json beside each file."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data_pipeline.errors import ConfigError, DataError, InputMissing
from data_pipeline.shards import SUFFIXES

Kind = Literal["video", "image"]
CAPTIONS = "captions.jsonl"


@dataclass(frozen=True)
class Item:
    """One captioned file of a collection; `file` is its path below the folder."""

    file: str
    caption: str
    metadata: dict = field(default_factory=dict)


def list_media(source: str | Path, kind: Kind | None = None) -> tuple[Kind, list[Item]]:
    """The kind and the captioned files of a collection, all of one kind."""
    folder = Path(source)
    if not folder.is_dir():
        raise InputMissing(f"{folder}: no such folder; give the folder that holds the media.")
    captions = folder / CAPTIONS
    items = _from_captions(captions) if captions.is_file() else _from_sidecars(folder)
    kinds = {_kind(item.file) for item in items}
    if kind is None and len(kinds) > 1:
        raise ConfigError(
            f"{folder}: holds videos and images, which make separate datasets; "
            "choose one with --kind video or --kind image."
        )
    chosen = kind or ("video" if "video" in kinds else "image")
    items = [item for item in items if _kind(item.file) == chosen]
    if not items:
        raise InputMissing(f"{folder}: holds no captioned {chosen}; check --kind and the folder.")
    return chosen, items


def _from_captions(path: Path) -> list[Item]:
    items, seen = [], set()
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{where}: is wrong because it is no JSON ({error}); correct it."
            ) from None
        if not isinstance(entry, dict):
            raise DataError(
                f'{where}: is wrong because it is no object; write {{"file", "caption"}}.'
            )
        file, caption = entry.pop("file", None), entry.pop("caption", None)
        for name, value in (("file", file), ("caption", caption)):
            if not isinstance(value, str):
                raise DataError(f"{where}: {name}: value {value!r} is wrong because it is no text.")
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise DataError(
                f"{where}: file: value {file!r} is wrong because it leaves the folder; "
                "give a path below it."
            )
        if not (path.parent / file).is_file():
            raise InputMissing(
                f"{where}: file: value {file!r} is wrong because there is no such file; "
                "add the file or remove the line."
            )
        if not _kind(file):
            raise DataError(
                f"{where}: file: value {file!r} is wrong because its type is not known; "
                f"known are {', '.join(SUFFIXES['video'] + SUFFIXES['image'])}."
            )
        if file in seen:
            raise DataError(f"{where}: file: value {file!r} is wrong because it is given twice.")
        seen.add(file)
        items.append(Item(file, caption.strip(), entry))
    if not items:
        raise InputMissing(f"{path}: is empty; write one line per file.")
    return items


def _from_sidecars(folder: Path) -> list[Item]:
    items = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or not _kind(path.name):
            continue
        metadata, text = path.with_suffix(".json"), path.with_suffix(".txt")
        entry: dict = {}
        if metadata.is_file():
            try:
                entry = json.loads(metadata.read_bytes())
            except ValueError as error:
                raise DataError(f"{metadata}: is wrong because it is no JSON ({error}).") from None
            if not isinstance(entry, dict):
                raise DataError(f"{metadata}: is wrong because it holds no object.")
        caption = entry.pop("caption", None)
        if caption is None and text.is_file():
            caption = text.read_text(encoding="utf-8", errors="replace")
        if not isinstance(caption, str):
            raise InputMissing(
                f"{path}: has no caption; write {text.name} or {metadata.name} beside it, "
                f"or a {CAPTIONS} for the folder."
            )
        items.append(Item(path.relative_to(folder).as_posix(), caption.strip(), entry))
    if not items:
        raise InputMissing(f"{folder}: holds no video or image; check the folder.")
    return items


def _kind(file: str) -> Kind | None:
    suffix = Path(file).suffix.lower().removeprefix(".")
    kinds: tuple[Kind, ...] = ("video", "image")
    return next((kind for kind in kinds if suffix in SUFFIXES[kind]), None)
