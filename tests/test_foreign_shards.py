"""Shards of others as they really are: every member is a sample's, or counted by reason."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from numbered import numbered_clip, numbered_video
from odd_media import write_video
from strangers import tree

from data_pipeline.errors import DataError, InputMissing
from data_pipeline.making.indexing import index
from data_pipeline.making.verify import mend_shards, repair, verify
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.warnings import caption_warnings
from t2v.cli import main

VIDEO = numbered_video(4)
GIF = write_video(list(numbered_clip(4)), "gif", "gif", pixels="rgb8", rate=25)


def pack(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def captions(dataset: Dataset) -> list[tuple[str, ...]]:
    return [
        dataset.read_told(shard, row)[1].texts
        for shard, samples in enumerate(dataset.shard_sizes.tolist())
        for row in range(samples)
    ]


def shard(first: int, count: int = 3) -> dict[str, bytes]:
    keys = [f"{first + number:02d}" for number in range(count)]
    return {f"{k}.{s}": VIDEO if s == "mp4" else k.encode() for k in keys for s in ("mp4", "txt")}


def test_keys_with_dots_are_samples_unless_a_plain_key_has_media(tmp_path):
    pack(tmp_path / "0.tar", {
        "clip.v1.mp4": VIDEO, "clip.v1.txt": b"v1", "clip.v2.mp4": VIDEO, "clip.v2.json": b"{}",
        "plain.mp4": VIDEO, "plain.txt": b"plain", "plain.depth.mp4": VIDEO,
    })  # fmt: skip
    dataset = index(tmp_path)
    assert captions(dataset) == [("v1",), ("",), ("plain",)]
    told = dataset.info.account
    assert told.passed_over == {"media of a dotted key beside the plain one": 1}
    assert told.examples == {"media of a dotted key beside the plain one": ["plain.depth"]}
    assert not verify(tmp_path)


@pytest.mark.parametrize("dots", [("clip.v1", "clip.v2"), ("a.b.c", "d")])
def test_dotted_keys_survive_embedding_like_any(tmp_path, dots, datasets):
    from data_pipeline.text.embed import embed

    pack(tmp_path / "0.tar", {f"{key}.{s}": VIDEO if s == "mp4" else b"a red circle" for key in dots
                              for s in ("mp4", "txt")})  # fmt: skip
    index(tmp_path)
    assert embed(tmp_path, datasets / "encoder", name="tiny", max_tokens=16) is not None
    assert not verify(tmp_path)


def test_captions_are_text_or_lists_of_text_and_others_are_refused_by_row(tmp_path):
    values = ['["a dog", "a cat"]', '{"short": "x"}', "NaN", "5", "null", '""', "true", '[1, "b"]',
              '"\\ud83d"', '["", "only"]']  # fmt: skip
    members = {}
    for number, value in enumerate(values):
        members |= {f"{number}.mp4": VIDEO, f"{number}.json": f'{{"caption": {value}}}'.encode()}
    pack(tmp_path / "0.tar", members)
    with pytest.raises(DataError, match="6 of 10 samples cannot be used: 6 x caption is no text"):
        index(tmp_path)
    dataset = index(tmp_path, skip_bad=True)
    assert captions(dataset) == [("a dog", "a cat"), ("",), ("",), ("only",)]
    assert dataset.info.account.unusable == {"caption is no text": 6}
    assert dataset.info.account.examples["caption is no text"][0] == "0.tar: 1"
    assert not verify(tmp_path)
    assert caption_warnings(dataset) == [f"{tmp_path}: 2 captions are empty."]


def test_captions_under_other_names_are_found_by_option_or_told(tmp_path):
    pack(tmp_path / "0.tar", {
        "a.mp4": VIDEO, "a.json": b'{"text": "a dog runs"}',
        "b.mp4": VIDEO, "b.json": b'{"prompt": "a cat", "llava_caption": "long"}',
    })  # fmt: skip
    (warning,) = caption_warnings(index(tmp_path))
    assert "all captions are empty: none is in caption" in warning
    dataset = index(tmp_path, captions={"text": 1.0, "prompt": 1.0, "llava_caption": 3.0})
    assert captions(dataset) == [("a dog runs",), ("a cat", "long")]
    assert dataset.read_told(0, 1)[1].weights == (0.25, 0.75)
    assert not caption_warnings(dataset)
    assert not verify(tmp_path)
    assert repair(tmp_path, []).info.captions == dataset.info.captions
    (warning,) = caption_warnings(index(tmp_path, captions={"fps": 1.0, "text": 1.0}))
    assert "1 captions are empty" in warning


def test_captions_that_are_all_alike_are_told(tmp_path):
    pack(tmp_path / "0.tar", {f"{n}.{s}": VIDEO if s == "mp4" else b"one" for n in range(3)
                              for s in ("mp4", "txt")})  # fmt: skip
    assert caption_warnings(index(tmp_path)) == [f"{tmp_path}: all 3 captions are alike."]


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        ("é".encode(), "é"), ("é".encode("utf-8-sig"), "é"), ("é".encode("utf-16"), "é"),
        ("é".encode("utf-32"), "é"), ("é".encode("latin-1"), None),
        ("ab".encode("utf-16-le"), None), (b" x \r\n", "x"),
    ],
)  # fmt: skip
def test_texts_are_read_in_their_encoding_or_refused(tmp_path, content, caption):
    pack(tmp_path / "0.tar", {"a.mp4": VIDEO, "a.txt": content, "b.mp4": VIDEO, "b.txt": b"b"})
    dataset = index(tmp_path, skip_bad=True)
    assert captions(dataset) == ([(caption,)] if caption else []) + [("b",)]
    assert dataset.info.account.unusable == ({} if caption else {"is no UTF-8 text": 1})


def test_media_of_every_type_are_used_or_counted(tmp_path):
    pack(tmp_path / "0.tar", {
        "a.m4v": VIDEO, "a.txt": b"a", "b.mp4": VIDEO, "b.txt": b"b", "c.flv": VIDEO,
        "d.gif": GIF, "d.txt": b"d", "e.gif": GIF, "e.mp4": VIDEO, "e.webm": VIDEO, "f.json": b"{}",
        "._g.mp4": b"", "h": b"",
        "i.pickle": b"",
    })  # fmt: skip
    dataset = index(tmp_path)
    assert captions(dataset) == [("a",), ("b",), ("",), ("d",), ("",)]
    assert dataset.info.account.passed_over == {
        "member of type .pickle": 1, "second media of a key": 2,
        "text without media": 1, "hidden file": 1, "member without a type": 1,
    }  # fmt: skip
    assert [dataset.read(0, row).media for row in (3, 4)] == [GIF, VIDEO]  # no preview of a film
    assert not verify(tmp_path)


def test_a_folder_is_accounted_for(tmp_path):
    pack(tmp_path / "0.tar", shard(0))
    (tmp_path / "1.tar.gz").write_bytes(gzip.compress(b"x"))
    (tmp_path / "0_stats.json").write_text("{}")
    (tmp_path / "more").mkdir()
    assert index(tmp_path).info.account.passed_over == {
        "compressed shard, not read (unpack it)": 1, "file of type .json": 1,
        "folder, not entered": 1,
    }  # fmt: skip
    (tmp_path / "0.tar").unlink()
    (tmp_path / "0.idx").unlink()
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(InputMissing, match=r"holds no .tar, only compressed ones such as 1.tar.gz"):
        index(tmp_path)


def test_archives_behind_each_other_are_read_to_the_end(tmp_path):
    parts = [
        pack(tmp_path / name, shard(first)).read_bytes() for name, first in (("a", 0), ("b", 10))
    ]
    (tmp_path / "a").unlink()
    (tmp_path / "b").unlink()
    (tmp_path / "0.tar").write_bytes(b"".join(parts))
    assert len(captions(index(tmp_path))) == 6
    assert not verify(tmp_path)
    (tmp_path / "0.tar").write_bytes(parts[0] + b"no tar" * 1000)
    with pytest.raises(DataError, match=r"is no readable tar \(0.tar\)|damaged or cut"):
        index(tmp_path)


@pytest.mark.parametrize("spoil", ["cut", "page", "gzip"])
def test_a_bad_shard_is_named_and_does_not_stop_the_others(tmp_path, spoil):
    for number in range(3):
        pack(tmp_path / f"{number}.tar", shard(number * 10))
    bad = tmp_path / "1.tar"
    whole = bad.read_bytes()
    bad.write_bytes({"cut": whole[: len(whole) // 2], "page": b"<html>" * 300,
                     "gzip": gzip.compress(whole, mtime=0)}[spoil])  # fmt: skip
    with pytest.raises(DataError, match=r"cannot be used: .*1\.tar.*--skip-bad"):
        index(tmp_path)
    assert not (tmp_path / "dataset.json").exists()
    dataset = index(tmp_path, skip_bad=True)
    assert [info.name for info in dataset.info.shards] == ["0", "2"]
    assert ["1.tar"] in dataset.info.account.examples.values()
    (fault,) = verify(tmp_path)
    assert fault.path.endswith("1.tar")
    assert len(captions(repair(tmp_path, [fault]))) == (8 if spoil == "cut" else 6)
    assert (tmp_path / "1.tar.damaged").exists() == (spoil == "cut")
    assert len(verify(tmp_path)) == (spoil != "cut")


def test_shards_that_cannot_be_indexed_are_mended_in_one_go(tmp_path):
    folder = tmp_path / "set"
    pack(folder / "0.tar", shard(0))
    cut = pack(folder / "1.tar", shard(10))
    content = cut.read_bytes()[: len(cut.read_bytes()) // 2]
    cut.write_bytes(content)
    dataset = mend_shards(folder, kind=None, captions={"caption": 1.0})
    assert dataset.info.samples == 5
    assert tree(folder)["1.tar.damaged"] == content
    assert not verify(folder)


def test_shards_that_are_all_cut_are_mended_too(tmp_path):
    folder = tmp_path / "set"
    cut = [pack(folder / f"{n}.tar", shard(10 * n)) for n in range(2)]
    for path in cut:
        path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    before = [path.read_bytes() for path in cut]
    assert mend_shards(folder, kind=None, captions={"caption": 1.0}).info.samples == 4
    assert [tree(folder)[f"{n}.tar.damaged"] for n in range(2)] == before
    assert not verify(folder)


@pytest.mark.parametrize(
    ("content", "why"),
    [(gzip.compress(b"x" * 5000), r"0\.tar: is compressed \(gzip\)"), (b"", r"0\.tar: ")],
    ids=["gzip", "empty"],
)
def test_shards_of_which_none_can_be_read_say_why(tmp_path, content, why):
    for number in range(2):
        (tmp_path / f"{number}.tar").write_bytes(content)
    with pytest.raises(DataError, match=f"no video and no image.*{why}"):
        index(tmp_path)


def test_a_tar_that_repair_does_not_take_in_is_told(tmp_path, capsys):
    pack(tmp_path / "0.tar", shard(0))
    index(tmp_path)
    (tmp_path / "1.tar").write_bytes(b"no tar")
    assert main(["data", "verify", str(tmp_path), "--repair"]) == 65
    assert "1.tar: is not in dataset.json" in capsys.readouterr().out
    assert main(["data", "verify", str(tmp_path)]) == 65


def test_what_a_list_of_captions_says_is_embedded_and_chosen_by_weight(tmp_path, datasets):
    from data_pipeline.text.audit import check
    from data_pipeline.text.embed import embed
    from data_pipeline.text.encoder import TextEncoder

    told = {"short": "a red circle", "long": ["a red circle moving left", "a blue square"]}
    pack(tmp_path / "0.tar", {"a.mp4": VIDEO, "a.json": json.dumps(told).encode(),
                              "b.mp4": VIDEO, "b.json": b'{"short": "one"}'})  # fmt: skip
    index(tmp_path, captions={"short": 1.0, "long": 1.0})
    found = embed(tmp_path, datasets / "encoder", name="tiny", max_tokens=16)
    assert found is not None
    reader = TextEncoder(datasets / "encoder", max_tokens=16)
    expected = reader.encode(["a red circle", "a red circle moving left", "a blue square"])
    embeddings, weights = found.read_all(0, 0)
    assert weights == [0.5, 0.25, 0.25]
    assert all(a.equal(b) for a, b in zip(embeddings, expected, strict=True))
    for chance, which in ((0.0, 0), (0.49, 0), (0.5, 1), (0.74, 1), (0.75, 2), (0.999, 2)):
        assert found.read(0, 0, chance).equal(expected[which])
    assert found.read(0, 1, 0.7).equal(reader.encode(["one"])[0])
    assert check(tmp_path, reader, name="tiny", count=10) == 2
    assert not verify(tmp_path)
