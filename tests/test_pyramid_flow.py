"""The identities of pyramidal flow matching: stages, jumps between them, and what they keep."""

import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from t2v.methods.pyramid_flow.flow import (
    FlowConfig,
    clock,
    corrective_noise,
    down,
    down_by,
    jump,
    jump_noise,
    jump_scale,
    noise_down_by,
    shifted,
    signal_after_jump,
    stage_ends,
    training_pair,
    up,
)
from t2v.methods.pyramid_flow.sampling import integrate, stage_grid

SCHEDULES = [
    FlowConfig(),
    FlowConfig(gamma=0.2),
    FlowConfig(shift=2.0),
    FlowConfig(joints=(0.15, 0.5)),
    FlowConfig(joints=(0.5,)),
    FlowConfig(joints=(0.25, 0.5, 0.75), gamma=0.3),
]
ALL = pytest.mark.parametrize("flow", SCHEDULES, ids=str)
# A smaller gamma adds noise to the means of cells as well.
THIRDS = [flow for flow in SCHEDULES if flow.gamma == 1 / 3]
AT_A_THIRD = pytest.mark.parametrize("flow", THIRDS, ids=str)
SIGNALS = torch.linspace(0.02, 0.98, 25).tolist()
GAMMAS = [0.05, 0.2, 0.3, 1 / 3]
SHAPE = (2, 3, 2, 16, 24)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """White noise in fp64, so that identities hold to 1e-12."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def matrix(linear: Callable[[Tensor], Tensor], side: int) -> Tensor:
    """A linear map of one-channel frames, `side` cells wide, as a matrix."""
    basis = torch.eye(side * side, dtype=torch.float64).view(-1, 1, 1, side, side)
    return linear(basis).flatten(1).T


# The schedule.


def test_the_default_schedule_is_the_published_one():
    flow = FlowConfig()
    assert flow.sigma_start == pytest.approx([1, 0.80024, 0.50075], abs=1e-5)
    assert flow.sigma_end == pytest.approx([0.667, 0.334, 0], abs=1e-12)
    assert flow.clock_edges == pytest.approx([1000, 744, 386, 1], abs=1e-9)
    joints = flow.signal[:-1]
    scales = [jump_scale(e, flow.gamma) for e in joints]
    assert scales == pytest.approx([0.599880, 0.749625], abs=1e-6)
    assert [jump_noise(e, flow.gamma) for e in joints] == pytest.approx(
        [0.693028, 0.433662], abs=1e-6
    )


@ALL
def test_noise_rises_at_a_jump_and_falls_in_a_stage(flow):
    for start, end in zip(flow.sigma_start, flow.sigma_end, strict=True):
        assert start > end
    for before, after in zip(flow.sigma_end[:-1], flow.sigma_start[1:], strict=True):
        assert after > before
    assert (flow.sigma_start[0], flow.sigma_end[-1]) == (1, 0)
    edges = flow.clock_edges
    assert edges == sorted(edges, reverse=True)
    assert len(set(edges)) == flow.stages + 1


@ALL
def test_a_stage_ends_where_the_shifted_joint_says(flow):
    for joint, end in zip(flow.joints, flow.sigma_end, strict=False):
        assert end == pytest.approx(shifted(1 - joint, flow.shift), abs=1e-12)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_jump_starts_with_less_signal_than_the_stage_before_ended_with(gamma):
    root = math.sqrt(1 + 1 / gamma)
    for e in SIGNALS:
        scale, s = jump_scale(e, gamma), signal_after_jump(e, gamma)
        assert scale < 1
        assert s == pytest.approx(scale * e)
        assert scale * (1 - e) * root == pytest.approx(1 - s)  # the noise is white again
        assert s < e


def test_the_papers_joint_inverts_ours():
    for e in SIGNALS:
        s = signal_after_jump(e, 1 / 3)
        assert 2 * s / (1 + s) == pytest.approx(e)
        assert jump_scale(e, 1 / 3) == pytest.approx((1 + s) / 2)
        assert jump_noise(e, 1 / 3) == pytest.approx(math.sqrt(3) * (1 - s) / 2)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"joints": (0.6, 0.3)}, "do not rise"),
        ({"joints": (0.3, 0.3)}, "do not rise"),
        ({"joints": (0.0, 0.3)}, "do not rise"),
        ({"joints": (0.5, 1.0)}, "do not rise"),
        ({"gamma": 0.34}, "use at most 1/3"),
        ({"joints": (0.6, 0.9), "gamma": 0.001}, None),
        ({"gamma": 0.0}, "greater than 0"),
    ],
)
def test_schedules_that_cannot_be_are_refused(fields, told):
    if told is None:
        assert FlowConfig(**fields).stages == 3
        return
    with pytest.raises(ValidationError, match=told):
        FlowConfig(**fields)


# Levels and noise.


def test_coarse_cells_are_means_and_fine_ones_copies():
    x = randn(*SHAPE)
    cells = x.unfold(3, 2, 2).unfold(4, 2, 2)
    torch.testing.assert_close(down(x), cells.mean((-1, -2)), rtol=0, atol=1e-14)
    coarse = down(x)
    assert torch.equal(down(up(coarse)), coarse)
    assert torch.equal(up(coarse)[..., ::2, 1::2], coarse)
    with pytest.raises(Exception, match="can't divide axis of length 15"):
        down(x[..., :15, :])


def test_noise_is_white_at_every_level():
    for levels in (1, 2):
        pooled = matrix(lambda z, levels=levels: noise_down_by(z, levels), 8)
        eye = torch.eye(64 // 4**levels, dtype=torch.float64)
        torch.testing.assert_close(pooled @ pooled.T, eye, rtol=0, atol=1e-14)
    z = randn(*SHAPE)
    torch.testing.assert_close(noise_down_by(z, 2), 2 * down(noise_down_by(z, 1)))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_corrective_noise_has_the_correlations_asked_for(gamma):
    mixing = matrix(lambda z: corrective_noise(z, gamma), 4)
    covariance = mixing @ mixing.T
    same_block = matrix(lambda z: 4 * up(down(z)), 4)
    expected = (1 + gamma) * torch.eye(16, dtype=torch.float64) - gamma * same_block
    torch.testing.assert_close(covariance, expected, rtol=0, atol=1e-14)


def test_blocks_of_corrective_noise_add_up_to_zero_at_a_third():
    z = randn(*SHAPE)
    assert down(corrective_noise(z, 1 / 3)).abs().max() < 1e-15
    for dtype in (torch.bfloat16, torch.float16):
        assert corrective_noise(z.to(dtype), 1 / 3).isfinite().all()


@AT_A_THIRD
def test_a_jump_at_a_third_keeps_the_means_of_cells(flow):
    for stage in range(1, flow.stages):
        y, z = randn(2, 3, 2, 8, 12), randn(*SHAPE, seed=1)
        scale = jump_scale(flow.signal[stage - 1], flow.gamma)
        torch.testing.assert_close(down(jump(y, z, flow, stage)), scale * y, rtol=0, atol=1e-14)


@AT_A_THIRD
def test_a_jump_from_the_end_of_a_stage_is_the_start_of_the_next(flow):
    """Pathwise: with the noise that training draws once for both ends of a stage."""
    x, z = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    for stage in range(1, flow.stages):
        _, end = stage_ends(x, z, flow, stage - 1)
        start, _ = stage_ends(x, z, flow, stage)
        own = noise_down_by(z, flow.stages - 1 - stage)
        torch.testing.assert_close(jump(end, own, flow, stage), start, rtol=0, atol=1e-13)
        half = jump(end.float(), own.float(), flow, stage)
        torch.testing.assert_close(half, start.float(), rtol=0, atol=1e-5)


@ALL
def test_a_jump_keeps_mean_and_covariance(flow):
    """Exactly, for any clean clip and any gamma: white noise of the next stage's strength around
    the clip as that stage first sees it."""
    eye = torch.eye(64, dtype=torch.float64)
    still, quiet = torch.zeros(64, 1, 1, 4, 4).double(), torch.zeros(16, 1, 1, 8, 8).double()
    for stage in range(1, flow.stages):
        by_noise = matrix(lambda z, stage=stage: jump(still, z, flow, stage), 8)
        by_state = matrix(lambda y, stage=stage: jump(y, quiet, flow, stage), 4)
        e, sigma = flow.signal[stage - 1], flow.sigma_start[stage]
        covariance = (1 - e) ** 2 * by_state @ by_state.T + by_noise @ by_noise.T
        torch.testing.assert_close(covariance, sigma**2 * eye, rtol=0, atol=1e-13)
        torch.testing.assert_close(e * by_state, (1 - sigma) * matrix(up, 4), rtol=0, atol=1e-13)


# Paths.


@ALL
def test_a_path_leads_straight_from_start_to_end(flow):
    x, z = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    for stage in range(flow.stages):
        start, end = stage_ends(x, z, flow, stage)
        for value, expected in ((1.0, start), (0.0, end), (0.25, 0.25 * start + 0.75 * end)):
            r = torch.full((2,), value, dtype=torch.float64)
            state, velocity = training_pair(x, z, r, flow, stage)
            torch.testing.assert_close(state, expected, rtol=0, atol=1e-14)
            torch.testing.assert_close(velocity, start - end, rtol=0, atol=1e-14)
    assert torch.equal(stage_ends(x, z, flow, flow.stages - 1)[1], x)
    assert torch.equal(stage_ends(x, z, flow, 0)[0], noise_down_by(z, flow.stages - 1))


def test_one_stage_is_rectified_flow():
    flow, x, z = FlowConfig(joints=()), randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    r = torch.tensor([0.3, 0.8], dtype=torch.float64)
    state, velocity = training_pair(x, z, r, flow, 0)
    wide = r[:, None, None, None, None]
    torch.testing.assert_close(state, wide * z + (1 - wide) * x)
    torch.testing.assert_close(velocity, z - x)
    torch.testing.assert_close(clock(r, flow, 0), 1000 - 999 * (1 - r))


@ALL
def test_both_ends_of_a_stage_share_their_noise(flow):
    x, z, other = randn(*SHAPE), randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    for stage in range(flow.stages):
        first, second = (stage_ends(x, noise, flow, stage) for noise in (z, other))
        moved = (first[0] - first[1]) - (second[0] - second[1])
        shift = flow.sigma_start[stage] - flow.sigma_end[stage]
        pooled = noise_down_by(z - other, flow.stages - 1 - stage)
        torch.testing.assert_close(moved, shift * pooled, rtol=0, atol=1e-13)
        if flow.sigma_end[stage]:  # a noise for each end would have left more in between
            apart = (first[0] - second[1]) - (second[0] - second[1])
            assert not torch.allclose(apart, shift * pooled)


@ALL
def test_velocity_of_one_colour_is_known(flow):
    x, z = torch.full(SHAPE, 0.7, dtype=torch.float64), randn(*SHAPE)
    for stage in range(flow.stages):
        r = torch.tensor([0.1, 0.9], dtype=torch.float64)
        _, velocity = training_pair(x, z, r, flow, stage)
        pooled = noise_down_by(z, flow.stages - 1 - stage)
        share = flow.sigma_start[stage] - flow.sigma_end[stage]
        torch.testing.assert_close(velocity, share * (pooled - 0.7), rtol=0, atol=1e-13)


@ALL
def test_the_clock_tells_stages_apart_and_falls(flow):
    r = torch.linspace(1, 0.001, 50, dtype=torch.float64)
    told = torch.cat([clock(r, flow, stage) for stage in range(flow.stages)])
    assert (told.diff() < 0).all()


# The sampler, on distributions whose velocity is known.

SIDE = 8


@ALL
@pytest.mark.parametrize("steps", [1, 3])
def test_the_sampler_finds_a_clip_that_is_all_there_is(flow, steps):
    x, noise = randn(1, 3, 2, 16, 24), randn(1, 3, 2, 16, 24, seed=1)

    def velocity(state: Tensor, stage: int, r: float) -> Tensor:
        start, end = stage_ends(x, 0 * x, flow, stage)
        sigma = r * flow.sigma_start[stage] + (1 - r) * flow.sigma_end[stage]
        z = (state - r * start - (1 - r) * end) / sigma
        return start - end + (flow.sigma_start[stage] - flow.sigma_end[stage]) * z

    draws = iter(range(2, 9))
    made = integrate(
        velocity, noise, flow, grids=[stage_grid(steps)] * flow.stages,
        draw=lambda shape: randn(*shape, seed=next(draws)),
    )  # fmt: skip
    torch.testing.assert_close(made, x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("reference", [False, True])
def test_steps_lead_from_one_to_zero(reference):
    for steps in (1, 2, 10):
        grid = stage_grid(steps, reference=reference)
        assert len(grid) == steps + 1
        assert (grid[0], grid[-1]) == (1, 0)
        assert grid == sorted(grid, reverse=True)
    assert stage_grid(10, reference=True)[-2] == pytest.approx(0.001)


def test_levels_of_a_clip_are_levels_of_each_other():
    x = randn(*SHAPE)
    assert torch.equal(down_by(x, 0), x)
    torch.testing.assert_close(down_by(x, 2), down(down(x)))
