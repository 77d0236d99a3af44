"""Generation against a network that knows the answer, an exact trajectory, the joint network."""

import contextlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from t2v.methods.hpdm.context import TokenGrid
from t2v.methods.hpdm.diffusion import DiffusionConfig, c_in, c_out, c_skip
from t2v.methods.hpdm.memory import plan_memory
from t2v.methods.hpdm.sampling import generate
from t2v.methods.hpdm.settings import level_tilings, network_calls
from t2v.methods.hpdm.solver import Solver, noise_levels
from t2v.methods.hpdm.store import Store
from t2v.methods.hpdm.tiling import OVERLAPS, cut_tile
from t2v.network.conditioning import Condition
from t2v.recipe.recipe import RunConfig, load_config
from tests.tiny import THREE_LEVELS, class_condition, stirred_model, tiny_config

CONFIGS = Path(__file__).parent.parent / "configs"
DIFFUSION = DiffusionConfig(input_scale=2.0, input_scale_growth=2.0)


class Painter:
    """A network whose denoised tile is always cut from the clip that its label stands for."""

    self_conditioning = None

    def __init__(self, config: RunConfig, clips: list[Tensor]) -> None:
        self.pyramid, self.diffusion, self.clips = (
            config.method.pyramid,
            config.method.diffusion,
            clips,
        )
        # Of blocks that only the coarsest level runs: nothing looks at features.
        self.config = config.method.model.model_copy(update={"levels_per_block": [1]})
        self.grid = TokenGrid(config.method.pyramid, config.method.model.token_size)

    def __call__(
        self,
        x: Tensor,
        noise: Tensor,
        offsets: Tensor,
        condition: Condition,
        previous_latents: None,
        *,
        level: int,
        **_: object,
    ) -> tuple[Tensor, None]:
        sigma = (4 * noise[:, 0].double()).exp()
        scale = torch.full_like(sigma, self.diffusion.level_input_scale(level))
        x_noisy = x[:, 0] / wide(c_in(sigma, scale))
        canvases = self.clips[level][condition.label]
        pairs = zip(canvases, offsets[:, 0], strict=True)
        patch = self.pyramid.patch_size
        clean = torch.stack([cut_tile(canvas, offset.tolist(), patch) for canvas, offset in pairs])
        answer = (clean - wide(c_skip(sigma, scale)) * x_noisy) / wide(c_out(sigma, scale))
        return answer[:, None].float(), None


def wide(values: Tensor) -> Tensor:
    return values[:, None, None, None, None]


def random_clips(config: RunConfig, labels: int) -> list[Tensor]:
    """Clips of every label at every level, in [-0.4, 0.4], unrelated to each other."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.rand(labels, 3, *config.method.pyramid.size(level), generator=generator) * 0.8 - 0.4
        for level in range(config.method.pyramid.levels)
    ]


def sample(model: object, config: RunConfig, labels: list[int], seeds: list[int]) -> list[Tensor]:
    return generate(
        model,
        condition=class_condition(labels),
        null=class_condition([3] * len(labels)),
        seeds=seeds,
        sampling=config.method.sampling,
        diffusion=config.method.diffusion,
    )


def three_levels(**sampling: object) -> RunConfig:
    changes = THREE_LEVELS | {"sampling": THREE_LEVELS["sampling"] | sampling}
    return tiny_config(**changes, diffusion={"input_scale": 2.0, "input_scale_growth": 2.0})


@pytest.mark.parametrize("steps", [1, 2, 18])
def test_noise_levels_are_those_of_edm(steps):
    sigmas = noise_levels(DIFFUSION, steps).tolist()
    top, bottom, rho = DIFFUSION.sigma_max, DIFFUSION.sigma_min, DIFFUSION.rho
    expected = [
        (top ** (1 / rho) + i / max(steps - 1, 1) * (bottom ** (1 / rho) - top ** (1 / rho))) ** rho
        for i in range(steps)
    ]
    assert sigmas == pytest.approx([*expected, 0.0], rel=1e-9)
    assert sigmas == sorted(sigmas, reverse=True)


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("solver", [["heun", "euler"], "unipc", ["euler", "dpm++", "heun"]])
def test_the_sampler_finds_the_clip_that_the_network_knows(overlap, solver):
    config = three_levels(overlap=overlap, solver=solver, steps=[6, 3, 2], tile_batch=5)
    clips = random_clips(config, 3)
    found = sample(Painter(config, clips), config, labels=[2, 0], seeds=[5, 6])
    for level, canvas in enumerate(found):
        # Divided and multiplied by c_out, small at the last noise level, in fp32.
        torch.testing.assert_close(canvas, clips[level][[2, 0]], rtol=0, atol=1e-4)


@pytest.mark.parametrize("overlap", ["", "hw", "fhw"])
def test_a_pyramid_that_grows_in_space_alone_is_sampled_too(overlap):
    """The geometry of the 16x576x1024 variant: an axis of one tile does not overlap."""
    pyramid = {"levels": 3, "clip_size": [2, 24, 32]}
    config = tiny_config(
        **THREE_LEVELS
        | {"pyramid": pyramid, "sampling": THREE_LEVELS["sampling"] | {"overlap": overlap}}
    )
    clips = random_clips(config, 1)
    found = sample(Painter(config, clips), config, labels=[0], seeds=[5])
    for level, canvas in enumerate(found):
        torch.testing.assert_close(canvas, clips[level], rtol=0, atol=1e-4)
    tiles = {"": [1, 4, 16], "hw": [1, 9, 49], "fhw": [1, 9, 49]}[overlap]
    assert network_calls(config.method.sampling, config.method.pyramid) == [
        5,
        2 * tiles[1],
        tiles[2],
    ]


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5, 1.0, 2.0])
def test_guidance_goes_from_the_null_answer_through_the_conditional_one(guidance_scale):
    config = three_levels(guidance_scale=guidance_scale)
    clips = random_clips(config, 4)
    found = sample(Painter(config, clips), config, labels=[1], seeds=[0])
    for level, canvas in enumerate(found):
        null, told = clips[level][3], clips[level][1]
        expected = (null + guidance_scale * (told - null)).clamp(-1, 1)
        # A single step from sigma 80 at input scale 8 leaves 80 * 8 roundings of fp32.
        torch.testing.assert_close(canvas[0], expected, rtol=0, atol=1e-3)


class LinearDenoiser:
    """The exact denoiser of pixels that are normal with standard deviation `data_std`."""

    input_scale, data_std = 2.0, 0.5

    def __call__(self, x_noisy: Tensor, sigma: float) -> Tensor:
        scaled = (self.data_std / self.input_scale) ** 2
        return self.input_scale * scaled / (scaled + sigma**2) * x_noisy

    def exact(self, x_noisy: Tensor, sigma: float, following: float) -> Tensor:
        """The solution of the sampling equation between two noise levels."""
        scaled = (self.data_std / self.input_scale) ** 2
        return x_noisy * ((scaled + following**2) / (scaled + sigma**2)) ** 0.5


@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1), ("heun", 2), ("dpm++", 2), ("unipc", 2)]
)
def test_steps_follow_the_exact_trajectory_with_their_order(solver, order):
    denoiser, start, errors = LinearDenoiser(), torch.ones(1, dtype=torch.float64), []
    for steps in (64, 128):
        x_noisy, stepper = start, Solver(solver)
        sigmas = torch.linspace(2.0, 0.1, steps + 1, dtype=torch.float64).tolist()
        for sigma, following in pairwise(sigmas):
            x_noisy = stepper.step(denoiser, x_noisy, sigma, following)
        errors.append(float((x_noisy - denoiser.exact(start, 2.0, 0.1)).abs()))
    # UniPC begins with a step of order 2.
    assert 0.9 * 2**order < errors[0] / errors[1] < 1.1 * 2 ** (3 if solver == "unipc" else order)


@pytest.mark.parametrize("solver", ["dpm++", "unipc"])
@pytest.mark.parametrize("detail_std", [0.5, 0.2, 0.05])
def test_every_level_keeps_the_detail_that_an_exact_network_knows(solver, detail_std):
    """At the paper's numbers of steps and no more calls, where the range follows the scale."""
    config = load_config(
        CONFIGS / "t2v_64x288x512.yaml",
        ["method.diffusion.range_follows_scale=1.0", f"method.sampling.solver=[heun, {solver}]"],
    )
    sampling, diffusion = config.method.sampling, config.method.diffusion
    kept = []
    for level, steps in enumerate(sampling.steps):
        denoiser = LinearDenoiser()
        denoiser.input_scale, denoiser.data_std = diffusion.level_input_scale(level), detail_std
        sigmas = noise_levels(diffusion, steps, level).tolist()
        stepper, x = Solver(sampling.level_solver(level)), torch.ones(1).double() * sigmas[0]
        for sigma, following in pairwise(sigmas):
            x = stepper.step(denoiser, x, sigma, following)
        kept.append(float(x) * denoiser.input_scale / detail_std)
    assert all(0.95 < share < 1.15 for share in kept), kept
    paper = load_config(CONFIGS / "t2v_64x288x512.yaml").method
    assert network_calls(sampling, config.method.pyramid) == network_calls(
        paper.sampling, paper.pyramid
    )


@pytest.mark.parametrize(
    ("name", "overlap", "calls"),
    [
        ("t2v_64x288x512", "", 11_007),
        ("t2v_64x288x512", "hw", 36_479),
        ("t2v_64x288x512", "fhw", 66_959),
        ("ucf101_s", "", 2_815),
        ("ucf101_s", "hw", 7_679),
        ("ucf101_s", "fhw", 12_959),
    ],
)
def test_network_calls_are_those_of_the_published_sampler(name, overlap, calls):
    config = load_config(CONFIGS / f"{name}.yaml", [f"method.sampling.overlap='{overlap}'"])
    assert sum(network_calls(config.method.sampling, config.method.pyramid)) == calls


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_network_calls_of_every_overlap_follow_from_its_axes(overlap):
    """128, 64, 32, 16 steps; an axis of `2 ** level` tiles has twice as many less one if they
    overlap."""
    config = load_config(CONFIGS / "t2v_64x288x512.yaml", [f"method.sampling.overlap='{overlap}'"])
    tiles = [
        (2 * 2**level - 1) ** len(overlap) * 2 ** (level * (3 - len(overlap))) for level in range(4)
    ]
    expected = [255, 64 * tiles[1], 32 * tiles[2], 16 * tiles[3]]
    assert network_calls(config.method.sampling, config.method.pyramid) == expected


@pytest.mark.parametrize(("guidance_scale", "answers"), [(1.0, 1), (3.0, 2)])
def test_sampling_makes_the_calls_it_announces(guidance_scale, answers):
    config = three_levels(guidance_scale=guidance_scale, overlap="hw", tile_batch=14)
    model, calls = stirred_model(config), [0, 0, 0]
    forward = model.forward

    def counted(x: Tensor, *rest: object, level: int, **more: object) -> tuple:
        calls[level] += len(x)
        return forward(x, *rest, level=level, **more)

    model.forward = counted
    sample(model, config, labels=[0, 1], seeds=[0, 1])
    tiles = [1, 18, 196]
    denoising = network_calls(config.method.sampling, config.method.pyramid)
    assert denoising == [5, 2 * 18, 196]
    # A finished level is read in two passes, of which the first makes latents for the second, and
    # under each condition that a finer level's tiles are denoised under.
    reading = [2 * tiles[0], 2 * tiles[1], 0]
    expected = [2 * answers * (d + r) for d, r in zip(denoising, reading, strict=True)]
    assert calls == expected


def test_the_same_seeds_give_the_same_bytes_twice():
    config = three_levels(guidance_scale=2.0, churn=4.0, overlap="h")
    model = stirred_model(config)
    first, second = (sample(model, config, [0, 2], [1, 2]) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    other = sample(model, config, [0, 2], [1, 3])
    assert torch.allclose(other[0][0], first[0][0], atol=1e-4)
    assert not torch.allclose(other[0][1], first[0][1], atol=1e-2)


def gentle_model(config: RunConfig):
    """A network whose answers are not so wild that rounding grows from step to step."""
    model = stirred_model(config)
    with torch.no_grad():
        model.detokenizer.weight.mul_(0.1)
    return model


@pytest.mark.slow
def test_neither_the_batch_of_tiles_nor_the_company_changes_a_clip():
    base = {"guidance_scale": 2.0, "churn": 4.0, "overlap": "w", "steps": [3, 2, 1]}
    model = gentle_model(three_levels(**base))
    together = sample(model, three_levels(**base, tile_batch=16), [0, 2, 1], [1, 2, 3])
    for tile_batch, labels, seeds, rows in (
        (500, [0, 2, 1], [1, 2, 3], [0, 1, 2]),
        (1, [2], [2], [1]),
        (7, [1, 0], [3, 1], [2, 0]),
    ):
        other = sample(model, three_levels(**base, tile_batch=tile_batch), labels, seeds)
        for level, canvas in enumerate(other):
            # Matrix products of other batch sizes round otherwise: far below 1/255.
            torch.testing.assert_close(canvas, together[level][rows], rtol=0, atol=1e-3)


@pytest.mark.parametrize("keep", ["fp32", "bf16"])
def test_where_features_and_latents_are_kept_does_not_change_a_clip(keep, tmp_path):
    changes = {"guidance_scale": [2.0, 1.0, 2.0], "overlap": ["", "fw", "h"], "steps": [2, 2, 2]}
    config = three_levels(**changes, keep=keep, tile_batch=32)
    model = gentle_model(config)
    shared = {
        "condition": class_condition([0, 2]),
        "null": class_condition([3, 3]),
        "seeds": [1, 2],
        "diffusion": config.method.diffusion,
    }
    free = generate(model, sampling=config.method.sampling, **shared)
    rooms = plan_memory(model, config.method.sampling, clips=2, device_bytes=1 << 62)
    assert {place for room in rooms for place in (room.volumes, room.latents)} == {"device"}
    far = [replace(room, volumes="disk", latents="disk", tile_batch=20) for room in rooms]
    with contextlib.closing(Store(torch.device("cpu"), tmp_path)) as store:
        found = generate(model, sampling=config.method.sampling, rooms=far, store=store, **shared)
    assert not list(tmp_path.iterdir())
    # Batches of another size round otherwise; halves of fp32 may then fall to the other side.
    tolerance = {"rtol": 0, "atol": 1e-3 if keep == "fp32" else 2e-2}
    for level, canvas in enumerate(found):
        torch.testing.assert_close(canvas, free[level], **tolerance)
    if keep == "bf16":
        exact = three_levels(**changes)
        for level, canvas in enumerate(generate(model, sampling=exact.method.sampling, **shared)):
            # Features keep eight bits of their mantissa.
            torch.testing.assert_close(canvas, free[level], rtol=0, atol=5e-2)


@pytest.mark.parametrize("overlap", ["", "h", "fw", "hw"])
def test_slabs_that_share_no_tile_may_take_turns(overlap):
    config = three_levels(overlap=overlap, steps=[2, 2, 2], tile_batch=32)
    model = gentle_model(config)
    told = {
        "condition": class_condition([0]),
        "null": class_condition([3]),
        "seeds": [1],
        "sampling": config.method.sampling,
        "diffusion": config.method.diffusion,
    }
    rooms = plan_memory(model, config.method.sampling, clips=1, device_bytes=1 << 62)
    cut = [
        replace(
            room,
            slabs=tuple(
                level_tilings(config.method.sampling, config.method.pyramid, n)[0].slabs(1)
            ),
        )
        for n, room in enumerate(rooms)
    ]
    assert [len(room.slabs) > 1 for room in cut] == [False, True, True]
    for one, other in zip(generate(model, **told), generate(model, rooms=cut, **told), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


def test_null_answers_rest_on_features_read_under_the_null_condition():
    """Guidance at scale 0 is the null condition everywhere, coarse levels included."""
    config = three_levels(guidance_scale=0.0, steps=[2, 2, 2], overlap="w")
    model = gentle_model(config)
    guided = sample(model, config, labels=[1], seeds=[4])
    plain = sample(model, three_levels(guidance_scale=1.0, steps=[2, 2, 2], overlap="w"), [3], [4])
    for one, other in zip(guided, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


def test_levels_have_their_own_overlap_and_guidance():
    """A level's settings change that level and what rests on it, and no coarser one."""
    base = {"guidance_scale": [2.0, 2.0, 2.0], "overlap": ["", "hw", "w"], "steps": [2, 2, 1]}
    model = gentle_model(three_levels())
    before = sample(model, three_levels(**base), [1], [0])
    for change in ({"guidance_scale": [2.0, 3.0, 2.0]}, {"overlap": ["", "h", "w"]}):
        after = sample(model, three_levels(**base | change), [1], [0])
        same = [torch.equal(*pair) for pair in zip(before, after, strict=True)]
        assert same == [True, False, False]
    calls = network_calls(three_levels(**base).method.sampling, model.pyramid)
    assert calls == [3, 2 * 18, 4 * 7 * 4]


@pytest.mark.parametrize(("overlap", "shifted"), [("", "hw"), ("h", "fw"), ("", "f")])
@pytest.mark.parametrize("blending", ["uniform", "tapered"])
def test_shifted_and_tapered_tiles_find_the_clip_that_the_network_knows(overlap, shifted, blending):
    config = three_levels(overlap=overlap, shifted=shifted, blending=blending, steps=[3, 3, 2])
    clips = random_clips(config, 1)
    painter, counted = Painter(config, clips), []
    found = generate(
        painter,
        condition=class_condition([0]),
        null=class_condition([0]),
        seeds=[3],
        sampling=config.method.sampling,
        diffusion=config.method.diffusion,
        progress=counted.append,
    )
    for level, canvas in enumerate(found):
        torch.testing.assert_close(canvas, clips[level], rtol=0, atol=1e-4)
    assert sum(counted) == sum(network_calls(config.method.sampling, config.method.pyramid))


def test_progress_is_told_for_every_tile():
    config, told = three_levels(), []
    generate(
        Painter(config, random_clips(config, 4)),
        condition=class_condition([0, 1]),
        null=class_condition([3, 3]),
        seeds=[0, 1],
        sampling=config.method.sampling,
        diffusion=config.method.diffusion,
        progress=told.append,
    )
    assert sum(told) == 2 * sum(network_calls(config.method.sampling, config.method.pyramid))
