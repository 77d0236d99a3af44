"""WebDataset shards and their index.

A shard is a plain tar: `KEY.mp4` or `KEY.jpg`, with `KEY.json` and/or `KEY.txt`. Beside it lies
`NAME.idx`, a numpy array with one row per sample that tells where each member's bytes are and what
they must sum to. A tar without its index does not exist: the index is written last.
"""

import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from pathlib import PurePosixPath

import numpy as np

from data_pipeline.errors import DataError, InputMissing
from data_pipeline.store import storage

VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "avi", "mov")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
TENSOR_SUFFIXES = ("safetensors",)
SUFFIXES = {"video": VIDEO_SUFFIXES, "image": IMAGE_SUFFIXES, "tensor": TENSOR_SUFFIXES}
KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # as webdataset splits a member's name
MAX_MEMBER_BYTES = 4 << 30  # a claimed size must not fill the memory

MEMBER = np.dtype([("offset", "<u8"), ("size", "<u8"), ("crc32", "<u4")])
ROW = np.dtype(
    [
        ("key", "<u8"),  # digest of KEY
        ("caption", "<u8"),  # digest of the caption; of the origin in a shard of a derived set
        ("media", MEMBER),
        ("json", MEMBER),  # size 0: none
        ("txt", MEMBER),
    ]
)


@dataclass(frozen=True)
class Record:
    """One sample as stored."""

    media: bytes
    metadata: dict
    caption: str


def digest64(text: str) -> int:
    """A 64-bit digest: keys and captions are compared by it."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def write_tar(path: str, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Write `(key, {suffix: content})` samples as a tar; it is no shard before `write_index`.

    Equal samples give equal bytes: nothing of the clock or the user enters the tar.
    """
    with (
        storage.open_atomic(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for key, members in samples:
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_index(folder: str, name: str, kind: str) -> int:
    """Index a finished tar, and so commit it; the number of samples."""
    rows = index_tar(storage.join(folder, f"{name}.tar"), kind)
    save_index(folder, name, rows)
    return len(rows)


def save_index(folder: str, name: str, rows: np.ndarray) -> None:
    """Write the index of a shard."""
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    storage.write_atomic(storage.join(folder, f"{name}.idx"), buffer.getvalue())


def index_tar(path: str, kind: str) -> np.ndarray:
    """The index rows of a tar of `kind` media; DataError at its first fault."""
    return _rows(_samples(path, kind, _raise))


def examine_tar(path: str, kind: str) -> "Contents":
    """What a tar holds whole, and every fault found on the way."""
    faults: list[str] = []
    samples = _samples(path, kind, lambda error: faults.append(str(error)))
    return Contents(
        _rows(samples), list(samples), [sample.suffixes for sample in samples.values()], faults
    )


def list_captions(path: str, kind: str) -> list[tuple[str, str]]:
    """(key, caption) of a tar's samples, row by row."""
    return [(key, sample.caption) for key, sample in _samples(path, kind, _raise).items()]


def json_caption(metadata: dict) -> str:
    """The caption in a sample's json member, which goes before that of a txt member."""
    return str(metadata.get("caption") or "").strip()


def txt_caption(content: bytes) -> str:
    """The caption that a txt member is."""
    return content.decode("utf-8", errors="replace").strip()


def parse_metadata(path: str, key: str, content: bytes) -> dict:
    """A sample's json member."""
    try:
        metadata = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path}: json of '{key}' is damaged because {error}.") from None
    if not isinstance(metadata, dict):
        raise DataError(f"{path}: json of '{key}' is wrong because it holds no mapping.")
    return metadata


def open_index(folder: str, name: str) -> np.ndarray:
    """A shard's index, mapped into memory."""
    path = storage.join(folder, f"{name}.idx")
    try:
        rows = np.load(storage.local_file(path), mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: is missing; run `t2v data index` on the dataset.") from None
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path}: is damaged because {error}; index it again.") from None
    if rows.dtype != ROW or rows.ndim != 1:
        raise DataError(f"{path}: is of another format; run `t2v data index` again.")
    return rows


def index_digest(folder: str, name: str) -> str:
    """sha256 of a shard's index; it covers every member through its crc32."""
    return sha256(storage.read_bytes(storage.join(folder, f"{name}.idx"))).hexdigest()


def read_member(path: str, member: np.void) -> bytes:
    """The bytes of one member, checked."""
    size = int(member["size"])
    content = storage.read_range(path, int(member["offset"]), size)
    if len(content) != size:
        raise DataError(f"{path}: ends early")
    if zlib.crc32(content) != int(member["crc32"]):
        raise DataError(f"{path}: bytes differ from the index (crc32)")
    return content


def read_record(folder: str, name: str, row: np.void) -> Record:
    """One sample of a shard."""
    metadata, caption = read_told(folder, name, row)
    media = read_member(storage.join(folder, f"{name}.tar"), row["media"])
    return Record(media, metadata, caption)


def read_told(folder: str, name: str, row: np.void) -> tuple[dict, str]:
    """(metadata, caption) of a sample, whose media stay unread."""
    path = storage.join(folder, f"{name}.tar")
    metadata: dict = {}
    if row["json"]["size"]:
        metadata = parse_metadata(path, "the sample", read_member(path, row["json"]))
    caption = json_caption(metadata)
    if not caption and row["txt"]["size"]:
        caption = txt_caption(read_member(path, row["txt"]))
    return metadata, caption


def stored_size(members: Iterable[int]) -> int:
    """Bytes that members of these sizes take in a tar, and their sample in its index."""
    block = tarfile.BLOCKSIZE
    return sum(block + -(-size // block) * block for size in members) + ROW.itemsize


@dataclass(frozen=True)
class Contents:
    """A tar as it was found, whatever its index says."""

    rows: np.ndarray
    keys: list[str]
    suffixes: list[dict[str, str]]  # of each row's members, by their place in the row
    faults: list[str]


@dataclass
class _Sample:
    """What a scan of a tar knows of one key."""

    places: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    suffixes: dict[str, str] = field(default_factory=dict)
    json_caption: str = ""
    txt_caption: str = ""

    @property
    def caption(self) -> str:
        return self.json_caption or self.txt_caption


@dataclass(frozen=True)
class _Member:
    """A member that is of use, and which part of an index row it fills."""

    key: str
    suffix: str
    slot: str
    offset: int
    content: bytes


Refuse = Callable[[DataError], None]


def _raise(error: DataError) -> None:
    raise error


def _rows(samples: dict[str, _Sample]) -> np.ndarray:
    rows = np.zeros(len(samples), ROW)
    for row, (key, sample) in zip(rows, samples.items(), strict=True):
        row["key"], row["caption"] = digest64(key), digest64(sample.caption)
        for slot, place in sample.places.items():
            row[slot] = place
    return rows


def _samples(path: str, kind: str, refuse: Refuse) -> dict[str, _Sample]:
    """The samples of a tar, in the order in which their keys first appear.

    Keys without media and members of other types are passed over; what could harm a reader
    (links, devices, paths that leave the folder, a key twice, a cut end) is refused. If `refuse`
    returns, samples with a fault are left out, and at a cut the last one, which may be partial.
    """
    samples: dict[str, _Sample] = {}
    bad: set[str] = set()
    key = ""
    try:
        for member in _scan(path, kind, refuse):
            key, slot, content = member.key, member.slot, member.content
            sample = samples.setdefault(key, _Sample())
            try:
                if slot in sample.places:
                    raise DataError(f"{path}: holds {slot} of '{key}' twice; write it again.")
                if slot == "json":
                    sample.json_caption = json_caption(parse_metadata(path, key, content))
                elif slot == "txt":
                    sample.txt_caption = txt_caption(content)
            except DataError as error:
                refuse(error)
                bad.add(key)
            sample.places[slot] = (member.offset, len(content), zlib.crc32(content))
            sample.suffixes[slot] = member.suffix
    except DataError as error:
        refuse(error)
        bad.add(key)
    return {key: s for key, s in samples.items() if "media" in s.places and key not in bad}


def _scan(path: str, kind: str, refuse: Refuse) -> Iterator[_Member]:
    """Each member that is of use; DataError where nothing after it can be read."""
    with (
        _tar_errors(path),
        storage.local_file(path).open("rb") as stream,
        tarfile.open(fileobj=stream, mode="r:") as tar,
    ):
        for member in tar:
            try:
                key, slot, suffix = _slot(path, member, kind)
            except DataError as error:
                refuse(error)
                continue
            if slot:
                stream.seek(member.offset_data)
                content = stream.read(member.size)
                if len(content) != member.size:
                    raise DataError(f"{path}: ends inside '{member.name}'; fetch it again.")
                yield _Member(key, suffix, slot, member.offset_data, content)
        stream.seek(tar.offset)
        if stream.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise DataError(
                f"{path}: is damaged or cut at byte {tar.offset}, so samples are lost; "
                "fetch it again."
            )


@contextmanager
def _tar_errors(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise InputMissing(f"{path}: no such file; check the folder.") from None
    except tarfile.TarError as error:
        raise DataError(f"{path}: is no readable tar because {error}; fetch it again.") from None


def _slot(path: str, member: tarfile.TarInfo, kind: str) -> tuple[str, str, str]:
    """(key, what of the index row the member fills, suffix); nothing for what is passed over."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name:
        raise DataError(f"{path}: member '{member.name}' leaves the folder; do not use this tar.")
    if member.isdir():
        return "", "", ""
    if not member.isreg() or member.issparse():
        raise DataError(f"{path}: member '{member.name}' is no plain file; do not use this tar.")
    if member.size > MAX_MEMBER_BYTES:
        raise DataError(
            f"{path}: member '{member.name}' is wrong because its {member.size} bytes are more "
            f"than {MAX_MEMBER_BYTES}; cut it up."
        )
    match = KEY.match(member.name)
    if not match:
        return "", "", ""
    key, suffix = match.group(1), match.group(2).lower()
    if suffix in SUFFIXES[kind]:
        return key, "media", suffix
    return (key, suffix, suffix) if suffix in ("json", "txt") else ("", "", "")
