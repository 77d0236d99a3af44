"""The seam: what a generative method brings, and all that the rest may know of it.

A method is a folder beside this file, which only `recipe/methods.py` names: a strict configuration
(the recipe's section `method`, chosen by its `kind`) and a class that does what `Method` says.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.feeding.config import CachedLatents, Conditioning
from data_pipeline.feeding.loader import Batch
from data_pipeline.pyramid import Pyramid
from data_pipeline.strict import Size, Strict
from t2v.network.conditioning import Condition
from t2v.network.network import Network

Clips = Float[Tensor, "clips channels frames height width"]
LEAST_FPS, MOST_FPS = 0.001, 1000.0
NOTHING = re.compile("(?!)")


class SamplingConfig(Strict):
    """What sampling is told whatever the method, which adds fields of its own."""

    weights: Literal["ema", "raw"] = "ema"
    fps: float = Field(
        default=24.0, ge=0, le=MOST_FPS, description="frame rate asked for; 0: a still image"
    )
    original_size: Annotated[
        tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], Field(strict=False)
    ] = Field(default=(720, 1280), description="size of source media asked for: (height, width)")

    @model_validator(mode="after")
    def _refuse_rates_that_no_file_holds(self) -> "SamplingConfig":
        if 0 < self.fps < LEAST_FPS:
            raise ValueError(
                f"fps: {self.fps:g} is wrong because mp4 holds no rate below {LEAST_FPS:g}; give "
                "more, or 0 for still images"
            )
        return self


class MethodConfig(Strict, ABC):
    """A method's section of a recipe."""

    kind: str
    sampling: SamplingConfig

    @property
    @abstractmethod
    def view(self) -> Pyramid:
        """What a batch shows of each clip: one window per level of this pyramid."""

    @property
    def values_per_sample(self) -> int:
        """How many numbers the network is given of a sample."""
        return self.view.levels * prod(self.view.patch_size) * 3

    def problem_with_batches(self, global_batch_size: int) -> str | None:
        """Why a step cannot have as many samples, beginning with their number."""
        return None

    @property
    def cached_latents(self) -> CachedLatents | None:
        """The latents of whole clips, of the view's size, that a batch holds instead of pixels."""
        return None


@dataclass(frozen=True)
class Output:
    """A clip that generation makes of a subject; methods may make coarser ones on their way."""

    size: Size
    frame_stride: int = 1  # frames of the finest clip for each of this one's
    borders: tuple[tuple[int, ...], ...] = ((), (), ())  # where tiles meet, on each axis


@dataclass(frozen=True)
class Team:
    """The processes that share the work on the same clips; by default this one alone."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def gather(self, part: Tensor) -> list[Tensor]:
        """Every member's part, all of one shape, in rank order."""
        if self.size == 1:
            return [part]
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return parts


ALONE = Team()


@dataclass(frozen=True)
class Room:
    """The bytes that generation may fill, and a folder for what fits in no memory."""

    device_bytes: int
    host_bytes: int = 0
    scratch: Path | None = None


class Method(ABC):
    """A generative method at the settings of one recipe. Its parts are the named losses, such as
    HPDM's levels, that add up to the training loss. Networks it is given are its own."""

    Config: ClassVar[type[MethodConfig]]
    title: ClassVar[str]
    bin_axis: ClassVar[str]  # what grows from bin to bin of the held-out loss
    # Parameters that a base of the same method lacks, and its position tables, by name.
    new_parameters: ClassVar[re.Pattern[str]] = NOTHING
    position_tables: ClassVar[re.Pattern[str]] = NOTHING

    parts: tuple[str, ...]
    passes_without_gradient: int = 0  # of the network, for one training pass
    calls_per_clip: int  # of the network, to generate it without guidance
    is_guided: bool = False  # whether generation looks at the null condition
    guide_checkpoint: str | None = None  # of a second network that generation is given

    def __init__(self, config: Any, conditioning: Conditioning) -> None:
        self.config, self.conditioning = config, conditioning

    @abstractmethod
    def network(self) -> Network:
        """The network; on the meta device where that is the default device."""

    @abstractmethod
    def inputs(self) -> dict[str, Any]:
        """A training sample's inputs of the network, as zeros: the heaviest's where they differ."""

    @property
    def mean_compute(self) -> float:
        """Operations of an average training sample over those for `inputs()`."""
        return 1.0

    @abstractmethod
    def losses(
        self, network: Any, batch: Batch, *, seed: int, device: torch.device
    ) -> Float[Tensor, " parts"]:
        """Mean loss of each part over a micro-batch; a function of (seed, sample numbers)."""

    @abstractmethod
    def held_out(
        self,
        network: Any,
        batch: Batch,
        *,
        turns: list[int],
        bins: int,
        seed: int,
        device: torch.device,
    ) -> tuple[Float[Tensor, "batch parts"], list[list[int]]]:
        """(loss, bin of noise) of each sample's parts at the fixed noise of its turn; over `bins`
        turns each part visits every bin once."""

    @abstractmethod
    def bin_edges(self, bins: int) -> list[float]:
        """Where one bin of the held-out loss ends and the next begins; one fewer than bins."""

    def problem_with_base(self, base: dict, *, resized: bool) -> tuple[str, Any, Any] | None:
        """(field, base's value, ours) where a base's `method` section makes weights of the same
        shapes mean something else; `resized` lets position tables be interpolated."""
        return None

    def kind_of(self, parameter: str) -> str:
        """What a parameter is for, in a word or two."""
        return parameter.partition(".")[0]

    def facts(self) -> dict[str, Any]:
        """What `t2v plan` tells of the method besides."""
        return {}

    @property
    def outputs(self) -> list[Output]:
        """The clips that generation makes, coarsest first."""
        return [Output(self.config.view.clip_size)]

    def problem_with_given(self, frames: int) -> str | None:
        """Why a clip cannot begin with as many given frames, and what to do."""
        return "the checkpoint's method makes whole clips; leave it out"

    def given_sizes(self, frames: int) -> list[tuple[int, int]]:
        """(height, width) that as many given frames may have."""
        return [self.outputs[-1].size[1:]]

    def clips_at_once(self, network: Any, most: int, room: Room, team: Team) -> int:
        """How many clips to make together, at most `most`; ConfigError where not one fits."""
        return most

    @abstractmethod
    def generate(
        self,
        network: Any,
        *,
        condition: Condition,
        null: Condition,
        seeds: list[int],
        room: Room,
        team: Team,
        progress: Callable[[int], None],
        given: Clips | None = None,
        guide: Any = None,
    ) -> list[Clips]:
        """Clips in [-1, 1], one per seed, at each of `outputs`; a clip depends on its seed, its
        condition and the frames it is given, to begin with or to refine. `guide` is the network of
        `guide_checkpoint`. `progress` is told of calls as they are done."""


def first_difference(
    base: dict, run: dict, paths: Sequence[Sequence[str]]
) -> tuple[str, Any, Any] | None:
    """(field, base's value, ours) of the first of these settings that is not the same."""
    for path in paths:
        old, new = base, run
        for name in path:
            old, new = (old or {}).get(name), (new or {}).get(name)
        if old != new:
            return ".".join(path), old, new
    return None


def no_room(device_bytes: int, more_bytes: int, what: str) -> ConfigError:
    """The error where memory does not even hold what is sampled at once."""
    return ConfigError(
        f"--memory-gib: leaves {device_bytes / 2**30:.2f} GiB beside the program and its weights, "
        f"which is wrong because {what} cannot be sampled in it; give at least "
        f"{more_bytes / 2**30:.2f} GiB more."
    )
