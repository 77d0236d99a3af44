"""From captioned media to datasets: same input, same bytes; bad input, one clear line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_pipeline.errors import ConfigError, DataError, InputMissing, UserError
from data_pipeline.making import build as building
from data_pipeline.making import plan as planning
from data_pipeline.making.build import build
from data_pipeline.making.indexing import index
from data_pipeline.making.plan import Plan
from data_pipeline.media.clips import read_clip
from data_pipeline.media.codec import (
    decode_clip,
    decode_image,
    encode_image,
)
from data_pipeline.shards.dataset import open_dataset

SIZE = {"frames": 8, "height": 24, "width": 32}


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def few(media, tmp_path) -> Path:
    """Four captioned videos of one's own to spoil."""
    folder = tmp_path / "few"
    folder.mkdir()
    lines = (media / "videos" / "captions.jsonl").read_text().splitlines()[:4]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    for line in lines:
        shutil.copy(media / "videos" / json.loads(line)["file"], folder)
    return folder


def test_a_dataset_holds_every_clip_at_its_size_with_its_caption(media, datasets):
    dataset = open_dataset(datasets / "videos")
    lines = [
        json.loads(line) for line in (media / "videos/captions.jsonl").read_text().splitlines()
    ]
    assert dataset.info.samples == len(lines) == sum(dataset.shard_sizes)
    assert dataset.info.clip == (8, 24, 32)
    for number in (0, 7, 25):
        record = dataset.read(number // 6, number % 6)
        source = (media / "videos" / lines[number]["file"]).read_bytes()
        assert record.caption == lines[number]["caption"]
        expected = {"frames": 8, "fps": 8.0, "height": 24, "width": 32, "original_height": 32,
                    "original_width": 48, "source": lines[number]["file"]}  # fmt: skip
        assert expected.items() <= record.metadata.items()
        wanted = read_clip(source, "video", (8, 24, 32)).clip
        # Edges bleed: colour is stored at half resolution.
        assert abs(decode_clip(record.media).astype(int) - wanted).mean() < 4
    images = open_dataset(datasets / "images")
    assert (images.info.kind, images.info.clip) == ("image", (1, 24, 32))
    assert decode_image(images.read(1, 3).media).shape == (24, 32, 3)


def test_sidecar_captions_make_the_same_shards(few, tmp_path):
    build(few, tmp_path / "a", **SIZE)
    folder = tmp_path / "sidecar"
    folder.mkdir()
    for number, line in enumerate((few / "captions.jsonl").read_text().splitlines()):
        entry = json.loads(line)
        shutil.copy(few / entry["file"], folder)
        if number % 2:
            (folder / entry["file"]).with_suffix(".txt").write_text(entry["caption"] + "\n")
        else:
            content = json.dumps({"caption": entry["caption"]})
            (folder / entry["file"]).with_suffix(".json").write_text(content)
    build(folder, tmp_path / "b", **SIZE)
    assert files(tmp_path / "a" / "shards") == files(tmp_path / "b" / "shards")


def test_labels_and_other_fields_reach_the_metadata(few, tmp_path):
    lines = [json.loads(line) for line in (few / "captions.jsonl").read_text().splitlines()]
    text = [json.dumps(line | {"label": 7, "licence": "CC0"}) for line in lines]
    (few / "captions.jsonl").write_text("\n".join(text))
    dataset = build(few, tmp_path / "out", **SIZE)
    assert {"label": 7, "licence": "CC0"}.items() <= dataset.read(0, 3).metadata.items()


def test_building_again_changes_nothing(media, datasets, tmp_path):
    out = tmp_path / "videos"
    shutil.copytree(datasets / "videos", out, ignore=shutil.ignore_patterns("embeddings"))
    before = {name: os.stat(out / name).st_mtime_ns for name in files(out)}
    build(media / "videos", out, **SIZE, shard_samples=6)
    assert {name: os.stat(out / name).st_mtime_ns for name in files(out)} == before


def test_tasks_in_any_order_make_the_same_dataset(media, datasets, tmp_path):
    results = [
        build(media / "videos", tmp_path, **SIZE, shard_samples=6, task=(task, 3))
        for task in (2, 0, 1)
    ]
    assert results[:2] == [None, None]
    expected = files(datasets / "videos")
    assert files(tmp_path) == {
        name: content for name, content in expected.items() if not name.startswith("embeddings")
    }


@pytest.mark.dist
def test_a_killed_build_goes_on_to_the_same_dataset(media, datasets, tmp_path):
    out = tmp_path / "out"
    call = f"build({str(media / 'videos')!r}, {str(out)!r}, **{SIZE}, shard_samples=6)"
    command = [sys.executable, "-c", f"from data_pipeline.making.build import build; {call}"]
    kills = 0
    for shard in (0, 2):
        job = subprocess.Popen(command)
        while not (out / "shards" / f"{shard:06d}.idx").exists() and job.poll() is None:
            time.sleep(0.002)
        job.send_signal(signal.SIGKILL)
        kills += job.wait() == -signal.SIGKILL
        if not (out / "dataset.json").exists():
            with pytest.raises(InputMissing, match="is no dataset"):
                open_dataset(out)
    assert kills
    subprocess.run(command, check=True)
    expected = files(datasets / "videos")
    assert files(out) == {
        name: content for name, content in expected.items() if not name.startswith("embeddings")
    }


def test_another_build_in_the_same_folder_is_refused(media, datasets, few):
    for source, settings, said in (
        (few, SIZE, "was begun of another source, or of .* before it changed; put back"),
        (media / "videos", SIZE | {"height": 26}, "holds a dataset of other settings"),
    ):
        with pytest.raises(ConfigError, match=said):
            build(source, datasets / "videos", **settings, shard_samples=6)
    with pytest.raises(ConfigError, match="is not empty and no build of ours"):
        build(few, media / "images", **SIZE)


def missing_clip(few: Path) -> None:
    (few / json.loads((few / "captions.jsonl").read_text().splitlines()[2])["file"]).unlink()


def no_files(few: Path) -> None:
    shutil.rmtree(few)
    few.mkdir()


def no_folder(few: Path) -> None:
    shutil.rmtree(few)


def no_captions(few: Path) -> None:
    (few / "captions.jsonl").unlink()


def cut_clip(few: Path) -> None:
    path = sorted(few.glob("*.mp4"))[3]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def line(text: str):
    def spoil(few: Path) -> None:
        with (few / "captions.jsonl").open("a") as file:
            file.write(text + "\n")

    return spoil


def image_too(few: Path) -> None:
    (few / "a.jpg").write_bytes(encode_image(np.zeros((32, 48, 3), np.uint8)))
    line('{"file": "a.jpg", "caption": "black"}')(few)


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (missing_clip, 66, r"captions.jsonl: row 3 \(000002.mp4\): no such file"),
        (no_files, 66, "holds no video or image; check the folder"),
        (no_folder, 66, "no such folder"),
        (no_captions, 65, r"000000.mp4: has no caption \(4 of 4 .*; write a .txt or .json beside"),
        (cut_clip, 65, r"000003.mp4: cannot be decoded.*; repair or remove it"),
        (line("{nonsense"), 65, "row 5: row is no JSON object"),
        (line("[1]"), 65, "row 5: row is no JSON object"),
        (line('{"file": "000001.mp4"}'), 65, r"000001.mp4 \(row 5\): has no caption"),
        (line('{"file": "../a.mp4", "caption": ""}'), 65, "row 5 .*: file leaves the folder"),
        (line('{"file": "/a.mp4", "caption": ""}'), 65, "row 5 .*: file leaves the folder"),
        (
            line('{"file": "captions.jsonl", "caption": ""}'),
            65,
            "row 5 .*: file is of another type",
        ),
        (image_too, 78, "choose one with --kind"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(few, tmp_path, spoil, code, message):
    spoil(few)
    with pytest.raises(UserError, match=message) as error:
        build(few, tmp_path / "out", **SIZE)
    assert error.value.exit_code == code
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 25}, "height: value 25 is wrong because H.264 .* use 24 or 26"),
        ({"frames": 0}, "frames: value 0 is wrong because it is below 1"),
        ({"fps": -1.0}, "fps: value -1.0 is wrong"),
        ({"fps": float("nan")}, "fps: value nan is wrong"),
        ({"max_drop_rate": -1.0}, "max_drop_rate: value -1.0 is wrong because it is no share"),
        ({"max_drop_rate": float("nan")}, "max_drop_rate: value nan is wrong"),
        ({"task": (3, 3)}, "task: value 3/3 is wrong"),
    ],
)
def test_bad_settings_are_refused(few, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        build(few, tmp_path / "out", **(SIZE | settings))
    assert not (tmp_path / "out").exists()


def test_unusable_files_within_the_budget_are_left_out_and_counted(few, tmp_path):
    cut_clip(few)
    dataset = build(few, tmp_path / "out", **SIZE, max_drop_rate=0.25)
    assert dataset.info.samples == 3
    assert sum(dataset.info.rejected.values()) == 1
    assert "000003.mp4" in (tmp_path / "out/shards/000000.rejected.json").read_text()


def test_one_kind_can_be_chosen_from_a_mixed_folder(few, tmp_path):
    image_too(few)
    assert build(few, tmp_path / "v", **SIZE, kind="video").info.samples == 4
    assert build(few, tmp_path / "i", **SIZE, kind="image").info.samples == 1


def test_frames_can_be_taken_at_another_rate(few, tmp_path):
    dataset = build(few, tmp_path / "out", frames=4, height=32, width=48, fps=4.0)
    clip = decode_clip(dataset.read(0, 1).media)
    source = decode_clip((few / "000001.mp4").read_bytes())
    assert dataset.read(0, 1).metadata["fps"] == 4.0
    assert abs(clip.astype(int) - source[::2]).mean() < 1.5


@pytest.fixture
def foreign(media, tmp_path) -> Path:
    """Shards as video2dataset writes them: .mp4, .txt and .json of each key."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as tar:
            for row in range(3):
                number = 3 * shard + row
                path = media / "videos" / f"{number:06d}.mp4"
                tar.write({
                    "__key__": f"{number:09d}",
                    "mp4": path.read_bytes(),
                    "txt": f"foreign {number}",
                    "json": json.dumps({"caption": f"foreign {number}", "status": "success"}),
                })  # fmt: skip
    return folder


def test_shards_of_others_are_usable_as_they_are(foreign):
    before = files(foreign)
    dataset = index(foreign, notes={"licence": "CC-BY"})
    assert (dataset.info.kind, dataset.info.clip, dataset.info.samples) == ("video", None, 6)
    assert dataset.read(1, 2).caption == "foreign 5"
    assert before.items() <= files(foreign).items()
    assert index(foreign, notes={"licence": "CC-BY"}).info == dataset.info


def test_a_change_in_any_shard_changes_the_fingerprint(foreign):
    first = index(foreign).info.fingerprint
    path = foreign / "00001.tar"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"foreign 4", b"foreign X"))
    assert index(foreign).info.fingerprint != first
    path.write_bytes(content)
    assert index(foreign).info.fingerprint == first


def test_folders_without_shards_cannot_be_indexed(tmp_path, datasets):
    with pytest.raises(InputMissing, match=r"holds no \.tar; give"):
        index(tmp_path)
    with pytest.raises(ConfigError, match="is a build of ours"):
        index(datasets / "videos")
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as tar:
        tar.write({"__key__": "0", "txt": "only text"})
    with pytest.raises(DataError, match="hold no video and no image"):
        index(tmp_path)


def test_damaged_manifests_are_told(tmp_path, datasets):
    content = json.loads((datasets / "videos" / "dataset.json").read_text())
    for text, error, message in (
        ("{", DataError, "is damaged because"),
        (json.dumps(content | {"format": 2}), ConfigError, "format 2 is not 1"),
        (json.dumps(content | {"kind": "sound"}), DataError, "kind: is wrong because"),
    ):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(error, match=message):
            open_dataset(tmp_path)


def test_odd_real_clips_are_built(shared_clips, tmp_path):
    odd = tmp_path / "odd"
    shutil.copytree(shared_clips / "odd", odd)
    for path in list(odd.iterdir()):
        path.with_suffix(".txt").write_text(f"a test clip, {path.stem}")
    dataset = build(odd, tmp_path / "built", frames=10, height=36, width=64)
    assert dataset.info.samples == 8


@pytest.mark.parametrize("content", [b"more than there was", None])
def test_a_file_that_changes_after_it_was_listed_stops_a_build(few, tmp_path, monkeypatch, content):
    """Put back, it gives the bytes of a build that nothing happened to."""
    build(few, tmp_path / "whole", **SIZE, shard_samples=2)
    film, open_plan = few / "000003.mp4", building.open_plan
    before = film.read_bytes()

    def change(path: str) -> Plan:
        film.write_bytes(before + content) if content else film.unlink()
        return open_plan(path)

    monkeypatch.setattr(building, "open_plan", change)
    with pytest.raises(InputMissing, match=r"000003\.mp4: (is not what was listed|no such file)"):
        build(few, tmp_path / "out", **SIZE, shard_samples=2, max_drop_rate=1.0)
    monkeypatch.undo()
    film.write_bytes(before)
    build(few, tmp_path / "out", **SIZE, shard_samples=2, max_drop_rate=1.0)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("was_killed", [True, False])
def test_no_plan_is_kept_of_a_source_that_changed_meanwhile(few, tmp_path, monkeypatch, was_killed):
    """Not even where a build that was killed had written down what it would build."""
    build(few, tmp_path / "whole", **SIZE)
    if was_killed:
        (tmp_path / "out").mkdir()
        shutil.copy(tmp_path / "whole" / "build.json", tmp_path / "out")
    film, aside, write_plan = few / "000003.mp4", tmp_path / "aside", planning.write_plan

    def lose(*arguments, **options) -> None:
        film.rename(aside)
        write_plan(*arguments, **options)

    monkeypatch.setattr(planning, "write_plan", lose)
    with pytest.raises(ConfigError, match="changed while it was listed; build again"):
        build(few, tmp_path / "out", **SIZE)
    monkeypatch.undo()
    aside.rename(film)
    build(few, tmp_path / "out", **SIZE)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
