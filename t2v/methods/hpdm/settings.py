"""Sampling settings, and what follows from them and the pyramid alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, model_validator

from data_pipeline.pyramid import AXES, Pyramid
from data_pipeline.strict import Share, Strict
from t2v.methods.hpdm.diffusion import DiffusionConfig
from t2v.methods.hpdm.solver import MULTISTEP, SolverName
from t2v.methods.hpdm.tiling import OVERLAPS, Blending, Tiling, tile_level
from t2v.methods.method import SamplingConfig

T = TypeVar("T")
Shown = Literal["prompt", "null"]


@dataclass(frozen=True)
class Branch:
    """What tiles are denoised under: a condition, and a number of latents (None: all)."""

    shows: Shown
    latents: int | None = None


def _known_axes(value: str | list[str]) -> str | list[str]:
    for letters in [value] if isinstance(value, str) else value:
        if letters not in OVERLAPS:
            raise ValueError(
                f"value '{letters}' is wrong because it is none of {', '.join(OVERLAPS[1:])} or "
                "''; name axes by f, h, w in this order"
            )
    return value


def at_level(value: T | list[T], level: int) -> T:
    """A level's own of a list, or what holds for all."""
    return value[level] if isinstance(value, list) else value


def per_level(value: str | list[str]) -> list[str]:
    """What holds for all levels, or each level's own."""
    return [value] if isinstance(value, str) else value


Latents = Annotated[int, Field(ge=1)]
Interval = Annotated[
    tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]], Field(strict=False)
]
Intervals = Interval | list[Interval] | None


def _rising(intervals: Intervals) -> Intervals:
    for low, high in intervals if isinstance(intervals, list) else filter(None, [intervals]):
        if low >= high:
            raise ValueError(
                f"value [{low:g}, {high:g}] is wrong because it holds no noise level; write "
                "[lowest, highest]"
            )
    return intervals


class ContextReading(Strict):
    """At which noise level a finished level is read for the finer ones: at `sigma`, at a `quantile`
    of the level's training noise, or, without either, at the last noise level of sampling."""

    sigma: float | None = Field(default=None, gt=0)
    quantile: float | None = Field(default=None, gt=0, lt=1)
    noised: bool = Field(default=False, description="add the noise, or only tell of it")

    @model_validator(mode="after")
    def _refuse_two_noise_levels(self) -> "ContextReading":
        if self.sigma is not None and self.quantile is not None:
            raise ValueError(
                f"sigma: {self.sigma} is wrong beside a quantile; leave one of the two out"
            )
        return self

    def level_sigma(self, diffusion: DiffusionConfig, level: int) -> float:
        """The noise level at which a level is read."""
        if self.quantile is not None:
            return diffusion.sigma_at(self.quantile, level)
        return self.sigma or diffusion.level_range(level)[0]


class HPDMSamplingConfig(SamplingConfig):
    """How a checkpoint turns prompts into clips; lists have one entry per level."""

    steps: list[Annotated[int, Field(ge=1)]] = Field(
        description="sampling steps of each level; the paper: 128, 64, 32, 16"
    )
    guidance_scale: Annotated[float, Field(ge=0)] | list[Annotated[float, Field(ge=0)]] = Field(
        default=1.0, description="classifier-free; 1: none; one, or one per level"
    )
    overlap: Annotated[str | list[str], AfterValidator(_known_axes)] = Field(
        default="hw",
        description="axes on which neighbouring tiles overlap by half: f, h, w; one, or per level",
    )
    shifted: Annotated[str, AfterValidator(_known_axes)] = Field(
        default="", description="axes on which tiles move by half of one at every other step"
    )
    blending: Blending = Field(
        default="uniform", description="weights of overlapping tiles; tapered: less at their ends"
    )
    guide: Shown = Field(
        default="null",
        description="what guidance leads away from: the null condition, or the prompt as fewer "
        "latents, or guide_checkpoint, see it (autoguidance)",
    )
    guide_checkpoint: str | None = Field(
        default=None,
        description="whose network answers for that, such as an older step: a run, a step folder "
        "or an export; none: the network itself",
    )
    guidance_rescale: Share | list[Share] = Field(
        default=0.0,
        description="how much of its unguided contrast a guided tile gets back; one, or per level",
    )
    latents: Latents | list[Latents] | None = Field(
        default=None, description="how many latents work; none: all; one, or one per level"
    )
    guide_latents: Latents | list[Latents] | None = Field(
        default=None, description="the same of what guidance leads away from; none: as many"
    )
    guidance_interval: Annotated[Intervals, AfterValidator(_rising)] = Field(
        default=None, description="(lowest, highest) sigma with guidance; one, or one per level"
    )
    solver: SolverName | list[SolverName] = Field(
        default=["heun", "euler"],
        min_length=1,
        description="of each level; the last holds for the finer ones",
    )
    context: ContextReading = ContextReading()
    coarse_projection: bool = Field(
        default=False, description="make finer clips shrink to the coarser one at every step"
    )
    churn: float = Field(
        default=0.0, ge=0, description="EDM's S_churn at level 0; 0: deterministic"
    )
    tile_batch: int = Field(
        default=16, ge=1, description="most tiles per forward pass; a guidance pair counts twice"
    )
    keep: Literal["fp32", "bf16"] = Field(
        default="fp32", description="precision of features and latents kept between passes"
    )

    @model_validator(mode="after")
    def _refuse_churn_between_steps(self) -> "HPDMSamplingConfig":
        if self.churn and (solver := self.level_solver(0)) in MULTISTEP:
            raise ValueError(
                f"churn: {self.churn:g} is wrong because solver '{solver}' goes on from the step "
                "before; use 0, or solver heun"
            )
        return self

    @model_validator(mode="after")
    def _refuse_axes_that_overlap_and_shift(self) -> "HPDMSamplingConfig":
        both = sorted({a for a in self.shifted for o in per_level(self.overlap) if a in o})
        if both:
            raise ValueError(
                f"shifted: '{self.shifted}' is wrong because tiles already overlap on "
                f"{', '.join(both)}; leave those out of one of the two"
            )
        return self

    def level_guidance(self, level: int) -> float:
        """Guidance scale of a level."""
        return at_level(self.guidance_scale, level)

    def level_solver(self, level: int) -> SolverName:
        """Solver of a level."""
        if isinstance(self.solver, str):
            return self.solver
        return self.solver[min(level, len(self.solver) - 1)]

    def guides_at(self, level: int, sigma: float) -> bool:
        """Whether a level is guided at a noise level."""
        if self.guidance_interval is None:
            return True
        low, high = at_level(self.guidance_interval, level)
        return low <= sigma <= high

    def branches(self, level: int) -> tuple[Branch, ...]:
        """Under what a level's tiles are denoised: the prompt and, if guided, what leads away."""
        return self._branches(level, guided=self.level_guidance(level) != 1)

    def readers(self, level: int) -> tuple[Branch, ...]:
        """Under what a finished level is read for the finer ones: as it would be denoised."""
        finer = range(level + 1, len(self.steps))
        return self._branches(level, guided=any(self.level_guidance(n) != 1 for n in finer))

    def _branches(self, level: int, *, guided: bool) -> tuple[Branch, ...]:
        weak = self.latents if self.guide_latents is None else self.guide_latents
        prompt, guide = (
            Branch(shows, many[level] if isinstance(many, list) else many)
            for shows, many in (("prompt", self.latents), (self.guide, weak))
        )
        return (prompt, guide) if guided else (prompt,)


def level_tilings(sampling: HPDMSamplingConfig, pyramid: Pyramid, level: int) -> list[Tiling]:
    """The tilings of a level that sampling steps take in turn."""
    size, patch = pyramid.size(level), pyramid.patch_size
    overlap = at_level(sampling.overlap, level)
    plain = tile_level(size, patch, overlap, blending=sampling.blending)
    if not sampling.shifted or size == patch:
        return [plain]
    moved = tile_level(size, patch, overlap, shifted=sampling.shifted, blending=sampling.blending)
    return [plain] if moved.places == plain.places else [plain, moved]


def network_calls(sampling: HPDMSamplingConfig, pyramid: Pyramid) -> list[int]:
    """Tiles that the denoising of one clip takes at each level, without guidance."""
    return [
        sum(tiles for *_, tiles in calls_of_level(sampling, pyramid, level))
        for level in range(pyramid.levels)
    ]


def calls_of_level(
    sampling: HPDMSamplingConfig, pyramid: Pyramid, level: int
) -> Iterator[tuple[int, int, int]]:
    """(step, number of the noise level, tiles) of each time that a clip is denoised at a level."""
    tilings, steps = level_tilings(sampling, pyramid, level), sampling.steps[level]
    for step in range(steps):
        tiles = len(tilings[step % len(tilings)])
        yield step, step, tiles
        if sampling.level_solver(level) == "heun" and step + 1 < steps:
            yield step, step + 1, tiles


def problem_with(
    sampling: HPDMSamplingConfig, pyramid: Pyramid, token_size: tuple[int, int, int]
) -> str | None:
    """Why these settings do not suit a pyramid, beginning with the field's name."""
    for name in (
        "steps", "overlap", "guidance_scale", "guidance_interval", "guidance_rescale",
        "latents", "guide_latents",
    ):  # fmt: skip
        value = getattr(sampling, name)
        if isinstance(value, list) and len(value) != pyramid.levels:
            return (
                f"{name}: {value} has {len(value)} entries for {pyramid.levels} levels; "
                "give one per level"
            )
    for name in ("overlap", "shifted"):
        letters = "".join(per_level(getattr(sampling, name)))
        for axis, letter in enumerate("fhw"):
            patch, token = pyramid.patch_size[axis], token_size[axis]
            if letter in letters and pyramid.growth[axis] > 1 and patch % (2 * token):
                return (
                    f"{name}: '{letter}' is wrong because half of pyramid.patch_size {patch} "
                    f"({AXES[axis]}) is not whole tokens of {token}; leave '{letter}' out"
                )
    return None


def problem_with_latents(sampling: HPDMSamplingConfig, fewest: int, most: int) -> str | None:
    """Why these settings do not suit a network that was trained with these numbers of latents,
    beginning with the field's name."""
    for name in ("latents", "guide_latents"):
        value = getattr(sampling, name)
        for number in value if isinstance(value, list) else [value or most]:
            if not fewest <= number <= most:
                known = f"{fewest} to {most}" if fewest < most else f"{most}"
                return (
                    f"{name}: {number} is wrong because the network is trained with {known} "
                    "latents (method.latent_budget); stay within"
                )
    for level in range(len(sampling.steps)):
        counts = [branch.latents or most for branch in sampling.branches(level)]
        is_same = sampling.guide == "prompt" and sampling.guide_checkpoint is None
        if is_same and len(counts) == 2 and counts[0] <= counts[1]:
            return (
                f"guide: 'prompt' is wrong because at level {level} its {counts[1]} latents "
                f"are no fewer than the {counts[0]} that it guides; lower guide_latents, give a "
                "guide_checkpoint, or use 'null'"
            )
    return None
