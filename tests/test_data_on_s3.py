"""The data commands on an object store: the same datasets as on a disk."""

import re
import resource
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from numbered import numbered_video

from data_pipeline.errors import StorageError
from data_pipeline.making.build import build
from data_pipeline.making.indexing import index
from data_pipeline.making.stats import measure
from data_pipeline.making.verify import repair, verify
from data_pipeline.shards.dataset import open_dataset
from data_pipeline.store import storage
from data_pipeline.text.embed import embed
from data_pipeline.text.embeddings import open_embeddings
from tests.latent_sets import MADE, noise, write_latents

SIZE = {"frames": 8, "height": 24, "width": 32}


def upload(folder: Path, to: str) -> str:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.write_atomic(f"{to}/{path.relative_to(folder)}", path.read_bytes())
    return to


def test_a_dataset_built_from_and_on_a_store_is_the_one_on_disk(media, datasets, bucket):
    source = upload(media / "videos", f"{bucket}/media/videos")
    out = f"{bucket}/data/videos"
    assert build(source, out, **SIZE, shard_samples=6, task=(1, 2)) is None
    dataset = build(source, out, **SIZE, shard_samples=6, task=(0, 2))
    assert dataset.info == open_dataset(datasets / "videos").info
    for path in sorted((datasets / "videos" / "shards").iterdir()):
        assert storage.read_bytes(f"{out}/shards/{path.name}") == path.read_bytes()
    embed(out, datasets / "encoder", name="tiny", max_tokens=16)
    ours = open_embeddings(dataset, "tiny")
    theirs = open_embeddings(open_dataset(datasets / "videos"), "tiny")
    assert ours.info == theirs.info
    assert torch.equal(ours.read(2, 3), theirs.read(2, 3))
    latents, here = write_latents(out), noise(MADE, 1, 4)
    assert torch.equal(latents.read(1, 4)[0], here)
    assert verify(out) == []
    storage.write_atomic(f"{out}/embeddings/other/provenance.json", b"{}")
    (fault,) = verify(out, decode=False)
    assert "has no embeddings 'other'" in str(fault)
    assert measure(out).hours == measure(datasets / "videos").hours


def test_foreign_shards_on_a_store_are_indexed_verified_and_mended(
    media, datasets, bucket, tmp_path
):
    own = tmp_path / "own"
    own.mkdir()
    for shard in range(2):
        shutil.copy(datasets / "videos" / "shards" / f"{shard:06d}.tar", own)
    path = upload(own, f"{bucket}/foreign")
    assert index(path).info.fingerprint == index(own).info.fingerprint
    tar = storage.read_bytes(f"{path}/000001.tar")
    storage.write_atomic(f"{path}/000001.tar", tar[: len(tar) // 2])
    faults = verify(path)
    assert any("whole samples, but should hold 6" in str(fault) for fault in faults)
    assert 6 < repair(path, faults).info.samples < 12
    assert verify(path) == []


def test_a_store_is_listed_once_for_all_tasks_and_each_file_asked_for_once(bucket, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.mp4").write_bytes(numbered_video(8))
        (tmp_path / f"{number}.txt").write_text(f"clip {number}")
    source, out = upload(tmp_path, f"{bucket}/media"), str(tmp_path / "out")
    asked: Counter[tuple[str, str]] = Counter()

    def note(model, params, **_: object) -> None:
        asked[model.name, params["url_path"] + str(params["query_string"].get("delimiter"))] += 1

    client = storage.remote().store.requests._connected()
    client.meta.events.register("before-call.s3", note)
    settings = {"frames": 8, "height": 16, "width": 160, "shard_samples": 2}
    assert build(source, out, **settings, task=(1, 2)) is None
    assert build(source, out, **settings, task=(0, 2)) is not None
    media = {key: count for key, count in asked.items() if re.search(r"media/\d[.]", key[1])}
    assert {name for name, _ in media} == {"GetObject"}
    assert len(media) == sum(media.values()) == 8
    listed = [
        count for (name, url), count in asked.items() if "List" in name and "/" not in url[-1]
    ]
    assert listed == [1]


def test_a_full_disk_on_the_way_to_a_store_is_told_and_nothing_is_stored(bucket):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(StorageError, match="check disk and rights"):
            storage.write_atomic(f"{bucket}/object", bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not storage.exists(f"{bucket}/object")
