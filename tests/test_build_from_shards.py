"""Shards of others, and folders of media with texts beside, as a source of builds."""

import gzip
import json
import tarfile
import zipfile
from pathlib import Path

import pytest
from numbered import SIZE, clips_of, numbered_video, write_csv
from strangers import tree
from test_foreign_shards import pack

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.making.build import build
from data_pipeline.making.indexing import index
from data_pipeline.making.presets import Columns
from data_pipeline.making.samples import Filters

CAPTIONS = ["a dog", "a cat", "a bird", "a fish"]


@pytest.fixture(scope="module")
def members() -> dict[str, bytes]:
    found = {}
    for number, caption in enumerate(CAPTIONS):
        found[f"{number:03d}.mp4"] = numbered_video(12 + 12 * number)
        found[f"{number:03d}.json"] = json.dumps({"caption": caption, "score": number}).encode()
    return found


@pytest.fixture
def shards(members, tmp_path) -> Path:
    folder, names = tmp_path / "shards", list(members)
    pack(folder / "0.tar", {name: members[name] for name in names[:4]})
    pack(folder / "1.tar", {f"./{name}": members[name] for name in names[4:]})
    return folder


@pytest.fixture
def loose(members, tmp_path) -> Path:
    folder = tmp_path / "loose"
    folder.mkdir()
    for name, content in members.items():
        (folder / name).write_bytes(content)
    return folder


def test_shards_are_cut_again_as_their_files_would_be(shards, loose, tmp_path):
    before = tree(shards)
    how = {"frames": 8, **SIZE, "cut": "length", "shard_samples": 3}
    ours = build(shards, tmp_path / "a", **how)
    assert clips_of(ours) == clips_of(build(loose, tmp_path / "b", **how))
    assert [caption for caption, *_ in clips_of(ours)][:3] == ["a dog", "a cat", "a cat"]
    told = ours.read(0, 1).metadata
    assert (told["source"], told["score"]) == ("0.tar/001.mp4", 1)
    assert tree(shards) == before


@pytest.mark.parametrize("kind", ["shards", "loose"])
def test_a_condition_chooses_by_what_lies_beside(request, kind, tmp_path):
    source = request.getfixturevalue(kind)
    chosen = Columns(where="score >= 1 and caption != 'a bird'", select="score + 1 AS s")
    dataset = build(source, tmp_path / "out", frames=8, **SIZE, columns=chosen)
    assert [caption for caption, *_ in clips_of(dataset)] == ["a cat", "a fish"]
    assert [dataset.read(0, row).metadata["s"] for row in (0, 1)] == [2, 4]
    assert dataset.info.account.not_wanted == {"row is not --where": 2}
    assert set(dataset.info.account.passed_over) == {"media in no wanted row"}


def test_a_list_gives_shards_new_captions_without_unpacking(shards, tmp_path):
    rows = [{"key": f"{n:03d}", "caption": f"new {n}"} for n in (3, 1)]
    path = write_csv(tmp_path / "new.csv", rows)
    dataset = build(path, tmp_path / "out", frames=8, **SIZE, root=str(shards),
                    columns=Columns(file="key"))  # fmt: skip
    assert [caption for caption, *_ in clips_of(dataset)] == ["new 3", "new 1"]
    assert dataset.info.account.passed_over == {
        "file of type .json": 4,
        "media in no wanted row": 2,
    }


@pytest.mark.parametrize("suffix", ["", ".mp4"])
def test_a_list_names_members_by_their_path_in_a_shard(tmp_path, suffix):
    keys = ["a/0", "b/0", "b/c/1"]
    for number, names in enumerate((keys[:2], keys[2:])):
        media = {f"{key}.mp4": numbered_video(8) for key in names}
        pack(tmp_path / "set" / f"{number}.tar", media)
    rows = [{"key": key + suffix, "caption": key} for key in reversed(keys)]
    path = write_csv(tmp_path / "new.csv", rows)
    dataset = build(path, tmp_path / "out", frames=8, **SIZE, root=str(tmp_path / "set"),
                    columns=Columns(file="key"))  # fmt: skip
    assert [caption for caption, *_ in clips_of(dataset)] == keys[::-1]
    assert not dataset.info.account.unusable


def test_a_cut_shard_gives_what_it_holds_whole_and_costs_the_budget(shards, tmp_path):
    bad = shards / "1.tar"
    with tarfile.open(bad) as tar:
        last = tar.getmember("./003.mp4")
    bad.write_bytes(bad.read_bytes()[: last.offset_data + last.size // 2])
    (shards / "2.tar.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(DataError, match=r"1\.tar: ends early"):
        build(shards, tmp_path / "a", frames=8, **SIZE)
    dataset = build(shards, tmp_path / "b", frames=8, **SIZE, max_drop_rate=1.0)
    assert dataset.info.samples == 3
    assert dataset.info.account.passed_over["file of type .gz"] == 1


@pytest.mark.parametrize(
    ("how", "captions"),
    [
        ({}, ["one", "two words"]),
        ({"columns": Columns(where="frames = 10", select="source")}, ["one", "two words"]),
        ({"filters": Filters(min_caption_words=2)}, ["two words"]),
    ],
)
def test_a_dataset_of_ours_is_cut_again_with_all_of_its_captions(loose, tmp_path, how, captions):
    """Where its clips were cut from what they were made of is not where they are cut now."""
    for name in ("000", "001", "002"):
        (loose / f"{name}.json").write_text(json.dumps({"caption": ["one", "two words"]}))
    (loose / "003.json").write_text(json.dumps({"caption": ""}))
    (loose / "003.txt").write_text("what lies beside")
    first = build(loose, tmp_path / "first", frames=10, **SIZE, cut="length")
    again = build(first.path, tmp_path / "again", frames=8, **SIZE, **how)
    shown = [(begin, end - 2) for _, begin, end in clips_of(first)]
    assert [clip[1:] for clip in clips_of(again)] == shown
    assert [again.read(0, row).captions.texts for row in (0, 1)] == [tuple(captions)] * 2
    assert again.read(0, len(shown) - 1).caption == "what lies beside"
    assert "start_seconds" not in again.read(0, 1).metadata


def test_captions_of_an_indexed_dataset_are_those_that_it_was_indexed_by(members, tmp_path):
    told = [json.dumps({"prompt": f"prompt {n}", "caption": f"caption {n}"}) for n in range(2)]
    pack(tmp_path / "in" / "0.tar", {
        f"{n}.{s}": members["003.mp4"] if s == "mp4" else told[n].encode()
        for n in range(2) for s in ("mp4", "json")})  # fmt: skip
    index(tmp_path / "in", captions={"prompt": 1.0})
    for out, where in (("a", None), ("b", "true")):
        dataset = build(tmp_path / "in", tmp_path / out, frames=8, **SIZE,
                        columns=Columns(where=where))  # fmt: skip
        assert [caption for caption, *_ in clips_of(dataset)] == ["prompt 0", "prompt 1"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zips_are_folders(members, loose, tmp_path, method):
    folder = tmp_path / "zips"
    folder.mkdir()
    for number in range(2):
        with zipfile.ZipFile(folder / f"{number}.zip", "w", method) as archive:
            for name in list(members)[4 * number :][:4]:
                archive.writestr(name if number else f"videos\\{name}", members[name])
            archive.writestr("__MACOSX/._000.mp4", b"")
    before = tree(folder)
    how = {"frames": 8, **SIZE, "cut": "length", "shard_samples": 3}
    ours = build(folder, tmp_path / "a", **how)
    assert clips_of(ours) == clips_of(build(loose, tmp_path / "b", **how))
    assert ours.read(0, 0).metadata["source"] == "0.zip/videos/000.mp4"
    assert ours.info.account.passed_over == {"hidden file": 2}
    assert tree(folder) == before


def test_what_a_zip_does_not_give_is_counted_and_costs_the_budget(members, tmp_path):
    folder = tmp_path / "zips"
    folder.mkdir()
    with zipfile.ZipFile(folder / "0.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("../out.mp4", *members):
            archive.writestr(name, members.get(name, b""))
        archive.writestr("other.mp4", b"", zipfile.ZIP_LZMA)
        second = archive.getinfo("001.mp4")
    (folder / "1.zip").write_bytes((folder / "0.zip").read_bytes()[:-50])
    with (folder / "0.zip").open("r+b") as file:
        file.seek(second.header_offset + 30 + len(second.filename))
        file.write(b"\xff" * 64)
    with pytest.raises(DataError, match=r"1\.zip: is no readable zip"):
        build(folder, tmp_path / "a", frames=8, **SIZE)
    dataset = build(folder, tmp_path / "b", frames=8, **SIZE, max_drop_rate=1.0)
    assert [caption for caption, *_ in clips_of(dataset)] == ["a dog", "a bird", "a fish"]
    assert dataset.info.account.unusable == {
        "leaves the folder": 1, "is packed by another method than deflate": 1,
        "is no readable zip": 1, "is damaged": 1,
    }  # fmt: skip


def test_unreadable_texts_cost_their_media_only(loose, tmp_path):
    (loose / "000.json").write_bytes(b"{nonsense")
    (loose / "001.json").write_bytes(json.dumps({"caption": 5}).encode())
    (loose / "002.json").write_bytes(json.dumps({"caption": "x", "score": float("nan")}).encode())
    (loose / "003.json").unlink()
    (loose / "003.txt").write_bytes("é".encode("latin-1"))
    dataset = build(loose, tmp_path / "out", frames=8, **SIZE, max_drop_rate=1.0)
    assert [caption for caption, *_ in clips_of(dataset)] == ["x"]
    assert dataset.info.account.unusable == {
        "json is damaged": 1, "caption is no text": 1, "is no UTF-8 text": 1,
    }  # fmt: skip
    assert dataset.read(0, 0).metadata["score"] is None


def test_a_plan_stands_until_its_source_changes(loose, tmp_path):
    out = tmp_path / "out"
    how = {"frames": 8, **SIZE, "shard_samples": 1}
    assert build(loose, out, **how, task=(0, 2)) is None
    plan = (out / "plan.parquet").read_bytes()
    (loose / "000.json").write_text(json.dumps({"caption": "a hog", "score": 0}))
    with pytest.raises(ConfigError, match="before it changed; put back"):
        build(loose, out, **how, task=(1, 2))
    (loose / "000.json").unlink()
    with pytest.raises(ConfigError, match="before it changed; put back"):
        build(loose, out, **how, task=(1, 2))
    assert (out / "plan.parquet").read_bytes() == plan


def test_a_list_that_cannot_be_planned_leaves_room_for_the_right_one(loose, tmp_path):
    path, out = tmp_path / "l.csv", tmp_path / "out"
    write_csv(path, [{"name": "000.mp4", "caption": "x"}])
    for task in ((0, 2), (1, 2)):
        with pytest.raises(ConfigError, match="'file' is missing"):
            build(path, out, frames=8, **SIZE, root=str(loose), task=task)
        assert not out.exists()
    write_csv(path, [{"file": "000.mp4", "caption": "x"}])
    assert build(path, out, frames=8, **SIZE, root=str(loose)) is not None
