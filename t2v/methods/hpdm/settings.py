"""Sampling settings, and what follows from them and the pyramid alone."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from data_pipeline.pyramid import AXES, Pyramid
from data_pipeline.strict import Strict
from t2v.methods.hpdm.diffusion import DiffusionConfig
from t2v.methods.hpdm.solver import MULTISTEP, SolverName
from t2v.methods.hpdm.tiling import OVERLAPS, Blending, Tiling, tile_level
from t2v.methods.method import SamplingConfig

Branch = Literal["prompt", "null"]


def _known_axes(value: str | list[str]) -> str | list[str]:
    for letters in [value] if isinstance(value, str) else value:
        if letters not in OVERLAPS:
            raise ValueError(
                f"value '{letters}' is wrong because it is none of {', '.join(OVERLAPS[1:])} or "
                "''; name axes by f, h, w in this order"
            )
    return value


Interval = Annotated[
    tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]], Field(strict=False)
]


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
    guidance_interval: Interval | list[Interval] | None = Field(
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
        both = sorted({a for a in self.shifted for o in self._per_level("overlap") if a in o})
        if both:
            raise ValueError(
                f"shifted: '{self.shifted}' is wrong because tiles already overlap on "
                f"{', '.join(both)}; leave those out of one of the two"
            )
        return self

    def level_overlap(self, level: int) -> str:
        """Axes on which the tiles of a level overlap."""
        return self.overlap if isinstance(self.overlap, str) else self.overlap[level]

    def level_guidance(self, level: int) -> float:
        """Guidance scale of a level."""
        scale = self.guidance_scale
        return scale[level] if isinstance(scale, list) else scale

    def level_solver(self, level: int) -> SolverName:
        """Solver of a level."""
        if isinstance(self.solver, str):
            return self.solver
        return self.solver[min(level, len(self.solver) - 1)]

    def guides_at(self, level: int, sigma: float) -> bool:
        """Whether a level is guided at a noise level."""
        interval = self.guidance_interval
        if isinstance(interval, list):
            interval = interval[level]
        return interval is None or interval[0] <= sigma <= interval[1]

    def branches(self, level: int) -> tuple[Branch, ...]:
        """The conditions under which a level's tiles are denoised."""
        return ("prompt",) if self.level_guidance(level) == 1 else ("prompt", "null")

    def read_branches(self, level: int) -> int:
        """The number of conditions under which a finished level is read for the finer ones."""
        finer = range(level + 1, len(self.steps))
        return max((len(self.branches(level)) for level in finer), default=1)

    def problem_with(self, pyramid: Pyramid, token_size: tuple[int, int, int]) -> str | None:
        """Why these settings do not suit a pyramid, beginning with the field's name."""
        for name in ("steps", "overlap", "guidance_scale", "guidance_interval"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != pyramid.levels:
                return (
                    f"{name}: {value} has {len(value)} entries for {pyramid.levels} levels; "
                    "give one per level"
                )
        for name in ("overlap", "shifted"):
            letters = "".join(self._per_level(name))
            for axis, letter in enumerate("fhw"):
                patch, token = pyramid.patch_size[axis], token_size[axis]
                if letter in letters and pyramid.growth[axis] > 1 and patch % (2 * token):
                    return (
                        f"{name}: '{letter}' is wrong because half of pyramid.patch_size {patch} "
                        f"({AXES[axis]}) is not whole tokens of {token}; leave '{letter}' out"
                    )
        return None

    def _per_level(self, name: str) -> list[str]:
        value = getattr(self, name)
        return [value] if isinstance(value, str) else value


def level_tilings(sampling: HPDMSamplingConfig, pyramid: Pyramid, level: int) -> list[Tiling]:
    """The tilings of a level that sampling steps take in turn."""
    size, patch, overlap = pyramid.size(level), pyramid.patch_size, sampling.level_overlap(level)
    plain = tile_level(size, patch, overlap, blending=sampling.blending)
    if not sampling.shifted or size == patch:
        return [plain]
    moved = tile_level(size, patch, overlap, shifted=sampling.shifted, blending=sampling.blending)
    return [plain] if moved.places == plain.places else [plain, moved]


def network_calls(sampling: HPDMSamplingConfig, pyramid: Pyramid) -> list[int]:
    """Tiles that the denoising of one clip takes at each level, without guidance."""
    calls = []
    for level, steps in enumerate(sampling.steps):
        tilings = level_tilings(sampling, pyramid, level)
        counts = [len(tilings[step % len(tilings)]) for step in range(steps)]
        twice = sampling.level_solver(level) == "heun"
        calls.append(sum(counts) + (sum(counts[:-1]) if twice else 0))
    return calls
