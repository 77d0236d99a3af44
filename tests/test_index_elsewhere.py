"""An index of shards of others in a folder of its own: the same dataset, and theirs untouched."""

import json
import os
import shutil

import pytest
from moving import FPS, moving
from strangers import tree

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.making import indexing
from data_pipeline.making.build import build
from data_pipeline.making.indexing import index
from data_pipeline.making.scoring import score
from data_pipeline.making.verify import repair, verify
from data_pipeline.media.codec import encode_clip
from data_pipeline.shards.dataset import open_dataset
from data_pipeline.shards.tar import write_tar


@pytest.fixture(scope="module")
def media() -> list[bytes]:
    return [encode_clip(moving(0, step), FPS) for step in range(1, 5)]


@pytest.fixture
def theirs(media, tmp_path):
    folder = tmp_path / "theirs"
    for number, one in enumerate(media):
        told = json.dumps({"caption": f"clip {number}"}).encode()
        write_tar(str(folder / f"{number}.tar"), [(f"{number}", {"mp4": one, "json": told})])
    (folder / "notes.parquet").write_bytes(b"theirs")
    return folder


def test_it_is_the_dataset_that_it_would_be_in_place(theirs, tmp_path):
    before = tree(theirs)
    elsewhere = index(theirs, out=tmp_path / "out")
    assert tree(theirs) == before
    in_place = index(shutil.copytree(theirs, tmp_path / "copy"))
    changed = {"folder": "shards"}
    assert elsewhere.info.model_dump() == in_place.info.model_dump() | changed
    assert elsewhere.read(2, 0) == in_place.read(2, 0)
    assert verify(elsewhere.path) == []
    assert index(theirs, out=tmp_path / "out").info == elsewhere.info


def test_killed_and_gone_on_by_tasks_gives_the_same_folder(theirs, tmp_path, monkeypatch):
    index(theirs, out=tmp_path / "whole")
    calls, examine = iter(range(2)), indexing.examine_tar

    def killed(*arguments):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return examine(*arguments)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "examine_tar", killed)
        with pytest.raises(KeyboardInterrupt):
            index(theirs, out=out, kind="video")
    assert not (out / "dataset.json").exists()
    assert index(theirs, out=out, task=(1, 2)) is None
    assert index(theirs, out=out, task=(0, 2)) is not None
    assert tree(out) == tree(tmp_path / "whole")


def test_mending_writes_beside_the_index_only(theirs, media, tmp_path):
    both = [(name, {"mp4": one, "txt": b"x"}) for name, one in zip("ab", media, strict=False)]
    write_tar(str(theirs / "1.tar"), both)
    content = (theirs / "1.tar").read_bytes()
    (theirs / "1.tar").write_bytes(content[: -len(media[1]) // 2 - 10240])
    before, out = tree(theirs), tmp_path / "out"
    with pytest.raises(DataError, match="cannot be used"):
        index(theirs, out=out)
    dataset = index(theirs, out=out, skip_bad=True)
    assert [shard.name for shard in dataset.info.shards] == ["0", "2", "3"]
    mended = repair(out, verify(out))
    assert mended.info.samples == 4
    assert mended.read(1, 0).media == media[0]
    assert verify(out) == []
    assert index(theirs, out=out).info == mended.info
    assert tree(theirs) == before


def test_a_first_shard_that_is_cut_is_left_out(theirs, tmp_path):
    (theirs / "0.tar").write_bytes((theirs / "0.tar").read_bytes()[:1000])
    assert index(theirs, out=tmp_path / "out", kind="video", skip_bad=True).info.samples == 3


def test_it_is_scored_and_built_from(theirs, tmp_path):
    index(theirs, out=tmp_path / "out")
    before = tree(theirs)
    score(tmp_path / "out")
    built = build(tmp_path / "out", tmp_path / "built", frames=8, height=96, width=160)
    assert built.info.samples == 4
    assert tree(theirs) == before


def test_wrong_places_and_settings_are_refused(theirs, tmp_path):
    for out in (theirs, theirs / "out", tmp_path, "s3://bucket/out"):
        with pytest.raises(ConfigError):
            index(theirs, out=out)
    with pytest.raises(ConfigError, match="give --out"):
        index(theirs, task=(0, 2))
    index(theirs, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="other settings"):
        index(theirs, out=tmp_path / "out", captions={"text": 1.0})
    os.truncate(theirs / "0.tar", 512)
    with pytest.raises(ConfigError, match="of other shards"):
        index(theirs, out=tmp_path / "out", kind="video")


def test_an_older_index_beside_theirs_does_no_harm(theirs, tmp_path):
    (theirs / "0.idx").write_bytes(b"another loader's")
    assert index(theirs, out=tmp_path / "out").info.samples == 4
    assert (theirs / "0.idx").read_bytes() == b"another loader's"
    assert open_dataset(tmp_path / "out").read(0, 0).caption == "clip 0"
