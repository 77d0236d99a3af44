"""How a finer level follows a coarser one in sampling: what it reads, what it must shrink to."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from data_pipeline.media.codec import decode_clip, encode_clip
from data_pipeline.pyramid import area_average
from t2v.cli import main
from t2v.methods.hpdm.diffusion import c_in
from t2v.methods.hpdm.network import HPDM
from t2v.methods.hpdm.sampling import generate
from t2v.methods.hpdm.settings import network_calls
from t2v.methods.hpdm.tiled_denoiser import project
from t2v.methods.hpdm.tiling import OVERLAPS
from t2v.recipe.recipe import RunConfig
from tests.test_sampling import Painter, gentle_model, random_clips, sample, three_levels
from tests.tiny import THREE_LEVELS, class_condition, tiny_config, tiny_content


def shrunk(fine: Tensor, growth: tuple[int, int, int]) -> Tensor:
    """A level's clips as the level before sees them: frames by stride, pixels by area average."""
    by_t, by_h, by_w = growth
    pooled = torch.nn.functional.avg_pool2d(fine[:, :, ::by_t].flatten(0, 2), (by_h, by_w))
    return pooled.view(*fine.shape[:2], -1, *pooled.shape[1:])


@pytest.mark.parametrize("growth", [(2, 2, 2), (1, 2, 3), (2, 1, 1)])
def test_projected_clips_are_the_nearest_that_shrink_to_the_coarse_ones(growth):
    generator = torch.Generator().manual_seed(0)
    fine = torch.randn(2, 3, 4, 6, 12, generator=generator)
    coarse = shrunk(torch.randn(fine.shape, generator=generator), growth)
    moved = fine.clone()
    project(moved, coarse, growth)
    torch.testing.assert_close(shrunk(moved, growth), coarse)
    between = torch.ones(4, dtype=torch.bool)
    between[:: growth[0]] = False
    assert torch.equal(moved[:, :, between], fine[:, :, between])
    # Nearest: the move is at a right angle to every direction that keeps the coarse clip.
    other = torch.randn(fine.shape, generator=generator)
    project(other, torch.zeros_like(coarse), growth)
    along = float(((moved - fine) * other)[:, :, ~between].sum())
    assert along == pytest.approx(0, abs=1e-3)
    again = moved.clone()
    project(again, coarse, growth)
    torch.testing.assert_close(again, moved)


@pytest.mark.parametrize("overlap", ["", "hw"])
def test_sampled_clips_shrink_to_the_coarser_one_if_they_must(overlap):
    """Even where the network knows clips that have nothing to do with each other."""
    config = three_levels(coarse_projection=True, overlap=overlap, solver="unipc", steps=[3, 3, 2])
    clips = [0.4 * clip for clip in random_clips(config, 1)]
    found = sample(Painter(config, clips), config, labels=[0], seeds=[1])
    growth = config.method.pyramid.growth
    for coarse, fine in pairwise(found):
        assert float(fine.abs().max()) < 1
        torch.testing.assert_close(shrunk(fine, growth), coarse, rtol=0, atol=1e-3)


@pytest.mark.parametrize("noised", [False, True])
@pytest.mark.parametrize("place", [{"sigma": 0.25}, {"quantile": 0.2}, {}])
def test_a_finished_level_is_read_at_the_noise_level_asked_for(place, noised):
    config = three_levels(context=place | {"noised": noised}, overlap="", steps=[2, 1, 1])
    diffusion, model = config.method.diffusion, gentle_model(config)
    seen: list[tuple[float, Tensor]] = []
    forward = model.forward

    def spied(x: Tensor, told: Tensor, *rest: object, level: int, **more: object) -> tuple:
        if level == 0:
            seen.append((float((4 * told[0, 0]).exp()), x[:, 0]))
        return forward(x, told, *rest, level=level, **more)

    model.forward = spied
    clip = sample(model, config, [1], [5])[0]
    sigma, x = seen[-1]
    expected = place.get("sigma", diffusion.sigma_min)
    if "quantile" in place:
        normal = torch.distributions.Normal(diffusion.sigma_mean, diffusion.sigma_std)
        expected = float(normal.icdf(torch.tensor(0.2)).exp())
    assert sigma == pytest.approx(expected, rel=1e-4)
    sigmas, scale = torch.full((1,), sigma), torch.full((1,), diffusion.input_scale)
    noise = (x / c_in(sigmas, scale) - clip / diffusion.input_scale) / sigma
    if noised:
        # Five standard errors of 288 draws.
        assert float(noise.std()) == pytest.approx(1, abs=0.21)
    else:
        # Rounding, seen through a noise level of 0.002.
        assert float(noise.abs().max()) < 1e-3


def evaluations(model: HPDM, config: RunConfig) -> tuple[list[Tensor], int]:
    """Sampled levels, and how many tiles the network saw."""
    rows, forward = [0], model.forward

    def counted(x: Tensor, *rest: object, **more: object) -> tuple:
        rows[0] += len(x)
        return forward(x, *rest, **more)

    model.forward = counted
    try:
        return sample(model, config, [0, 1], [0, 1]), rows[0]
    finally:
        model.forward = forward


@pytest.mark.slow
def test_outside_its_interval_guidance_costs_nothing_and_does_nothing():
    base = {"steps": [3, 2, 2], "overlap": "w", "tile_batch": 6}
    model = gentle_model(three_levels())
    guided, all_rows = evaluations(model, three_levels(**base, guidance_scale=3.0))
    inside, same_rows = evaluations(
        model, three_levels(**base, guidance_scale=3.0, guidance_interval=[0.0, 1e9])
    )
    assert same_rows == all_rows
    assert all(torch.equal(*pair) for pair in zip(guided, inside, strict=True))
    plain, _ = evaluations(model, three_levels(**base))
    outside, rows = evaluations(
        model, three_levels(**base, guidance_scale=3.0, guidance_interval=[0.0, 1e-9])
    )
    for one, other in zip(plain, outside, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    config = three_levels(**base)
    calls = sum(network_calls(config.method.sampling, config.method.pyramid))
    assert all_rows - rows == 2 * calls
    # Of two noise levels, one lies inside: half of the null answers are saved.
    high = [[50.0, 1e9]] * 3
    _, half = evaluations(
        model, three_levels(**base, guidance_scale=3.0, guidance_interval=high, solver="euler")
    )
    tiles = [1, 2 * 2 * 3, 4 * 4 * 7]
    saved = 2 * sum((steps - 1) * tiles[n] for n, steps in enumerate(base["steps"]))
    euler = three_levels(**base, solver="euler")
    calls = sum(network_calls(euler.method.sampling, euler.method.pyramid))
    assert half == rows - 2 * 2 + 2 * calls - saved


@pytest.mark.parametrize("overlap", OVERLAPS[::3])
def test_coarse_pixels_reach_finer_levels_in_sampling(overlap):
    """Where the network reads them, a change of its weights for them changes finer levels alone."""
    changes = THREE_LEVELS | {
        "model": THREE_LEVELS["model"] | {"coarse_pixels": True},
        "sampling": {"steps": [2, 2, 1], "overlap": overlap, "guidance_scale": 2.0},
    }
    config = tiny_config(**changes)
    model = gentle_model(config)
    before = sample(model, config, [1, 2], [0, 1])
    with torch.no_grad():
        model.coarse_tokenizer.weight.add_(0.5)
    after = sample(model, config, [1, 2], [0, 1])
    same = [torch.equal(*pair) for pair in zip(before, after, strict=True)]
    assert same == [True, False, False]


@pytest.mark.parametrize("level", [0, 1])
def test_given_clips_are_refined_as_those_that_were_sampled(level):
    """Levels finer than the given clips are made; those below are what the given ones shrink to."""
    config = three_levels(coarse_projection=True, steps=[2, 2, 1], overlap="")
    model = gentle_model(config)
    told = {
        "condition": class_condition([1, 2]),
        "null": class_condition([3, 3]),
        "seeds": [5, 6],
        "sampling": config.method.sampling,
        "diffusion": config.method.diffusion,
    }
    free = generate(model, **told)
    found = generate(model, given=free[level], **told)
    growth = config.method.pyramid.growth
    for finer in range(level, 3):
        # Levels below the given one are shrunk anew, and rounding grows from step to step.
        torch.testing.assert_close(found[finer], free[finer], rtol=0, atol=5e-3)
    for coarser in range(level):
        torch.testing.assert_close(found[coarser], shrunk(found[coarser + 1], growth))
    assert torch.equal(found[level], free[level])


def test_the_command_refines_a_clip_of_a_coarser_level(tmp_path, datasets, capsys):
    """By its size it is known which level it is of; no other is taken."""
    recipe = tmp_path / "recipe.yaml"
    content = tiny_content(
        **THREE_LEVELS | {"sampling": {"steps": [2, 1, 1], "coarse_projection": True}},
        total_steps=1,
        run_dir=str(tmp_path / "run"),
        data={"sources": [{"path": str(datasets / "videos")}]},
    ) | {"conditioning": {"kind": "none"}}
    recipe.write_text(yaml.safe_dump(content))
    assert main(["train", str(recipe)]) == 0
    grey = np.full((4, 12, 16, 3), 128, dtype=np.uint8)
    for name, clip in (("right", grey), ("long", np.repeat(grey, 2, axis=0)), ("wide", grey[:2])):
        (tmp_path / f"{name}.mp4").write_bytes(encode_clip(clip, 8.0))

    def sampled(name: str) -> int:
        given, out = tmp_path / f"{name}.mp4", tmp_path / f"from_{name}"
        return main(["sample", str(tmp_path / "run"), f"--given={given}", f"--out={out}"])

    assert sampled("right") == 0
    clip = decode_clip((tmp_path / "from_right" / "0000.mp4").read_bytes())
    assert clip.shape == (8, 24, 32, 3)
    # Lossy twice over; a sample of so young a network alone is all but grey.
    assert area_average(clip[::2], 2, 2).mean() == pytest.approx(128, abs=4)
    assert sampled("long") == 78
    assert "8 frames are wrong because clips of coarser levels" in capsys.readouterr().err
    assert sampled("wide") == 78
    assert "12x16 is wrong because the checkpoint makes 6x8 (height" in capsys.readouterr().err
