"""Where bytes live, on disk or in S3: ranged reads, and all-or-nothing writes, so that no reader
sees half a file."""

import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from data_pipeline.errors import ConfigError, InputMissing, StorageError, UserError

if TYPE_CHECKING:
    from data_pipeline.store.cache import Cache

PARTIAL = ".part"
OURS_PARTIAL = re.compile(rf"\..+\.[0-9a-f]{{32}}{re.escape(PARTIAL)}")  # of `open_atomic`
S3 = "s3://"


def join(path: str, *names: str) -> str:
    """A path below another."""
    return "/".join([path.rstrip("/") or "/", *names])


def is_remote(path: str | Path) -> bool:
    """Whether a path lies in an object store."""
    return str(path).startswith(S3)


def exists(path: str) -> bool:
    """Whether there is a file or folder at a path."""
    if is_remote(path):
        return remote().store.exists(path)
    return _local(path).exists()


def list_files(folder: str, suffix: str = "") -> list[str]:
    """Names of the finished files directly in a folder, sorted; none where there is no folder."""
    if is_remote(folder):
        names = list(remote().store.list(folder))
    elif (root := _local(folder)).is_dir():
        with _storage_errors(folder), os.scandir(root) as entries:
            names = [entry.name for entry in entries if entry.is_file()]
    else:
        names = []
    return sorted(name for name in names if name.endswith(suffix) and not name.endswith(PARTIAL))


def list_folders(folder: str) -> list[str]:
    """Names of the folders directly in a folder, sorted; none where there is no folder."""
    if is_remote(folder):
        return sorted(remote().store.list_folders(folder))
    root = _local(folder)
    if not root.is_dir():
        return []
    with _storage_errors(folder):
        return sorted(path.name for path in root.iterdir() if path.is_dir())


def list_below(prefix: str) -> Iterator[tuple[str, int]]:
    """(path from there, bytes) of every finished object below a prefix of a store."""
    return (
        (name, size) for name, size in remote().store.list_below(prefix)
        if not name.endswith(PARTIAL)
    )  # fmt: skip


def identity(path: str) -> str:
    """What changes when the content of a file does."""
    if is_remote(path):
        version = remote().store.version(path)
        return f"{version.etag} {version.size}"
    with _storage_errors(path), _local(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def match(pattern: str) -> list[str]:
    """The files whose path fits a pattern with *, ? and [...], sorted; InputMissing for none."""
    if is_remote(pattern):
        fixed = re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]
        names = (join(fixed, name) for name, _ in list_below(fixed))
        found = [name for name in names if fnmatchcase(name, pattern)]
    else:
        found = [path for path in glob(pattern, recursive=True) if os.path.isfile(path)]
    if not found:
        raise InputMissing(f"{pattern}: no such file; check the pattern, and put it in quotes.")
    return sorted(found)


def is_empty(folder: str) -> bool:
    """Whether nothing lies in a folder, or it is not there; ConfigError where it is no folder.

    What a killed writer of ours left half does not count.
    """
    if is_remote(folder):
        store = remote().store
        return not any(store.list(folder)) and not any(store.list_folders(folder))
    root = _local(folder)
    if not os.path.lexists(root):
        return True
    if not root.is_dir():
        raise ConfigError(f"{folder}: is no folder; give a new one.")
    with _storage_errors(folder):
        return all(OURS_PARTIAL.fullmatch(name) for name in os.listdir(root))


def claim(folder: str, mark: str, content: bytes, *, what: str) -> bytes | None:
    """Make an empty folder `what` of ours by its first file; what that file says already where the
    folder is one, None where it was not. ConfigError where anything else is in the folder."""
    path = join(folder, mark)
    empty = is_empty(folder)  # looked at before the mark, which another task may be writing
    if exists(path):
        return read_bytes(path)
    if not empty:
        raise ConfigError(f"{folder}: is not empty and no {what} of ours; give a new folder.")
    write_atomic(path, content)
    return None


def refuse_overlap(source: str, out: str) -> None:
    """ConfigError where an output contains its source or lies inside it, links followed."""
    if is_remote(source) != is_remote(out):
        return
    inner, outer = _real(out), _real(source)
    for how in ("lies inside", "contains"):
        if inner.startswith(outer):
            raise ConfigError(
                f"{out}: is wrong because it {how} the source {source}; give a folder beside it."
            )
        inner, outer = outer, inner


def read_bytes(path: str) -> bytes:
    """The whole file."""
    if is_remote(path):
        return remote().read_all(path)
    with _storage_errors(path):
        return _local(path).read_bytes()


def read_range(path: str, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`; fewer only where the file ends."""
    if is_remote(path):
        return remote().read(path, offset, length)
    with _storage_errors(path), _local(path).open("rb", buffering=0) as file:
        return os.pread(file.fileno(), length, offset)


def local_file(path: str) -> Path:
    """A file on this machine with the content of `path`, to map into memory."""
    if is_remote(path):
        return remote().file(path)
    return _local(path)


def write_atomic(path: str | Path, content: bytes) -> None:
    """Replace the file as a whole."""
    with open_atomic(str(path)) as file:
        file.write(content)


@contextmanager
def open_atomic(path: str) -> Iterator[BinaryIO]:
    """A file to write that appears at `path`, whole and on disk, when the block ends well."""
    if is_remote(path):
        with _storage_errors(tempfile.gettempdir()), tempfile.TemporaryFile() as file:
            yield file
            remote().store.write(path, file)
        remote().forget(path)
        return
    target = _local(path)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}{PARTIAL}")
    with _storage_errors(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            _put_in_place(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(target.parent)


def _put_in_place(partial: Path, target: Path) -> None:
    try:
        partial.replace(target)
    except FileNotFoundError:
        raise StorageError(
            f"{target}: cannot be finished because another process in its folder took away what "
            "was half written; let one at a time work there, and start this one again."
        ) from None


def create(path: str, content: bytes) -> None:
    """Write a file that must not be there yet, unless it is the same; StorageError otherwise."""
    if is_remote(path):
        made = remote().store.create(path, content)
    else:
        made = not exists(path)
        if made:
            write_atomic(path, content)
    if not made and read_bytes(path) != content:
        raise StorageError(f"{path}: is there already with other content; use another prefix.")


def copy_to(source: Path, path: str) -> None:
    """Copy a file of this machine to a path, where it appears whole."""
    with _storage_errors(str(source)), source.open("rb") as file:
        if is_remote(path):
            remote().store.write(path, file)
        else:
            with open_atomic(path) as target:
                shutil.copyfileobj(file, target)


def copy_from(path: str, target: Path) -> None:
    """Copy a path to a file of this machine, past the cache."""
    with _storage_errors(str(target)), target.open("wb") as file:
        if is_remote(path):
            store = remote().store
            store.download(path, store.version(path), file)
        else:
            with _local(path).open("rb") as source:
                shutil.copyfileobj(source, file)
        file.flush()
        os.fsync(file.fileno())


def remove(path: str) -> None:
    """Delete a file; it may be gone already."""
    if is_remote(path):
        remote().store.remove(path)
        return
    with _storage_errors(path):
        _local(path).unlink(missing_ok=True)


def remove_partial(folder: str) -> None:
    """Delete what killed writers of ours left in a folder; no writer may be at work there."""
    if is_remote(folder):
        return  # an object appears whole or not at all
    root = _local(folder)
    if root.is_dir():
        for path in root.iterdir():
            if OURS_PARTIAL.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                path.unlink(missing_ok=True)


def absent_folders(folder: str) -> list[str]:
    """Those of a folder and its parents that are not there, outermost first; none in an object
    store, which has no folders."""
    if is_remote(folder):
        return []
    path = _local(folder)
    return [str(place) for place in (*reversed(path.parents), path) if not os.path.lexists(place)]


def take_back(files: Iterable[str], folders: Iterable[str]) -> None:
    """Delete files that the caller wrote, and then, innermost first, the folders that it made and
    that nobody else has put anything into; whatever cannot be deleted stays."""
    for path in files:
        with suppress(UserError):
            remove(path)
    for folder in sorted(folders, key=len, reverse=True):
        with suppress(OSError):
            _local(folder).rmdir()


def remote() -> "Cache":
    """The object store behind this machine's cache; connections belong to one process."""
    return _remote(os.getpid())


@lru_cache(maxsize=1)
def _remote(_process: int) -> "Cache":
    from data_pipeline.store.cache import open_cache
    from data_pipeline.store.s3 import ObjectStore

    return open_cache(ObjectStore())


def _local(path: str) -> Path:
    scheme, separator, _ = path.partition("://")
    if separator:
        raise ConfigError(
            f"{path}: is wrong because {scheme}:// is not served; give a folder or {S3}..."
        )
    return Path(path)


def _real(path: str) -> str:
    """A path without links and with a slash at its end, by which it begins all that it contains."""
    real = path if is_remote(path) else os.path.realpath(_local(path))
    return f"{real.rstrip('/')}/"


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _storage_errors(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise InputMissing(f"{path}: no such file; check the path.") from None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}; check disk and rights.") from None
