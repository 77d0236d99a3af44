"""A large build in two interrupted halves equals one that nothing disturbed."""

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
from PIL import Image

from data_pipeline.making.build import build
from data_pipeline.making.toy import toy_clips
from data_pipeline.shards.dataset import open_dataset

BUILD = """
import sys
from data_pipeline.making.build import build
if __name__ == "__main__":
    source, out, per_shard, task = sys.argv[1:]
    build(source, out, frames=1, height=16, width=16, shard_samples=int(per_shard),
          task=(int(task), 2))
"""


def write_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    lines = []
    for number, (toy, clip) in enumerate(toy_clips(count, (1, 20, 24), 0, moving=False)):
        Image.fromarray(clip[0]).save(folder / f"{number:06d}.png", compress_level=1)
        lines.append(json.dumps({"file": f"{number:06d}.png", "caption": toy.caption}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def finished(out: Path) -> int:
    return len(list((out / "shards").glob("*.idx")))


def run_until(command: list[str], out: Path, shards: int) -> bool:
    """Kill a build once so many shards are there; whether it was still at work."""
    job = subprocess.Popen(command)
    while finished(out) < shards and job.poll() is None:
        time.sleep(0.005)
    job.send_signal(signal.SIGKILL)
    return job.wait() == -signal.SIGKILL


def halves_equal_the_whole(tmp_path: Path, samples: int, per_shard: int) -> None:
    source = write_images(tmp_path / "source", samples)
    whole = build(source, tmp_path / "whole", frames=1, height=16, width=16,
                  shard_samples=per_shard)  # fmt: skip
    out, kills = tmp_path / "halves", 0
    commands = [
        [sys.executable, "-c", BUILD, str(source), str(out), str(per_shard), str(task)]
        for task in (1, 0)
    ]
    shards = samples // per_shard
    for done, command in enumerate(commands):
        kills += run_until(command, out, done * shards // 2 + shards // 8 + 1)
        assert not (out / "dataset.json").exists()
        subprocess.run(command, check=True)
    assert kills == 2
    names = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert (
        len(names) == 3 * shards + 4
    )  # tar, idx, rejections; claim, plan, manifest, contact sheet
    assert whole is not None
    assert open_dataset(out).info == whole.info
    assert whole.info.samples == samples
    rng = np.random.default_rng(0)
    for number in rng.choice(samples, 20, replace=False).tolist():
        metadata = whole.read(number // per_shard, number % per_shard).metadata
        assert metadata["source"] == f"{number:06d}.png"


@pytest.mark.dist
def test_halves_that_were_killed_equal_the_whole(tmp_path):
    halves_equal_the_whole(tmp_path, samples=320, per_shard=20)


@pytest.mark.slow
@pytest.mark.dist
def test_builds_that_are_struck_end_with_the_bytes_of_those_that_are_not(tmp_path):
    command = [sys.executable, "-m", "benchmarks.soak_build", "--faults", "10"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(next(tmp_path.glob("soak-build-10-*.json")).read_text())
    assert sum(result["faults"].values()) >= 10
    assert not result["wrong"]


@pytest.mark.slow
@pytest.mark.dist
def test_4000_samples_in_100_shards_from_killed_halves_equal_the_whole(tmp_path):
    halves_equal_the_whole(tmp_path, samples=4_000, per_shard=40)
    for folder in ("source", "whole", "halves"):
        shutil.rmtree(tmp_path / folder)
    assert os.listdir(tmp_path) == []
