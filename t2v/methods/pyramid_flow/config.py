"""What a recipe says of Pyramid Flow, and what of it must fit together."""

from itertools import accumulate
from math import prod
from typing import Annotated, Literal

from pydantic import Field, model_validator

from data_pipeline.feeding.config import CachedLatents
from data_pipeline.pyramid import AXES, Pyramid
from data_pipeline.strict import Share, Size, Strict
from t2v.methods.method import MethodConfig, SamplingConfig
from t2v.methods.pyramid_flow.flow import FlowConfig
from t2v.methods.pyramid_flow.history import Units, lay_out, units_of

COLOURS = 3
Side = Annotated[int, Field(ge=1)]
Steps = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, min_length=1)]
Guidance = Annotated[float, Field(ge=0)]
ROTARY_SHARE = 16  # a head's channels go to time, height and width in parts of 4, 6 and 6


class ModelConfig(Strict):
    """Sizes of the network."""

    token_size: Annotated[tuple[Side, Side], Field(strict=False)] = Field(
        description="(height, width) of a token; it is one frame deep"
    )
    dim: int = Field(ge=1, description="channels of tokens")
    head_dim: int = Field(ge=ROTARY_SHARE, multiple_of=ROTARY_SHARE)
    double_blocks: int = Field(ge=0, description="blocks with weights for text of their own")
    single_blocks: int = Field(ge=1, description="blocks with the same weights for all tokens")
    mlp_ratio: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _refuse_heads_that_do_not_divide(self) -> "ModelConfig":
        if self.dim % self.head_dim:
            raise ValueError(
                f"head_dim: {self.head_dim} is wrong because it does not divide dim {self.dim}; "
                "choose a divisor"
            )
        return self


class PyramidFlowSamplingConfig(SamplingConfig):
    """How a checkpoint turns prompts into clips, unit by unit."""

    steps: Steps = Field(description="Euler steps of each stage, coarsest first")
    first_steps: Steps | None = Field(
        default=None, description="the same for the first unit; none: as for the others"
    )
    guidance_scale: Guidance = Field(default=1.0, description="classifier-free; 1: none")
    first_guidance_scale: Guidance | None = Field(
        default=None, description="the same for the first unit; none: as for the others"
    )
    reference_grid: bool = Field(
        default=False, description="steps as the authors' code has them: the last is 1/1000"
    )
    decode_tile: int | None = Field(
        default=None,
        ge=32,
        description="pixels a side that latents are decoded at a time; none: all",
    )

    def steps_of(self, unit: int) -> tuple[int, ...]:
        """Steps of each stage of a unit."""
        return (self.first_steps or self.steps) if unit == 0 else self.steps

    def guidance_of(self, unit: int) -> float:
        """Guidance scale of a unit."""
        first = self.first_guidance_scale
        return first if unit == 0 and first is not None else self.guidance_scale


class PyramidFlowConfig(MethodConfig):
    """Pyramidal flow matching: geometry, flow, network, history and sampling."""

    kind: Literal["pyramid-flow"]
    space: Literal["pixels", "latents"] = Field(description="what the flow is of")
    latents: CachedLatents | None = None
    temporal: Literal["pyramid", "full"] = Field(
        description="pyramid: unit after unit, each seeing those before; full: all at once"
    )
    clip_size: Size = Field(description="pixels of the clip")
    unit_frames: int | None = Field(
        default=None, ge=1, description="frames of each unit but the first, in the flow's space"
    )
    flow: FlowConfig = FlowConfig()
    model: ModelConfig
    stage_turns: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] = Field(
        description="stages that samples train in turn, such as [0, 1, 1, 2]"
    )
    turn_samples: int = Field(
        default=1, ge=1, description="successive samples that train the same stage and unit"
    )
    history_noise: Share = Field(
        default=1 / 3, description="most noise that training mixes into the history"
    )
    sampling: PyramidFlowSamplingConfig

    @property
    def view(self) -> Pyramid:
        """A batch shows the whole clip."""
        return Pyramid(levels=1, patch_size=self.clip_size, clip_size=self.clip_size)

    @property
    def cached_latents(self) -> CachedLatents | None:
        return self.latents

    @property
    def values_per_sample(self) -> int:
        frames, height, width = self.size
        return self.channels * frames * height * width

    @property
    def size(self) -> tuple[int, int, int]:
        """(frames, height, width) of a clip in the flow's space."""
        return self.latents.size(self.clip_size) if self.latents else self.clip_size

    def pixel_frames(self, frames: int) -> int:
        """Frames of the clip that as many first frames in the flow's space stand for."""
        return 1 + (frames - 1) * self.latents.stride[0] if self.latents else frames

    @property
    def channels(self) -> int:
        """Channels of a clip in the flow's space."""
        return self.latents.channels if self.latents else COLOURS

    @property
    def units(self) -> Units:
        """The units of a clip."""
        return units_of(self.size[0], self.unit_frames)

    def grid(self, level: int) -> tuple[int, int]:
        """(height, width) of a frame at a level, in tokens."""
        (_, *sides), coarser = self.size, 2 ** (self.flow.stages - 1 - level)
        height, width = (
            s // t // coarser for s, t in zip(sides, self.model.token_size, strict=True)
        )
        return height, width

    def token_ends(self, unit: int, stage: int) -> tuple[int, ...]:
        """Where the tokens of each unit end in the sequence of a sample, text left out: those of
        the history, oldest first, and of the unit itself."""
        counts = [
            (self.units.ends[one] - self.units.start(one)) * prod(self.grid(stretch.level))
            for stretch in lay_out(unit, stage)
            for one in range(stretch.first, stretch.end)
        ]
        return tuple(accumulate(counts))

    def problem_with_batches(self, global_batch_size: int) -> str | None:
        round_ = self.turn_samples * len(self.stage_turns)
        if global_batch_size % round_:
            return (
                f"{global_batch_size} is wrong because method.turn_samples {self.turn_samples} x "
                f"{len(self.stage_turns)} of method.stage_turns make rounds of {round_}, and then "
                "no step has the exact mixture of stages; use a multiple"
            )
        return None

    @model_validator(mode="after")
    def _refuse_what_does_not_fit_together(self) -> "PyramidFlowConfig":
        refuse_space(self)
        refuse_units(self)
        refuse_levels(self)
        refuse_turns(self)
        refuse_sampling(self)
        return self


def refuse_space(config: PyramidFlowConfig) -> None:
    """ValueError where the space and the clip do not fit together."""
    if (config.space == "latents") != (config.latents is not None):
        raise ValueError(
            "latents: missing because space is 'latents'; give the set's name, channels and stride"
            if config.latents is None
            else "latents: is wrong because space is 'pixels'; leave it out, or use latents"
        )
    if config.latents:
        by_frames, *strides = config.latents.stride
        frames, *sides = config.clip_size
        if (frames - 1) % by_frames:
            low = 1 + (frames - 1) // by_frames * by_frames
            raise ValueError(
                f"clip_size: {frames} (frames) is wrong because the autoencoder takes 1 frame "
                f"and then {by_frames} at a time; use {low} or {low + by_frames}"
            )
        for axis, side, stride in zip(AXES[1:], sides, strides, strict=True):
            if side % stride:
                raise ValueError(
                    f"clip_size: {side} ({axis}) is wrong because it is no multiple of "
                    f"latents.stride {stride}; use {max(side // stride, 1) * stride}"
                )


def refuse_units(config: PyramidFlowConfig) -> None:
    """ValueError where the clip's frames are not whole units."""
    if (config.temporal == "pyramid") != (config.unit_frames is not None):
        raise ValueError(
            "unit_frames: missing because temporal is 'pyramid'; give the frames of a unit"
            if config.unit_frames is None
            else "unit_frames: is wrong because temporal 'full' has one unit; leave it out"
        )
    frames, unit = config.size[0], config.unit_frames or 1
    if (frames - 1) % unit:
        low = 1 + (frames - 1) // unit * unit
        in_space = f"{frames} latent frames" if config.latents else f"{frames} frames"
        fits = f"{low} or {low + unit}" + (" latent frames" if config.latents else "")
        raise ValueError(
            f"clip_size: {config.clip_size[0]} (frames) is wrong because its {in_space} are not "
            f"1 and then units of {unit}; use {fits}, or another unit_frames"
        )


def refuse_levels(config: PyramidFlowConfig) -> None:
    """ValueError where a frame cannot be halved as often as there are stages."""
    for axis, side, token in zip(AXES[1:], config.size[1:], config.model.token_size, strict=True):
        least = token * 2 ** (config.flow.stages - 1)
        if side % least:
            # As many stages as the side can be halved for.
            most, rest = 1, side // token
            while side % token == 0 and rest % 2 == 0:
                most, rest = most + 1, rest // 2
            remedy = (
                f"use {most}, or sides that are multiples of {least}"
                if side % token == 0
                else f"make sides multiples of {least}"
            )
            raise ValueError(
                f"flow.joints: {config.flow.stages} stages are wrong because {axis} {side} is no "
                f"multiple of model.token_size {token} x {least // token} at the coarsest; "
                f"{remedy}"
            )


def refuse_turns(config: PyramidFlowConfig) -> None:
    """ValueError where the turns are not those of the stages."""
    stages = set(range(config.flow.stages))
    if set(config.stage_turns) != stages:
        raise ValueError(
            f"stage_turns: {list(config.stage_turns)} is wrong because the stages are 0 to "
            f"{config.flow.stages - 1}; give each of them a turn, and no other"
        )


def refuse_sampling(config: PyramidFlowConfig) -> None:
    """ValueError where sampling does not suit the stages."""
    for name in ("steps", "first_steps"):
        steps = getattr(config.sampling, name)
        if steps is not None and len(steps) != config.flow.stages:
            raise ValueError(
                f"sampling.{name}: {list(steps)} has {len(steps)} entries for "
                f"{config.flow.stages} stages; give one per stage"
            )
