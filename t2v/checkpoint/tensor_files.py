"""Named tensors as flat slices: every rank writes what it holds, any rank reads what it needs.

A rank's file is plain safetensors; each tensor in it is a range of a flattened parameter. An index
tells the shape of every name and which file holds which range, so any split over any engine reads
what any other wrote. Nothing is pickled.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from data_pipeline.errors import StorageError
from data_pipeline.strict import Strict
from t2v.engine.faults import fault
from t2v.engine.place import Place
from t2v.engine.world import storage_error

INDEX = "tensors.json"
SAFETENSORS_TYPES = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class Slice:
    """A part of a named tensor and its place in it."""

    part: Tensor
    place: Place

    @property
    def kind(self) -> "TensorKind":
        return TensorKind(self.place.shape, self.part.dtype)


@dataclass(frozen=True)
class TensorKind:
    """What a named tensor must be to take another's values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        sizes = "x".join(str(size) for size in self.shape) or "scalar"
        return f"{sizes} {type_name(self.dtype)}"


class Piece(Strict):
    """A range of a flattened tensor in a rank's file."""

    rank: int
    offset: int
    count: int
    start_byte: int


class Entry(Strict):
    """One tensor; its pieces lie end to end."""

    shape: list[int]
    dtype: str
    pieces: list[Piece]


class TensorIndex(Strict):
    """Where every tensor of a folder is."""

    tensors: dict[str, Entry]


@dataclass(frozen=True)
class WrittenFile:
    """A rank's file as it was handed to the disk, and what lies in it."""

    name: str
    size_bytes: int
    sha256: str
    entries: dict[str, Entry]


def whole(tensor: Tensor) -> Slice:
    """A tensor that is all there."""
    return Slice(tensor, Place(tuple(tensor.shape), 0))


def type_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def file_of(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def write_slices(folder: Path, slices: dict[str, Slice], rank: int) -> WrittenFile:
    """Write this rank's parts, durably; the digest is of the bytes on their way to the disk."""
    kept = {n: s for n, s in slices.items() if s.place.kept and s.part.numel()}
    flat = {name: TensorKind((s.part.numel(),), s.part.dtype) for name, s in kept.items()}
    header, starts = safetensors_header(flat)
    hasher, size_bytes = hashlib.sha256(), 0
    path = folder / file_of(rank)
    try:
        with path.open("wb") as file:
            for content in (header, *(bytes_of(piece.part) for piece in kept.values())):
                hasher.update(content)
                size_bytes += file.write(content)
            fault("checkpoint.write")
            file.flush()
            os.fsync(file.fileno())
    except OSError as failure:
        failure.filename = str(path)  # which neither a write nor a sync tells
        raise
    entries = {
        name: Entry(
            shape=list(piece.place.shape),
            dtype=type_name(piece.part.dtype),
            pieces=[
                Piece(
                    rank=rank,
                    offset=piece.place.offset,
                    count=piece.part.numel(),
                    start_byte=starts[name],
                )
            ],
        )
        for name, piece in kept.items()
    }
    return WrittenFile(file_of(rank), size_bytes, hasher.hexdigest(), entries)


def join_index(parts: list[dict[str, Entry]]) -> TensorIndex:
    """One index of what all ranks wrote."""
    tensors: dict[str, Entry] = {}
    for entries in parts:
        for name, entry in entries.items():
            if name in tensors:
                tensors[name].pieces.extend(entry.pieces)
            else:
                tensors[name] = entry.model_copy(update={"pieces": list(entry.pieces)})
    for entry in tensors.values():
        entry.pieces.sort(key=lambda piece: piece.offset)
    return TensorIndex(tensors=dict(sorted(tensors.items())))


def read_index(folder: Path) -> TensorIndex:
    """The folder's index; StorageError where its pieces do not make up every tensor exactly."""
    path = folder / INDEX
    try:
        found = path.stat()
        return _parse_index(path.absolute(), found.st_ino, found.st_mtime_ns, found.st_size)
    except OSError as failure:
        raise storage_error(failure) from None


# Of many ranks it is large, and asked for once per tensor; a diff reads two in turn.
@functools.lru_cache(maxsize=2)
def _parse_index(path: Path, *version: int) -> TensorIndex:
    try:
        index = TensorIndex.model_validate_json(path.read_bytes())
    except (ValidationError, ValueError):
        raise StorageError(
            f"{path}: is wrong because it is damaged or of another format; use another checkpoint."
        ) from None
    for name, entry in index.tensors.items():
        *starts, length = accumulate((piece.count for piece in entry.pieces), initial=0)
        in_line = [piece.offset for piece in entry.pieces] == starts
        if not in_line or length != prod(entry.shape) or entry.dtype not in SAFETENSORS_TYPES:
            raise StorageError(
                f"{path}: is wrong because the pieces of {name} do not make it up; use another "
                "checkpoint."
            )
    return index


def tensor_kinds(folder: Path) -> dict[str, TensorKind]:
    """Name -> shape and dtype of every tensor in a folder."""
    return {name: kind_of(entry) for name, entry in read_index(folder).tensors.items()}


def kind_of(entry: Entry) -> TensorKind:
    """Shape and dtype of an indexed tensor."""
    return TensorKind(tuple(entry.shape), getattr(torch, entry.dtype))


def read_slices(folder: Path, slices: dict[str, Slice], index: TensorIndex | None = None) -> None:
    """Fill the given parts in place; names and kinds must be known to agree."""
    index = index or read_index(folder)
    with contextlib.ExitStack() as exits:
        files: dict[int, FileIO] = {}
        for name, wanted in slices.items():
            entry = index.tensors[name]
            assert kind_of(entry) == wanted.kind, name
            for piece, low, high in _overlaps(entry, wanted):
                if piece.rank not in files:
                    try:
                        opened = FileIO(folder / file_of(piece.rank))
                    except OSError as failure:
                        raise storage_error(failure) from None
                    files[piece.rank] = exits.enter_context(opened)
                start = piece.start_byte + (low - piece.offset) * wanted.part.itemsize
                target = wanted.part.reshape(-1)[low - wanted.place.offset :][: high - low]
                _read_into(files[piece.rank], start, target)


def read_whole(folder: Path, name: str, index: TensorIndex | None = None) -> Tensor:
    """One tensor, all of it, on the CPU; whoever reads many folders in turn keeps each `index`."""
    index = index or read_index(folder)
    kind = kind_of(index.tensors[name])
    tensor = torch.empty(kind.shape, dtype=kind.dtype)
    read_slices(folder, {name: whole(tensor)}, index)
    return tensor


def safetensors_header(
    kinds: dict[str, TensorKind], **metadata: dict[str, str]
) -> tuple[bytes, dict[str, int]]:
    """safetensors' header of tensors in order, and the byte at which each begins."""
    sizes = [prod(kind.shape) * kind.dtype.itemsize for kind in kinds.values()]
    places = list(pairwise(accumulate(sizes, initial=0)))
    entries = {
        name: {
            "dtype": SAFETENSORS_TYPES[type_name(kind.dtype)],
            "shape": kind.shape,
            "data_offsets": place,
        }
        for (name, kind), place in zip(kinds.items(), places, strict=True)
    }
    text = json.dumps(metadata | entries).encode()
    text += b" " * (-len(text) % 8)
    length = len(text).to_bytes(8, "little")
    starts = {name: 8 + len(text) + low for name, (low, _) in zip(kinds, places, strict=True)}
    return length + text, starts


def bytes_of(part: Tensor) -> memoryview:
    """The bytes of a part; one on the CPU is not copied."""
    return part.detach().cpu().reshape(-1).view(torch.uint8).numpy().data


def _overlaps(entry: Entry, wanted: Slice) -> Iterator[tuple[Piece, int, int]]:
    """Pieces that hold elements of a part, with the range [low, high) that they share."""
    first, last = wanted.place.offset, wanted.place.offset + wanted.part.numel()
    for piece in entry.pieces:
        low, high = max(first, piece.offset), min(last, piece.offset + piece.count)
        if low < high:
            yield piece, low, high


def _read_into(file: FileIO, start: int, target: Tensor) -> None:
    buffer = target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
    view = bytes_of(buffer)
    done = 0
    file.seek(start)
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise StorageError(f"{file.name!s}: ends too early; use another checkpoint.")
        done += count
    if buffer is not target:
        target.copy_(buffer)
