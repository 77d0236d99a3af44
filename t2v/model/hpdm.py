"""The Hierarchical Patch Diffusion Model (CVPR 2024, arXiv 2406.07792)."""

from typing import Literal

from pydantic import Field

from data_pipeline.strict import Share, Size, Strict


class ModelConfig(Strict):
    """Sizes of the network (paper, Table 8) and the ablation switches of Table 3."""

    token_size: Size = Field(description="pixels per token: (frames, height, width)")
    token_dim: int = Field(ge=8, description="channels of a data token")
    num_latents: int = Field(ge=1)
    latent_dim: int = Field(ge=8, description="channels of a latent")
    latent_layers: int = Field(ge=1, description="self-attention layers per block")
    token_head_dim: int = Field(ge=4, description="channels per head, read and write attention")
    latent_head_dim: int = Field(ge=4, description="channels per head, latent self-attention")
    levels_per_block: list[int] = Field(
        min_length=1, description="how many coarse levels each block processes; its length is depth"
    )
    conditioning_dim: int = Field(ge=8, description="channels of the modulation vector")
    self_conditioning_rate: Share = Field(
        description="share of training samples that see their own previous latents; 0: none"
    )
    fusion: Literal["deep", "shallow"] = Field(
        default="deep",
        description="deep: block features of all coarser levels; shallow: the previous level's RGB",
    )
    detach_context: bool = Field(default=False, description="stop gradients through the context")
    coordinates: bool = Field(default=True, description="give each fused token its place in the clip")
