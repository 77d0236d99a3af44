"""Finding captioned media: a folder, or a list in JSON lines, CSV or parquet; local or on S3."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pyarrow
from pyarrow import parquet

from data_pipeline.errors import ConfigError, DataError, InputMissing
from data_pipeline.shards.tar import SUFFIXES
from data_pipeline.store import storage

Kind = Literal["video", "image"]
CAPTIONS = "captions.jsonl"
LISTS = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Item:
    """One captioned file of a collection; `file` is its path below `Collection.folder`."""

    file: str
    caption: str
    metadata: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return self.file


@dataclass(frozen=True)
class Collection:
    """Captioned files of one kind below one folder."""

    folder: str
    kind: Kind
    items: list[Item]
    notes: dict[str, str] = field(default_factory=dict)


def list_media(source: str | Path, kind: Kind | None = None) -> Collection:
    """The captioned files of a folder or list, all of one kind."""
    source = str(source)
    is_list = source.lower().endswith(LISTS)
    folder = str(source).rpartition("/")[0] or "." if is_list else source
    if not storage.exists(source):
        raise InputMissing(
            f"{source}: no such folder or list; give the folder that holds the media, or a list of "
            f"them ({', '.join(LISTS)})."
        )
    captions = source if is_list else storage.join(source, CAPTIONS)
    if is_list or storage.exists(captions):
        items = _from_list(captions, folder)
    else:
        items = _from_sidecars(folder)
    kinds = {_kind(item.file) for item in items}
    if kind is None and len(kinds) > 1:
        raise ConfigError(
            f"{source}: holds videos and images, which make separate datasets; "
            "choose one with --kind video or --kind image."
        )
    chosen = kind or ("video" if "video" in kinds else "image")
    items = [item for item in items if _kind(item.file) == chosen]
    if not items:
        raise InputMissing(f"{source}: holds no captioned {chosen}; check --kind and the folder.")
    return Collection(folder, chosen, items)


def _caption(where: str, caption: str) -> str:
    """A caption that can be written as UTF-8; JSON can name half a character."""
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: caption: is wrong because character {error.start} is half of a pair "
            f"({caption[error.start]!a}); correct it."
        ) from None
    return caption.strip()


def _from_list(path: str, folder: str) -> list[Item]:
    items, seen = [], set()
    names: dict[str, set[str]] = {}
    for number, entry in _entries(path):
        where = f"{path}: line {number}"
        file, caption = entry.pop("file", None), entry.pop("caption", None)
        for name, value in (("file", file), ("caption", caption)):
            if not isinstance(value, str):
                raise DataError(f"{where}: {name}: value {value!r} is wrong because it is no text.")
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or "://" in file:
            raise DataError(
                f"{where}: file: value {file!r} is wrong because it leaves the folder; "
                "give a path below it."
            )
        parent = storage.join(folder, *PurePosixPath(file).parts[:-1])
        if parent not in names:
            names[parent] = set(storage.list_files(parent))
        if PurePosixPath(file).name not in names[parent]:
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
        items.append(Item(file, _caption(where, caption), entry))
    if not items:
        raise InputMissing(f"{path}: is empty; write one line per file.")
    return items


def _entries(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, fields) of a list's entries."""
    content = storage.read_bytes(path)
    match PurePosixPath(path).suffix.lower():
        case ".csv":
            yield from _csv_entries(path, content)
        case ".parquet":
            yield from _parquet_entries(path, content)
        case _:
            yield from _json_entries(path, content)


def _json_entries(path: str, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(content.splitlines(), 1):
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
        yield number, entry


def _csv_entries(path: str, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        _refuse_missing_columns(path, reader.fieldnames or [])
        for entry in reader:
            if None in entry or None in entry.values():
                raise DataError(
                    f"{path}: line {reader.line_num}: is wrong because it has not as many fields "
                    "as the header; put texts with commas in quotes."
                )
            yield reader.line_num, dict(entry)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is no CSV in UTF-8 because {error}; correct it.") from None


def _parquet_entries(path: str, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        table = parquet.read_table(io.BytesIO(content))
        _refuse_missing_columns(path, table.column_names)
        entries = table.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{path}: is no readable parquet because {reason}; correct it.") from None
    for number, entry in enumerate(entries, 1):
        yield number, {name: value for name, value in entry.items() if _is_json(value)}


def _refuse_missing_columns(path: str, names: Iterable[str]) -> None:
    for name in ("file", "caption"):
        if name not in names:
            raise DataError(
                f"{path}: column {name!r} is missing; name the columns 'file' and 'caption' "
                "(any others are kept as metadata)."
            )


def _from_sidecars(folder: str) -> list[Item]:
    items = []
    present = _files_below(folder)
    for file in sorted(present):
        if not _kind(file):
            continue
        path = PurePosixPath(file)
        metadata, text = path.with_suffix(".json").as_posix(), path.with_suffix(".txt").as_posix()
        entry: dict = {}
        if metadata in present:
            where = storage.join(folder, metadata)
            try:
                entry = json.loads(storage.read_bytes(where))
            except ValueError as error:
                raise DataError(f"{where}: is wrong because it is no JSON ({error}).") from None
            if not isinstance(entry, dict):
                raise DataError(f"{where}: is wrong because it holds no object.")
        caption = entry.pop("caption", None)
        if caption is None and text in present:
            caption = storage.read_bytes(storage.join(folder, text)).decode(errors="replace")
        if not isinstance(caption, str):
            raise InputMissing(
                f"{storage.join(folder, file)}: has no caption; write {PurePosixPath(text).name} "
                f"or {PurePosixPath(metadata).name} beside it, or a {CAPTIONS} for the folder."
            )
        items.append(Item(file, _caption(storage.join(folder, file), caption), entry))
    if not items:
        raise InputMissing(f"{folder}: holds no video or image; check the folder.")
    return items


def _files_below(folder: str) -> set[str]:
    """Every file below a folder, by its path from there; of an object store's, those directly in
    it."""
    if "://" in folder:
        return set(storage.list_files(folder))
    paths = Path(folder).rglob("*")
    return {path.relative_to(folder).as_posix() for path in paths if path.is_file()}


def _is_json(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, dict))


def _kind(file: str) -> Kind | None:
    suffix = PurePosixPath(file).suffix.lower().removeprefix(".")
    kinds: tuple[Kind, ...] = ("video", "image")
    return next((kind for kind in kinds if suffix in SUFFIXES[kind]), None)
