"""Latents of real autoencoders: the autoencoder's own word, row for row, within a memory.

They are tiny ones of diffusers' real classes, randomly initialised: what they make of a clip is no
picture of it, so nothing here is said of quality.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from data_pipeline.errors import ConfigError, DataError, InputMissing
from data_pipeline.latents.audit import check, estimate, measure
from data_pipeline.latents.autoencoder import Autoencoder, pixels_of
from data_pipeline.latents.encode import begin_encoding, encode
from data_pipeline.latents.latents import Normalisation, Statistics, open_latents
from data_pipeline.latents.memory import LiveBytes
from data_pipeline.latents.tiles import WORKSPACE, refuse_misfit, tile_within, working_bytes
from data_pipeline.making.build import build
from data_pipeline.making.indexing import index
from data_pipeline.making.verify import verify
from data_pipeline.media.clips import read_clip
from data_pipeline.media.codec import decode_clip, decode_image
from data_pipeline.shards.dataset import open_dataset
from data_pipeline.shards.tar import write_index, write_tar
from t2v.cli import main
from tests.test_verify import members
from tests.tiny_autoencoder import KINDS, write_autoencoder

pytestmark = pytest.mark.slow
PARTS = Normalisation(
    first=Statistics(mean=[0.5, 0.0, -1.0, 2.0], std=[1.0, 2.0, 0.5, 3.0]),
    later=Statistics(mean=[0.0, 1.0, 0.0, -2.0], std=[0.1, 1.0, 4.0, 1.0]),
)


@pytest.fixture(scope="module")
def home(media, tmp_path_factory) -> Path:
    """`videos` of 5x24x32 in shards of 6 and `images` with latents `tiny`; autoencoder `wan`."""
    home = tmp_path_factory.mktemp("encoded")
    write_autoencoder(home / "wan")
    for kind in ("videos", "images"):
        build(media / kind, home / kind, frames=5, height=24, width=32, shard_samples=6)
        encode(home / kind, home / "wan", name="tiny")
    return home


@pytest.fixture(scope="module")
def wan(home) -> Autoencoder:
    return Autoencoder(home / "wan")


@pytest.fixture
def own(home, tmp_path) -> Path:
    """A copy of the videos to spoil."""
    return Path(shutil.copytree(home / "videos", tmp_path / "videos"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_cache_holds_what_the_plain_autoencoder_says_of_each_clip(home):
    """The oracle: diffusers called by itself, normalised as its pipelines do."""
    from diffusers import AutoencoderKLWan

    plain = AutoencoderKLWan.from_pretrained(home / "wan").eval()
    mean, std = (
        torch.tensor(plain.config[name]).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    for kind, decode in (("videos", decode_clip), ("images", decode_image)):
        dataset = open_dataset(home / kind)
        cached = open_latents(dataset, "tiny")
        for shard, row in ((0, 0), (1, 5), (2, 1)):
            record = dataset.read(shard, row)
            clip = decode(record.media).reshape(-1, 24, 32, 3)
            pixels = torch.from_numpy(clip).permute(3, 0, 1, 2)[None] / 255 * 2 - 1
            with torch.inference_mode():
                expected = (plain.encode(pixels).latent_dist.mode() - mean) / std
            latents, told = cached.read(shard, row)
            assert latents.shape == (4, 2 if kind == "videos" else 1, 6, 8)
            torch.testing.assert_close(latents.float(), expected[0], rtol=2**-8, atol=1e-5)
            assert told.fps == (8.0 if kind == "videos" else 0.0)
            assert (told.original_height, told.original_width) == (32, 48)
    assert verify(home / "videos") == []
    assert verify(home / "images") == []


def test_the_first_frame_and_later_ones_are_normalised_apart_and_back(home, wan):
    own = Autoencoder(home / "wan", normalisation=PARTS)
    clips = torch.rand(2, 3, 9, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    raw, latents = wan.denormalise(wan.encode(clips)), own.encode(clips)
    for frame, part in enumerate([PARTS.first, PARTS.later, PARTS.later]):
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (part.mean, part.std))
        torch.testing.assert_close(latents[:, :, frame], (raw[:, :, frame] - mean) / std)
    torch.testing.assert_close(own.denormalise(own.normalise(raw)), raw)
    torch.testing.assert_close(own.decode(latents), wan.decode(wan.normalise(raw)))


@pytest.mark.parametrize(
    ("kind", "factors", "unit"),
    [("wan", (4, 4, 4), 4), ("cogvideox", (4, 4, 4), 8), ("hunyuan", (4, 8, 8), 4)],
)
def test_factors_and_lengths_of_each_kind_are_found_out(tmp_path, kind, factors, unit):
    reader = Autoencoder(write_autoencoder(tmp_path / kind, kind))
    assert (reader.factors, reader.unit_frames) == (factors, unit)
    assert (reader.class_name, reader.channels) == (KINDS[kind][0], 4)
    for frames in (1, 1 + unit, 1 + 2 * unit):
        clips = torch.rand(2, 3, frames, 16, 24) * 2 - 1
        latents = reader.encode(clips)
        assert latents.shape[1:] == reader.provenance((frames, 16, 24), None).size
        assert reader.decode(latents).shape == clips.shape
        assert torch.equal(latents[1:], reader.encode(clips[1:]))  # whatever its neighbour
    if kind != "wan":
        scale = json.loads((tmp_path / kind / "config.json").read_text())["scaling_factor"]
        raw = reader.model.encode(clips[:1]).latent_dist.mode()
        torch.testing.assert_close(latents[:1], raw * scale)


def test_a_clip_that_does_not_fit_is_refused_with_the_sizes_that_would(datasets, home, wan):
    with pytest.raises(ConfigError, match=r"videos: clips of 8 frames .* 1 \+ 4 x k; use 5 or 9\."):
        encode(datasets / "videos", home / "wan", name="tiny")
    assert not (datasets / "videos" / "latents").exists()
    with pytest.raises(ConfigError, match=r"height 26 .* multiples of 4; use 24 or 28\."):
        refuse_misfit(wan, (5, 26, 32), "x")


def test_tasks_share_the_work_and_a_stopped_one_goes_on_byte_for_byte(home, own):
    reference = content(own / "latents" / "tiny")
    assert encode(own, home / "wan", name="again", task=(1, 2)) is None
    folder = own / "latents" / "again"
    assert {path.stem for path in folder.glob("*.idx")} == {"000001", "000003"}
    (folder / "000000.tar").write_bytes(b"killed before its index")
    (folder / f".000002.tar.{'0' * 32}.part").write_bytes(b"killed in the middle")
    assert encode(own, home / "wan", name="again", task=(0, 2)) is not None
    assert content(folder) == reference
    for name in ("manifest.json", "000002.idx"):
        (folder / name).unlink()
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    encode(own, home / "wan", name="again")
    assert content(folder) == reference
    assert [n for n, t in times.items() if (folder / n).stat().st_mtime_ns != t] == ["000002.tar"]


@pytest.mark.parametrize("change", ["weights", "config", "normalisation", "tile", "size"])
def test_latents_made_otherwise_do_not_share_a_folder(home, own, tmp_path, change, monkeypatch):
    folder, how = home / "wan", {}
    if change == "weights":
        folder = write_autoencoder(tmp_path / "wan", seed=1)
    elif change == "config":
        folder = write_autoencoder(tmp_path / "wan", latents_std=[1.0] * 4)
    elif change == "normalisation":
        how = {"normalisation": PARTS}
    elif change == "size":
        how = {"size": (5, 12, 16)}
    before = content(own / "latents" / "tiny")
    if change == "tile":
        how = {"memory_gib": 1.0}
        monkeypatch.setattr("data_pipeline.latents.encode.tile_within", lambda *_: 16)
    with pytest.raises(ConfigError, match="holds latents of another autoencoder or other settings"):
        encode(own, folder, name="tiny", **how)
    assert content(own / "latents" / "tiny") == before


def noise(*size: int) -> torch.Tensor:
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decoding", [False, True])
def test_memory_is_forecast_without_computing_and_tiles_keep_within_it(tmp_path, kind, decoding):
    reader = Autoencoder(write_autoencoder(tmp_path / kind, kind))
    weights = sum(tensor.nbytes for tensor in reader.model.state_dict().values())
    clip = (1 + reader.unit_frames, 64, 96)
    latents = reader.encode(noise(*clip))

    def held(tile: int | None) -> int:
        with LiveBytes() as live:
            reader.decode(latents, tile=tile) if decoding else reader.encode(
                noise(*clip), tile=tile
            )
        return live.peak

    budget = 1e12
    for tile in (None, 64, 32):
        needed = weights + WORKSPACE * working_bytes(reader, clip, tile, decoding)
        assert tile_within(reader, min(budget, needed), clip, decoding=decoding) == tile
        assert held(tile) <= needed - weights
        budget = needed - 1
    with pytest.raises(ConfigError, match=r"--memory-gib: \S+ is wrong because .* smallest tiles"):
        tile_within(reader, budget, clip, decoding=decoding)


@pytest.mark.parametrize("kind", ["wan", "cogvideox"])
def test_tiles_show_what_the_whole_shows(tmp_path, kind):
    """As near as one may ask of random weights, which look far: a tile's border is a clip's border
    to the autoencoder. Tiles in wrong places would have nothing in common with the whole."""
    reader = Autoencoder(write_autoencoder(tmp_path / kind, kind))
    clips = noise(1 + reader.unit_frames, 96, 64)
    latents = reader.encode(clips)
    pairs = [(reader.encode(clips, tile=64), latents)]
    pairs.append((reader.decode(latents, tile=64), reader.decode(latents)))
    for tiled, whole in pairs:
        assert tiled.shape == whole.shape
        assert 0 < (tiled - whole).norm() < 0.3 * whole.norm()
    assert torch.equal(reader.encode(clips), latents)  # tiles are for one call


def test_a_check_encodes_again_and_tells_what_decoding_loses(home, own, wan):
    found = check(own, home / "wan", name="tiny", count=100)
    dataset = open_dataset(own)
    cached = open_latents(dataset, "tiny")
    expected = []
    for shard, row in dataset.draw(100, seed=0):
        clip = pixels_of(decode_clip(dataset.read(shard, row).media))
        error = (wan.decode(cached.read(shard, row)[0][None]) - clip) * 127.5
        expected.append(20 * math.log10(255 / float(error.square().mean().sqrt())))
    np.testing.assert_allclose(found.decibels, expected, rtol=1e-4)
    middle = np.median(expected)
    assert f"PSNR {middle:.1f} dB" in str(found)
    assert f"differ from their pixels by {255 / 10 ** (middle / 20):.1f} of 255" in str(found)
    assert f"the worst by {255 / 10 ** (min(expected) / 20):.1f}" in str(found)


def test_a_check_refuses_what_the_autoencoder_does_not_say(home, own, tmp_path):
    folder = own / "latents" / "tiny"
    samples = members(folder / "000002.tar")
    changed = open_latents(open_dataset(own), "tiny").read(2, 3)[0] * 1.1
    samples[list(samples)[3]]["safetensors"] = save({"latents": changed.contiguous()})
    write_tar(str(folder / "000002.tar"), samples.items())
    write_index(str(folder), "000002", "tensor")
    shutil.copytree(own, tmp_path / "fresh")  # of a path that no index is cached for
    with pytest.raises(DataError, match=r"000002\.tar: row 3 is wrong .* differs by 0\.0?[19]"):
        check(tmp_path / "fresh", home / "wan", name="tiny", count=100)
    other = write_autoencoder(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="was made with autoencoder wan, not with other; give"):
        check(own, other, name="tiny", count=1)


def test_the_estimate_is_what_encoding_then_takes(home):
    found = estimate(begin_encoding(open_dataset(home / "videos"), home / "wan"))
    stored = sum(path.stat().st_size for path in (home / "videos/latents/tiny").glob("0*"))
    assert found.bytes == pytest.approx(stored, rel=0.5)  # small tars end in 10 KiB of padding
    assert (found.samples, found.latents) == (26, (4, 2, 6, 8))
    assert 0 < found.hours < 1
    assert str(found).startswith("26 clips of 5x24x32 as latents of 4x2x6x8, autoencoder of 0.1 M")


def test_measured_latents_have_mean_0_and_deviation_1(home, own):
    data = open_dataset(own)
    measured = measure(begin_encoding(data, home / "wan"))
    cached = encode(own, home / "wan", name="white", normalisation=measured)
    rows = [cached.read(*place)[0].float() for place in data.draw(26, seed=0)]
    for frames in (slice(0, 1), slice(1, None)):
        values = torch.stack([latents[:, frames] for latents in rows])
        zeros, ones = torch.zeros(4), torch.ones(4)
        # bfloat16 keeps 8 bits of the mantissa
        torch.testing.assert_close(values.mean((0, 2, 3, 4)), zeros, atol=0.01, rtol=0)
        torch.testing.assert_close(values.std((0, 2, 3, 4)), ones, atol=0.01, rtol=0)
    images = measure(begin_encoding(open_dataset(home / "images"), home / "wan"))
    assert images.first == images.later


def test_clips_are_encoded_at_a_smaller_size_and_foreign_ones_at_a_given_one(
    home, own, tmp_path, wan
):
    small = encode(own, home / "wan", name="small", size=(5, 12, 16))
    assert small.read(0, 0)[0].shape == (4, 2, 3, 4)
    with pytest.raises(ConfigError, match="no whole multiple"):
        encode(own, home / "wan", name="odd", size=(5, 16, 20))
    record = open_dataset(own).read(0, 0)
    write_tar(str(tmp_path / "f" / "0.tar"), [("a", {"mp4": record.media, "txt": b"text"})])
    index(tmp_path / "f")
    with pytest.raises(ConfigError, match="--size: missing because the clips of"):
        encode(tmp_path / "f", home / "wan", name="tiny")
    latents, told = encode(tmp_path / "f", home / "wan", name="tiny", size=(5, 12, 16)).read(0, 0)
    clip = read_clip(record.media, "video", (5, 12, 16)).clip
    assert torch.equal(latents, wan.encode(pixels_of(clip))[0].to(torch.bfloat16))
    assert (told.fps, told.original_height) == (8.0, 24.0)


def test_a_clip_that_cannot_be_read_is_named_with_the_way_out(home, own):
    tar = own / "shards" / "000001.tar"
    content = bytearray(tar.read_bytes())
    content[int(open_dataset(own).index(1)[2]["media"]["offset"]) + 300] ^= 1
    tar.write_bytes(content)
    with pytest.raises(DataError, match=r"row 2 of shard 000001 .* verify \S+ --repair"):
        encode(own, home / "wan", name="new")


def test_an_autoencoder_is_found_in_the_folder_of_a_pipeline(home, tmp_path, wan):
    shutil.copytree(home / "wan", tmp_path / "pipeline" / "vae")
    found = Autoencoder(tmp_path / "pipeline")
    assert found.name == "pipeline"
    clip = (5, 24, 32)
    assert found.provenance(clip, None).same_autoencoder(wan.provenance(clip, None))


def rewritten(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_is_no_autoencoder_is_refused_and_runs_no_code(home, tmp_path):
    from diffusers import AutoencoderKL, UNet2DModel

    def copy(name: str) -> Path:
        return Path(shutil.copytree(home / "wan", tmp_path / name))

    with pytest.raises(InputMissing, match="no such folder; give an autoencoder's folder"):
        Autoencoder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    flat = {"block_out_channels": (8,), "norm_num_groups": 2, "latent_channels": 4}
    AutoencoderKL(**flat).save_pretrained(tmp_path / "pictures")
    UNet2DModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        norm_num_groups=2,
    ).save_pretrained(tmp_path / "unet")  # fmt: skip
    code = rewritten(copy("code"), _class_name="Mine", auto_map={"AutoModel": "mine.Mine"})
    (code / "mine.py").write_text("raise SystemExit('code of a stranger')")
    pickled = copy("pickled")
    torch.save({}, pickled / "diffusion_pytorch_model.bin")
    (pickled / "diffusion_pytorch_model.safetensors").unlink()
    extra = copy("extra") / "diffusion_pytorch_model.safetensors"
    save_file(load_file(extra) | {"encoder.x": torch.zeros(1)}, extra)
    larger = rewritten(copy("larger"), z_dim=5, latents_mean=[0.0] * 5, latents_std=[1.0] * 5)
    for folder, reason in (
        (tmp_path / "empty", "No such file"),
        (tmp_path / "pictures", "is no video autoencoder because"),
        (tmp_path / "unet", "'UNet2DModel' is no autoencoder of diffusers"),
        (code, "'Mine' is no autoencoder of diffusers"),
        (pickled, "safetensors"),
        (extra.parent, "1 of its weights have no place in it, encoder.x first"),
        (larger, "is no video autoencoder because"),
        (rewritten(copy("deeper"), num_res_blocks=2), "of its weights are missing"),
    ):
        with pytest.raises(ConfigError, match=reason):
            Autoencoder(folder)
    few = Normalisation(first=PARTS.first, later=Statistics(mean=[0.0] * 3, std=[1.0] * 3))
    with pytest.raises(ConfigError, match="normalisation: is wrong because it is not 4 means"):
        Autoencoder(home / "wan", normalisation=few)


def test_the_command_encodes_checks_estimates_and_measures(home, own, tmp_path, capsys):
    command = ["data", "encode", str(own), "--vae", str(home / "wan"), "--name"]
    assert main([*command, "a", "--task", "1/2"]) == 0
    assert "this task is done; others are not" in capsys.readouterr().out
    assert main([*command, "a", "--task", "0/2"]) == 0
    assert f"{own}/latents/a: complete." in capsys.readouterr().out
    assert main([*command, "a", "--check", "3"]) == 0
    assert "latents/a: 3 encoded again, all equal; decoded again, clips differ" in (
        capsys.readouterr().out
    )
    assert main([*command, "b", "--estimate"]) == 0
    assert "26 clips of 5x24x32" in capsys.readouterr().out
    file = tmp_path / "normalisation.json"
    assert main([*command, "b", "--normalisation", str(file)]) == InputMissing.exit_code
    assert "write one with --measure" in capsys.readouterr().err
    assert main([*command, "b", "--measure", str(file)]) == 0
    assert not (own / "latents" / "b").exists()
    written = file.read_bytes()
    assert main([*command, "b", "--normalisation", str(file)]) == 0
    info = open_latents(open_dataset(own), "b").info
    assert info.provenance.normalisation == Normalisation.model_validate_json(written)
    assert main([*command, "b", "--check", "3"]) == 0  # at the normalisation of the set
    file.write_text("{}")
    assert main([*command, "c", "--normalisation", str(file)]) == ConfigError.exit_code
    assert main([*command, "c", "--measure", str(file)]) != 0
    assert file.read_text() == "{}"
    with pytest.raises(SystemExit):
        main([*command, "a", "--check", "0"])
