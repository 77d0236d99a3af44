"""Batches and their account over changes of world size, workers, interruptions and storage."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import boto3
import psutil
import pytest
from test_loader import config, damage, digest, make, seen

from data_pipeline.errors import InputMissing
from data_pipeline.store import storage

# Where a run of six steps is stopped and goes on.
RESUMES = {0: ((0, 6),), 1: ((0, 2), (2, 6)), 2: ((0, 1), (1, 4), (4, 6))}


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than this machine has
@pytest.mark.parametrize("resumes", RESUMES)
@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_batch_k_is_the_same_for_every_world_workers_and_resumes(datasets, world, workers, resumes):
    data = config(datasets / "videos", datasets / "images")
    reference = seen([make(data)], 0, 6)
    data = data.model_copy(update={"num_workers": workers})
    steps = []
    for span in RESUMES[resumes]:
        ranks = [make(data, micro=1, rank=rank, world=world) for rank in range(world)]
        steps += seen(ranks, *span)
    assert steps == reference


@pytest.mark.dist
def test_the_account_of_an_epoch_holds_over_three_interruptions(datasets, tmp_path):
    own = Path(shutil.copytree(datasets / "videos", tmp_path / "videos"))
    damage(own, "000001", 2)
    damage(own, "000003", 0)
    bad = {"0/000001/2", "0/000003/0"}
    runs = [(0, 3, 1, 2), (3, 4, 2, 0), (4, 9, 4, 1), (9, 13, 3, 0)]  # start, stop, world, workers
    ids: dict[int, str] = {}
    replaced: dict[int, str] = {}
    for start, stop, world, workers in runs:
        data = config(own, workers=workers)
        ranks = [make(data, micro=1, rank=rank, world=world) for rank in range(world)]
        steps = [rank.steps(start, 100) for rank in ranks]  # killed while it reads ahead
        for _ in range(start, stop):
            for batch in [batch for rank in steps for batch in next(rank)]:
                for n, name in zip(batch.numbers.tolist(), batch.ids, strict=True):
                    assert n not in ids
                    ids[n] = name
                replaced |= {record["n"]: record["id"] for record in batch.quarantined}
        for rank in steps:
            rank.close()
    assert sorted(ids) == list(range(13 * 12))
    for epoch in range(6):
        numbers = range(26 * epoch, 26 * (epoch + 1))
        consumed = Counter(ids[n] for n in numbers if n not in replaced)
        quarantined = Counter(replaced[n] for n in numbers if n in replaced)
        assert set(quarantined) == bad
        planned = {f"0/{i // 6:06d}/{i % 6}" for i in range(26)}
        assert consumed + quarantined == Counter(planned)


@pytest.mark.slow
def test_memory_does_not_grow_over_6000_samples(datasets):
    process = psutil.Process()
    steps = make(config(datasets / "videos"), batch=100, micro=25).steps(0, 80)
    for _ in range(20):
        next(steps)
    before = process.memory_info().rss
    seen_samples = sum(len(batch.ids) for step in steps for batch in step)
    growth = process.memory_info().rss / before - 1
    print(f"{seen_samples} samples: {growth:+.2%} of {before / 1e6:.0f} MB")
    assert seen_samples == 6_000
    assert growth < 0.05


@pytest.fixture
def s3(datasets, tmp_path, monkeypatch) -> Iterator[str]:
    """The datasets in a bucket of a real server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("T2V_CACHE", str(tmp_path / "cache"))
    storage._remote.cache_clear()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="bucket")
    for folder, _, files in os.walk(datasets):
        for file in files:
            path = Path(folder, file)
            client.upload_file(str(path), "bucket", f"data/{path.relative_to(datasets)}")
    yield "s3://bucket/data"
    server.terminate()
    server.wait()
    storage._remote.cache_clear()


@pytest.mark.dist
def test_batches_from_an_object_store_are_those_from_disk(datasets, s3, tmp_path):
    local = make(config(datasets / "videos", datasets / "images"))
    data = config(f"{s3}/videos", f"{s3}/images")
    expected = seen([local], 0, 3)
    assert seen([make(data)], 0, 3) == expected
    workers = data.model_copy(update={"num_workers": 2})
    assert seen([make(workers)], 0, 3) == expected
    storage.write_atomic(f"{s3}/new/a.tar", b"content")
    storage.write_atomic(f"{s3}/new/b.idx", b"")
    assert storage.list_files(f"{s3}/new") == ["a.tar", "b.idx"]
    assert storage.list_files(f"{s3}/new", ".tar") == ["a.tar"]
    assert storage.read_bytes(f"{s3}/new/a.tar") == b"content"
    assert storage.exists(f"{s3}/new")
    assert not storage.exists(f"{s3}/ne")
    with pytest.raises(InputMissing, match=r"bucket/data/new/c\.tar: no such object"):
        storage.read_bytes(f"{s3}/new/c.tar")
    assert digest(next(make(data).steps(0, 1))[0], 0) == expected[0][0][1]
