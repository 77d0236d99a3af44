"""Clips of drifting scenes, stand-in networks that are random, and protocols to judge them by."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data_pipeline.making.build import build
from data_pipeline.media.codec import encode_clip
from data_pipeline.pyramid import Clip
from t2v.cli import main
from tests.stand_ins import (
    NoProbabilities,
    StandInC3D,
    StandInI3D,
    write_script,
)

SIZE = (4, 12, 16)
CLIPS = 48


def scene(number: int, noise: float = 0.0) -> Clip:
    """Blurred noise that drifts; `noise` of another kind over it."""
    rng = np.random.default_rng(number)
    coarse = rng.uniform(96, 160, (5, 6, 3)).repeat(4, 0).repeat(4, 1)
    clip = np.stack([coarse[t : t + SIZE[1], t : t + SIZE[2]] for t in range(SIZE[0])])
    clip = clip + noise * rng.normal(size=clip.shape)
    return clip.round().clip(0, 255).astype(np.uint8)


def write_samples(folder: Path, numbers: range, noise: float = 0.0) -> Path:
    """A folder of mp4 files of unknown origin."""
    folder.mkdir(parents=True)
    for number in numbers:
        (folder / f"{number:04d}.mp4").write_bytes(encode_clip(scene(number, noise), 8.0))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """`real`, a dataset of scenes with labels and captions; `other`, as many other scenes; and
    the networks."""
    home = tmp_path_factory.mktemp("evaluation")
    media = write_samples(home / "media", range(CLIPS))
    lines = [
        {"file": f"{n:04d}.mp4", "caption": f"scene {n % 3}", "label": n % 3} for n in range(CLIPS)
    ]
    (media / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    frames, height, width = SIZE
    build(media, home / "real", frames=frames, height=height, width=width, fps=8.0,
          shard_samples=20, notes={"split": "train01"})  # fmt: skip
    write_samples(home / "other", range(1000, 1000 + CLIPS))
    write_script(StandInI3D, home / "i3d.pt", 8)
    write_script(StandInC3D, home / "c3d.pt")
    write_script(NoProbabilities, home / "none.pt")
    torch.save({"weight": torch.zeros(3)}, home / "weights.pt")
    (home / "text.pt").write_text("no network")
    return home


def rules(home: Path, **changes: object) -> dict:
    """The smallest protocol of the scenes, with sections changed."""
    return {
        "format": 1,
        "name": "scenes",
        "real": {"dataset": str(home / "real")},
        "generated": {"clips": CLIPS},
        "fps": 8.0,
        "views": [{"name": "whole", "size": list(SIZE), "frames": 4, "metrics": ["fvd"]}],
        "i3d": {"path": str(home / "i3d.pt"), "resolution": 16},
        "uncertainty": {"resamples": 8},
    } | changes


def write_rules(path: Path, content: dict) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def run_evaluate(target: Path, protocol: Path, out: Path, *more: str) -> int:
    cache = [] if "--cache" in more else ["--cache", str(out.parent / "cache")]
    command = ["evaluate", str(target), "--protocol", str(protocol), "--out", str(out)]
    return main([*command, "--workers", "1", *cache, *more])


def result_of(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())
