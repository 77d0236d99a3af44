"""Pyramid Flow by the commands that users give, in pixels and in latents of an autoencoder.

Networks, text encoder and autoencoder have random weights; what is shown is everything but quality.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data_pipeline.latents.autoencoder import Autoencoder, pixels_of
from data_pipeline.making.build import build
from data_pipeline.making.toy import all_toys, write_toy
from data_pipeline.media.codec import decode_clip, encode_clip
from data_pipeline.text.embed import embed, make_tiny_encoder
from t2v.cli import main
from t2v.recipe.recipe import method_of, parse_config
from t2v.sampling.given_frames import read_given
from tests.tiny_autoencoder import write_autoencoder
from tests.tiny_flow import flow_content

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]
SIZE = {"frames": 9, "height": 24, "width": 32}
PIXELS = {
    "clip_size": [9, 24, 32],
    "unit_frames": 2,
    "flow": {"joints": [0.5]},
    "model": {"token_size": [4, 4]},
    "stage_turns": [0, 1],
    "sampling": {"steps": [2, 1], "guidance_scale": 2.0, "weights": "raw", "fps": 8.0},
    "conditioning": {"kind": "text", "encoder": "tiny", "width": 8, "max_tokens": 16},
}
LATENTS = {
    **PIXELS,
    "space": "latents",
    "latents": {"name": "wan", "channels": 4, "stride": [4, 4, 4]},
    "unit_frames": 1,
    "model": {"token_size": [1, 1]},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Toy clips and images with embeddings and latents, and a run of two steps of each recipe."""
    folder = tmp_path_factory.mktemp("flow")
    write_toy(folder / "media", videos=10, images=6, size=(9, 32, 48), fps=8.0)
    make_tiny_encoder(folder / "encoder", [toy.caption for toy in all_toys()], width=8, seed=0)
    write_autoencoder(folder / "vae")
    for kind in ("videos", "images"):
        build(folder / "media" / kind, folder / kind, **SIZE)
        embed(folder / kind, folder / "encoder", name="tiny", max_tokens=16)
        encode = ["data", "encode", str(folder / kind), f"--vae={folder / 'vae'}", "--name=wan"]
        assert main(encode) == 0
    sources = [{"path": str(folder / kind)} for kind in ("videos", "images")]
    for name, changes in (("pixels", PIXELS), ("latents", LATENTS)):
        content = flow_content(
            **changes, name=name, run_dir=str(folder / name), total_steps=2, micro_batch_size=2,
            data={"sources": sources, "num_workers": 0},
            held_out={"every_steps": 2, "samples": 2, "bins": 2, "sources": sources[:1]},
        )  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
        assert main(["train", str(folder / f"{name}.yaml")]) == 0
    return folder


def sample(home: Path, run: str, out: str, *options: str) -> int:
    models = [f"--encoder={home / 'encoder'}"]
    models += [f"--vae={home / 'vae'}"] if run == "latents" and "--vae=" not in options else []
    command = ["sample", str(home / run), f"--out={home / out}", "--prompt=a red circle"]
    return main([*command, *models, *options])


def clips(home: Path, out: str) -> list[np.ndarray]:
    records = json.loads((home / out / "samples.json").read_text())
    return [decode_clip((home / out / record["file"]).read_bytes()) for record in records]


@pytest.mark.parametrize("run", ["pixels", "latents"])
def test_runs_measure_each_stage_and_sample_clips_of_their_size(home, run):
    lines = [json.loads(line) for line in (home / run / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == [1, 2]
    for line in losses:
        assert line["loss"] == pytest.approx(line["loss_stage_0"] + line["loss_stage_1"])
    [measured] = [line for line in lines if "held_out_loss" in line]
    assert len(measured["held_out_stage_1_bins"]) == 2
    assert sample(home, run, f"{run}-two", "--prompt=a blue square", "--seed=3") == 0
    first, second = clips(home, f"{run}-two")
    assert first.shape == second.shape == (9, 24, 32, 3)
    assert main(["report", str(home / run)]) == 0
    assert "Stage 1 by noise" in (home / run / "report.html").read_text()


@pytest.mark.parametrize("run", ["pixels", "latents"])
def test_an_interrupted_request_goes_on_and_an_export_samples_the_same(home, run, capsys):
    options = ["--prompt=a blue square", "--seed=3"]
    assert sample(home, run, f"{run}-first", *options) == 0
    kept = [path.read_bytes() for path in sorted((home / f"{run}-first").glob("*.mp4"))]
    (home / f"{run}-first" / "0001.json").unlink()
    assert sample(home, run, f"{run}-first", *options) == 0
    assert main(["checkpoint", "export", str(home / run), str(home / f"{run}-weights"),
                 "--weights=raw"]) == 0  # fmt: skip
    assert sample(home, f"{run}-weights" if run == "pixels" else run, f"{run}-again", *options) == 0
    for folder in (f"{run}-first", f"{run}-again"):
        assert [path.read_bytes() for path in sorted((home / folder).glob("*.mp4"))] == kept


def test_a_negative_prompt_and_guidance_change_the_clip(home):
    seen = []
    for number, options in enumerate(
        ([], ["--negative-prompt=a blue square"], ["--set=guidance_scale=4"],
         ["--set=first_guidance_scale=4"], ["--set=reference_grid=true"])
    ):  # fmt: skip
        assert sample(home, "pixels", f"guided-{number}", *options) == 0
        seen.append(clips(home, f"guided-{number}")[0].tobytes())
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("run", ["pixels", "latents"])
def test_clips_begin_with_given_frames(home, run):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(image).save(home / "given.png")
    assert sample(home, run, f"{run}-given", f"--given={home / 'given.png'}") == 0
    assert sample(home, run, f"{run}-free") == 0
    [given], [free] = clips(home, f"{run}-given"), clips(home, f"{run}-free")
    # What the file holds is what H.264 makes of the image.
    coded = decode_clip(encode_clip(np.concatenate([image[None], given[1:]]), 8.0))
    assert np.abs(given[0].astype(int) - coded[0].astype(int)).mean() < 4
    assert np.abs(free[0].astype(int) - image.astype(int)).mean() > 20
    [record] = json.loads((home / f"{run}-given" / "samples.json").read_text())
    assert record["given"]["file"] == "given.png"
    assert not np.array_equal(given, free)


def test_what_cannot_begin_a_clip_is_told_in_one_line(home, capsys):
    def refused(*files: tuple[str, bytes]) -> str:
        paths = []
        for name, content in files:
            (home / name).write_bytes(content)
            paths.append(f"--given={home / name}")
        capsys.readouterr()
        assert sample(home, "pixels", "refused", *paths) in (66, 78)
        [line] = capsys.readouterr().err.splitlines()
        assert not (home / "refused").exists()
        return line.replace(f"{home}/", "")

    def video(frames: int, height: int = 24) -> bytes:
        return encode_clip(np.zeros((frames, height, 32, 3), np.uint8), 8.0)

    assert refused(("a.mp4", video(4))) == (
        "--given a.mp4: 4 frames are wrong because units end after 1, 3, 5, 7 frames; give as many."
    )
    assert refused(("a.mp4", video(3, 48))) == (
        "--given a.mp4: 48x32 is wrong because the checkpoint makes 24x32 (height x width); resize "
        "or crop it."
    )
    assert refused(("a.png", b"no image")).startswith("--given a.png: is wrong because it ")
    assert refused(("a.mp4", video(3)), ("b.mp4", video(3))) == (
        "--given: 2 files are wrong because there are 1 clips; give one for all, or one for each."
    )
    assert sample(home, "pixels", "refused", "--given=nowhere.mp4") == 66


def test_autoencoders_that_did_not_make_the_latents_are_refused(home, capsys):
    write_autoencoder(home / "other", seed=1)
    for options, told in (
        ([f"--vae={home / 'other'}"], "is wrong because the checkpoint was trained on latents of"),
        ([f"--vae={home / 'encoder'}"], "is no video autoencoder because"),
    ):
        capsys.readouterr()
        assert main(["sample", str(home / "latents"), f"--out={home / 'none'}", "--prompt=a",
                     f"--encoder={home / 'encoder'}", *options]) == 78  # fmt: skip
        assert told in capsys.readouterr().err
    assert main(["sample", str(home / "latents"), f"--out={home / 'none'}", "--prompt=a",
                 f"--encoder={home / 'encoder'}"]) == 78  # fmt: skip
    assert "--vae: missing because the checkpoint makes latents" in capsys.readouterr().err
    assert sample(home, "pixels", "none", f"--vae={home / 'vae'}") == 78
    assert "--vae: is wrong because the checkpoint makes pixels" in capsys.readouterr().err


def test_clips_of_latents_are_what_the_autoencoder_makes_of_them(home):
    """The codec by itself: decoded as by the autoencoder, given frames put back untouched."""
    from t2v.checkpoint.finding import resolve_checkpoint
    from t2v.checkpoint.manifest import read_manifest
    from t2v.engine.config import EngineConfig
    from t2v.engine.world import join_world
    from t2v.sampling.codec import Codec

    with join_world(EngineConfig(kind="single")) as world:
        manifest = read_manifest(resolve_checkpoint(home / "latents", world))
    config = parse_config(manifest.config, "latents")
    codec = Codec(config, str(home / "vae"), manifest.latents, torch.device("cpu"))
    made = torch.randn(1, 4, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    autoencoder = Autoencoder(home / "vae")
    assert torch.equal(codec.decode(made, None), autoencoder.decode(made))
    Image.fromarray(np.full((24, 32, 3), 77, np.uint8)).save(home / "grey.png")
    given = read_given(str(home / "grey.png"), method_of(config))
    frames = pixels_of(given.frames)
    assert torch.equal(codec.encode(frames), autoencoder.encode(frames))
    assert torch.equal(codec.decode(made, frames)[:, :, :1], frames)


def test_joints_and_gamma_are_those_of_training(home, capsys):
    for change, told in (
        ("flow.gamma=0.2", "flow.gamma: unknown field"),
        ("flow.joints=[0.4]", "flow.joints: unknown field"),
        ("steps=[2, 2, 2]", "steps: [2, 2, 2] has 3 entries for 2 stages; give one per stage"),
    ):
        capsys.readouterr()
        assert sample(home, "pixels", "of other joints", f"--set={change}") == 78
        [line] = capsys.readouterr().err.splitlines()
        assert told in line
        assert not (home / "of other joints").exists()
    for change in ("flow.gamma=0.2", "flow.joints=[0.4]", "flow.shift=2.0"):
        assert main(["train", str(home / "pixels.yaml"), f"method.{change}", "total_steps=3"]) == 78
        told = capsys.readouterr().err
        assert "is of another recipe because these differ" in told
        assert f"method.{change.partition('=')[0]}: " in told
