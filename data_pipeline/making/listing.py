"""What lies in a folder or prefix: media and what belongs to them, and what is passed over."""

import json
import os
import stat
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from data_pipeline.errors import DataError, InputMissing
from data_pipeline.making.zips import list_zip
from data_pipeline.shards.account import Tally
from data_pipeline.shards.scan import SUFFIXES, TarFault, list_members
from data_pipeline.store import storage

Kind = Literal["video", "image"]
KINDS: tuple[Kind, ...] = ("video", "image")
TEXTS = (".json", ".txt")  # of captions and metadata, beside media
ARCHIVES = (".tar", ".zip")  # taken for folders


@dataclass(frozen=True)
class Place:
    """Where the bytes of a file are below a folder: a file of its own, or a part of an archive."""

    path: str
    size: int | None = None  # none: it was not listed
    offset: int | None = None  # none: all of the file
    deflated_size: int | None = None  # of what is compressed in a zip

    def read(self, folder: str) -> bytes:
        """The bytes; InputMissing where they are not as many as were listed."""
        path = storage.join(folder, self.path)
        if self.size is None or self.offset is None:
            content = storage.read_bytes(path)
        elif self.deflated_size is None:
            content = storage.read_range(path, self.offset, self.size)
        else:
            packed = storage.read_range(path, self.offset, self.deflated_size)
            try:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, self.size + 1)
            except zlib.error as error:
                raise DataError(f"is damaged: what {self.path} holds of it ({error})") from None
        if self.size not in (None, len(content)):
            raise InputMissing(
                f"{path}: is not what was listed because it holds {len(content)} bytes instead of "
                f"{self.size}; put back what there was, or build into a new folder."
            )
        return content

    def __str__(self) -> str:
        values = [self.path, self.size, self.offset, self.deflated_size]
        return json.dumps(values[: 4 - values[1:].count(None)])


@dataclass(frozen=True)
class Found:
    """A file below a folder; one in an archive is called as if that were a folder."""

    file: str
    place: Place

    @property
    def stem(self) -> str:
        """The name without the type, however its accents are written."""
        return unicodedata.normalize("NFC", str(PurePosixPath(self.file).with_suffix("")))


def kind_of(path: str) -> Kind | None:
    """What kind of media a file is by its name."""
    suffix = PurePosixPath(path).suffix.lower().removeprefix(".")
    return next((kind for kind in KINDS if suffix in SUFFIXES[kind]), None)


def scan(folder: str, tally: Tally) -> Iterator[Found]:
    """Every file below a folder; what cannot be told or is not entered is counted."""
    if storage.is_remote(folder):
        files = storage.list_below(folder)
    elif not os.path.isdir(folder):
        what = "is a file, no folder" if os.path.exists(folder) else "no such folder"
        raise InputMissing(f"{folder}: {what}; give the one that holds the media.")
    else:
        files = _walk(folder, "", tally)
    for path, size in files:
        if _is_usable(path, tally):
            yield Found(path, Place(path, size))


def scan_archive(folder: str, path: str, tally: Tally) -> Iterator[Found]:
    """Every file in a tar or zip below a folder; what cannot be read of it is counted."""

    def refuse(fault: TarFault) -> None:
        tally.add("unusable", fault.reason, [": ".join(filter(None, [path, fault.name]))])

    whole = storage.join(folder, path)
    members = list_zip if path.lower().endswith(".zip") else list_members
    for name, offset, size, *packed in members(whole, refuse):
        name = str(PurePosixPath(name))
        if _is_usable(name, tally):
            yield Found(f"{path}/{name}", Place(path, size, offset, *packed))


def _is_usable(path: str, tally: Tally) -> bool:
    if any(part.startswith(".") or part == "__MACOSX" for part in path.split("/")):
        tally.add("passed_over", "hidden file", [path])
        return False
    try:
        path.encode()
    except UnicodeEncodeError:  # a name on a disk may be any bytes
        tally.add("passed_over", "name is no UTF-8", [ascii(path)])
        return False
    return True


def _walk(folder: str, below: str, tally: Tally) -> Iterator[tuple[str, int]]:
    with os.scandir(os.path.join(folder, below)) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        path = f"{below}/{entry.name}" if below else entry.name
        try:
            found = entry.stat()
        except OSError:  # of a link in a circle, too
            found = None
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder, path, tally)
        elif found and stat.S_ISDIR(found.st_mode):
            tally.add("passed_over", "link to a folder", [path])
        elif found and stat.S_ISREG(found.st_mode):
            yield path, found.st_size
        else:
            tally.add("passed_over", "link that leads nowhere, or no file", [path])
