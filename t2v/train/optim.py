"""Optimizers and the learning rate as a pure function of the step."""

from typing import Annotated, Literal

from pydantic import Field

from data_pipeline.strict import Strict


class OptimizerConfig(Strict):
    """LAMB is the paper's; AdamW is torch's."""

    name: Literal["lamb", "adamw"]
    learning_rate: float = Field(gt=0, description="peak learning rate")
    warmup_steps: int = Field(ge=0, description="linear warm-up; then cosine down to 0")
    weight_decay: float = Field(default=0.01, ge=0)
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.99)
    eps: float = Field(default=1.0e-6, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0, description="global gradient norm is cut here")
