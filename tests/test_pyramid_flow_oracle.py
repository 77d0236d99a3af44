"""The sampler of Pyramid Flow against data whose law is known: exact where its jumps are right."""

import pytest
import torch
from torch import Tensor

from t2v.methods.pyramid_flow import sampling
from t2v.methods.pyramid_flow.flow import (
    FlowConfig,
    corrective_noise,
    jump,
    jump_noise,
    jump_scale,
    stage_ends,
)
from t2v.methods.pyramid_flow.sampling import integrate, stage_grid
from tests.test_pyramid_flow import SCHEDULES, SIDE, matrix


def gaussian_data() -> tuple[Tensor, Tensor]:
    """Mean and covariance of smooth random fields of 8 x 8 cells."""
    places = torch.cartesian_prod(*[torch.arange(SIDE, dtype=torch.float64)] * 2)
    covariance = 0.8 * torch.exp(-(torch.cdist(places, places) ** 2) / 8) + 0.05 * torch.eye(64)
    return 0.5 + 0.3 * torch.sin(places[:, 0]) - 0.02 * places[:, 1], covariance


class GaussianOracle:
    """E[start - end | state] of Gaussian data: affine, and in closed form."""

    def __init__(self, flow: FlowConfig) -> None:
        self.flow, (self.mean, self.covariance) = flow, gaussian_data()
        self.ends = []
        for stage in range(flow.stages):
            of_x, of_z = [], []
            for which in (0, 1):
                of_x.append(matrix(lambda x: stage_ends(x, 0 * x, flow, stage)[which], SIDE))  # noqa: B023
                of_z.append(matrix(lambda z: stage_ends(0 * z, z, flow, stage)[which], SIDE))  # noqa: B023
            self.ends.append((of_x, of_z))

    def __call__(self, x: Tensor, stage: int, r: float) -> Tensor:
        of_x, of_z = self.ends[stage]
        state_x, state_z = (r * start + (1 - r) * end for start, end in (of_x, of_z))
        velocity_x, velocity_z = of_x[0] - of_x[1], of_z[0] - of_z[1]
        both = velocity_x @ self.covariance @ state_x.T + velocity_z @ state_z.T
        own = state_x @ self.covariance @ state_x.T + state_z @ state_z.T
        gain = torch.linalg.solve(own, both.T).T
        shape = x.shape
        moved = (x.flatten(1) - state_x @ self.mean) @ gain.T + velocity_x @ self.mean
        return moved.view(shape)


def sampled_law(flow: FlowConfig, steps: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of what the sampler makes of all its noises; it is affine in them."""
    oracle, sides = GaussianOracle(flow), [SIDE // 2**k for k in range(flow.stages)][::-1]
    counts = [SIDE * SIDE, *(side * side for side in sides[1:])]
    total = sum(counts)
    basis = torch.cat([torch.zeros(1, total), torch.eye(total)]).double()
    noises = [
        part.view(-1, 1, 1, round(part.shape[1] ** 0.5), round(part.shape[1] ** 0.5))
        for part in basis.split(counts, dim=1)
    ]
    later = iter(noises[1:])
    made = integrate(
        oracle, noises[0], flow, grids=[stage_grid(steps)] * flow.stages,
        draw=lambda shape: next(later),
    ).flatten(1)  # fmt: skip
    moves = made[1:] - made[0]
    return made[0], moves.T @ moves


def law_error(flow: FlowConfig, steps: int) -> tuple[float, float]:
    """Relative errors of (mean, covariance) after as many steps per stage."""
    mean, covariance = gaussian_data()
    got_mean, got_covariance = sampled_law(flow, steps)
    return (
        float((got_mean - mean).norm() / mean.norm()),
        float((got_covariance - covariance).norm() / covariance.norm()),
    )


def endless_law_error(flow: FlowConfig) -> tuple[float, float]:
    """The same in the limit of many steps, extrapolated from 40 and 80 (Euler is of first order,
    so what is left is of second)."""
    once, twice = sampled_law(flow, 40), sampled_law(flow, 80)
    mean, covariance = gaussian_data()
    got = [2 * fine - coarse for coarse, fine in zip(once, twice, strict=True)]
    return (
        float((got[0] - mean).norm() / mean.norm()),
        float((got[1] - covariance).norm() / covariance.norm()),
    )


@pytest.mark.parametrize("flow", SCHEDULES[:5], ids=str)
def test_the_sampler_keeps_the_law_of_gaussian_data(flow):
    mean_error, covariance_error = endless_law_error(flow)
    assert mean_error < 2e-3
    assert covariance_error < 2e-3


def test_more_steps_come_nearer_by_the_first_order():
    errors = [law_error(FlowConfig(), steps)[1] for steps in (10, 20, 100)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2)
    assert errors[0] / errors[2] == pytest.approx(10, rel=0.2)


def smooth_up(x: Tensor) -> Tensor:
    """The wrong upsampling: bilinear."""
    return torch.nn.functional.interpolate(x[:, 0], scale_factor=2, mode="bilinear")[:, None]


def without_noise(y: Tensor, z: Tensor, flow: FlowConfig, stage: int) -> Tensor:
    return jump(y, 0 * z, flow, stage)


def with_white_noise(y: Tensor, z: Tensor, flow: FlowConfig, stage: int) -> Tensor:
    e = flow.signal[stage - 1]
    return jump(y, 0 * z, flow, stage) + jump_noise(e, flow.gamma) * z


def with_smooth_upsampling(y: Tensor, z: Tensor, flow: FlowConfig, stage: int) -> Tensor:
    e = flow.signal[stage - 1]
    noise = jump_noise(e, flow.gamma) * corrective_noise(z, flow.gamma)
    return jump_scale(e, flow.gamma) * smooth_up(y) + noise


@pytest.mark.parametrize("wrong", [without_noise, with_white_noise, with_smooth_upsampling])
def test_a_wrong_jump_breaks_the_law(wrong, monkeypatch):
    monkeypatch.setattr(sampling, "jump", wrong)
    assert endless_law_error(FlowConfig())[1] > 0.2
