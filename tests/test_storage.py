"""Reads by range; writes that are whole or not there."""

import pytest

from data_pipeline.errors import ConfigError, InputMissing, StorageError
from data_pipeline.store import storage


def test_read_range_is_a_slice_of_the_whole(tmp_path):
    content = bytes(range(200))
    path = str(tmp_path / "file")
    storage.write_atomic(path, content)
    for offset, length in ((0, 200), (0, 1), (37, 60), (150, 100), (200, 5)):
        assert storage.read_range(path, offset, length) == content[offset : offset + length]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    storage.write_atomic(path, b"old")

    def write_and_fail() -> None:
        with storage.open_atomic(str(path)) as file:
            file.write(b"half of the ne")
            file.flush()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_writer_whose_half_was_taken_away_by_another_says_so(tmp_path):
    path = str(tmp_path / "file")

    def write_beside_another() -> None:
        with storage.open_atomic(path) as file:
            file.write(b"half")
            storage.remove_partial(str(tmp_path))

    with pytest.raises(StorageError, match="another process in its folder"):
        write_beside_another()


def test_an_unfinished_write_is_not_listed_and_can_be_removed(tmp_path):
    storage.write_atomic(tmp_path / "a.tar", b"")
    with storage.open_atomic(str(tmp_path / "b.tar")) as file:
        file.write(b"x")
        assert storage.list_files(str(tmp_path)) == ["a.tar"]
    assert storage.list_files(str(tmp_path), ".tar") == ["a.tar", "b.tar"]
    (tmp_path / f".c.tar.{'0123' * 8}.part").write_bytes(b"left by a killed writer")
    storage.remove_partial(str(tmp_path))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tar", "b.tar"]


def test_errors_name_the_path_and_their_kind(tmp_path):
    with pytest.raises(InputMissing, match="nowhere: no such file"):
        storage.read_bytes(str(tmp_path / "nowhere"))
    with pytest.raises(StorageError, match="Is a directory"):
        storage.read_bytes(str(tmp_path))
    with pytest.raises(ConfigError, match="ftp:// is not served"):
        storage.read_bytes("ftp://host/file")
