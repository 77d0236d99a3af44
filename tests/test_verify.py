"""Every fault is found before a run meets it, named, and mended without touching good samples."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from data_pipeline.errors import InputMissing
from data_pipeline.making.indexing import index
from data_pipeline.making.verify import repair, verify
from data_pipeline.media.codec import encode_clip
from data_pipeline.shards.dataset import open_dataset
from data_pipeline.shards.tar import list_captions, open_index, write_index, write_tar
from data_pipeline.text.embed import embed
from data_pipeline.text.embeddings import open_embeddings
from t2v.cli import main


@pytest.fixture
def own(datasets, tmp_path) -> Path:
    """A copy of the videos, shards of 6, with embeddings, to spoil."""
    return Path(shutil.copytree(datasets / "videos", tmp_path / "videos"))


def tar_of(folder: Path, shard: int = 1) -> Path:
    return folder / "shards" / f"{shard:06d}.tar"


def members(tar: Path) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tar) as file:
        for member in file:
            key, suffix = member.name.split(".")
            samples.setdefault(key, {})[suffix] = file.extractfile(member).read()
    return samples


def places(tar: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(tar) as file:
        return file.getmembers()


def test_sound_datasets_have_no_fault(datasets):
    assert verify(datasets / "videos") == []
    assert verify(datasets / "images") == []
    with pytest.raises(InputMissing, match="is no dataset"):
        verify(datasets)


def cut_inside_a_member(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes()[: places(tar)[4].offset_data + 10])


def cut_between_members(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes()[: places(tar)[5].offset])


def cut_between_samples(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes()[: places(tar)[4].offset])


def cut_inside_a_header(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes()[: places(tar)[4].offset + 100])


def damaged_header(tar: Path) -> None:
    content = bytearray(tar.read_bytes())
    content[places(tar)[4].offset + 150] ^= 0xFF
    tar.write_bytes(content)


def a_page(tar: Path) -> None:
    tar.write_text("<Error><Code>AccessDenied</Code></Error>" * 400)


@pytest.mark.parametrize(
    ("spoil", "whole"),
    [
        (cut_inside_a_member, 2),
        (cut_between_members, 2),
        (cut_between_samples, 1),  # the last before a cut might be partial
        (cut_inside_a_header, 1),
        (damaged_header, 1),
        (a_page, 0),
    ],
)
def test_what_a_damaged_tar_lost_is_counted_and_the_rest_saved(own, spoil, whole):
    """R15."""
    before = members(tar_of(own))
    spoil(tar_of(own))
    faults = verify(own)
    assert {Path(fault.path).name for fault in faults} == {"000001.tar"}
    assert any(f"holds {whole} whole samples, but should hold 6" in str(f) for f in faults)
    dataset = repair(own, faults)
    assert dataset.info.samples == 20 + whole
    assert dataset.info.rejected["lost to repair"] == 6 - whole
    kept = members(tar_of(own))
    assert kept == {key: before[key] for key in list(before)[:whole]}
    assert tar_of(own).with_suffix(".tar.damaged").exists()
    assert [fault for fault in verify(own) if "embeddings" not in fault.path] == []


def spoiled_media(media: bytes) -> dict[str, bytes]:
    noise = bytearray(media)
    rng = np.random.default_rng(0)
    start = noise.index(b"mdat") + 40
    for at in rng.integers(start, len(noise) - 1200, 60):
        noise[at] ^= 0x5A
    black = np.zeros((8, 24, 32, 3), np.uint8)
    return {
        "zeros": bytes(len(media)),
        "cut": media[: len(media) // 2],
        "noise": bytes(noise),
        "no frame": b"",
        "fps": encode_clip(black, 24.0),
        "size": encode_clip(np.zeros((8, 48, 32, 3), np.uint8), 8.0),
        "short": encode_clip(black[:5], 8.0),
        "still": encode_clip(black[:1], 8.0),
    }


REASONS = {
    "zeros": "cannot be decoded",
    "cut": "cannot be decoded",
    "noise": r"cannot be decoded|is damaged",
    "no frame": "cannot be decoded",
    "fps": "has 24 frames per second, its json 8",
    "size": r"is \(8, 48, 32\) .* not \(8, 24, 32\)",
    "short": r"is \(5, 24, 32\)",
    "still": "is one still frame",
}


def test_every_unusable_video_is_named_and_dropped_alone(own):
    """R16, as a shard written so: the bytes match their index, the pictures do not."""
    samples = members(tar_of(own))
    clip = np.random.default_rng(1).integers(0, 255, (8, 24, 32, 3), np.uint8)
    media = spoiled_media(encode_clip(clip, 8.0))
    good = list(samples)[5]
    json_part = samples[good]["json"]
    spoiled = {name.replace(" ", "-"): {"mp4": m, "json": json_part} for name, m in media.items()}
    write_tar(str(tar_of(own)), [*spoiled.items(), (good, samples[good])])
    write_index(str(own / "shards"), "000001", "video")
    repaired = repair(own, [])  # dataset.json over the shards as they are
    assert repaired.info.samples == 29
    shutil.rmtree(own / "embeddings")
    faults = verify(own)
    assert [fault.key.replace("-", " ") for fault in faults] == list(media)
    for name, fault in zip(media, faults, strict=True):
        with_reason = pytest.raises(AssertionError, match=REASONS[name])
        with with_reason:
            raise AssertionError(str(fault))
    assert repair(own, faults).info.samples == 21
    assert verify(own) == []
    assert members(tar_of(own)) == {good: samples[good]}


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_harmful_members_are_named_and_dropped(own, tmp_path):
    """R24."""
    evil = [
        tarfile.TarInfo("../evil.mp4"),
        tarfile.TarInfo("/evil.mp4"),
        special("a.mp4", tarfile.SYMTYPE, "/etc/passwd"),
        special("b.mp4", tarfile.LNKTYPE, "a.mp4"),
        special("c.mp4", tarfile.CHRTYPE),
        special("d.mp4", tarfile.GNUTYPE_SPARSE),
        places(tar_of(own))[0],  # a key twice
    ]
    evil[-1].size = 0
    before = members(tar_of(own))
    with tarfile.open(tar_of(own), "a") as tar:
        for info in evil:
            tar.addfile(info)
    faults = verify(own)
    told = " ".join(str(fault) for fault in faults)
    for word in ("../evil.mp4", "'/evil.mp4'", "a.mp4", "b.mp4", "c.mp4", "d.mp4", "twice"):
        assert word in told
    repair(own, faults)
    assert members(tar_of(own)) == dict(list(before.items())[1:])
    assert not (tmp_path / "evil.mp4").exists()


def test_changed_bytes_and_lost_files_are_named(own):
    content = bytearray(tar_of(own).read_bytes())
    content[places(tar_of(own))[6].offset_data + 300] ^= 1
    tar_of(own).write_bytes(content)
    tar_of(own, 2).unlink()
    tar_of(own, 3).with_suffix(".idx").write_bytes(b"garbage")
    shutil.copy(tar_of(own, 0), tar_of(own, 9))
    told = "\n".join(str(fault) for fault in verify(own, decode=False))
    for line in (
        "000001.tar: '000001000003': bytes of its media differ from the index (crc32)",
        "000002.tar: is missing, and 6 samples with it",
        "000003.idx: is damaged because",
        "000009.tar: is not in dataset.json",
    ):
        assert line in told


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"garbage")])
def test_any_fault_ends_the_command_with_65_and_no_other_line(own, spoil, capsys):
    spoil(tar_of(own, 2).with_suffix(".idx"))
    assert main(["data", "verify", str(own), "--no-decode", "--workers", "1"]) == 65
    out, err = capsys.readouterr()
    assert "000002.idx" in out
    assert not err


def test_repair_of_an_index_gives_the_dataset_back(own):
    before = open_dataset(own).info
    tar_of(own).with_suffix(".idx").unlink()
    shutil.copy(tar_of(own, 2).with_suffix(".idx"), tar_of(own, 3).with_suffix(".idx"))
    faults = verify(own)
    assert repair(own, [fault for fault in faults if "embeddings" not in fault.path]).info == before
    assert verify(own) == []


def tokens_of(own: Path) -> Path:
    return own / "embeddings" / "tiny" / "000001.tar"


def rewrite_tokens(own: Path, change) -> None:
    folder = tokens_of(own).parent
    samples = list(members(tokens_of(own)).items())
    write_tar(str(tokens_of(own)), change(samples))
    write_index(str(folder), "000001", "tensor")


def shifted(samples):
    keys = [key for key, _ in samples]
    return zip(keys, [m for _, m in samples[1:] + samples[:1]], strict=True)


def missing(samples):
    return samples[:-1]


def damaged(content: bytes):
    return lambda samples: [(samples[0][0], samples[0][1] | {"safetensors": content}), *samples[1:]]


NAN = save({"tokens": torch.full((2, 8), float("nan"), dtype=torch.bfloat16)})
LONG = save({"tokens": torch.zeros(17, 8, dtype=torch.bfloat16)})
WIDE = save({"tokens": torch.zeros(2, 9, dtype=torch.bfloat16)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (shifted, "is of another caption than the sample has"),
        (missing, "holds 5 whole samples, but should hold 6"),
        (damaged(b"garbage"), "an embedding is damaged"),
        (damaged(NAN), "not finite"),
        (damaged(LONG), "has 17 tokens, not 1 to 16"),
        (damaged(WIDE), r"shape \(2, 9\)"),
    ],
)
def test_wrong_embeddings_are_found_and_made_again(own, datasets, change, reason):
    """R22."""
    before = {path.name: path.read_bytes() for path in tokens_of(own).parent.iterdir()}
    rewrite_tokens(own, change)
    faults = verify(own)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError("\n".join(map(str, faults)))
    repair(own, faults)
    embed(own, datasets / "encoder", name="tiny", max_tokens=16)
    assert {path.name: path.read_bytes() for path in tokens_of(own).parent.iterdir()} == before
    assert verify(own) == []


def test_a_row_in_doubt_leaves_its_neighbours_in_the_index(own):
    """So that only it is made again: a latent of a long clip takes seconds."""
    before = open_index(str(tokens_of(own).parent), "000001").copy()
    content = bytearray(tokens_of(own).read_bytes())
    content[int(before[2]["media"]["offset"]) + 70] ^= 1
    tokens_of(own).write_bytes(content)
    repair(own, verify(own))
    left = open_index(str(tokens_of(own).parent), "000001")
    assert left.tolist() == np.delete(before, 2).tolist()


def test_cut_embeddings_and_another_provenance_are_found(own):
    """R22."""
    tokens_of(own).write_bytes(tokens_of(own).read_bytes()[:3000])
    manifest = tokens_of(own).parent / "manifest.json"
    content = json.loads(manifest.read_text())
    content["provenance"]["max_tokens"] = 12
    manifest.write_text(json.dumps(content))
    told = "\n".join(str(fault) for fault in verify(own, decode=False))
    for line in ("000001.tar: holds 1 whole", "manifest.json: was changed by hand",
                 "provenance.json: differs from the manifest"):  # fmt: skip
        assert line in told
    manifest.unlink()
    assert "has no embeddings 'tiny'" in "\n".join(map(str, verify(own, decode=False)))


def test_odd_real_clips_are_sound_after_building(shared_clips, tmp_path):
    from data_pipeline.making.build import build

    odd = Path(shutil.copytree(shared_clips / "odd", tmp_path / "odd"))
    for path in list(odd.iterdir()):
        path.with_suffix(".txt").write_text(f"a test clip, {path.stem}")
    build(odd, tmp_path / "built", frames=10, height=36, width=64)
    assert verify(tmp_path / "built") == []


def test_foreign_shards_are_verified_at_their_own_sizes(shared_clips, tmp_path):
    """As they are: AVI in a shard, clips of any size, one of them spoiled."""
    samples = [
        (path.stem, {path.suffix[1:]: path.read_bytes(), "txt": path.stem.encode()})
        for path in sorted((shared_clips / "odd").iterdir())
    ]
    write_tar(str(tmp_path / "0.tar"), [*samples, ("zeros", {"mp4": bytes(4000), "txt": b"no"})])
    assert index(tmp_path).info.samples == 9
    (fault,) = verify(tmp_path)
    assert fault.key == "zeros"
    assert repair(tmp_path, [fault]).info.samples == 8
    assert verify(tmp_path) == []
    kept = list_captions(str(tmp_path / "0.tar"), "video")
    assert [(key, captions.first) for key, captions in kept] == [(key, key) for key, _ in samples]


def test_embeddings_open_after_repair_of_another_shard(own, datasets):
    cut_between_samples(tar_of(own))
    repair(own, verify(own))
    embed(own, datasets / "encoder", name="tiny", max_tokens=16)
    assert open_embeddings(open_dataset(own), "tiny").info.shards[1].samples == 1
    assert verify(own) == []
