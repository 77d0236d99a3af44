"""Generation unit after unit: each goes through all stages, seeing those before it."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from t2v.methods.method import ALONE, Team
from t2v.methods.pyramid_flow.config import PyramidFlowConfig
from t2v.methods.pyramid_flow.flow import FlowConfig, clock, jump, noise_down_by
from t2v.methods.pyramid_flow.history import Piece, history_pieces
from t2v.methods.pyramid_flow.network import Group
from t2v.network.conditioning import Condition

REFERENCE_LAST = 0.001  # where the authors' grid ends before it jumps to 0

# (state, stage, r) -> velocity
Velocity = Callable[[Piece, int, float], Piece]


def stage_grid(steps: int, *, reference: bool = False) -> list[float]:
    """Where Euler steps through a stage begin and end: r from 1 to 0."""
    if reference:
        return [*torch.linspace(1, REFERENCE_LAST, steps, dtype=torch.float64).tolist(), 0.0]
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()


def integrate(
    velocity: Velocity,
    noise: Piece,
    flow: FlowConfig,
    *,
    grids: Sequence[Sequence[float]],
    draw: Callable[[torch.Size], Piece],
) -> Piece:
    """A clean unit out of white noise of full resolution, through all stages; the state is fp32.

    `draw` gives white noise of a shape, for the jumps.
    """
    x = noise_down_by(noise, flow.stages - 1)
    for stage, grid in enumerate(grids):
        if stage:
            *outer, height, width = x.shape
            x = jump(x, draw(torch.Size([*outer, 2 * height, 2 * width])), flow, stage)
        for r, following in pairwise(grid):
            x = x + (following - r) * velocity(x, stage, r)
    return x


@torch.no_grad()
def generate(
    network: nn.Module,
    config: PyramidFlowConfig,
    *,
    condition: Condition,
    null: Condition,
    seeds: list[int],
    given: Piece | None = None,
    team: Team = ALONE,
    progress: Callable[[int], None] = lambda calls: None,
) -> Piece:
    """Clips in the flow's space, one per seed; the frames of `given`, whole units, begin them.

    A clip's noise depends on its seed alone. The history is computed anew at every step: its keys
    and values follow the clock of the unit that is denoised, so none can be kept.
    """
    device, size = condition.fps.device, config.size
    generators = [torch.Generator(device).manual_seed(seed % 2**63) for seed in seeds]

    def draw(shape: torch.Size) -> Piece:
        each = [torch.randn(shape[1:], generator=g, device=device) for g in generators]
        return torch.stack(each)

    noise = draw(torch.Size([len(seeds), config.channels, *size]))
    frames = noise[:, :, :0] if given is None else given
    for unit in range(len(config.units)):
        start, end = config.units.start(unit), config.units.ends[unit]
        if start < frames.shape[2]:
            continue
        velocity = guided(network, config, condition, null, frames, unit, team, progress)
        grids = [
            stage_grid(steps, reference=config.sampling.reference_grid)
            for steps in config.sampling.steps_of(unit)
        ]
        made = integrate(velocity, noise[:, :, start:end], config.flow, grids=grids, draw=draw)
        if config.space == "pixels":
            made = made.clamp(-1, 1)
        frames = torch.cat([frames, made], dim=2)
    return frames


def guided(
    network: nn.Module,
    config: PyramidFlowConfig,
    condition: Condition,
    null: Condition,
    frames: Piece,
    unit: int,
    team: Team,
    progress: Callable[[int], None],
) -> Velocity:
    """The network's velocity of a unit that follows clean frames, led away from the null condition.

    Members of a team answer a branch each; the answers are those of one process, bit for bit.
    """
    scale, stages = config.sampling.guidance_of(unit), config.flow.stages
    branches = [condition] if scale == 1 else [condition, null]
    lengths = [text_lengths(branch) for branch in branches]
    histories = [
        history_pieces(frames, config.units, unit=unit, stage=stage, stages=stages)
        for stage in range(stages)
    ]

    def answer(branch: int, x: Piece, stage: int, r: float) -> Piece:
        group = Group(
            stage=stage,
            unit=unit,
            pieces=[*histories[stage], x],
            clock=clock(torch.full((len(x),), r, device=x.device), config.flow, stage),
            condition=branches[branch],
            text_lengths=lengths[branch],
        )
        return network([group])[0]

    def velocity(x: Piece, stage: int, r: float) -> Piece:
        if len(branches) > 1 and team.size > 1:
            found = team.gather(answer(team.rank % 2, x, stage, r))[:2]
        else:
            found = [answer(branch, x, stage, r) for branch in range(len(branches))]
        progress(len(x))
        return found[0] if len(found) == 1 else torch.lerp(found[1], found[0], scale)

    return velocity


def text_lengths(condition: Condition) -> tuple[int, ...] | None:
    """How many text tokens each clip has."""
    if condition.text_mask is None:
        return None
    return tuple(condition.text_mask.sum(1).tolist())
