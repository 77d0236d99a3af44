"""HPDM as a method: what the rest of the system may ask of it."""

import re
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.feeding.config import Conditioning
from data_pipeline.feeding.loader import Batch
from t2v.methods.hpdm.config import HPDMConfig
from t2v.methods.hpdm.cost import mean_compute, sampling_flops
from t2v.methods.hpdm.held_out import fixed_noise, sigma_at
from t2v.methods.hpdm.memory import clips_that_fit, plan_memory
from t2v.methods.hpdm.network import CHANNELS, HPDM
from t2v.methods.hpdm.objective import level_losses, weighted_errors
from t2v.methods.hpdm.sampling import generate
from t2v.methods.hpdm.settings import level_tilings, network_calls
from t2v.methods.hpdm.store import Store
from t2v.methods.hpdm.tiling import tile_borders
from t2v.methods.method import Clips, Method, Output, Room, Team, first_difference
from t2v.methods.seeds import noise_bins
from t2v.network.conditioning import Condition, blank_condition

# Fields whose change keeps every shape and still makes another network.
SAME_MODEL = (("model", "token_size"), ("model", "token_head_dim"), ("model", "latent_head_dim"))


class HPDMMethod(Method):
    """Hierarchical patch diffusion: its parts are the levels of the pyramid."""

    Config = HPDMConfig
    title = "Hierarchical Patch Diffusion Model"
    new_parameters = re.compile(
        r"blocks\.\d+\.fusion\..+|conditioning\.level_embedding|coarse_tokenizer\..+"
    )
    position_tables = re.compile(r"positions\.(frames|height|width)")
    bin_axis = "sigma"

    def __init__(self, config: HPDMConfig, conditioning: Conditioning) -> None:
        super().__init__(config, conditioning)
        levels = range(config.pyramid.levels)
        self.parts = tuple(f"level_{level}" for level in levels)
        self.passes_without_gradient = int(config.model.self_conditioning_rate > 0)
        self.calls_per_clip = sum(network_calls(config.sampling, config.pyramid))
        self.is_guided = any(
            branch.shows == "null" for n in levels for branch in config.sampling.branches(n)
        )
        if any(len(config.sampling.branches(n)) > 1 for n in levels):
            self.guide_checkpoint = config.sampling.guide_checkpoint

    def network(self) -> HPDM:
        return HPDM(self.config.model, self.config.pyramid, self.conditioning)

    def inputs(self) -> dict[str, Any]:
        pyramid = self.config.pyramid
        return {
            "x": torch.zeros(1, pyramid.levels, CHANNELS, *pyramid.patch_size),
            "noise": torch.zeros(1, pyramid.levels),
            "offsets": torch.zeros(1, pyramid.levels, 3, dtype=torch.long),
            "condition": blank_condition(self.conditioning),
        }

    @property
    def mean_compute(self) -> float:
        budget = self.config.latent_budget
        return mean_compute(self, budget) if budget else 1.0

    def losses(
        self, network: HPDM, batch: Batch, *, seed: int, device: torch.device
    ) -> Float[Tensor, " parts"]:
        return level_losses(network, batch, self.config, seed=seed, device=device)

    def held_out(
        self,
        network: HPDM,
        batch: Batch,
        *,
        turns: list[int],
        bins: int,
        seed: int,
        device: torch.device,
    ) -> tuple[Float[Tensor, "batch parts"], list[list[int]]]:
        numbers = batch.numbers.tolist()
        places = noise_bins(numbers, turns, bins=bins, parts=len(self.parts), seed=seed)
        drawn = fixed_noise(self.config, numbers, turns, places, bins=bins, seed=seed)
        noise, sigma, conditioned = (values.to(device) for values in drawn)
        errors = weighted_errors(network, batch, self.config, noise, sigma, conditioned)
        return errors, places

    def bin_edges(self, bins: int) -> list[float]:
        """Of level 0; a finer level's lie as much lower as its noise follows the input scale."""
        quantiles = torch.linspace(0, 1, bins + 1)[:, None]
        return sigma_at(quantiles, self.config.diffusion)[1:-1, 0].tolist()

    def problem_with_base(self, base: dict, *, resized: bool) -> tuple[str, Any, Any] | None:
        # Level 0 is the base; tables that are interpolated may be of another scale.
        paths = SAME_MODEL if resized else (*SAME_MODEL, ("diffusion", "input_scale"))
        return first_difference(base, self.config.model_dump(mode="json"), paths)

    def kind_of(self, parameter: str) -> str:
        return kind_of(parameter)

    def facts(self) -> dict[str, Any]:
        return facts_of(self.config, self.conditioning)

    @property
    def outputs(self) -> list[Output]:
        return outputs_of(self.config)

    def problem_with_given(self, frames: int) -> str | None:
        return problem_with_coarse(self.outputs[:-1], frames)

    def given_sizes(self, frames: int) -> list[tuple[int, int]]:
        return [output.size[1:] for output in self.outputs[:-1] if output.size[0] == frames]

    def clips_at_once(self, network: HPDM, most: int, room: Room, team: Team) -> int:
        return clips_that_fit(network, self.config.sampling, most, room, team_size=team.size)

    def generate(
        self,
        network: HPDM,
        *,
        condition: Condition,
        null: Condition,
        seeds: list[int],
        room: Room,
        team: Team,
        progress: Callable[[int], None],
        given: Clips | None = None,
        guide: HPDM | None = None,
    ) -> list[Clips]:
        sampling, diffusion = self.config.sampling, self.config.diffusion
        rooms = plan_memory(
            network, sampling, clips=len(seeds), device_bytes=room.device_bytes,
            host_bytes=room.host_bytes, team_size=team.size,
        )  # fmt: skip
        with closing(Store(condition.fps.device, room.scratch)) as store:
            return generate(
                network, condition=condition, null=null, seeds=seeds, sampling=sampling,
                diffusion=diffusion, rooms=rooms, store=store, team=team, progress=progress,
                given=given, guide=guide,
            )  # fmt: skip


def kind_of(parameter: str) -> str:
    """What a parameter is for."""
    top, _, rest = parameter.partition(".")
    if top != "blocks":
        kinds = {"conditioning", "self_conditioning", "latents"}
        return top if top in kinds else "tokenizer"
    if ".fusion." in parameter:
        return "fusion"
    if ".modulation." in parameter:
        return "modulation"
    return "latent layers" if ".layers." in rest else "read and write"


def facts_of(config: HPDMConfig, conditioning: Conditioning) -> dict[str, Any]:
    """What `t2v plan` tells besides."""
    pyramid, sampling = config.pyramid, config.sampling
    with torch.device("meta"):
        network = HPDM(config.model, pyramid, conditioning)
    flops = sampling_flops(network, sampling, config.diffusion, conditioning)
    return {
        "tokens per patch": network.grid.count,
        "network calls per sampled clip": network_calls(sampling, pyramid),
        "TFLOP per sampled clip": [float(f"{one / 1e12:.4g}") for one in flops],
    }


def outputs_of(config: HPDMConfig) -> list[Output]:
    """The clips of all levels."""
    pyramid, sampling = config.pyramid, config.sampling
    return [
        Output(
            pyramid.size(level),
            pyramid.stride(level)[0],
            tile_borders(level_tilings(sampling, pyramid, level)),
        )
        for level in range(pyramid.levels)
    ]


def problem_with_coarse(coarser: list[Output], frames: int) -> str | None:
    """Why as many frames are no clip of a coarser level, and what to do."""
    fits = sorted({output.size[0] for output in coarser})
    if frames in fits:
        return None
    if not fits:
        return "the checkpoint has one level, so that nothing is finer; leave it out"
    known = " or ".join(map(str, fits))
    return f"clips of coarser levels, to be refined, have {known} frames; give as many"
