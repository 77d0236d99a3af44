"""The cache on disk: the same bytes, within its quota, whatever happens to its files."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import ConfigError, StorageError
from data_pipeline.store.cache import BLOCK_BYTES, Cache, open_cache
from data_pipeline.store.s3 import Version

CONTENT = np.random.default_rng(0).bytes(5 * BLOCK_BYTES + 1234)


class Shelf:
    """A store in memory that writes down what it was asked for."""

    def __init__(self, log: Path, content: bytes = CONTENT):
        self.log, self.content = log, content

    def version(self, path: str) -> Version:
        return Version(f'"{hash(self.content)}"', len(self.content))

    def read(
        self, path: str, version: Version, offset: int = 0, length: int | None = None
    ) -> bytes:
        with self.log.open("a") as file:
            file.write(f"{path} {offset}\n")
        return self.content[offset : None if length is None else offset + length]

    def download(self, path: str, version: Version, file) -> None:
        file.write(self.read(path, version))

    @property
    def requests(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


def cache(tmp_path: Path, *, quota: int = 10**9) -> Cache:
    return Cache(Shelf(tmp_path / "log"), tmp_path / "cache", quota)


def test_a_read_is_a_slice_of_the_object_and_each_block_is_fetched_once(tmp_path):
    first = cache(tmp_path)
    spans = [(0, 10), (BLOCK_BYTES - 5, 10), (0, len(CONTENT)), (len(CONTENT) - 3, 99), (10**9, 4)]
    for offset, length in spans * 2:
        assert first.read("s3://b/k", offset, length) == CONTENT[offset : offset + length]
    assert cache(tmp_path).read("s3://b/k", 7, 7) == CONTENT[7:14]
    assert first.store.requests == 6


def test_a_damaged_block_is_fetched_again(tmp_path):
    first = cache(tmp_path)
    first.read("s3://b/k", 0, 10)
    (block,) = (tmp_path / "cache").glob("??/*")
    whole = block.read_bytes()
    for damaged in (b"", whole[:1000], b"\x00" + whole[1:]):
        block.write_bytes(damaged)
        assert first.read("s3://b/k", 0, 10) == CONTENT[:10]
        assert block.read_bytes() == whole
    assert first.store.requests == 4


def test_the_quota_holds_and_the_least_recently_used_goes(tmp_path):
    small = cache(tmp_path, quota=20 * BLOCK_BYTES)
    for number in range(100):
        small.read(f"s3://b/{number}", 0, 10)
        small.read("s3://b/0", 0, 10)  # stays in use
    size = sum(path.stat().st_size for path in (tmp_path / "cache").glob("??/*"))
    assert size < (20 + 17) * BLOCK_BYTES
    assert small.store.requests == 100


def _read_all(folder: Path) -> bool:
    own = cache(folder)
    return all(own.read("s3://b/k", at, 9) == CONTENT[at : at + 9] for at in range(0, 9**7, 9**5))


@pytest.mark.dist
def test_processes_share_blocks_and_fetch_each_once(tmp_path):
    with multiprocessing.get_context("forkserver").Pool(4) as pool:
        assert all(pool.map(_read_all, [tmp_path] * 4))
    assert Shelf(tmp_path / "log").requests == len(range(0, 9**7, BLOCK_BYTES))


def test_a_whole_file_is_fetched_once_per_version(tmp_path):
    own = cache(tmp_path)
    assert own.file("s3://b/k").read_bytes() == own.file("s3://b/k").read_bytes() == CONTENT
    assert own.store.requests == 1
    own.store.content = CONTENT[::-1]
    assert own.file("s3://b/k").read_bytes() == CONTENT[::-1]


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot be a cache because .*; set T2V_CACHE"):
        cache(tmp_path).read("s3://b/k", 0, 1)
    for wrong in ("much", "0", "-1", "nan"):
        monkeypatch.setenv("T2V_CACHE_GIB", wrong)
        with pytest.raises(ConfigError, match=r"T2V_CACHE_GIB: .* is no size"):
            open_cache(Shelf(tmp_path))
