"""The layers every block is made of: attention, MLP, modulation, and features of scalars."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

NORM_EPS = 1e-6
INIT_STD = 0.02
# Elements; torch copies a bias whose rows start elsewhere before its fused kernels take it.
BIAS_ALIGNMENT = 16


def scalar_features(values: Float[Tensor, " batch"], count: int) -> Float[Tensor, "batch {count}"]:
    """Sines and cosines of a scalar of order 1, at frequencies from 1/8 to 32 per unit."""
    frequencies = torch.logspace(-3, 5, count // 2, base=2, device=values.device)
    angles = 2 * math.pi * values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def sine_table(positions: int, dim: int) -> Float[Tensor, "{positions} {dim}"]:
    """The Transformer's sine-cosine table; the first values of the learned positions."""
    rates = torch.exp(-math.log(10_000.0) * torch.arange(0, dim, 2) / dim)
    angles = torch.arange(positions)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :dim]


def modulate(
    x: Float[Tensor, "batch tokens dim"],
    shift: Float[Tensor, "batch 1 dim"],
    modulation_scale: Float[Tensor, "batch 1 dim"],
) -> Float[Tensor, "batch tokens dim"]:
    """`x * (1 + modulation_scale) + shift`."""
    return torch.addcmul(shift, x, 1 + modulation_scale)


def key_bias(mask: Bool[Tensor, "batch text"], tokens: int) -> Float[Tensor, "batch padded_keys"]:
    """What attention adds to its scores where the keys are `tokens` that all are seen, then text:
    0, or minus infinity at padding. Rows are filled up to a multiple of `BIAS_ALIGNMENT`.

    A mask of booleans says the same, but each attention would make such a bias of it anew.
    """
    fill = -(tokens + mask.shape[1]) % BIAS_ALIGNMENT
    text = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
    return F.pad(text, (tokens, fill))


class Attention(nn.Module):
    """Multi-head attention of queries over a context; softmax is computed in fp32."""

    attention_dtype: torch.dtype | None = None

    def __init__(self, query_dim: int, context_dim: int, inner_dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query = nn.Linear(query_dim, inner_dim)
        self.key_value = nn.Linear(context_dim, 2 * inner_dim)
        self.out = nn.Linear(inner_dim, query_dim)

    def forward(
        self,
        x: Float[Tensor, "batch queries query_dim"],
        context: Float[Tensor, "batch keys context_dim"],
        bias: Float[Tensor, "batch padded_keys"] | None = None,
    ) -> Float[Tensor, "batch queries query_dim"]:
        """`bias` is that of `key_bias`; what it has past the last key is left out."""
        q, kv = self.query(x), self.key_value(context)
        own, dtype = q.dtype, self.attention_dtype or q.dtype
        q = rearrange(q.to(dtype), "b n (h d) -> b h n d", d=self.head_dim)
        k, v = rearrange(kv.to(dtype), "b n (two h d) -> two b h n d", two=2, d=self.head_dim)
        if bias is not None:
            # A slice of whole rows, whose strides stay aligned; every head and query shares it.
            bias = bias.to(dtype)[:, None, None, : k.shape[2]]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(rearrange(attended.to(own), "b h n d -> b n (h d)"))


class MLP(nn.Module):
    """Two linear maps with a GELU between them; its tanh form, three times faster on a CPU."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, ratio * dim)
        self.contract = nn.Linear(ratio * dim, dim)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return self.contract(F.gelu(self.expand(x), approximate="tanh"))


class ModulatedLayer(nn.Module):
    """Self-attention and MLP; shift, scale and gate of both come from a conditioning vector."""

    def __init__(self, dim: int, head_dim: int, conditioning_dim: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(conditioning_dim, 6 * dim)
        self.attention_norm = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.attention = Attention(dim, dim, dim, head_dim)
        self.mlp_norm = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.mlp = MLP(dim, 4)

    def forward(
        self, x: Float[Tensor, "batch latents dim"], vector: Float[Tensor, "batch conditioning_dim"]
    ) -> Float[Tensor, "batch latents dim"]:
        modulation = self.modulation(F.silu(vector))[:, None]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=2)
        normed = modulate(self.attention_norm(x), shift_a, scale_a)
        x = torch.addcmul(x, gate_a, self.attention(normed, normed))
        normed = modulate(self.mlp_norm(x), shift_m, scale_m)
        return torch.addcmul(x, gate_m, self.mlp(normed))

    def init_weights(self, generator: torch.Generator) -> None:
        """Closed gates: the layer starts as the identity (DiT's adaLN-Zero)."""
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)


def init_linear(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Xavier-uniform weights and zero biases for a linear map; ones and zeros for a norm."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight, generator=generator)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
