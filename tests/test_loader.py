"""The loader: what batch k is depends on nothing but the data, the recipe and k."""

import hashlib
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import webdataset

from data_pipeline.errors import ConfigError, DataError, InputMissing, StorageError
from data_pipeline.feeding.config import (
    ClassConditioning,
    DataConfig,
    NoConditioning,
    Source,
    TextConditioning,
)
from data_pipeline.feeding.loader import QUIET, Batch, Loader
from data_pipeline.feeding.order import keyed_rng
from data_pipeline.feeding.quarantine import Quarantine
from data_pipeline.making.build import build
from data_pipeline.making.indexing import index
from data_pipeline.media.codec import decode_clip, decode_image
from data_pipeline.pyramid import Pyramid, cut_patches, draw_offsets, repeat_still
from data_pipeline.shards.dataset import open_dataset
from data_pipeline.text.embed import embed, make_tiny_encoder
from data_pipeline.text.embeddings import open_embeddings

PYRAMID = Pyramid(levels=2, patch_size=(4, 12, 16), clip_size=(8, 24, 32))
TEXT = TextConditioning(kind="text", encoder="tiny", width=8, max_tokens=6, dropout=0.1)
NONE = NoConditioning(kind="none")


def config(*paths: Path, weights=(2, 1), workers: int = 0, **settings) -> DataConfig:
    sources = [
        Source(path=str(path), weight=weight) for path, weight in zip(paths, weights, strict=False)
    ]
    return DataConfig(sources=sources, num_workers=workers, **settings)


def make(
    data: DataConfig,
    *,
    conditioning=TEXT,
    pyramid=PYRAMID,
    batch=12,
    micro=2,
    rank=0,
    world=1,
    latents=None,
) -> Loader:
    return Loader(
        data,
        pyramid,
        conditioning,
        seed=5,
        global_batch_size=batch,
        micro_batch_size=micro,
        rank=rank,
        world_size=world,
        latents=latents,
    )


def digest(batch: Batch, row: int) -> str:
    """A digest of all that a model sees of a sample."""
    tensors = [batch.patches, batch.offsets, batch.fps, batch.original_size]
    tensors += [t for t in (batch.text_tokens, batch.text_mask, batch.label) if t is not None]
    parts = [tensor[row] for tensor in tensors]
    if batch.latents is not None:
        parts.append(batch.latents[row, :, : batch.latent_frames[row]])  # zeros fill a batch up
    content = b"".join(part.reshape(-1).contiguous().view(torch.uint8).numpy() for part in parts)
    return hashlib.sha256(content).hexdigest()


def seen(loaders: list[Loader], start: int, total: int) -> list[dict[int, tuple[str, str]]]:
    """Per step, over all ranks: sample number -> (id, digest)."""
    steps = []
    for ranks in zip(*(loader.steps(start, total) for loader in loaders), strict=True):
        samples: dict[int, tuple[str, str]] = {}
        for batch in (batch for micro_batches in ranks for batch in micro_batches):
            for row, n in enumerate(batch.numbers.tolist()):
                assert n not in samples
                samples[n] = batch.ids[row], digest(batch, row)
        steps.append(samples)
    return steps


@pytest.fixture(scope="module")
def mixture(datasets) -> DataConfig:
    return config(datasets / "videos", datasets / "images")


@pytest.fixture(scope="module")
def reference(mixture) -> list[dict[int, tuple[str, str]]]:
    return seen([make(mixture)], 0, 6)


@pytest.fixture
def own(datasets, tmp_path) -> Path:
    return Path(shutil.copytree(datasets / "videos", tmp_path / "videos"))


def damage(dataset: Path, shard: str, row: int) -> None:
    """Flip a byte in the middle of a sample's media."""
    rows = open_dataset(dataset).index(int(shard))
    path = dataset / "shards" / f"{shard}.tar"
    content = bytearray(path.read_bytes())
    content[int(rows[row]["media"]["offset"]) + 500] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (3, 0), (2, 2)])
def test_batches_do_not_depend_on_ranks_or_workers(mixture, reference, world, workers):
    data = mixture.model_copy(update={"num_workers": workers})
    loaders = [make(data, rank=rank, world=world) for rank in range(world)]
    assert [loader.accumulation_steps for loader in loaders] == [6 // world] * world
    assert seen(loaders, 0, 6 if workers == 0 else 3) == reference[: 6 if workers == 0 else 3]


def test_a_resumed_loader_goes_on_where_it_stopped_twice(mixture, reference):
    pieces = [seen([make(mixture, micro=3)], *span) for span in ((0, 2), (2, 3), (3, 6))]
    assert [step for piece in pieces for step in piece] == reference


@pytest.mark.parametrize("rank", [0, 1])
def test_every_micro_batch_knows_its_step(mixture, rank):
    steps = make(mixture, rank=rank, world=2).steps(2, 5)
    assert [[batch.step for batch in step] for step in steps] == [[2] * 3, [3] * 3, [4] * 3]


def test_step_k_covers_its_samples_in_the_exact_mixture(reference):
    for k, samples in enumerate(reference):
        assert sorted(samples) == list(range(12 * k, 12 * (k + 1)))
        sources = Counter(name.split("/")[0] for name, _ in samples.values())
        assert sources == {"0": 8, "1": 4}


def test_every_epoch_holds_every_sample_once(datasets):
    loader = make(config(datasets / "videos"), conditioning=NONE, batch=13, micro=13)
    ids = [name for step in loader.steps(0, 6) for batch in step for name in batch.ids]
    everything = {f"0/{i // 6:06d}/{i % 6}" for i in range(26)}
    for epoch in range(3):
        assert Counter(ids[26 * epoch : 26 * (epoch + 1)]) == Counter(everything)


def test_a_sample_is_its_clip_cut_at_its_own_windows(datasets, mixture):
    (first, *_), *_ = make(mixture, micro=12).steps(0, 1)
    for row, (n, name) in enumerate(zip(first.numbers.tolist(), first.ids, strict=True)):
        source, shard, place = (int(part) for part in name.split("/"))
        dataset = open_dataset(datasets / ("videos", "images")[source])
        record = dataset.read(shard, place)
        offsets = draw_offsets(PYRAMID, keyed_rng(5, n, "windows"))
        clip = decode_clip(record.media) if source == 0 else repeat_still(
            decode_image(record.media), 8
        )  # fmt: skip
        np.testing.assert_array_equal(first.offsets[row], offsets)
        np.testing.assert_array_equal(first.patches[row], cut_patches(clip, PYRAMID, offsets))
        assert first.fps[row] == (8.0 if source == 0 else 0.0)
        assert first.original_size[row].tolist() == [32.0, 48.0]


def test_a_base_reads_the_same_clips_at_its_own_size(datasets):
    base = Pyramid(levels=1, patch_size=(4, 12, 16), clip_size=(4, 12, 16))
    (batch,) = next(make(config(datasets / "videos"), pyramid=base, micro=12).steps(0, 1))
    assert batch.patches.shape == (12, 1, 4, 12, 16, 3)
    assert batch.fps.tolist() == [4.0] * 12


def test_texts_are_their_embeddings_padded_or_cut_and_dropped_at_the_rate(datasets):
    short = TEXT.model_copy(update={"max_tokens": 4, "dropout": 0.5})
    loader = make(config(datasets / "videos"), conditioning=short, batch=130, micro=65)
    dataset = open_dataset(datasets / "videos")
    embeddings = open_embeddings(dataset, "tiny")
    dropped = 0
    for batch in next(loader.steps(0, 1)):
        for row, name in enumerate(batch.ids):
            _, shard, place = (int(part) for part in name.split("/"))
            length = int(batch.text_mask[row].sum())
            full = embeddings.null if length == 1 else embeddings.read(shard, place)
            assert torch.equal(batch.text_tokens[row, :length], full[:4])
            assert not batch.text_tokens[row, length:].any()
            assert length == min(len(full), 4)
            assert batch.text_mask[row].tolist() == [True] * length + [False] * (4 - length)
            dropped += length == 1
    assert abs(dropped - 65) < 5 * np.sqrt(130 / 4)  # five standard deviations


def test_labels_come_from_the_metadata_and_the_null_class_from_dropout(media, tmp_path):
    folder = shutil.copytree(media / "videos", tmp_path / "media")
    lines = (folder / "captions.jsonl").read_text().splitlines()
    labelled = [line[:-1] + f', "label": {number % 3}}}' for number, line in enumerate(lines)]
    (folder / "captions.jsonl").write_text("\n".join(labelled))
    build(folder, tmp_path / "data", frames=8, height=24, width=32)
    kind = ClassConditioning(kind="class", num_classes=3, dropout=0.25)
    loader = make(config(tmp_path / "data"), conditioning=kind, batch=104, micro=52)
    labels = Counter()
    for batch in next(loader.steps(0, 1)):
        assert batch.text_tokens is None
        for name, label in zip(batch.ids, batch.label.tolist(), strict=True):
            assert label in (int(name.split("/")[2]) % 3, 3)
            labels[label] += 1
    assert abs(labels[3] - 26) < 5 * np.sqrt(104 * 3 / 16)
    few = kind.model_copy(update={"num_classes": 2, "dropout": 0.0})
    (batch,) = next(make(config(tmp_path / "data"), conditioning=few, micro=12).steps(0, 1))
    assert {record["reason"] for record in batch.quarantined} == {"json: label 2 is none of 0 to 1"}


def test_a_bad_sample_is_replaced_the_same_way_by_everyone_and_told(own):
    damage(own, "000001", 2)
    damage(own, "000003", 0)
    bad = {"0/000001/2", "0/000003/0"}
    data = config(own)
    whole = [b for s in make(data, batch=26, micro=13).steps(0, 2) for b in s]
    split = [
        b
        for rank in range(2)
        for s in make(data, batch=26, micro=1, rank=rank, world=2).steps(0, 2)
        for b in s
    ]
    records = [r for batch in whole for r in batch.quarantined]
    assert len({r["n"] for r in records}) == 4  # each twice in two epochs
    assert {r["id"] for r in records} == bad
    assert {r["reason"].split(": ")[-1] for r in records} == {"bytes differ from the index (crc32)"}

    def by_number(batches: list[Batch]) -> dict[int, str]:
        pairs = [zip(b.numbers.tolist(), b.ids, strict=True) for b in batches]
        return dict(pair for batch in pairs for pair in batch)

    def sorted_records(batches: list[Batch]) -> list[tuple]:
        return sorted(tuple(r.values()) for batch in batches for r in batch.quarantined)

    assert by_number(whole) == by_number(split)
    assert sorted_records(whole) == sorted_records(split)
    ids = by_number(whole)
    for epoch in range(2):  # consumed + quarantined = planned
        numbers = range(26 * epoch, 26 * (epoch + 1))
        replaced = {r["n"] for r in records if r["n"] in numbers}
        good = [ids[n] for n in numbers if n not in replaced]
        assert len(set(good)) == len(good)
        assert set(good) | bad == {f"0/{i // 6:06d}/{i % 6}" for i in range(26)}


def test_a_run_on_ruined_data_stops_with_a_summary(own, tmp_path):
    for path in (own / "shards").glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match=r"sample 0 and 19 that could replace it are unusable"):
        next(make(config(own)).steps(0, 1))


def test_the_budget_counts_what_the_batches_report(own, tmp_path):
    for row in range(6):
        damage(own, "000002", row)
    book = Quarantine(tmp_path / "q", max_drop_rate=0.001, max_drops_in_a_row=100)
    loader = make(config(own), batch=26, micro=26)
    steps = [[r for batch in step for r in batch.quarantined] for step in loader.steps(0, 2)]
    book.record(steps[0], next_sample=26)
    assert book.dropped == 6
    with pytest.raises(DataError, match=r"12 x .*bytes differ from the index"):
        book.record(steps[1], next_sample=52)  # 10 of the first 10,000 are allowed


def test_shards_of_others_are_brought_to_the_recipes_size(media, tmp_path):
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as tar:
        for number in range(4):
            content = (media / "videos" / f"{number:06d}.mp4").read_bytes()
            tar.write({"__key__": f"{number}", "mp4": content, "txt": "text"})
    index(tmp_path)
    (batch,) = next(make(config(tmp_path), conditioning=NONE, micro=12).steps(0, 1))
    assert batch.patches.shape == (12, 2, 4, 12, 16, 3)
    assert not batch.quarantined
    assert batch.original_size.tolist() == [[32.0, 48.0]] * 12


def test_the_fingerprint_tells_all_that_decides_what_a_sample_is(datasets, mixture):
    first = make(mixture).fingerprint
    assert make(mixture, micro=3, rank=1, world=2, batch=24).fingerprint == first
    others = [
        make(config(datasets / "videos", datasets / "images", weights=(1, 1))),
        make(config(datasets / "images", datasets / "videos")),
        make(mixture.model_copy(update={"block_shards": 2})),
        make(mixture, conditioning=TEXT.model_copy(update={"dropout": 0.2})),
        make(mixture, pyramid=Pyramid(levels=1, patch_size=(8, 24, 32), clip_size=(8, 24, 32))),
    ]
    assert len({first, *(loader.fingerprint for loader in others)}) == 6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pyramid": Pyramid(levels=1, patch_size=(8, 20, 32), clip_size=(8, 20, 32))}, ConfigError,
         r"data\.sources\.0: .*stored size \(8, 24, 32\) .* no whole multiple"),
        ({"conditioning": TEXT.model_copy(update={"encoder": "t5-11b"})}, InputMissing,
         r"has no embeddings 't5-11b' because .*t2v data embed"),
        ({"conditioning": TEXT.model_copy(update={"width": 1024})}, ConfigError,
         r"conditioning\.width: value 1024 is wrong because .* has width 8; set 8"),
        ({"conditioning": ClassConditioning(kind="class", num_classes=3)}, ConfigError,
         r"its samples have no label"),
        ({"micro": 5}, ConfigError, r"global_batch_size: value 12 is wrong because 1 processes"),
        ({"batch": 10, "micro": 1}, ConfigError, r"data\.sources: weights \[2, 1\] are wrong"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_at_start(mixture, change, error, message):
    with pytest.raises(error, match=message):
        make(mixture, **change)


def test_a_missing_dataset_is_refused_at_start(tmp_path):
    with pytest.raises(InputMissing, match=r"nowhere: is no dataset because there is no .*json"):
        make(config(tmp_path / "nowhere"))


def workers_of(loader: Loader) -> list[psutil.Process]:
    return [psutil.Process(worker.pid) for worker in loader._workers]


@pytest.mark.dist
def test_workers_outlive_the_signals_that_stop_a_run(mixture, reference):
    loader = make(mixture.model_copy(update={"num_workers": 2}))
    steps = loader.steps(0, 6)
    next(steps)
    for worker in workers_of(loader):
        for sent in QUIET:
            os.kill(worker.pid, sent)
    time.sleep(0.2)
    assert len(list(steps)) == 5
    assert workers_of(loader) == []


@pytest.mark.dist
def test_a_lost_worker_ends_the_run_with_one_line(mixture):
    loader = make(mixture.model_copy(update={"num_workers": 2}))
    steps = loader.steps(0, 1000)
    next(steps)
    os.kill(workers_of(loader)[0].pid, signal.SIGKILL)
    with pytest.raises(StorageError, match="a loader process of rank 0 is lost or stuck"):
        list(steps)


@pytest.mark.dist
def test_closing_ends_stuck_workers_too(mixture):
    loader = make(mixture.model_copy(update={"num_workers": 2}))
    steps = loader.steps(0, 1000)
    next(steps)
    workers = workers_of(loader)
    workers[0].suspend()
    loader.close()
    assert not any(worker.is_running() for worker in workers)
    del steps


def test_sources_embedded_by_different_encoders_are_refused(datasets, tmp_path):
    videos, images = tmp_path / "videos", tmp_path / "images"
    shutil.copytree(datasets / "videos", videos)
    shutil.copytree(datasets / "images", images)
    shutil.rmtree(images / "embeddings")
    make_tiny_encoder(tmp_path / "other", ["a red circle"], width=8, seed=1)
    embed(images, tmp_path / "other", name="tiny", max_tokens=16)
    with pytest.raises(ConfigError, match="another encoder or tokenizer made it"):
        make(config(videos, images))
