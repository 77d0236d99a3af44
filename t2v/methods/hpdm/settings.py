"""Sampling settings, and what follows from them and the pyramid alone."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from data_pipeline.pyramid import AXES, Pyramid
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
    second_order: bool = Field(default=True, description="Heun steps at level 0 (EDM, Algorithm 1)")
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

    def branches(self, level: int) -> tuple[Branch, ...]:
        """The conditions under which a level's tiles are denoised."""
        return ("prompt",) if self.level_guidance(level) == 1 else ("prompt", "null")

    def read_branches(self, level: int) -> int:
        """The number of conditions under which a finished level is read for the finer ones."""
        finer = range(level + 1, len(self.steps))
        return max((len(self.branches(level)) for level in finer), default=1)

    def problem_with(self, pyramid: Pyramid, token_size: tuple[int, int, int]) -> str | None:
        """Why these settings do not suit a pyramid, beginning with the field's name."""
        for name in ("steps", "overlap", "guidance_scale"):
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
        second_order = level == 0 and sampling.second_order
        calls.append(sum(counts) + (sum(counts[:-1]) if second_order else 0))
    return calls
