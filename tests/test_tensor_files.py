"""What any split of ranks wrote, any other split reads."""

from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import StorageError
from t2v.checkpoint.tensor_files import (
    INDEX,
    Slice,
    join_index,
    read_index,
    read_slices,
    read_whole,
    tensor_kinds,
    write_slices,
)
from t2v.engine.place import Place

SHAPES = {"matrix": (5, 7), "vector": (11,), "scalar": (), "volume": (2, 3, 4)}


def values(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()
    }


def cut(tensors: dict[str, torch.Tensor], ranks: int, seed: int) -> list[dict[str, Slice]]:
    """Every tensor cut at random places; some ranks get nothing of some."""
    rng = np.random.default_rng(seed)
    parts: list[dict[str, Slice]] = [{} for _ in range(ranks)]
    for name, tensor in tensors.items():
        flat, shape = tensor.flatten(), tuple(tensor.shape)
        inner = rng.integers(0, len(flat) + 1, ranks - 1)
        cuts = [0, *sorted(inner.tolist()), len(flat)]
        for rank in range(ranks):
            low, high = cuts[rank], cuts[rank + 1]
            parts[rank][name] = Slice(flat[low:high].clone(), Place(shape, low))
    return parts


def write(folder: Path, parts: list[dict[str, Slice]]) -> None:
    written = [write_slices(folder, slices, rank) for rank, slices in enumerate(parts)]
    index = join_index([file.entries for file in written])
    (folder / INDEX).write_text(index.model_dump_json())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("writers", "readers"), [(1, 3), (3, 1), (4, 3), (2, 5)])
def test_any_split_reads_what_any_other_wrote(tmp_path, writers, readers, dtype):
    tensors = values(dtype)
    write(tmp_path, cut(tensors, writers, seed=writers))
    for name, tensor in tensors.items():
        assert torch.equal(read_whole(tmp_path, name), tensor), name
    for wanted in cut(tensors, readers, seed=10 + readers):
        blank = {n: Slice(torch.zeros_like(s.part), s.place) for n, s in wanted.items()}
        read_slices(tmp_path, blank)
        for name, piece in wanted.items():
            assert torch.equal(blank[name].part, piece.part), name


def test_replicas_that_are_not_kept_are_not_written(tmp_path):
    tensors = values()
    first = cut(tensors, 1, seed=0)[0]
    replica = {n: Slice(s.part + 1, Place(s.place.shape, 0, kept=False)) for n, s in first.items()}
    write(tmp_path, [first, replica])
    for name, tensor in tensors.items():
        assert torch.equal(read_whole(tmp_path, name), tensor), name


def test_index_tells_shapes_and_covers_every_element(tmp_path):
    write(tmp_path, cut(values(), 3, seed=1))
    index = read_index(tmp_path)
    assert {name: kind.shape for name, kind in tensor_kinds(tmp_path).items()} == SHAPES
    for name, entry in index.tensors.items():
        assert sum(piece.count for piece in entry.pieces) == prod(SHAPES[name])


def test_missing_part_of_a_tensor_is_found(tmp_path):
    parts = cut(values(), 3, seed=1)
    write(tmp_path, parts[:2])
    with pytest.raises(StorageError, match="do not make it up"):
        read_index(tmp_path)


def test_index_that_was_written_again_is_read_again(tmp_path):
    for ranks in (1, 3):
        write(tmp_path, cut(values(), ranks, seed=1))
        assert len(read_index(tmp_path).tensors["matrix"].pieces) == ranks


def test_file_that_ends_too_early_is_named(tmp_path):
    write(tmp_path, cut(values(), 1, seed=1))
    path = tmp_path / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StorageError, match=r"rank-00000\.safetensors: ends too early"):
        read_whole(tmp_path, "volume")
