"""Named tensors in a folder, sliced over ranks as they are in memory; any other slicing reads them.

The files are torch.distributed.checkpoint's. Its index is a pickle: it is read by an unpickler that
knows the dozen types of an index and nothing else, and it may point only at files beside it.
"""

import contextlib
import io
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, dtype
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from data_pipeline.errors import StorageError
from t2v.engine.world import ALONE, World, storage_error

INDEX = ".metadata"
METADATA = "torch.distributed.checkpoint.metadata"
INDEX_TYPES = {
    *((METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((METADATA, name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata")),
    *((METADATA, name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")


@dataclass(frozen=True)
class TensorKind:
    """What a named tensor must be to take another's values."""

    shape: tuple[int, ...]
    dtype: dtype

    def __str__(self) -> str:
        sizes = "x".join(str(size) for size in self.shape) or "scalar"
        return f"{sizes} {str(self.dtype).removeprefix('torch.')}"


def write_tensors(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Write every rank's slices and, by rank 0, their index; all ranks raise where one fails."""
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
    with _one_error(folder):
        dcp.save(tensors, storage_writer=writer, **_ranks(world))


def read_tensors(folder: Path, tensors: dict[str, Tensor], world: World = ALONE) -> None:
    """Fill the given tensors, whole or slices, in place; names and kinds must be known to agree."""
    with _one_error(folder):
        dcp.load(tensors, storage_reader=_SafeReader(folder), **_ranks(world))


def tensor_kinds(folder: Path) -> dict[str, TensorKind]:
    """Name -> shape and dtype of every tensor in a folder."""
    entries = read_index(folder).state_dict_metadata.items()
    return {
        name: TensorKind(tuple(entry.size), entry.properties.dtype)
        for name, entry in entries
        if isinstance(entry, TensorStorageMetadata)
    }


def read_index(folder: Path) -> Metadata:
    """The folder's index; whatever is not plainly one is refused."""
    path = folder / INDEX
    try:
        index = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
    except OSError as failure:
        raise storage_error(failure) from None
    except StorageError:
        raise
    except Exception as failure:
        raise StorageError(
            f"{path}: is no index of tensors because reading it ends in {failure!r}; "
            "use another checkpoint."
        ) from None
    if not isinstance(index, Metadata):
        raise StorageError(f"{path}: is no index of tensors; use another checkpoint.")
    for entry in index.state_dict_metadata.values():
        if not isinstance(entry, TensorStorageMetadata):
            raise StorageError(f"{path}: holds something else than tensors; do not trust it.")
    for place in index.storage_data.values():
        name = PurePosixPath(place.relative_path)
        if name.name != str(place.relative_path) or place.transform_descriptors:
            raise StorageError(
                f"{path}: points at {str(name)!r} outside its folder; do not trust it."
            )
    return index


class _IndexUnpickler(pickle.Unpickler):
    """Builds the types of an index; any other name is refused before it is even imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in INDEX_TYPES or (module == "torch" and name in DTYPES):
            return super().find_class(module, name)
        raise StorageError(
            f"{INDEX}: asks for {module}.{name}, which no index of tensors needs; do not trust it."
        )


class _SafeReader(filesystem.FileSystemReader):
    """torch's reader, without its free unpickling of the index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        index = read_index(Path(self.path))
        index.storage_meta = StorageMeta(load_id=self.load_id)
        return index


def _ranks(world: World) -> dict[str, Any]:
    return {"no_dist": True} if world.world_size == 1 else {"process_group": world.storage}


@contextlib.contextmanager
def _one_error(folder: Path) -> Iterator[None]:
    """Turns a failure on some ranks into the root cause on the first of them."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as failure:
        rank, (cause, _) = min(failure.failures.items())
        if isinstance(cause, StorageError):
            raise cause from None
        if isinstance(cause, OSError):
            raise storage_error(cause) from None
        raise StorageError(
            f"{folder}: failed on rank {rank} because {cause!r}; check disk and folder."
        ) from None
