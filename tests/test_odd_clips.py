"""Real and odd clips all the way: built, embedded, verified, described and loaded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.feeding.config import DataConfig, Source, TextConditioning
from data_pipeline.feeding.loader import Loader
from data_pipeline.making.build import build
from data_pipeline.making.indexing import index
from data_pipeline.making.stats import measure
from data_pipeline.making.verify import verify
from data_pipeline.media.clips import read_clip
from data_pipeline.pyramid import Pyramid
from data_pipeline.shards.dataset import open_dataset
from data_pipeline.shards.tar import write_tar
from data_pipeline.text.embed import embed, make_tiny_encoder

PYRAMID = Pyramid(levels=2, patch_size=(4, 18, 32), clip_size=(8, 36, 64))
TEXT = TextConditioning(kind="text", encoder="tiny", width=8, max_tokens=8, dropout=0.0)
NONE_OF_THEM = {"broken.mp4": b"\x00" * 4000, "page.mp4": b"<html>not found</html>" * 50}


@pytest.fixture(scope="module")
def collection(shared_clips, tmp_path_factory) -> Path:
    """Clips of any codec, container, turn and size, and two files that are no video."""
    folder = tmp_path_factory.mktemp("collection")
    lines = (shared_clips / "captions.jsonl").read_text().splitlines()[:8]
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        shutil.copy(shared_clips / entry["file"], folder)
    for path in sorted((shared_clips / "odd").iterdir()):
        shutil.copy(path, folder)
        entries.append({"file": path.name, "caption": f"a test clip of {path.stem}"})
    for name, content in NONE_OF_THEM.items():
        (folder / name).write_bytes(content)
        entries.append({"file": name, "caption": "nothing to see"})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return folder


def load(path: Path, samples: int) -> dict[str, np.ndarray]:
    """The patches of one epoch by sample id; none may be replaced."""
    config = DataConfig(sources=[Source(path=str(path), weight=1)], num_workers=0)
    loader = Loader(config, PYRAMID, TEXT, seed=0, global_batch_size=samples,
                    micro_batch_size=samples, rank=0, world_size=1)  # fmt: skip
    (batch,) = next(loader.steps(0, 1))
    assert batch.quarantined == []
    return dict(zip(batch.ids, batch.patches.numpy(), strict=True))


def test_built_embedded_verified_described_and_loaded(collection, tmp_path):
    dataset = build(collection, tmp_path / "built", frames=8, height=36, width=64, shard_samples=7,
                    max_drop_rate=0.2)  # fmt: skip
    assert dataset.info.samples == 16
    left_out = json.loads((tmp_path / "built/shards/000002.rejected.json").read_text())
    assert set(left_out["unusable"]) == set(NONE_OF_THEM)
    captions = [dataset.read(n // 7, n % 7).caption for n in range(16)]
    make_tiny_encoder(tmp_path / "encoder", captions, width=8, seed=0)
    embed(tmp_path / "built", tmp_path / "encoder", name="tiny", max_tokens=8)
    assert verify(tmp_path / "built") == []
    assert measure(tmp_path / "built").resolutions["270x480"] == 1  # the rotated one, upright
    patches = load(tmp_path / "built", 16)
    assert len(patches) == 16
    assert all(patch.std() > 5 for patch in patches.values())  # pictures, not grey


def test_as_they_are_in_foreign_shards(collection, tmp_path):
    entries = [
        json.loads(line) for line in (collection / "captions.jsonl").read_text().splitlines()
    ]
    good = [entry for entry in entries if entry["file"] not in NONE_OF_THEM]
    samples = []
    for number, entry in enumerate(good):
        path = collection / entry["file"]
        members = {path.suffix[1:]: path.read_bytes(), "txt": entry["caption"].encode()}
        samples.append((f"{number:06d}", members))
    write_tar(str(tmp_path / "0.tar"), samples)
    index(tmp_path)
    make_tiny_encoder(tmp_path / "encoder", [e["caption"] for e in good], width=8, seed=0)
    embed(tmp_path, tmp_path / "encoder", name="tiny", max_tokens=8)
    assert verify(tmp_path) == []
    assert len(load(tmp_path, 16)) == 16
    record = open_dataset(tmp_path).read(0, 9)
    assert read_clip(record.media, "video", (8, 36, 64)).clip.std() > 5
