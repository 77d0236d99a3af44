"""Coarse-to-fine generation: level 0 whole, then tiles of each finer level (paper, section 4.4)."""

from typing import Annotated

from pydantic import Field

from data_pipeline.strict import Strict


class SamplingConfig(Strict):
    """How a checkpoint turns prompts into clips; lists have one entry per level."""

    steps: list[Annotated[int, Field(ge=1)]] = Field(
        description="sampling steps of each level; the paper: 128, 64, 32, 16"
    )
    guidance_scale: float = Field(default=1.0, ge=0, description="classifier-free; 1: none")
    overlap: Annotated[str, Field(pattern="^f?h?w?$")] = Field(
        default="hw", description="axes on which neighbouring tiles overlap by half: f, h, w"
    )
    second_order: bool = Field(default=True, description="Heun steps at level 0 (EDM, Algorithm 1)")
    churn: float = Field(default=0.0, ge=0, description="EDM's S_churn at level 0; 0: deterministic")
    tile_batch: int = Field(default=16, ge=1, description="tiles per forward pass")
    ema: bool = Field(default=True, description="sample from the averaged weights")
