"""Embedding large sets: nothing is encoded twice, its cost is known before, its truth after."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.making.toy import all_toys
from data_pipeline.shards.dataset import commit_dataset, open_dataset
from data_pipeline.shards.tar import list_captions, write_index, write_tar
from data_pipeline.text.audit import check, estimate
from data_pipeline.text.embed import embed, make_tiny_encoder
from data_pipeline.text.embeddings import open_embeddings
from data_pipeline.text.encoder import TextEncoder

CAPTIONS = [toy.caption for toy in all_toys()]


@pytest.fixture
def own(datasets, tmp_path) -> Path:
    return Path(shutil.copytree(datasets / "videos", tmp_path / "videos"))


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many captions each batch of the encoder held."""
    counts: list[int] = []
    encode = TextEncoder._encode_batch

    def counting(self, rows):
        counts.append(len(rows))
        return encode(self, rows)

    monkeypatch.setattr(TextEncoder, "_encode_batch", counting)
    return counts


def test_an_encoder_spread_over_memory_and_disk_says_the_same(tmp_path):
    make_tiny_encoder(tmp_path, CAPTIONS, width=256, seed=0)
    whole = TextEncoder(tmp_path, max_tokens=16)
    spread = TextEncoder(tmp_path, max_tokens=16, memory_gib=0.0015)
    assert "disk" in spread.model.hf_device_map.values()
    for pair in zip(whole.encode(CAPTIONS), spread.encode(CAPTIONS), strict=True):
        assert torch.equal(*pair)
    assert whole.provenance == spread.provenance


def test_captions_that_shards_share_are_encoded_once(datasets, encoded):
    reader = TextEncoder(datasets / "encoder", max_tokens=16)
    first = reader.encode(["a red circle", "a blue square", "a red circle"])
    again = reader.encode(["a blue square", "a red  circle", "a white cross"])
    assert encoded == [1, 2, 1]  # the empty caption when it is opened
    assert torch.equal(first[1], again[0])
    assert torch.equal(first[0], again[1])


def test_only_changed_captions_are_encoded_again(datasets, own, encoded):
    shards = own / "shards"
    before = open_dataset(own)
    samples = []
    for row, (key, caption) in enumerate(list_captions(str(shards / "000001.tar"), "video")):
        record = before.read(1, row)
        caption = "a red zebra" if row == 2 else caption.first
        metadata = json.dumps(record.metadata | {"caption": caption})
        samples.append((key, {"mp4": record.media, "json": metadata.encode()}))
    write_tar(str(shards / "000001.tar"), samples)
    write_index(str(shards), "000001", "video")
    info = before.info
    dataset = commit_dataset(
        str(own), [shard.name for shard in info.shards], kind="video", folder="shards",
        clip=info.clip, fps=info.fps, notes={},
    )  # fmt: skip
    embed(own, datasets / "encoder", name="tiny", max_tokens=16)
    assert encoded == [1, 1]  # the null embedding and the zebra
    reader = TextEncoder(datasets / "encoder", max_tokens=16)
    found = open_embeddings(dataset, "tiny")
    for row in range(6):
        (expected,) = reader.encode([dataset.read(1, row).caption])
        assert torch.equal(found.read(1, row), expected)


def test_the_estimate_is_what_embedding_then_takes(datasets):
    reader = TextEncoder(datasets / "encoder", max_tokens=16)
    found = estimate(datasets / "videos", reader)
    folder = datasets / "videos" / "embeddings" / "tiny"
    stored = sum(path.stat().st_size for path in folder.glob("0*"))
    assert found.bytes == pytest.approx(stored, rel=0.7)  # small tars end in 10 KiB of padding
    assert found.bytes < stored
    assert (found.captions, found.distinct) == (26, 26)
    assert 4 <= found.tokens_per_caption <= 7
    assert 0 < found.hours < 1
    assert "26 captions" in str(found)


def test_every_row_is_drawn_at_most_once(datasets):
    dataset = open_dataset(datasets / "videos")
    places = dataset.draw(100, seed=1)
    assert places == [(number // 6, number % 6) for number in range(26)]
    assert len(set(dataset.draw(9, seed=2))) == 9


def test_a_check_finds_embeddings_the_encoder_does_not_say(datasets, own, tmp_path):
    reader = TextEncoder(datasets / "encoder", max_tokens=16)
    assert check(own, reader, name="tiny", count=100) == 26
    folder = own / "embeddings" / "tiny"
    captions = list_captions(str(own / "shards" / "000002.tar"), "video")
    wrong = [
        (key, {"safetensors": save({"tokens": reader.encode([caption.first])[0] * 1.1}),
               "txt": caption.origin.encode()})
        for key, caption in captions
    ]  # fmt: skip
    write_tar(str(folder / "000002.tar"), wrong)
    write_index(str(folder), "000002", "tensor")
    open_dataset(own)
    shutil.copytree(own, tmp_path / "fresh")  # of a path that no index is cached for
    with pytest.raises(
        DataError, match=r"000002\.tar: row 0 is wrong because it differs by 0\.0?[19]"
    ):
        check(tmp_path / "fresh", reader, name="tiny", count=100)
    make_tiny_encoder(tmp_path / "other", CAPTIONS, width=8, seed=5)
    for folder, tokens in ((tmp_path / "other", 16), (datasets / "encoder", 12)):
        other = TextEncoder(folder, max_tokens=tokens)
        with pytest.raises(ConfigError, match="was made with encoder encoder at max_tokens 16"):
            check(own, other, name="tiny", count=3)
