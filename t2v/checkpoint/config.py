"""How often a run is saved, and how much of it is kept."""

from pydantic import Field

from data_pipeline.strict import Strict


class CheckpointConfig(Strict):
    """How often a run is saved and how much of it is kept."""

    every_steps: int = Field(ge=1)
    keep_last: int = Field(default=3, ge=2, description="newest checkpoints kept")
    milestone_every_steps: int = Field(default=0, ge=0, description="kept for ever; 0: none")
    asynchronous: bool = Field(
        default=True, description="train on while a copy in host memory is written"
    )
    max_failures_in_a_row: int = Field(
        default=3, ge=1, description="saves that a disk may refuse before the run stops"
    )
    mirror: str | None = Field(
        default=None,
        pattern="^s3://.+",
        description="a prefix to which every committed step is copied, and restored from",
    )
    accept_data_change: bool = Field(
        default=False, description="resume although the datasets are not those of the checkpoint"
    )
