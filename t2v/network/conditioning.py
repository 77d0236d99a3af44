"""What the network is told besides pixels: noise level, level, frame rate, size, text or class."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from data_pipeline.feeding.config import (
    ClassConditioning,
    Conditioning,
    TextConditioning,
    text_shape,
)
from data_pipeline.pyramid import Pyramid
from t2v.network.layers import INIT_STD, NORM_EPS, scalar_features

if TYPE_CHECKING:
    from data_pipeline.feeding.loader import Batch

FEATURES = 64


@dataclass(frozen=True)
class Condition:
    """The condition of each clip of a batch; text and label are None where a recipe has none."""

    fps: Float[Tensor, " batch"]
    original_size: Float[Tensor, "batch 2"]
    text_tokens: Float[Tensor, "batch text width"] | None = None
    text_mask: Bool[Tensor, "batch text"] | None = None
    label: Int[Tensor, " batch"] | None = None

    @classmethod
    def of(cls, batch: "Batch", device: torch.device) -> "Condition":
        """The condition of a loader's batch, on a device."""
        fields = ("fps", "original_size", "text_tokens", "text_mask", "label")
        present = {k: v for k in fields if (v := getattr(batch, k)) is not None}
        return cls(**{name: value.to(device) for name, value in present.items()})

    def rows(self, index: Int[Tensor, " rows"]) -> "Condition":
        """The condition of the clips at `index`, repeats allowed."""
        values = {k: v[index] for k, v in vars(self).items() if v is not None}
        return replace(self, **values)


def blank_condition(conditioning: Conditioning) -> Condition:
    """The condition of one clip, of whatever a recipe reads, on the default device."""
    text = mask = label = None
    if shape := text_shape(conditioning):
        text, mask = torch.zeros(1, *shape), torch.ones(1, shape[0], dtype=torch.bool)
    elif isinstance(conditioning, ClassConditioning):
        label = torch.zeros(1, dtype=torch.long)
    return Condition(
        fps=torch.ones(1),
        original_size=torch.ones(1, 2),
        text_tokens=text,
        text_mask=mask,
        label=label,
    )


class TextEmbedding(nn.Module):
    """Encoder output -> its mean for the modulation vector, and tokens for the latents to read."""

    def __init__(self, width: int, *, dim: int, token_dim: int) -> None:
        super().__init__()
        # T5's outputs have a few channels far larger than the rest.
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.tokens = nn.Linear(width, token_dim)
        self.pooled = nn.Linear(width, dim)

    def forward(
        self, text: Float[Tensor, "batch text width"], mask: Bool[Tensor, "batch text"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch text token_dim"]]:
        text = self.norm(text.float())
        weights = mask / mask.sum(1, keepdim=True).clamp(min=1)
        mean = torch.einsum("bnd,bn->bd", text, weights.to(text.dtype))
        return self.pooled(mean), self.tokens(text)


class ConditionEmbedding(nn.Module):
    """Condition -> a modulation vector for each level, and text tokens for the latents to read."""

    def __init__(
        self, pyramid: Pyramid, conditioning: Conditioning, *, dim: int, token_dim: int
    ) -> None:
        super().__init__()
        self.frame_strides = [pyramid.stride(level)[0] for level in range(pyramid.levels)]
        self.noise_in = nn.Linear(FEATURES, dim)
        self.noise_out = nn.Linear(dim, dim)
        self.frame_rate = nn.Linear(FEATURES, dim)
        self.original_size = nn.Linear(2 * FEATURES, dim)
        # Level 0 has none, so that a base and the level 0 of its pyramid share every parameter.
        self.level_embedding = None
        if pyramid.levels > 1:
            self.level_embedding = nn.Parameter(torch.empty(pyramid.levels - 1, dim))
        self.label = None
        self.text = None
        if isinstance(conditioning, ClassConditioning):
            self.label = nn.Embedding(conditioning.num_classes + 1, dim)
        if isinstance(conditioning, TextConditioning):
            self.text = TextEmbedding(conditioning.width, dim=dim, token_dim=token_dim)

    def forward(
        self,
        noise: Float[Tensor, "batch levels"],
        levels: list[int],
        condition: Condition,
    ) -> tuple[Float[Tensor, "batch levels dim"], Float[Tensor, "batch text token_dim"] | None]:
        hidden = F.silu(self.noise_in(scalar_features(noise.flatten(), FEATURES)))
        vector = self.noise_out(hidden).unflatten(0, noise.shape)
        # Numbers of the host in a list or a tensor would stop it until the device has read them.
        rates = [condition.fps / self.frame_strides[level] for level in levels]
        rate = torch.log2(1 + torch.stack(rates, dim=1)) / 4
        rate_features = scalar_features(rate.flatten(), FEATURES).unflatten(0, rate.shape)
        size = torch.log2(condition.original_size / 256) / 4
        size_features = scalar_features(size.flatten(), FEATURES).view(len(size), -1)
        vector = vector + self.frame_rate(rate_features)
        vector = vector + self.original_size(size_features)[:, None]
        if self.level_embedding is not None:
            zero = self.level_embedding.new_zeros(1, self.level_embedding.shape[1])
            known = torch.cat([zero, self.level_embedding])
            vector = vector + torch.stack([known[level] for level in levels])
        if self.label is not None:
            vector = vector + self.label(condition.label)[:, None]
        if self.text is None:
            return vector, None
        pooled, text = self.text(condition.text_tokens, condition.text_mask)
        return vector + pooled[:, None], text

    def init_weights(self, generator: torch.Generator) -> None:
        """Size and frame rate start small: they must not drown the noise level."""
        if self.level_embedding is not None:
            nn.init.zeros_(self.level_embedding)
        for linear in (self.frame_rate, self.original_size):
            nn.init.normal_(linear.weight, std=INIT_STD, generator=generator)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=INIT_STD, generator=generator)
