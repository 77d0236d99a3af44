"""A pyramid that begins as its low-resolution base."""

from pydantic import Field

from data_pipeline.strict import Strict


class WarmStartConfig(Strict):
    """Where a run's first weights come from."""

    checkpoint: str = Field(description="a step folder, or a run folder: its newest valid step")
    weights: str = Field(default="ema", pattern="^(ema|raw)$")
    resize_positions: bool = Field(
        default=False, description="interpolate position tables of another token grid"
    )
