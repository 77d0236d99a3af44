"""Cached latents: batches of them keep every law of batches of pixels, and no pixel is read.

The latents are noise, written as `t2v data encode` writes; it has a file of tests of its own.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from test_loader import config, make, seen
from test_verify import members

from data_pipeline.errors import ConfigError, DataError, InputMissing
from data_pipeline.feeding.config import CachedLatents, ClassConditioning, DataConfig
from data_pipeline.feeding.held_out import held_out_reader
from data_pipeline.feeding.sources import open_sources
from data_pipeline.latents.latents import Normalisation, Statistics, open_latents
from data_pipeline.making.build import build
from data_pipeline.making.stats import measure
from data_pipeline.making.verify import repair, verify
from data_pipeline.media.codec import encode_clip
from data_pipeline.pyramid import Pyramid
from data_pipeline.shards.dataset import commit_dataset, open_dataset
from data_pipeline.shards.tar import list_captions, write_index, write_tar
from tests.latent_sets import MADE, noise, write_latents

WHOLE = Pyramid(levels=1, patch_size=(8, 24, 32), clip_size=(8, 24, 32))
LATENTS = CachedLatents(name="noise", channels=3, stride=MADE.factors)


@pytest.fixture(scope="module")
def home(datasets, tmp_path_factory) -> Path:
    """The videos and images with latents; the tars of their pixels are gone."""
    home = tmp_path_factory.mktemp("latents")
    for kind in ("videos", "images"):
        write_latents(Path(shutil.copytree(datasets / kind, home / kind)))
        for tar in (home / kind / "shards").glob("*.tar"):
            tar.unlink()
    return home


@pytest.fixture(scope="module")
def mixture(home) -> DataConfig:
    return config(home / "videos", home / "images")


@pytest.fixture
def own(datasets, tmp_path) -> Path:
    """A copy of the videos, with latents, to spoil."""
    folder = Path(shutil.copytree(datasets / "videos", tmp_path / "videos"))
    write_latents(folder)
    return folder


def load(data: DataConfig, **changes):
    return make(data, **({"pyramid": WHOLE, "latents": LATENTS} | changes))


def test_latents_come_in_the_order_of_pixels_with_the_same_conditions(datasets, mixture):
    pixels = make(config(datasets / "videos", datasets / "images"), pyramid=WHOLE)
    latents = load(mixture)
    for theirs, ours in zip(pixels.steps(0, 4), latents.steps(0, 4), strict=True):
        for one, other in zip(theirs, ours, strict=True):
            assert one.ids == other.ids
            for name in ("numbers", "fps", "original_size", "text_tokens", "text_mask"):
                assert torch.equal(getattr(one, name), getattr(other, name)), name
            assert one.latents is None
            assert other.patches.shape == (2, 0, 8, 24, 32, 3)
            assert not other.quarantined


@pytest.mark.parametrize(
    ("world", "workers"), [(1, 0), (3, 0), pytest.param(2, 2, marks=pytest.mark.slow)]
)
def test_latents_do_not_depend_on_ranks_workers_or_where_a_run_stopped(mixture, world, workers):
    reference = seen([load(mixture)], 0, 3)
    data = mixture.model_copy(update={"num_workers": workers})
    loaders = [load(data, rank=rank, world=world) for rank in range(world)]
    assert seen(loaders, 0, 1) + seen(loaders, 1, 3) == reference


def test_a_batch_holds_the_cached_latents_and_images_are_one_frame(mixture):
    (batch,) = next(load(mixture, micro=12).steps(0, 1))
    assert batch.latents.shape == (12, 3, 2, 6, 4)
    for row, name in enumerate(batch.ids):
        source, shard, place = (int(part) for part in name.split("/"))
        made = MADE if source == 0 else MADE.model_copy(update={"clip": (1, 24, 32)})
        expected = noise(made, shard, place)
        frames = int(batch.latent_frames[row])
        assert frames == expected.shape[1] == 2 - source
        assert torch.equal(batch.latents[row, :, :frames], expected)
        assert not batch.latents[row, :, frames:].any()


def test_labels_are_read_without_the_media(media, tmp_path):
    lines = (media / "images" / "captions.jsonl").read_text().splitlines()
    listing = [json.loads(line) | {"label": n % 3} for n, line in enumerate(lines)]
    labelled = media / "images" / "labelled.jsonl"
    labelled.write_text("".join(json.dumps(line) + "\n" for line in listing))
    build(labelled, tmp_path / "images", frames=8, height=24, width=32)
    write_latents(tmp_path / "images")
    data = open_dataset(tmp_path / "images")
    tar = tmp_path / "images/shards/000000.tar"
    content = bytearray(tar.read_bytes())
    for row in data.index(0):
        content[int(row["media"]["offset"]) + 9] ^= 1
    tar.write_bytes(content)
    labels = ClassConditioning(kind="class", num_classes=3, dropout=0.0)
    loader = load(config(tmp_path / "images"), conditioning=labels, batch=14, micro=14)
    (batch,) = next(loader.steps(0, 1))
    assert not batch.quarantined
    for name, label in zip(batch.ids, batch.label.tolist(), strict=True):
        assert label == int(name.split("/")[2]) % 3


def test_damaged_latents_are_replaced_and_told(own):
    folder = own / "latents" / "noise"
    content = bytearray((folder / "000001.tar").read_bytes())
    content[700] ^= 1
    (folder / "000001.tar").write_bytes(content)
    batches = [b for step in load(config(own), batch=26, micro=13).steps(0, 1) for b in step]
    (record,) = [record for batch in batches for record in batch.quarantined]
    assert record["id"] == "0/000001/0"
    assert "crc32" in record["reason"]


def other(path: Path, to: Path, **changes: object) -> Path:
    """A copy of a dataset whose latents were made otherwise."""
    shutil.copytree(path, to)
    shutil.rmtree(to / "latents", ignore_errors=True)
    write_latents(to, **changes)
    return to


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"latents": LATENTS.model_copy(update={"name": "wan"})}, InputMissing,
         r"has no latents 'wan' because .* `t2v data encode \S+ --vae AUTOENCODER --name wan`"),
        ({"latents": LATENTS.model_copy(update={"channels": 16})}, ConfigError,
         r"method\.latents\.channels: value 16 is wrong because \S+ has 3; set 3"),
        ({"latents": LATENTS.model_copy(update={"stride": (8, 8, 8)})}, ConfigError,
         r"method\.latents\.stride: value \(8, 8, 8\) is wrong because \S+ has \(4, 4, 8\)"),
        ({"pyramid": Pyramid(levels=1, patch_size=(5, 24, 32), clip_size=(5, 24, 32))}, ConfigError,
         r"data\.sources\.0: \S+: latents of clips of \(8, 24, 32\) .* --size 5x24x32 under"),
    ],
)  # fmt: skip
def test_latents_that_do_not_fit_the_recipe_are_refused_at_start(mixture, change, error, message):
    with pytest.raises(error, match=message):
        load(mixture, **change)


TWICE = Statistics(mean=[0.0] * 3, std=[2.0] * 3)


@pytest.mark.parametrize(
    "change",
    [
        {"weights_sha256": "other"},
        {"config_sha256": "other"},
        {"class_name": "Other"},
        {"normalisation": Normalisation(first=MADE.normalisation.first, later=TWICE)},
    ],
)
def test_latents_of_two_autoencoders_do_not_mix(datasets, own, tmp_path, change):
    images = other(datasets / "images", tmp_path / "images", **change)
    with pytest.raises(ConfigError, match=r"images/latents/noise: does not fit data\.sources"):
        load(config(own, images))
    same = other(datasets / "images", tmp_path / "same", autoencoder="renamed", tile=64)
    mixed = config(own, same)
    assert load(mixed).autoencoder == MADE
    with pytest.raises(ConfigError, match="another autoencoder"):
        held_out_reader(
            mixed, config(images, weights=(1,)).sources, WHOLE, make_none(), seed=0, samples=2,
            encoder=None, latents=LATENTS, autoencoder=load(mixed).autoencoder,
        )  # fmt: skip


def make_none():
    from data_pipeline.feeding.config import NoConditioning

    return NoConditioning(kind="none")


def test_latents_of_other_data_are_refused(own, media, tmp_path):
    build(media / "videos", tmp_path / "other", frames=8, height=24, width=40, shard_samples=6)
    shutil.copytree(own / "latents", tmp_path / "other" / "latents")
    with pytest.raises(ConfigError, match=r"dataset_fingerprint: .* encode this dataset again"):
        open_latents(open_dataset(tmp_path / "other"), "noise")


def test_held_out_samples_are_latents_too(mixture):
    data = mixture.model_copy(update={"held_out_share": 0.3})
    held_out = held_out_reader(
        data, None, WHOLE, make_none(), seed=5, samples=6, encoder=None, latents=LATENTS,
        autoencoder=MADE,
    )  # fmt: skip
    trained = {name for step in load(data).steps(0, 8) for batch in step for name in batch.ids}
    for n in range(6):
        sample, _ = held_out.read(n)
        source, shard, row = (int(part) for part in sample.id.split("/"))
        cached, _ = open_sources(data, WHOLE, make_none(), LATENTS)[source].latents.read(shard, row)
        assert np.array_equal(sample.latents, cached.view(torch.uint16).numpy())
        assert sample.id not in trained


def test_the_fingerprint_tells_the_latents(own, datasets, tmp_path):
    pixels = make(config(own), pyramid=WHOLE)
    again = other(datasets / "videos", tmp_path / "again")
    changed = other(datasets / "videos", tmp_path / "changed", weights_sha256="other")
    prints = [load(config(path)).fingerprint for path in (own, again, changed)]
    assert prints[0] == prints[1]
    assert len({pixels.fingerprint, *prints}) == 3
    assert pixels.fingerprint == make(config(datasets / "videos"), pyramid=WHOLE).fingerprint


def rewrite(own: Path, change) -> None:
    folder = own / "latents" / "noise"
    samples = list(members(folder / "000001.tar").items())
    write_tar(str(folder / "000001.tar"), change(samples))
    write_index(str(folder), "000001", "tensor")


def first_is(**changes: bytes):
    return lambda samples: [(samples[0][0], samples[0][1] | changes), *samples[1:]]


def shifted(samples):
    keys = [key for key, _ in samples]
    return zip(keys, [parts for _, parts in samples[1:] + samples[:1]], strict=True)


def tensor(*shape: int, value: float = 0.0) -> bytes:
    return save({"latents": torch.full(shape, value, dtype=torch.bfloat16)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (shifted, "is of another clip than the sample has"),
        (lambda samples: samples[:-1], "holds 5 whole samples, but should hold 6"),
        (first_is(safetensors=b"garbage"), "latents are damaged"),
        (first_is(json=b"{}"), "latents are damaged"),
        (first_is(safetensors=tensor(3, 2, 6, 4, value=float("nan"))), "not finite"),
        (first_is(safetensors=tensor(3, 1, 6, 4)), r"shape \(3, 1, 6, 4\)"),
    ],
)
def test_wrong_latents_are_found_and_made_again(own, change, reason):
    folder = own / "latents" / "noise"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert verify(own, decode=False) == []
    rewrite(own, change)
    faults = verify(own, decode=False)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError("\n".join(map(str, faults)))
    repair(own, faults)
    write_latents(own)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert verify(own, decode=False) == []


def test_repair_leads_to_encoding_again_only_what_is_wrong(own):
    folder = own / "latents" / "noise"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    content = bytearray((folder / "000002.tar").read_bytes())
    rows = np.load(folder / "000002.idx")
    content[int(rows[3]["media"]["offset"]) + 90] ^= 1
    (folder / "000002.tar").write_bytes(content)
    faults = verify(own, decode=False)
    assert [fault.row for fault in faults] == [3]
    repair(own, faults)
    made: list[tuple[int, int]] = []
    write_latents(own, made=made)
    assert made == [(2, 3)]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_new_clip_under_an_old_key_is_encoded_again_and_a_new_caption_is_not(own):
    before, shards = open_dataset(own), own / "shards"
    samples = []
    for row, (key, _) in enumerate(list_captions(str(shards / "000001.tar"), "video")):
        record = before.read(1, row)
        media, caption = record.media, record.caption
        if row == 2:
            media = encode_clip(np.full((8, 24, 32, 3), 99, np.uint8), 8.0)
        if row == 4:
            caption = "a red zebra"
        metadata = json.dumps(record.metadata | {"caption": caption}).encode()
        samples.append((key, {"mp4": media, "json": metadata}))
    write_tar(str(shards / "000001.tar"), samples)
    write_index(str(shards), "000001", "video")
    commit_dataset(
        str(own), [shard.name for shard in before.info.shards], kind="video", folder="shards",
        clip=before.info.clip, fps=before.info.fps, notes={},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="encode this dataset again"):
        open_latents(open_dataset(own), "noise")
    made: list[tuple[int, int]] = []
    write_latents(own, made=made)
    assert made == [(1, 2)]


def test_statistics_tell_of_sets_and_of_those_that_are_not_whole(own):
    (own / "embeddings" / "tiny" / "manifest.json").unlink()
    rows = dict(measure(own, count=2).rows())
    assert rows["latents noise"] == "0.000 GB, 3x2x6x4, by noise"
    assert rows["embeddings tiny"] == "not whole, or of other data: embed again"


def test_latents_of_another_sample_are_found_at_the_first_read(own):
    folder = own / "latents" / "noise"
    for suffix in ("tar", "idx"):
        shutil.copy(folder / f"000001.{suffix}", folder / f"000000.{suffix}")
    with pytest.raises(DataError, match="row 3 is of another sample or clip"):
        open_latents(open_dataset(own), "noise").read(0, 3)
