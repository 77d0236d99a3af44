"""Two small recipes at the paper's settings for a few steps, by public commands, and digests of
what they make."""

import hashlib
import json
import platform
import sys
from pathlib import Path
from unittest import mock

import torch

from data_pipeline.making.toy import Staging, all_toys, write_toy
from data_pipeline.media.codec import Clip, encode_clip
from data_pipeline.text.embed import make_tiny_encoder
from t2v.checkpoint.tensor_files import read_whole, tensor_kinds
from t2v.cli import main
from t2v.sampling import generate

RECIPES = Path(__file__).parent / "golden"
STEPS = 20
PROMPT = "a red circle moves left"


def tell(folder: Path) -> dict:
    """Losses of 20 steps of base and pyramid, digests of the last checkpoint and of a sample."""
    write_toy(
        folder / "media",
        videos=24,
        images=8,
        staging=Staging(radius=0.25, travel=0.36, jitter=0.07),
    )
    make_tiny_encoder(folder / "encoder", sorted({t.caption for t in all_toys()}), width=64, seed=0)
    for kind in ("videos", "images"):
        data = folder / "data" / kind
        command("data", "build", folder / "media" / kind, data, "--size=8x24x32", "--fps=8")
        command("data", "embed", data, f"--encoder={folder / 'encoder'}", "--name=tiny-t5",
                "--max-tokens=16")  # fmt: skip
    losses = {}
    for recipe in ("quickstart_base", "quickstart_pyramid"):
        overrides = [
            f"run_dir={folder / recipe}", f"total_steps={STEPS}", "engine.kind=single",
            "optimizer.warmup_steps=5", f"data.sources.0.path={folder / 'data/videos'}",
            f"data.sources.1.path={folder / 'data/images'}", "data.num_workers=0",
        ]  # fmt: skip
        if recipe == "quickstart_pyramid":
            overrides.append(f"warm_start.checkpoint={folder / 'quickstart_base'}")
        command("train", RECIPES / f"{recipe}.yaml", *overrides)
        lines = (folder / recipe / "metrics.jsonl").read_text().splitlines()
        losses[recipe] = [json.loads(line)["loss"] for line in lines]
    out = folder / "samples"
    with mock.patch.object(generate, "encode_clip", plain_clip):
        command("sample", folder / "quickstart_pyramid", f"--prompt={PROMPT}", f"--out={out}",
                f"--encoder={folder / 'encoder'}", "--seed=7")  # fmt: skip
    step = folder / "quickstart_pyramid" / "checkpoints" / f"step-{STEPS:08d}"
    return {
        "machine": platform.machine(),
        "torch": torch.__version__.partition("+")[0],
        "losses": losses,
        "checkpoint": digest_of_tensors(step),
        "sample": hashlib.sha256((out / "0000.mp4").read_bytes()).hexdigest(),
    }


def plain_clip(clip: Clip, fps: float, *, index_first: bool) -> bytes:
    """A clip with its index last, as samples were when their digest was recorded."""
    return encode_clip(clip, fps)


def digest_of_tensors(step: Path) -> str:
    """Of the names and bytes of all tensors of a checkpoint."""
    told = hashlib.sha256()
    for name in sorted(tensor_kinds(step)):
        told.update(name.encode() + read_whole(step, name).numpy().tobytes())
    return told.hexdigest()


def command(*arguments: object) -> None:
    """A public command, which must do what it is told."""
    assert main([str(argument) for argument in arguments]) == 0, arguments


if __name__ == "__main__":
    where = Path(sys.argv[1])
    (where / "told.json").write_text(json.dumps(tell(where), indent=1) + "\n")
