"""How a model is split over processes and in which precision it computes."""

from typing import Literal

from pydantic import Field, model_validator

from data_pipeline.strict import Strict

# Elements that ranks exchange at once under ZeRO; DeepSpeed's own default takes 2 GB for it.
BUCKET_ELEMENTS = 50_000_000


class EngineConfig(Strict):
    """The engine and its precision; every engine trains the same numbers to rounding."""

    kind: Literal["single", "fsdp", "zero"]
    precision: Literal["fp32", "tf32", "bf16"] = Field(
        default="tf32", description="parameters and sums are fp32 in all three; tf32 is the paper's"
    )
    bf16_attention: bool = Field(
        default=False,
        description="tf32: attention in bf16, which flash kernels take; the rest stays as it is",
    )
    deterministic: bool = Field(
        default=True,
        description="equal inputs give equal bits, so that a resumed run is the one that never "
        "stopped; false: on a GPU, faster kernels that add in any order",
    )
    activation_checkpointing: Literal["none", "blocks", "selective"] = Field(
        default="none",
        description="recompute blocks in backward; selective: all but their matrix products",
    )
    compile: bool = Field(default=False, description="torch.compile per block")
    reshard_after_forward: bool = Field(
        default=True,
        description="fsdp: free gathered weights after each pass; false: gather them once a step",
    )
    accumulate: Literal["whole", "shards"] = Field(
        default="whole",
        description="fsdp: gradients of a step's micro-batches add up whole and travel once, or "
        "travel after each and add up in shards",
    )
    dp_replicate: int = Field(
        default=1, ge=1, description="fsdp: groups of ranks that each hold the whole model (HSDP)"
    )
    zero_stage: Literal[1, 2, 3] = Field(
        default=2, description="zero: splits 1 moments, 2 and gradients, 3 and weights"
    )
    offload_optimizer: bool = Field(
        default=False, description="zero: master weights, moments and their step on the CPU"
    )
    collective_timeout_seconds: float = Field(
        default=600.0,
        gt=0,
        le=1e9,
        description="ranks wait this long for each other, then the job ends",
    )

    @model_validator(mode="after")
    def _refuse_what_an_engine_lacks(self) -> "EngineConfig":
        if self.bf16_attention and self.precision != "tf32":
            why = "asks for exact products" if self.precision == "fp32" else "attends in it anyway"
            raise ValueError(
                f"bf16_attention: true is wrong because precision '{self.precision}' {why}; use "
                "false, or precision tf32"
            )
        if self.dp_replicate > 1 and self.kind != "fsdp":
            raise ValueError(
                f"dp_replicate: {self.dp_replicate} is wrong because engine.kind '{self.kind}' has "
                "no replicas; use 1, or kind fsdp"
            )
        if self.accumulate == "shards" and self.kind != "fsdp":
            raise ValueError(
                f"accumulate: 'shards' is wrong because engine.kind '{self.kind}' adds up whole "
                "gradients; use whole, or kind fsdp"
            )
        if self.offload_optimizer and self.kind != "zero":
            raise ValueError(
                f"offload_optimizer: true is wrong because engine.kind '{self.kind}' steps where "
                "its weights are; use false, or kind zero"
            )
        if self.kind == "zero" and self.zero_stage == 3:
            # DeepSpeed gathers weights in the middle of a block, which neither can follow.
            if self.activation_checkpointing == "selective":
                raise ValueError(
                    "activation_checkpointing: 'selective' is wrong because ZeRO stage 3 gathers "
                    "weights inside of blocks; use blocks, or zero_stage 2"
                )
            if self.compile:
                raise ValueError(
                    "compile: true is wrong because ZeRO stage 3 gathers weights inside of blocks; "
                    "use false, zero_stage 2, or kind fsdp"
                )
        return self
