"""Real captioned H.264 clips, built, embedded, encoded, trained on by each method and sampled."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from data_pipeline.feeding.loader import Loader
from data_pipeline.making.build import build
from data_pipeline.media.codec import decode_clip
from data_pipeline.text.embed import embed, make_tiny_encoder
from t2v.checkpoint.finding import load_weights, resolve_checkpoint
from t2v.cli import main
from t2v.recipe.recipe import RunConfig, load_config, method_of
from tests.tiny_autoencoder import write_autoencoder

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]
# A small two-level model on 8x36x64 -> 16x72x128.
HPDM: dict[str, Any] = {
    "kind": "hpdm",
    "pyramid": {"levels": 2, "patch_size": [8, 36, 64], "clip_size": [16, 72, 128]},
    "model": {
        "token_size": [1, 6, 8],
        "token_dim": 160,
        "num_latents": 32,
        "latent_dim": 128,
        "latent_layers": 1,
        "token_head_dim": 32,
        "latent_head_dim": 32,
        "levels_per_block": [1, 2],
        "conditioning_dim": 128,
        "self_conditioning_rate": 0.9,
    },
    "diffusion": {"input_scale": 1.0, "input_scale_growth": 1.0, "sigma_mean": 0.0},
    "sampling": {"steps": [4, 2], "fps": 8.0},
}
# 18x32, 36x64 and 72x128, in six units: one frame and five times three.
PIXELS: dict[str, Any] = {
    "kind": "pyramid-flow",
    "space": "pixels",
    "temporal": "pyramid",
    "clip_size": [16, 72, 128],
    "unit_frames": 3,
    "flow": {"joints": [0.333, 0.666]},
    "model": {"token_size": [6, 8], "dim": 128, "head_dim": 32, "double_blocks": 1,
              "single_blocks": 2},
    "stage_turns": [0, 1, 1, 2],
    "turn_samples": 2,
    "sampling": {"steps": [2, 2, 2], "fps": 8.0},
}  # fmt: skip
# 17 frames, for the autoencoder takes one and then four at a time: five latents of 18x32.
LATENTS: dict[str, Any] = PIXELS | {
    "space": "latents",
    "latents": {"name": "wan", "channels": 4, "stride": [4, 4, 4]},
    "clip_size": [17, 72, 128],
    "unit_frames": 1,
    "flow": {"joints": [0.5]},
    "model": PIXELS["model"] | {"token_size": [3, 4]},
    "stage_turns": [0, 1],
    "turn_samples": 4,
    "sampling": {"steps": [2, 2], "fps": 8.0},
}


def recipe(workdir: Path, method: dict[str, Any]) -> dict[str, Any]:
    """50 steps of a method."""
    return {
        "name": "clips",
        "run_dir": str(workdir / "run"),
        "seed": 0,
        "total_steps": 50,
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "ema_half_life_steps": 5.0,
        "method": method,
        "conditioning": {"kind": "text", "encoder": "tiny", "width": 32, "max_tokens": 32},
        "data": {"sources": [{"path": str(workdir / "data")}], "num_workers": 1},
        "optimizer": {"name": "adamw", "learning_rate": 0.002, "warmup_steps": 5},
        "engine": {"kind": "single", "precision": "fp32"},
        "checkpoint": {"every_steps": 25},
        "metrics": {},
    }


def losses_before_and_after(config: RunConfig, run: Path) -> tuple[Tensor, Tensor]:
    """Losses of each part on 32 fixed samples at fixed noise, untrained and trained."""
    settings = {"seed": 1, "global_batch_size": 32, "micro_batch_size": 32}
    with closing(
        Loader(
            config.data,
            config.method.view,
            config.conditioning,
            **settings,
            rank=0,
            world_size=1,
            latents=config.method.cached_latents,
        )
    ) as loader:
        [batch] = next(iter(loader.steps(0, 1)))
    method = method_of(config)
    model = method.network()
    model.init_weights(config.seed)
    losses, cpu = [], torch.device("cpu")
    for _ in range(2):
        with torch.no_grad():
            losses.append(method.losses(model, batch, seed=config.seed, device=cpu))
        load_weights(resolve_checkpoint(run), model, weights="raw")
    return losses[0], losses[1]


@pytest.mark.parametrize(
    ("method", "frames"),
    [(HPDM, 16), (PIXELS, 16), (LATENTS, 17)],
    ids=["hpdm", "pyramid flow", "pyramid flow in latents"],
)
def test_loss_falls_on_real_clips_and_a_sample_is_written(shared_clips, tmp_path, method, frames):
    data = build(shared_clips, tmp_path / "data", frames=frames, height=72, width=128, fps=8.0)
    assert data is not None
    lines = (shared_clips / "captions.jsonl").read_text().splitlines()
    captions = [json.loads(line)["caption"] for line in lines]
    assert data.info.samples == len(captions)
    make_tiny_encoder(tmp_path / "encoder", captions, width=32, seed=0)
    embed(tmp_path / "data", tmp_path / "encoder", name="tiny", max_tokens=32)
    means = ["--encoder", str(tmp_path / "encoder")]
    if method is LATENTS:
        write_autoencoder(tmp_path / "vae")
        vae = ["--vae", str(tmp_path / "vae")]
        assert main(["data", "encode", str(tmp_path / "data"), *vae, "--name", "wan"]) == 0
        means += vae
    config = tmp_path / "clips.yaml"
    config.write_text(yaml.safe_dump(recipe(tmp_path, method)))

    assert main(["train", str(config)]) == 0
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == list(range(1, 51))
    before, after = losses_before_and_after(load_config(config), tmp_path / "run")
    assert (after < 0.9 * before).all(), (before, after)

    arguments = ["sample", str(tmp_path / "run"), "--prompt", captions[0], *means]
    assert main([*arguments, "--out", str(tmp_path / "samples")]) == 0
    [record] = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert record["prompt"] == captions[0]
    clip = decode_clip((tmp_path / "samples" / record["file"]).read_bytes())
    assert clip.shape == (frames, 72, 128, 3)
    print(f"losses of the parts: {before.tolist()} -> {after.tolist()}")
