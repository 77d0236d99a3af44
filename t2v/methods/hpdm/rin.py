"""The recurrent interface block (RIN, arXiv 2212.11972): read, think, write."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from t2v.network.layers import MLP, NORM_EPS, Attention, ModulatedLayer


class RINBlock(nn.Module):
    """Latents read from data tokens, attend to themselves, and are written back to the tokens."""

    def __init__(
        self,
        *,
        token_dim: int,
        latent_dim: int,
        latent_layers: int,
        token_head_dim: int,
        latent_head_dim: int,
        conditioning_dim: int,
    ) -> None:
        super().__init__()
        self.read_norm = nn.LayerNorm(latent_dim, eps=NORM_EPS)
        self.read_context_norm = nn.LayerNorm(token_dim, eps=NORM_EPS)
        self.read = Attention(latent_dim, token_dim, latent_dim, token_head_dim)
        self.layers = nn.ModuleList(
            ModulatedLayer(latent_dim, latent_head_dim, conditioning_dim)
            for _ in range(latent_layers)
        )
        self.write_norm = nn.LayerNorm(token_dim, eps=NORM_EPS)
        self.write_context_norm = nn.LayerNorm(latent_dim, eps=NORM_EPS)
        self.write = Attention(token_dim, latent_dim, token_dim, token_head_dim)
        self.mlp_norm = nn.LayerNorm(token_dim, eps=NORM_EPS)
        self.mlp = MLP(token_dim, 4)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens token_dim"],
        latents: Float[Tensor, "batch latents latent_dim"],
        vector: Float[Tensor, "batch conditioning_dim"],
        text: Float[Tensor, "batch text token_dim"] | None,
        bias: Float[Tensor, "batch padded_keys"] | None,
    ) -> tuple[Float[Tensor, "batch tokens token_dim"], Float[Tensor, "batch latents latent_dim"]]:
        """`bias` hides the padding of `text` from what is read (`key_bias`)."""
        source = self.read_context_norm(tokens)
        if text is not None:
            source = torch.cat([source, text.to(source.dtype)], dim=1)
        latents = latents + self.read(self.read_norm(latents), source, bias)
        for layer in self.layers:
            latents = layer(latents, vector)
        tokens = tokens + self.write(self.write_norm(tokens), self.write_context_norm(latents))
        tokens = tokens + self.mlp(self.mlp_norm(tokens))
        return tokens, latents
