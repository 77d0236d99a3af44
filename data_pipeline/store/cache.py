"""A cache of remote objects on the local disk, shared by all processes of a machine.

Ranges are kept in blocks, each with its crc32 behind it; whole objects as they are. An entry is
named by path and version, so that a replaced object is never mixed with its successor. Past the
quota the least recently used entries go, and nothing else that lies in the folder.
"""

import fcntl
import os
import re
import stat
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, TypeVar

from data_pipeline.errors import ConfigError, StorageError
from data_pipeline.store.s3 import ObjectChanged, ObjectStore, Version

Result = TypeVar("Result")

# An entry, and one that is being written.
ENTRY = re.compile(r"([0-9a-f]{64}|\.[0-9a-f]{32})\.t2v")

BLOCK_BYTES = 2 * 1024 * 1024
CRC_BYTES = 4
FOLDER_VARIABLE, QUOTA_VARIABLE = "T2V_CACHE", "T2V_CACHE_GIB"
DEFAULT_QUOTA_GIB = 16.0
CHECK_QUOTA_EVERY = 16  # new entries of a process
MAX_CHANGES = 3  # of an object during one read


class Cache:
    """Reads of an object store through a folder of at most about `quota_bytes`."""

    def __init__(self, store: ObjectStore, folder: Path, quota_bytes: int):
        self.store, self.entries = store, Entries(folder, quota_bytes)
        self._versions: dict[str, Version] = {}

    def read(self, path: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`; fewer only where the object ends."""
        return self._steady(path, lambda version: self._read(path, version, offset, length))

    def read_all(self, path: str) -> bytes:
        """The whole object as it is now, past the cache."""
        self.forget(path)
        with suppress(ObjectChanged):
            return self.store.read_whole(path)
        return self._steady(path, lambda version: self.store.read(path, version))

    def file(self, path: str) -> Path:
        """A local file with the whole object as it is now."""
        self.forget(path)
        return self._steady(path, lambda version: self._file(path, version))

    def forget(self, path: str) -> None:
        """Look up anew which version of an object there is."""
        self._versions.pop(path, None)

    def _steady(self, path: str, read: Callable[[Version], Result]) -> Result:
        """Read one version; an object that was replaced meanwhile is read from the start."""
        for _ in range(MAX_CHANGES):
            if path not in self._versions:
                self._versions[path] = self.store.version(path)
            try:
                return read(self._versions[path])
            except ObjectChanged:
                self.forget(path)
        raise StorageError(
            f"{path}: cannot be read because it was replaced {MAX_CHANGES} times meanwhile; "
            "let its writer finish."
        )

    def _read(self, path: str, version: Version, offset: int, length: int) -> bytes:
        end = min(offset + length, version.size)
        pieces = []
        for number in range(offset // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            start = number * BLOCK_BYTES
            block = self._block(path, version, number)
            pieces.append(block[max(offset - start, 0) : end - start])
        return b"".join(pieces)

    def _block(self, path: str, version: Version, number: int) -> bytes:
        entry = self.entries.named(path, version, str(number))
        content = _checked(entry)
        if content is not None:
            return content
        with self.entries.lock(entry.name[:2]):
            content = _checked(entry)  # another process may have been faster
            if content is not None:
                return content
            content = self.store.read(path, version, number * BLOCK_BYTES, BLOCK_BYTES)
            with self.entries.new(entry) as file:
                file.write(content)
                file.write(_crc(content))
        return content

    def _file(self, path: str, version: Version) -> Path:
        entry = self.entries.named(path, version, "whole")
        with self.entries.lock(entry.name[:2]):
            if entry.exists() and entry.stat().st_size == version.size:
                os.utime(entry)
            else:
                with self.entries.new(entry) as file:
                    self.store.download(path, version, file)
        return entry


class Entries:
    """The files of a cache, which all processes of a machine share, within its quota."""

    def __init__(self, folder: Path, quota_bytes: int):
        self.folder, self.quota_bytes = folder, quota_bytes
        self._added = 0

    def named(self, path: str, version: Version, part: str) -> Path:
        """Where a part of a version of an object is kept."""
        name = sha256(f"{path}\n{version.etag}\n{version.size}\n{part}".encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.t2v"

    @contextmanager
    def new(self, entry: Path) -> Iterator[BinaryIO]:
        """A file that becomes the entry when the block ends well."""
        if self._added % CHECK_QUOTA_EVERY == 0:
            self._make_room()
        self._added += 1
        partial = entry.with_name(f".{uuid.uuid4().hex}.t2v")
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("xb") as file:
                yield file
            partial.replace(entry)
        except OSError as error:
            raise StorageError(
                f"{self.folder}: cannot cache because of '{error.strerror or error}'; free space, "
                f"or set {FOLDER_VARIABLE} and {QUOTA_VARIABLE}."
            ) from None
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self) -> None:
        """Remove the least recently used entries past the quota."""
        with self.lock("quota"):
            entries = []
            for path in self.folder.glob("??/*"):
                if not ENTRY.fullmatch(path.name):
                    continue
                try:
                    status = path.lstat()
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(status.st_mode):
                    entries.append((status.st_mtime_ns, status.st_size, path))
            surplus = sum(size for _, size, _ in entries) - self.quota_bytes
            for _, size, path in sorted(entries):
                if surplus <= 0:
                    return
                path.unlink(missing_ok=True)
                surplus -= size

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """One process at a time; the lock of a dead process is free."""
        folder = self.folder / "locks"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = (folder / name).open("ab")
        except OSError as error:
            raise StorageError(
                f"{self.folder}: cannot be a cache because of '{error.strerror}'; "
                f"set {FOLDER_VARIABLE} to a folder on a local disk."
            ) from None
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def open_cache(store: ObjectStore) -> Cache:
    """The cache that this machine's environment asks for."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "t2v"
    quota = os.environ.get(QUOTA_VARIABLE, DEFAULT_QUOTA_GIB)
    try:
        quota_bytes = int(float(quota) * 2**30)
    except (ValueError, OverflowError):
        quota_bytes = 0
    if quota_bytes <= 0:
        raise ConfigError(f"{QUOTA_VARIABLE}: {quota!r} is wrong because it is no size; set GiB.")
    return Cache(store, Path(os.environ.get(FOLDER_VARIABLE) or default), quota_bytes)


def _checked(entry: Path) -> bytes | None:
    """An entry's content; nothing where it is absent or damaged."""
    try:
        stored = entry.read_bytes()
        os.utime(entry)
    except (FileNotFoundError, NotADirectoryError):
        return None
    content = stored[:-CRC_BYTES]
    return content if stored[-CRC_BYTES:] == _crc(content) else None


def _crc(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(CRC_BYTES, "little")
