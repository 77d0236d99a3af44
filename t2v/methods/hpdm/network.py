"""The Hierarchical Patch Diffusion Model (CVPR 2024, arXiv 2406.07792).

Tokens of all levels of the pyramid run through one stack of blocks. Block b processes the
`levels_per_block[b]` coarsest levels (adaptive computation, section 4.3); before it, every active
level but the coarsest is fused with features of the coarser ones (section 4.2).
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from data_pipeline.feeding.config import Conditioning
from data_pipeline.pyramid import Pyramid
from data_pipeline.strict import Share, Size, Strict
from t2v.methods.hpdm.context import Context, ContextFusion, TokenGrid, Volume
from t2v.methods.hpdm.rin import RINBlock
from t2v.network.conditioning import Condition, ConditionEmbedding
from t2v.network.layers import INIT_STD, MLP, NORM_EPS, init_linear, key_bias, sine_table
from t2v.network.network import Network

Patches = Float[Tensor, "batch levels channels frames height width"]
Tokens = Float[Tensor, "batch levels tokens token_dim"]
Latents = Float[Tensor, "batch levels latents latent_dim"]
CHANNELS = 3
PIXELS = -1  # where features of blocks are kept: the pixels themselves
LARGEST_WIDTH = 65536  # far more than any GPU holds; more digits are a slip


class ModelConfig(Strict):
    """Sizes of the network (paper, Table 8) and the ablation switches of Table 3."""

    token_size: Size = Field(description="pixels per token: (frames, height, width)")
    token_dim: int = Field(ge=8, le=LARGEST_WIDTH, description="channels of a data token")
    num_latents: int = Field(ge=1, le=LARGEST_WIDTH)
    latent_dim: int = Field(ge=8, le=LARGEST_WIDTH, description="channels of a latent")
    latent_layers: int = Field(ge=1, le=1024, description="self-attention layers per block")
    token_head_dim: int = Field(ge=4, description="channels per head, read and write attention")
    latent_head_dim: int = Field(ge=4, description="channels per head, latent self-attention")
    levels_per_block: list[int] = Field(
        min_length=1, description="how many coarse levels each block processes; its length is depth"
    )
    conditioning_dim: int = Field(
        ge=8, le=LARGEST_WIDTH, description="channels of the modulation vector"
    )
    self_conditioning_rate: Share = Field(
        description="share of training samples that see their own previous latents; 0: none"
    )
    fusion: Literal["deep", "shallow"] = Field(
        default="deep",
        description="deep: block features of all coarser levels; shallow: the previous level's RGB",
    )
    detach_context: bool = Field(default=False, description="stop gradients through the context")
    coordinates: bool = Field(
        default=True, description="give each fused token its place in the clip"
    )
    coarse_pixels: bool = Field(
        default=False,
        description="give a finer level's tokenizer the pixels of the level before, interpolated",
    )

    @property
    def token_pixels(self) -> int:
        """Values in a token's pixels."""
        return CHANNELS * prod(self.token_size)

    @property
    def feature_dim(self) -> int:
        """Channels of the features that finer levels look at."""
        return self.token_dim if self.fusion == "deep" else self.token_pixels

    def fused_levels(self, block: int) -> range:
        """Levels that get context before a block: all active but the coarsest; with shallow fusion
        only those that enter here."""
        enters_after = block > 0 and self.fusion == "shallow"
        before = self.levels_per_block[block - 1] if enters_after else 1
        return range(before, self.levels_per_block[block])

    def context_levels(self, level: int) -> range:
        """The coarser levels that a level takes context from."""
        return range(0 if self.fusion == "deep" else max(level - 1, 0), level)

    def context_features(self, level: int) -> list[tuple[int, int]]:
        """(block, coarser level) of all features that a level takes context from."""
        pixels = [(PIXELS, level - 1)] if self.coarse_pixels and level > 0 else []
        return pixels + [
            (block, coarser)
            for block in range(len(self.levels_per_block))
            if level in self.fused_levels(block)
            for coarser in self.context_levels(level)
        ]

    def context_blocks(self, level: int) -> list[int]:
        """The blocks whose inputs at a level are context of some finer level."""
        return [
            block
            for block in range(len(self.levels_per_block))
            if any(level in self.context_levels(finer) for finer in self.fused_levels(block))
        ]


class AxialPositions(nn.Module):
    """Learned positions of a patch's tokens: the sum of one table per axis."""

    def __init__(self, shape: tuple[int, int, int], dim: int) -> None:
        super().__init__()
        frames, height, width = shape
        self.frames = nn.Parameter(torch.empty(frames, dim))
        self.height = nn.Parameter(torch.empty(height, dim))
        self.width = nn.Parameter(torch.empty(width, dim))

    def forward(self) -> Float[Tensor, "tokens dim"]:
        table = self.frames[:, None, None] + self.height[:, None] + self.width
        return table.flatten(0, 2)

    def init_weights(self, generator: torch.Generator) -> None:
        """The sine-cosine table, which learning may leave."""
        for table in (self.frames, self.height, self.width):
            with torch.no_grad():
                table.copy_(sine_table(*table.shape))


class SelfConditioning(nn.Module):
    """First latents from those of an earlier pass: `initial + norm(z + mlp(z))` (RIN, section 3.3),
    `z = 0` without one; the norm's gain starts at zero."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = MLP(dim, 2)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, initial: Latents, previous: Latents | None) -> Latents:
        previous = torch.zeros_like(initial) if previous is None else previous
        return initial + self.norm(previous + self.mlp(previous))

    def init_weights(self, generator: torch.Generator) -> None:
        """No influence before training."""
        nn.init.zeros_(self.norm.weight)


class Block(nn.Module):
    """Context fusion of the levels that have context, then one RIN block on all given levels."""

    def __init__(self, config: ModelConfig, context_dim: int | None) -> None:
        super().__init__()
        self.fusion = None
        if context_dim is not None:
            self.fusion = ContextFusion(config.token_dim, context_dim, config.coordinates)
        self.rin = RINBlock(
            token_dim=config.token_dim,
            latent_dim=config.latent_dim,
            latent_layers=config.latent_layers,
            token_head_dim=config.token_head_dim,
            latent_head_dim=config.latent_head_dim,
            conditioning_dim=config.conditioning_dim,
        )

    def forward(
        self,
        tokens: Tokens,
        latents: Latents,
        context: Float[Tensor, "batch fused tokens context_dim"] | None,
        coordinates: Float[Tensor, "batch fused tokens 3"] | None,
        vector: Float[Tensor, "batch levels conditioning_dim"],
        text: Float[Tensor, "batch text token_dim"] | None,
        bias: Float[Tensor, "batch padded_keys"] | None,
    ) -> tuple[Tokens, Latents]:
        """`context` belongs to the last `fused` of the given levels."""
        levels = tokens.shape[1]
        if self.fusion is not None and context is not None:
            alone = levels - context.shape[1]
            fused = self.fusion(tokens[:, alone:], context, coordinates)
            tokens = torch.cat([tokens[:, :alone], fused], dim=1)
        if text is not None and bias is not None:
            text = text[:, None].expand(-1, levels, -1, -1).flatten(0, 1)
            bias = bias[:, None].expand(-1, levels, -1).flatten(0, 1)
        new_tokens, new_latents = self.rin(
            tokens.flatten(0, 1), latents.flatten(0, 1), vector.flatten(0, 1), text, bias
        )
        return new_tokens.unflatten(0, (-1, levels)), new_latents.unflatten(0, (-1, levels))


class HPDM(Network):
    """Joint denoiser of one patch per level; `diffusion.py` tells what its output stands for."""

    def __init__(self, config: ModelConfig, pyramid: Pyramid, conditioning: Conditioning) -> None:
        super().__init__()
        self.config = config
        self.pyramid = pyramid
        self.grid = TokenGrid(pyramid, config.token_size)
        self.pixel_grid = TokenGrid(pyramid, (1, 1, 1))
        self.tokenizer = nn.Linear(config.token_pixels, config.token_dim)
        self.coarse_tokenizer = None
        if config.coarse_pixels and pyramid.levels > 1:
            self.coarse_tokenizer = nn.Linear(config.token_pixels, config.token_dim)
        self.tokenizer_norm = nn.LayerNorm(config.token_dim, eps=NORM_EPS)
        self.positions = AxialPositions(self.grid.shape, config.token_dim)
        self.latents = nn.Parameter(torch.empty(config.num_latents, config.latent_dim))
        self.self_conditioning = None
        if config.self_conditioning_rate > 0:
            self.self_conditioning = SelfConditioning(config.latent_dim)
        self.conditioning = ConditionEmbedding(
            pyramid, conditioning, dim=config.conditioning_dim, token_dim=config.token_dim
        )
        self.blocks = nn.ModuleList(
            Block(config, config.feature_dim if config.fused_levels(block) else None)
            for block in range(len(config.levels_per_block))
        )
        self.head_norm = nn.LayerNorm(config.token_dim, eps=NORM_EPS)
        self.detokenizer = nn.Linear(config.token_dim, config.token_pixels)

    def init_weights(self, seed: int = 0) -> None:
        """Set every parameter, in a fixed order, from one seed."""
        device = self.latents.device
        generator = torch.Generator(device).manual_seed(seed)
        for module in self.modules():
            init_linear(module, generator)
        nn.init.trunc_normal_(self.latents, std=INIT_STD, generator=generator)
        for module in self.modules():
            own = getattr(module, "init_weights", None)
            if module is not self and callable(own):
                own(generator)
        nn.init.zeros_(self.detokenizer.weight)
        if self.coarse_tokenizer is not None:
            nn.init.zeros_(self.coarse_tokenizer.weight)

    def forward(
        self,
        x: Patches,
        noise: Float[Tensor, "batch levels"],
        offsets: Int[Tensor, "batch levels 3"],
        condition: Condition,
        previous_latents: Latents | None = None,
        *,
        num_latents: int | None = None,
        level: int | None = None,
        kept: Mapping[tuple[int, int], Volume] | None = None,
        watch: Callable[[int, Tokens], None] = lambda block, features: None,
    ) -> tuple[Patches, Latents]:
        """Output for a noisy patch at each level (scaled by `c_in`), and the last latents.

        `noise` is `c_noise` of each patch. Level l's output depends on levels 0..l only. The first
        `num_latents` work, or all. Training passes all levels together. Sampling passes one `level`
        at a time with features `kept` from passes of coarser ones (see `Context`), which `watch` is
        shown as (block, its input).
        """
        levels = list(range(self.pyramid.levels)) if level is None else [level]
        pixels = self.grid.cut(x)
        tokens = self.tokenizer(pixels)
        if self.coarse_tokenizer is not None and levels[-1] > 0:
            seen = self.coarse_tokenizer(
                self.grid.cut(self._coarse(x, levels, offsets, kept or {}))
            )
            alone = len(levels) - seen.shape[1]
            tokens = torch.cat([tokens[:, :alone], tokens[:, alone:] + seen], dim=1)
        tokens = self.tokenizer_norm(tokens) + self.positions()
        latents = self.latents[:num_latents].expand(len(x), len(levels), -1, -1)
        if self.self_conditioning is not None:
            latents = self.self_conditioning(latents, previous_latents)
        vector, text = self.conditioning(noise, levels, condition)
        mask = condition.text_mask
        bias = None if mask is None else key_bias(mask, tokens.shape[2])
        looks = {level: self.config.context_levels(level) for level in levels}
        context = Context(self.grid, looks, offsets, kept or {})
        for number, block in enumerate(self.blocks):
            active = sum(level < self.config.levels_per_block[number] for level in levels)
            if active == 0:
                continue
            features = tokens if self.config.fusion == "deep" else pixels
            watch(number, features)
            if self.config.detach_context:
                features = features.detach()
            fused = [level for level in levels if level in self.config.fused_levels(number)]
            seen, places = context(number, fused, features) if fused else (None, None)
            if active == len(levels):
                tokens, latents = block(tokens, latents, seen, places, vector, text, bias)
                continue
            new_tokens, new_latents = block(
                tokens[:, :active], latents[:, :active], seen, places, vector[:, :active], text,
                bias,
            )  # fmt: skip
            tokens = torch.cat([new_tokens, tokens[:, active:]], dim=1)
            latents = torch.cat([new_latents, latents[:, active:]], dim=1)
        output = self.detokenizer(self.head_norm(tokens)).float()
        return self.grid.join(output), latents

    def _coarse(
        self,
        x: Patches,
        levels: list[int],
        offsets: Int[Tensor, "batch levels 3"],
        kept: Mapping[tuple[int, int], Volume],
    ) -> Patches:
        """For each of the levels but level 0: the pixels of the level before, at its window."""
        fine = [level for level in levels if level > 0]
        looks = {level: range(max(level - 1, 0), level) for level in levels}
        context = Context(self.pixel_grid, looks, offsets, kept)
        seen, _ = context(PIXELS, fine, rearrange(x, "b l c t h w -> b l (t h w) c"))
        (t, h, w) = self.pixel_grid.shape
        return rearrange(seen, "b l (t h w) c -> b l c t h w", t=t, h=h, w=w)
