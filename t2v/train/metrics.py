"""metrics.jsonl is the truth; the terminal and wandb are views of it."""

from pydantic import Field

from data_pipeline.strict import Strict


class MetricsConfig(Strict):
    """What is told of a run, and to whom."""

    every_steps: int = Field(default=1, ge=1, description="steps per line of metrics.jsonl")
    wandb_project: str | None = Field(
        default=None, description="offline without WANDB_API_KEY; none: wandb is not used"
    )
