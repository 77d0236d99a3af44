"""How a model is split over processes and in which precision it computes."""

from typing import Literal

from pydantic import Field

from data_pipeline.strict import Strict


class EngineConfig(Strict):
    """The engine and its precision; every engine trains the same numbers to rounding."""

    kind: Literal["single", "fsdp"]
    precision: Literal["fp32", "tf32", "bf16"] = Field(
        default="tf32", description="parameters and sums are fp32 in all three; tf32 is the paper's"
    )
    activation_checkpointing: bool = Field(
        default=False, description="recompute blocks in backward"
    )
    compile: bool = Field(default=False, description="torch.compile per block")
    reshard_after_forward: bool = Field(default=True, description="fsdp: free weights in between")
    collective_timeout_seconds: float = Field(
        default=600.0, gt=0, description="ranks wait this long for each other, then the job ends"
    )
