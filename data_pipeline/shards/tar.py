"""WebDataset shards and their index.

A shard is a plain tar: `KEY.mp4` or `KEY.jpg`, with `KEY.json` and/or `KEY.txt`. Beside it lies
`NAME.idx`, a numpy array with one row per sample that tells where each member's bytes are and what
they must sum to. A tar without its index does not exist: the index is written last.
"""

import io
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import PurePosixPath

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.shards.account import Tally
from data_pipeline.shards.captions import COLUMNS, Captions, captions_of, decode_text
from data_pipeline.shards.scan import Sample, TarFault, parse_metadata, raise_fault, scan_samples
from data_pipeline.store import storage

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
    captions: Captions

    @property
    def caption(self) -> str:
        """The first of them."""
        return self.captions.first


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


def write_index(folder: str, name: str, kind: str, columns: Mapping[str, float] = COLUMNS) -> int:
    """Index a finished tar, and so commit it; the number of samples."""
    rows = index_tar(storage.join(folder, f"{name}.tar"), kind, columns)
    save_index(folder, name, rows)
    return len(rows)


def save_index(folder: str, name: str, rows: np.ndarray) -> None:
    """Write the index of a shard."""
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    storage.write_atomic(storage.join(folder, f"{name}.idx"), buffer.getvalue())


def index_tar(path: str, kind: str, columns: Mapping[str, float] = COLUMNS) -> np.ndarray:
    """The index rows of a tar of `kind` media; DataError at its first fault."""
    return _rows(scan_samples(path, kind, columns, raise_fault, Tally()))


def examine_tar(path: str, kind: str, columns: Mapping[str, float] = COLUMNS) -> "Contents":
    """What a tar holds whole, every fault found on the way, and what was passed over."""
    faults: list[TarFault] = []
    tally = Tally()
    samples = scan_samples(path, kind, columns, faults.append, tally)
    suffixes = [sample.suffixes for sample in samples.values()]
    for fault in faults:
        shard = PurePosixPath(path).name
        tally.add("unusable", fault.reason, [": ".join(filter(None, [shard, fault.name]))])
    return Contents(_rows(samples), list(samples), suffixes, faults, tally)


def list_captions(
    path: str, kind: str, columns: Mapping[str, float] = COLUMNS
) -> list[tuple[str, Captions]]:
    """(key, captions) of a tar's samples, row by row."""
    samples = scan_samples(path, kind, columns, raise_fault, Tally())
    return [(key, sample.captions) for key, sample in samples.items()]


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


def read_record(
    folder: str, name: str, row: np.void, columns: Mapping[str, float] = COLUMNS
) -> Record:
    """One sample of a shard."""
    metadata, captions = read_told(folder, name, row, columns)
    media = read_member(storage.join(folder, f"{name}.tar"), row["media"])
    return Record(media, metadata, captions)


def read_told(
    folder: str, name: str, row: np.void, columns: Mapping[str, float] = COLUMNS
) -> tuple[dict, Captions]:
    """(metadata, captions) of a sample, whose media stay unread."""
    path = storage.join(folder, f"{name}.tar")
    metadata: dict = {}
    if row["json"]["size"]:
        metadata = parse_metadata(path, "the sample", read_member(path, row["json"]))
    captions = captions_of(metadata, columns)
    if not (captions and captions.first) and row["txt"]["size"]:
        captions = Captions((decode_text(read_member(path, row["txt"])),))
    return metadata, captions or Captions()


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
    faults: list[TarFault]
    tally: Tally

    @property
    def is_cut(self) -> bool:
        """Whether something is wrong with the tar itself, so that samples may be lost."""
        return any(not fault.name for fault in self.faults)


def _rows(samples: dict[str, Sample]) -> np.ndarray:
    rows = np.zeros(len(samples), ROW)
    for row, (key, sample) in zip(rows, samples.items(), strict=True):
        row["key"], row["caption"] = digest64(key), digest64(sample.captions.origin)
        for slot, place in sample.places.items():
            row[slot] = place
    return rows
