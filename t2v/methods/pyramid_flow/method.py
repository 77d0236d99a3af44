"""Pyramid Flow as a method: what the rest of the system may ask of it."""

from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.feeding.config import Conditioning, text_shape
from data_pipeline.feeding.loader import Batch
from t2v.methods.method import Clips, Method, Room, Team, first_difference, no_room
from t2v.methods.pyramid_flow.config import PyramidFlowConfig
from t2v.methods.pyramid_flow.history import lay_out
from t2v.methods.pyramid_flow.network import Group, PyramidFlow
from t2v.methods.pyramid_flow.objective import held_out_losses, stage_losses
from t2v.methods.pyramid_flow.sampling import generate
from t2v.network.conditioning import Condition, blank_condition

# Fields whose change keeps every shape and still makes another network.
SAME_NETWORK = (
    ("space",),
    ("latents", "name"),
    ("flow", "joints"),
    ("flow", "gamma"),
    ("flow", "shift"),
    ("model", "token_size"),
    ("model", "head_dim"),
)
FP32 = 4


class PyramidFlowMethod(Method):
    """Pyramidal flow matching: its parts are the stages."""

    Config = PyramidFlowConfig
    title = "Pyramid Flow model"
    bin_axis = "r, from the end of a stage to its start"

    def __init__(self, config: PyramidFlowConfig, conditioning: Conditioning) -> None:
        super().__init__(config, conditioning)
        units, sampling = len(config.units), config.sampling
        self.parts = tuple(f"stage_{stage}" for stage in range(config.flow.stages))
        self.calls_per_clip = sum(sum(sampling.steps_of(unit)) for unit in range(units))
        self.is_guided = any(sampling.guidance_of(unit) != 1 for unit in range(units))

    @property
    def mean_compute(self) -> float:
        text = text_shape(self.conditioning)
        return mean_compute(self.config, text[0] if text else 0)

    def network(self) -> PyramidFlow:
        return PyramidFlow(self.config, self.conditioning)

    def inputs(self) -> dict[str, Any]:
        last, finest = len(self.config.units) - 1, self.config.flow.stages - 1
        return {"groups": [blank_group(self.config, self.conditioning, last, finest)]}

    def losses(
        self, network: PyramidFlow, batch: Batch, *, seed: int, device: torch.device
    ) -> Float[Tensor, " parts"]:
        return stage_losses(network, batch, self.config, seed=seed, device=device)

    def held_out(
        self,
        network: PyramidFlow,
        batch: Batch,
        *,
        turns: list[int],
        bins: int,
        seed: int,
        device: torch.device,
    ) -> tuple[Float[Tensor, "batch parts"], list[list[int]]]:
        return held_out_losses(
            network, batch, self.config, turns=turns, bins=bins, seed=seed, device=device
        )

    def bin_edges(self, bins: int) -> list[float]:
        return [edge / bins for edge in range(1, bins)]

    def problem_with_base(self, base: dict, *, resized: bool) -> tuple[str, Any, Any] | None:
        return first_difference(base, self.config.model_dump(mode="json"), SAME_NETWORK)

    def kind_of(self, parameter: str) -> str:
        top, _, rest = parameter.partition(".")
        if top != "blocks":
            return "conditioning" if top == "conditioning" else "tokenizer and head"
        if ".modulation." in rest:
            return "modulation"
        return "text stream" if rest.partition(".")[2].startswith("text.") else "blocks"

    def facts(self) -> dict[str, Any]:
        config, last = self.config, len(self.config.units) - 1
        frames, finest = config.size[0], prod(config.grid(config.flow.stages - 1))
        return {
            "tokens of the last unit's sample, by stage": [
                config.token_ends(last, stage)[-1] for stage in range(config.flow.stages)
            ],
            "tokens of the whole clip at full resolution": frames * finest,
            "units": len(config.units),
            "network calls per sampled clip": self.calls_per_clip,
        }

    def clips_at_once(self, network: PyramidFlow, most: int, room: Room, team: Team) -> int:
        # By the activations of the heaviest step, an estimate.
        config, text = self.config, text_shape(self.conditioning)
        tokens = config.token_ends(len(config.units) - 1, config.flow.stages - 1)[-1]
        tokens += text[0] if text else 0
        wide = config.model.dim * (6 + 2 * config.model.mlp_ratio)  # of a block and its input
        clip = FP32 * (tokens * wide + 4 * config.values_per_sample)
        if room.device_bytes < clip:
            raise no_room(room.device_bytes, clip - room.device_bytes, "one clip")
        return min(most, room.device_bytes // clip)

    def problem_with_given(self, frames: int) -> str | None:
        fits = [self.config.pixel_frames(end) for end in self.config.units.ends[:-1]]
        if frames in fits:
            return None
        if not fits:
            return "the checkpoint makes all frames at once; leave it out"
        return f"units end after {', '.join(map(str, fits))} frames; give as many"

    def generate(
        self,
        network: PyramidFlow,
        *,
        condition: Condition,
        null: Condition,
        seeds: list[int],
        room: Room,
        team: Team,
        progress: Callable[[int], None],
        given: Clips | None = None,
        guide: None = None,
    ) -> list[Clips]:
        clips = generate(
            network,
            self.config,
            condition=condition,
            null=null,
            seeds=seeds,
            given=given,
            team=team,
            progress=progress,
        )
        return [clips]


def mean_compute(config: PyramidFlowConfig, text_tokens: int) -> float:
    """Operations of an average training sample over those of the heaviest: of the blocks' linear
    maps, which grow with the tokens, and of attention, which grows with what they see."""
    stages, units, model = range(config.flow.stages), range(len(config.units)), config.model
    per_token = model.dim * (4 + 2 * model.mlp_ratio)

    def cost(stage: int, unit: int) -> int:
        ends = [text_tokens + end for end in config.token_ends(unit, stage)]
        seen = sum((end - start) * end for start, end in pairwise([0, *ends]))
        return ends[-1] * per_token + 2 * seen

    turns = [cost(stage, unit) for stage in config.stage_turns for unit in units]
    return sum(turns) / len(turns) / cost(stages[-1], units[-1])


def blank_group(
    config: PyramidFlowConfig, conditioning: Conditioning, unit: int, stage: int
) -> Group:
    """One sample at a stage of a unit, as zeros."""
    text, pieces = text_shape(conditioning), []
    for stretch in lay_out(unit, stage):
        frames = config.units.frames(stretch)
        sides = zip(config.grid(stretch.level), config.model.token_size, strict=True)
        size = (frames.stop - frames.start, *(count * token for count, token in sides))
        pieces.append(torch.zeros(1, config.channels, *size))
    return Group(
        stage=stage,
        unit=unit,
        pieces=pieces,
        clock=torch.ones(1),
        condition=blank_condition(conditioning),
        text_lengths=(text[0],) if text else None,
    )
