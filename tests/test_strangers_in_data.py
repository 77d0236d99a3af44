"""Whatever makes and keeps data, and however it ends, the files of others stay as they are."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import webdataset

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.making import build as building
from data_pipeline.making.build import build
from data_pipeline.making.indexing import index
from data_pipeline.making.verify import repair, verify
from data_pipeline.shards.dataset import open_dataset
from data_pipeline.store import storage
from data_pipeline.store.cache import BLOCK_BYTES
from data_pipeline.text.embed import embed
from tests.strangers import Tree, alone, refused, settle, tree, untouched
from tests.test_cache import cache

SIZE = {"frames": 8, "height": 24, "width": 32}
HEX = "0123456789abcdef" * 2


def only_file(out: Path) -> None:
    (out / "notes.txt").write_text("notes")


def only_folder(out: Path) -> None:
    (out / "raw").mkdir()


def only_link(out: Path) -> None:
    (out / "link").symlink_to(out.parent)


def only_hidden(out: Path) -> None:
    (out / ".film.mp4.part").write_bytes(b"half")


@pytest.mark.parametrize("content", [only_file, only_folder, only_link, only_hidden, settle])
def test_a_folder_that_is_not_empty_is_not_built_in(media, tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    content(out)
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=r"out: is not empty and no build of ours; give a new"):
        build(media / "videos", out, **SIZE)
    assert tree(tmp_path) == before
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(ConfigError, match=r"notes\.txt: is no folder"):
        build(media / "videos", tmp_path / "notes.txt", **SIZE)


@pytest.mark.parametrize("broken", [True, False])
def test_a_source_and_its_dataset_do_not_overlap(media, tmp_path, broken):
    raw, link = tmp_path / "mine" / "raw", tmp_path / "link"
    shutil.copytree(media / "videos", raw)
    link.symlink_to(raw)
    (tmp_path / "mine" / "poems").mkdir()
    if broken:
        (raw / "000000.mp4").write_bytes(b"no film")
    before = tree(tmp_path)
    for source, out, how in (
        (raw, tmp_path / "mine", "contains"),
        (raw, raw, "lies inside"),
        (raw, raw / "shards" / "new", "lies inside"),
        (raw, link / "new", "lies inside"),
        (link, raw / "new", "lies inside"),
        (raw / "captions.jsonl", tmp_path / "mine", "contains"),
    ):
        with pytest.raises(ConfigError, match=f"is wrong because it {how} the source") as error:
            build(source, out, **SIZE)
        assert "\n" not in str(error.value)
        assert tree(tmp_path) == before


def test_prefixes_of_a_store_overlap_by_whole_names():
    for source, out in (
        ("s3://b/raw", "s3://b"),
        ("s3://b/raw/", "s3://b/raw"),
        ("s3://b/raw", "s3://b/raw/x"),
    ):
        with pytest.raises(ConfigError, match="the source"):
            storage.refuse_overlap(source, out)
    for source, out in (("s3://b/raw", "s3://b/rawer"), ("s3://b/raw", "s3:/b/raw/x")):
        storage.refuse_overlap(source, out)


ENDS = {"damage": DataError("damage"), "interrupt": KeyboardInterrupt(), "disk": OSError("full")}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("with_strangers", [True, False])
@pytest.mark.parametrize("moment", ["write_tar", "write_index"])
def test_a_failed_build_takes_back_what_it_made(
    media, tmp_path, monkeypatch, end, with_strangers, moment
):
    """Strangers come while it is at work, for before it would refuse them."""
    out = tmp_path / "new" / "parent" / "out"
    theirs: Tree = {}

    def fail(*arguments: object) -> None:
        if with_strangers:
            theirs.update(settle(out, "shards/their.tar", "shards/their.idx", "000000.tar"))
        raise ENDS[end]

    monkeypatch.setattr(building, moment, fail)
    with pytest.raises(type(ENDS[end])):
        build(media / "videos", out, **SIZE)
    if with_strangers:
        assert untouched(out, theirs)
        assert alone(out, theirs)
    else:
        assert tree(tmp_path) == {}


def test_an_empty_folder_of_the_user_stays(media, tmp_path, monkeypatch):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(building, "write_tar", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(media / "videos", tmp_path / "out", **SIZE)
    assert tree(tmp_path) == {"out": ""}


def test_strangers_beside_a_build_outlive_its_failure_and_its_success(media, tmp_path, monkeypatch):
    out, write = tmp_path / "out", building.write_tar

    def fail_later(path: str, *arguments: object) -> None:
        if path.endswith("000002.tar"):
            raise KeyboardInterrupt
        write(path, *arguments)

    monkeypatch.setattr(building, "write_tar", fail_later)
    with pytest.raises(KeyboardInterrupt):
        build(media / "videos", out, **SIZE, shard_samples=6)
    left = {f"shards/.000002.tar.{HEX}.part", f".plan.parquet.{HEX}.part"}
    for name in left:
        (out / name).write_bytes(b"left by a killed build of ours")
    theirs = settle(out, "shards/their.tar", "shards/.their.part", "contact_sheet.png")
    monkeypatch.undo()
    build(media / "videos", out, **SIZE, shard_samples=6)
    assert untouched(out, theirs)
    assert not left & tree(out).keys()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_spare_what_is_beside_a_build(media, datasets, tmp_path, number):
    mine = tmp_path / "mine"
    mine.mkdir()
    theirs = settle(mine)
    command = ["data", "build", str(media / "videos"), str(mine / "out"), "--size", "8x24x32"]
    command = [sys.executable, "-m", "t2v.cli", *command, "--shard-samples", "6", "--workers", "1"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (mine / "out").exists() and job.poll() is None:
        time.sleep(0.01)
    job.send_signal(number)
    job.wait(timeout=60)
    assert untouched(mine, theirs)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert untouched(mine, theirs)
    assert tree(mine / "out" / "shards") == tree(datasets / "videos" / "shards")


def test_objects_of_others_outlive_a_build_in_a_store(media, bucket, monkeypatch):
    objects = {f"{bucket}/mine/raw/film.mp4": b"film", f"{bucket}/half/x.part": b"half"}
    for path, content in objects.items():
        storage.write_atomic(path, content)
    for out in (f"{bucket}/mine", f"{bucket}/half", bucket):
        with pytest.raises(ConfigError, match="is not empty and no build of ours"):
            build(media / "videos", out, **SIZE)

    def fail(folder: str, *arguments: object) -> None:
        for name in ("their.idx", "000000.txt"):
            storage.write_atomic(f"{folder}/{name}", objects.setdefault(f"{folder}/{name}", b"x"))
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "write_index", fail)
    with pytest.raises(KeyboardInterrupt):
        build(media / "videos", f"{bucket}/new", **SIZE)
    assert storage.list_files(f"{bucket}/new") == []
    assert storage.list_files(f"{bucket}/new/shards") == ["000000.txt", "their.idx"]
    assert all(storage.read_bytes(path) == content for path, content in objects.items())


def test_unfinished_writes_of_others_are_not_ours(tmp_path):
    theirs = settle(tmp_path, ".film.part", ".x.0123.part", f"film.{HEX}.part", "a.part")
    (tmp_path / f".link.{HEX}.part").symlink_to(tmp_path / "notes.txt")
    (tmp_path / f".folder.{HEX}.part").mkdir()
    before = tree(tmp_path)
    (tmp_path / f".000000.tar.{HEX}.part").write_bytes(b"ours")
    storage.remove_partial(str(tmp_path))
    assert tree(tmp_path) == before
    assert untouched(tmp_path, theirs)


@pytest.mark.parametrize("command", [("data", "toy"), ("quickstart", "--workdir")])
def test_what_begins_in_a_new_folder_refuses_another(tmp_path, capsys, command):
    theirs = settle(tmp_path / "mine", "videos/000000.mp4", "videos/captions.jsonl")
    assert "mine: is not empty" in refused(capsys, *command, tmp_path / "mine")
    assert "notes.txt: is no folder" in refused(capsys, *command, tmp_path / "mine" / "notes.txt")
    assert untouched(tmp_path / "mine", theirs)
    assert alone(tmp_path / "mine", theirs)


@pytest.fixture
def foreign(media, tmp_path) -> Path:
    """A shard of others."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "0.tar")) as tar:
        for number in range(3):
            content = (media / "videos" / f"{number:06d}.mp4").read_bytes()
            tar.write({"__key__": f"{number}", "mp4": content, "txt": "a film"})
    return folder


@pytest.mark.parametrize("name", ["0.idx", "dataset.json"])
def test_index_replaces_no_file_of_others(foreign, name):
    """Other loaders, too, keep an index beside a tar."""
    theirs = settle(foreign, name)
    with pytest.raises(ConfigError, match=r"is there already and no .* move it away, then index"):
        index(foreign)
    assert untouched(foreign, theirs)
    (foreign / name).unlink()
    theirs.pop(name)
    index(foreign)
    assert index(foreign).info.samples == 3
    (foreign / "0.idx").write_bytes(b"damaged")  # but of a dataset of ours
    assert index(foreign).info.samples == 3
    assert untouched(foreign, theirs)


def test_repair_keeps_every_tar_that_it_replaces(foreign):
    index(foreign)
    theirs = settle(foreign, "0.tar.damaged", "embeddings/mine/0.idx", "embeddings/mine/0.tar")
    originals = []
    for _ in range(2):
        tar = foreign / "0.tar"
        content = bytearray(tar.read_bytes())
        content[content.index(b"ftyp") + 40] ^= 255
        tar.write_bytes(content)
        originals.append(bytes(content))
        repair(foreign, verify(foreign))
    assert open_dataset(foreign).info.samples == 1
    assert untouched(foreign, theirs)
    assert [(foreign / f"0.tar.damaged{n}").read_bytes() for n in (1, 2)] == originals


def test_a_manifest_names_no_shard_elsewhere(datasets, tmp_path):
    content = json.loads((datasets / "videos" / "dataset.json").read_text())
    content["shards"][0]["name"] = "../../elsewhere"
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="name: is wrong because"):
        open_dataset(tmp_path)


def test_embed_fills_no_folder_of_others(datasets, tmp_path):
    data = tmp_path / "videos"
    shutil.copytree(datasets / "videos", data)
    theirs = settle(data / "embeddings" / "mine", "000000.tar", "null.safetensors")
    beside = settle(data / "embeddings" / "tiny", "their.tar")
    with pytest.raises(ConfigError, match="mine: is not empty and no embedding set of ours"):
        embed(data, datasets / "encoder", name="mine", max_tokens=16)
    assert alone(data / "embeddings" / "mine", theirs)
    embed(data, datasets / "encoder", name="tiny", max_tokens=16)
    assert untouched(data / "embeddings" / "mine", theirs)
    assert untouched(data / "embeddings" / "tiny", beside)


def test_a_cache_in_a_folder_of_others_evicts_its_own_entries_only(tmp_path):
    full = 64 * "a"
    theirs = settle(tmp_path / "cache", "en/film.mp4", f"aa/{full}", "aa/.half", f"zz/{full}.bin")
    (tmp_path / "cache" / "aa" / f"{full}.t2v").symlink_to(tmp_path / "cache" / "notes.txt")
    (tmp_path / "cache" / "bb" / f"{full}.t2v").mkdir(parents=True)
    theirs |= tree(tmp_path / "cache")
    small = cache(tmp_path, quota=BLOCK_BYTES)
    for number in range(40):
        small.read(f"s3://b/{number}", 0, 10)
    assert untouched(tmp_path / "cache", theirs)
    entries = [name for name in tree(tmp_path / "cache").keys() - theirs if name.endswith(".t2v")]
    assert len(entries) <= 16  # the quota is looked at every 16 new ones
