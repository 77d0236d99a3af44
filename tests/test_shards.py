"""Shards: plain WebDataset tars whose index proves every byte."""

import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_pipeline.errors import DataError, InputMissing
from data_pipeline.shards.captions import Captions
from data_pipeline.shards.tar import (
    index_tar,
    list_captions,
    open_index,
    read_record,
    write_index,
    write_tar,
)
from data_pipeline.store import storage


def sample(number: int) -> tuple[str, dict[str, bytes]]:
    content = np.random.default_rng(number).bytes(700 + 100 * number)
    metadata = {"caption": f"caption {number}", "fps": 8.0}
    return f"{number:06d}", {"mp4": content, "json": json.dumps(metadata).encode()}


@pytest.fixture
def shard(tmp_path) -> Path:
    write_tar(str(tmp_path / "000000.tar"), [sample(number) for number in range(5)])
    write_index(str(tmp_path), "000000", "video")
    return tmp_path / "000000.tar"


def write_members(path: Path, members: list[tuple[tarfile.TarInfo | str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it closes late
def test_plain_webdataset_reads_our_shards(shard):
    reader = webdataset.WebDataset(str(shard), shardshuffle=False)
    read = [(entry["__key__"], entry["mp4"], json.loads(entry["json"])) for entry in reader]
    expected = [(key, m["mp4"], json.loads(m["json"])) for key, m in map(sample, range(5))]
    assert read == expected


def test_a_record_is_what_was_written(shard):
    rows = open_index(str(shard.parent), "000000")
    for number in (4, 0, 2):
        record = read_record(str(shard.parent), "000000", rows[number])
        assert record.media == sample(number)[1]["mp4"]
        assert record.caption == f"caption {number}"
        assert record.metadata["fps"] == 8.0


def test_the_index_gives_offset_size_and_crc_of_every_member(shard):
    content = shard.read_bytes()
    rows = index_tar(str(shard), "video")
    for number, row in enumerate(rows):
        for slot, suffix in (("media", "mp4"), ("json", "json")):
            expected = sample(number)[1][suffix]
            start, size = int(row[slot]["offset"]), int(row[slot]["size"])
            assert content[start : start + size] == expected
            assert row[slot]["crc32"] == zlib.crc32(expected)
        assert row["txt"]["size"] == 0


def test_equal_samples_give_equal_bytes(shard, tmp_path):
    write_tar(str(tmp_path / "again.tar"), [sample(number) for number in range(5)])
    write_index(str(tmp_path), "again", "video")
    for suffix in ("tar", "idx"):
        again = (tmp_path / f"again.{suffix}").read_bytes()
        assert again == shard.with_suffix(f".{suffix}").read_bytes()


def test_a_tar_without_index_is_no_shard(shard):
    shard.with_suffix(".idx").unlink()
    with pytest.raises(DataError, match=r"000000\.idx: is missing"):
        open_index(str(shard.parent), "000000")


def test_every_flipped_byte_of_a_member_is_found(shard):
    whole = shard.read_bytes()
    rows = open_index(str(shard.parent), "000000")
    for number, slot in ((0, "media"), (3, "json"), (4, "media")):
        at = int(rows[number][slot]["offset"]) + 3
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError, match=r"crc32|damaged"):
            read_record(str(shard.parent), "000000", rows[number])


def cuts(shard: Path) -> dict[str, int]:
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    return {
        "to nothing": 0,
        "inside the first header": 100,
        "inside a member": members[4].offset_data + 10,
        "inside a header": members[4].offset + 100,
        "between two members of a sample": members[5].offset,
        "between two samples": members[6].offset,
    }


def test_a_cut_tar_is_refused_wherever_it_is_cut(shard):
    whole, places = shard.read_bytes(), cuts(shard)
    for length in places.values():
        shard.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"000000\.tar: "):
            index_tar(str(shard), "video")


def test_a_damaged_header_is_refused_though_tar_readers_just_stop_there(shard):
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        content[tar.getmembers()[4].offset + 150] ^= 0xFF  # within the checksum
    shard.write_bytes(content)
    with tarfile.open(shard) as tar:
        assert len(tar.getmembers()) == 4
    with pytest.raises(DataError, match="is damaged or cut at byte"):
        index_tar(str(shard), "video")


def test_a_page_instead_of_a_tar_is_refused(tmp_path):
    path = tmp_path / "0.tar"
    path.write_text("<Error><Code>AccessDenied</Code></Error>" * 40)
    with pytest.raises(DataError, match="is no readable tar"):
        index_tar(str(path), "video")
    with pytest.raises(InputMissing, match=r"1\.tar: no such file"):
        index_tar(str(tmp_path / "1.tar"), "video")


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ("../evil.mp4", "leaves the folder"),
        ("a/../../evil.mp4", "leaves the folder"),
        ("/tmp/evil.mp4", "leaves the folder"),
        ("a\\evil.mp4", "leaves the folder"),
        (special("0.mp4", tarfile.SYMTYPE, "/etc/passwd"), "is no plain file"),
        (special("0.mp4", tarfile.LNKTYPE, "1.mp4"), "is no plain file"),
        (special("0.mp4", tarfile.CHRTYPE), "is no plain file"),
        (special("0.mp4", tarfile.FIFOTYPE), "is no plain file"),
        ("1.mp4", "twice"),
    ],
)
def test_members_that_could_harm_a_reader_are_refused(tmp_path, member, reason):
    path = write_members(tmp_path / "0.tar", [("1.mp4", b"x"), (member, b"")])
    with pytest.raises(DataError, match=reason):
        index_tar(str(path), "video")


def test_other_members_are_passed_over(tmp_path):
    members = [
        ("part/0.jpg", b"no video"),
        ("part/0.txt", b"a caption without its video"),
        ("part/1.pyd", b"never opened"),
        ("part/1.mp4", b"video one"),
        ("part/1.txt", b" one \n"),
        (special("part", tarfile.DIRTYPE), b""),
        ("README", b"no key"),
        ("part/2.WEBM", b"video two"),
        ("part/2.txt", b"two"),
        ("part/2.json", b'{"caption": "the json goes before the text"}'),
        ("part/3.en.txt", b"of another suffix"),
    ]
    path = str(write_members(tmp_path / "0.tar", members))
    listed = [(key, captions.first) for key, captions in list_captions(path, "video")]
    assert listed == [("part/1", "one"), ("part/2", "the json goes before the text")]
    write_index(str(tmp_path), "0", "video")
    rows = open_index(str(tmp_path), "0")
    records = [read_record(str(tmp_path), "0", row) for row in rows]
    assert [record.media for record in records] == [b"video one", b"video two"]
    assert [record.caption for record in records] == [caption for _, caption in listed]


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x93NUMPY\x01\x00"])
def test_a_damaged_index_is_told(shard, content):
    shard.with_suffix(".idx").write_bytes(content)
    with pytest.raises(DataError, match=r"000000\.idx: is damaged"):
        open_index(str(shard.parent), "000000")


def test_an_index_of_objects_is_never_unpickled(shard):
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    storage.write_atomic(shard.with_suffix(".idx"), buffer.getvalue())
    with pytest.raises(DataError, match="is damaged because"):
        open_index(str(shard.parent), "000000")


def test_an_index_of_another_layout_is_told(shard):
    np.save(shard.with_suffix(".npy"), np.zeros(3))
    shard.with_suffix(".npy").replace(shard.with_suffix(".idx"))
    with pytest.raises(DataError, match="is of another format"):
        open_index(str(shard.parent), "000000")


def test_long_and_foreign_names_survive(tmp_path):
    key = "ключ-" + "x" * 180
    write_tar(str(tmp_path / "0.tar"), [(key, {"mp4": b"1", "txt": "één".encode()})])
    assert list_captions(str(tmp_path / "0.tar"), "video") == [(key, Captions(("één",)))]
