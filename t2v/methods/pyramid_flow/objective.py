"""The training loss: each sample's velocity at one stage of one unit, its history given."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from data_pipeline.errors import ConfigError
from data_pipeline.feeding.loader import Batch
from t2v.methods.pyramid_flow.config import PyramidFlowConfig
from t2v.methods.pyramid_flow.flow import clock, training_pair
from t2v.methods.pyramid_flow.history import Piece, corrupt, history_pieces
from t2v.methods.pyramid_flow.network import Group
from t2v.methods.seeds import HELD_OUT, mix, noise_bins
from t2v.network.conditioning import Condition

TURN = 0x5455524E  # keeps this draw apart from those of noise


@dataclass(frozen=True)
class Lesson:
    """What one row of a batch is to learn: a stage of a unit, at r, from the noise of a seed."""

    row: int
    stage: int
    unit: int
    seed: int
    bin: int = 0
    bins: int = 1

    @property
    def kind(self) -> tuple[int, int]:
        """Lessons of a kind have tensors of the same shapes."""
        return self.stage, self.unit


def stage_losses(
    network: nn.Module,
    batch: Batch,
    config: PyramidFlowConfig,
    *,
    seed: int,
    device: torch.device,
) -> Float[Tensor, " stages"]:
    """The part of each stage in the mean loss of a micro-batch, in which all samples count alike.

    Stage, unit and all noise are functions of (seed, sample number) alone. However a micro-batch
    mixes stages and units, the network is called once, as often as on any other rank.
    """
    lessons = [
        Lesson(row, *training_turn(config, number, seed), mix(seed, number))
        for row, number in enumerate(batch.numbers.tolist())
    ]
    squared = errors(network, batch, config, lessons, device)
    stages = torch.tensor([lesson.stage for lesson in lessons], device=device)
    return (squared[:, None] * F.one_hot(stages, config.flow.stages)).mean(0)


def training_turn(config: PyramidFlowConfig, number: int, seed: int) -> tuple[int, int]:
    """(stage, unit) that a sample trains: a function of its number, so that every step has the same
    mixture and about as many tokens, on however many ranks.

    Turns of `turn_samples` samples go through `stage_turns` round after round. A round trains one
    unit at the finest stage and the one as far from the clip's other end at the coarser stages:
    long histories meet short ones. As many rounds as there are units train each once at the finest
    stage, in a drawn order.
    """
    units = len(config.units)
    round_, place = divmod(number // config.turn_samples, len(config.stage_turns))
    cycle, index = divmod(round_, units)
    generator = torch.Generator().manual_seed(mix(seed ^ TURN, cycle))
    unit = int(torch.randperm(units, generator=generator)[index])
    stage = config.stage_turns[place]
    return stage, unit if stage == max(config.stage_turns) else units - 1 - unit


def held_out_losses(
    network: nn.Module,
    batch: Batch,
    config: PyramidFlowConfig,
    *,
    turns: list[int],
    bins: int,
    seed: int,
    device: torch.device,
) -> tuple[Float[Tensor, "batch stages"], list[list[int]]]:
    """Each sample's part of the loss at every stage, and the bin of r that it was measured in.

    Units and noise are fixed by sample and turn; over all turns a stage of a sample visits every
    bin once. A stage counts as often as in training.
    """
    stages, lessons, numbers = config.flow.stages, [], batch.numbers.tolist()
    places = noise_bins(numbers, turns, bins=bins, parts=stages, seed=seed)
    for row, (number, turn) in enumerate(zip(numbers, turns, strict=True)):
        fixed = mix(mix(seed ^ HELD_OUT, number), turn)
        draw = torch.Generator().manual_seed(fixed)
        units = torch.randint(len(config.units), (stages,), generator=draw).tolist()
        lessons += [
            Lesson(row, stage, units[stage], mix(fixed, stage), places[row][stage], bins)
            for stage in range(stages)
        ]
    losses = errors(network, batch, config, lessons, device).view(-1, stages)
    shares = [config.stage_turns.count(stage) / len(config.stage_turns) for stage in range(stages)]
    return losses * torch.tensor(shares, device=device), places


def errors(
    network: nn.Module,
    batch: Batch,
    config: PyramidFlowConfig,
    lessons: list[Lesson],
    device: torch.device,
) -> Float[Tensor, " lessons"]:
    """Mean squared error of each lesson's velocity, from one call of the network."""
    clean = clean_clips(batch, config, device)
    units = units_there(batch, config)
    lessons = [replace(one, unit=min(one.unit, units[one.row] - 1)) for one in lessons]
    condition = Condition.of(batch, device)
    # Counted where the loader left it: to ask a GPU would be to wait for it.
    lengths = None if batch.text_mask is None else batch.text_mask.sum(1).tolist()
    by_length = sorted(range(len(lessons)), key=lambda n: lengths[lessons[n].row] if lengths else 0)
    kinds = sorted({lesson.kind for lesson in lessons})
    alike = [[n for n in by_length if lessons[n].kind == kind] for kind in kinds]
    prepared = [
        prepare(config, clean, condition, lengths, [lessons[n] for n in members])
        for members in alike
    ]
    velocities = network([group for group, _ in prepared])
    squared = [
        (velocity - target).square().mean(dim=(1, 2, 3, 4))
        for velocity, (_, target) in zip(velocities, prepared, strict=True)
    ]
    order = torch.tensor([n for members in alike for n in members], device=device)
    return torch.cat(squared)[order.argsort()]


def prepare(
    config: PyramidFlowConfig,
    clean: Piece,
    condition: Condition,
    text_lengths: list[int] | None,
    lessons: list[Lesson],
) -> tuple[Group, Piece]:
    """(input of the network, velocity it should answer with) for lessons of one kind."""
    stage, unit, stages = lessons[0].stage, lessons[0].unit, config.flow.stages
    rows = [lesson.row for lesson in lessons]
    frames = slice(config.units.start(unit), config.units.ends[unit])
    chosen = clean[rows]
    history = history_pieces(chosen, config.units, unit=unit, stage=stage, stages=stages)
    drawn = [draw(lesson, [*history, chosen[:, :, frames]], config) for lesson in lessons]
    r = torch.stack([one.r for one in drawn])
    noise = [torch.stack(pieces) for pieces in zip(*(one.noise for one in drawn), strict=True)]
    share = torch.stack([one.share for one in drawn])
    noisy, velocity = training_pair(chosen[:, :, frames], noise[-1], r, config.flow, stage)
    group = Group(
        stage=stage,
        unit=unit,
        pieces=[*corrupt(history, noise[:-1], share), noisy],
        clock=clock(r, config.flow, stage),
        condition=condition.rows(torch.tensor(rows, device=clean.device)),
        text_lengths=None if text_lengths is None else tuple(text_lengths[row] for row in rows),
    )
    return group, velocity


@dataclass(frozen=True)
class Draw:
    """What is random in a lesson; the noise of the unit, at full resolution, is the last."""

    r: Float[Tensor, ""]
    share: Float[Tensor, ""]
    noise: list[Float[Tensor, "channels frames height width"]]


def draw(lesson: Lesson, like: Iterable[Piece], config: PyramidFlowConfig) -> Draw:
    """A lesson's randomness, from its seed: r in (0, 1] within its bin, the share of noise in the
    history, and noise for each piece."""
    shapes = [(piece.shape[1:], piece.device) for piece in like]
    device = shapes[-1][1]
    generator = torch.Generator(device).manual_seed(lesson.seed)
    place, share = torch.rand(2, generator=generator, device=device)
    noise = [torch.randn(shape, generator=generator, device=device) for shape, _ in shapes]
    return Draw((lesson.bin + 1 - place) / lesson.bins, config.history_noise * share, noise)


def units_there(batch: Batch, config: PyramidFlowConfig) -> list[int]:
    """How many units each sample has: all of them, but images, whose latents are one frame."""
    ends = config.units.ends
    if batch.latent_frames is None:
        return [len(ends)] * len(batch.numbers)
    there = [sum(end <= frames for end in ends) for frames in batch.latent_frames.tolist()]
    if not all(there):
        raise ConfigError(
            "data.sources: images are wrong because method.temporal 'full' makes all frames of a "
            "clip at once, and their latents are one frame; leave them out."
        )
    return there


def clean_clips(batch: Batch, config: PyramidFlowConfig, device: torch.device) -> Piece:
    """A batch's clips in the space of the flow: latents, or pixels in [-1, 1]."""
    if batch.latents is not None:
        return batch.latents.to(device).float()
    pixels = batch.patches[:, 0].to(device)
    return rearrange(pixels, "b t h w c -> b c t h w").float() / 127.5 - 1
