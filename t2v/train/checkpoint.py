"""Checkpoints that are complete and right, or not checkpoints at all."""

from pydantic import Field

from data_pipeline.strict import Strict


class CheckpointConfig(Strict):
    """How often a run is saved and how much of it is kept."""

    every_steps: int = Field(ge=1)
    keep_last: int = Field(default=3, ge=2, description="newest checkpoints kept")
    milestone_every_steps: int = Field(default=0, ge=0, description="kept for ever; 0: none")
