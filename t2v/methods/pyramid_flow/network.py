"""The network of Pyramid Flow: a multimodal diffusion transformer (as in FLUX) over a clip's
history and the unit that is denoised, whatever their resolutions.

Text, history and noisy unit are one sequence. Blocks take the sequences of a whole micro-batch, for
samples at different stages and units differ in length; all linear maps are shared by all.
"""

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from data_pipeline.feeding.config import ClassConditioning, Conditioning, TextConditioning
from t2v.methods.pyramid_flow.attention import (
    HeadNorm,
    Sight,
    Turns,
    after_text,
    attend,
    rotary_turns,
    rotate,
    token_places,
)
from t2v.methods.pyramid_flow.config import ModelConfig, PyramidFlowConfig
from t2v.methods.pyramid_flow.flow import CLOCK
from t2v.methods.pyramid_flow.history import Piece, lay_out
from t2v.network.conditioning import FEATURES, Condition, TextEmbedding
from t2v.network.layers import (
    INIT_STD,
    MLP,
    NORM_EPS,
    init_linear,
    modulate,
    scalar_features,
)
from t2v.network.network import Network

CLOCK_FEATURES = 256

Tokens = Float[Tensor, "batch tokens dim"]
Vector = Float[Tensor, "batch dim"]


@dataclass(frozen=True)
class Group:
    """Samples of a micro-batch at the same stage and unit: their history, oldest first and each
    stretch at its level, and last the noisy unit. `text_lengths` counts each sample's text tokens;
    None where a recipe has no text."""

    stage: int
    unit: int
    pieces: list[Piece]
    clock: Float[Tensor, " batch"]
    condition: Condition
    text_lengths: tuple[int, ...] | None


class ClipConditioning(nn.Module):
    """Clock and condition -> the vector that modulates every block, and text tokens."""

    def __init__(self, conditioning: Conditioning, dim: int) -> None:
        super().__init__()
        self.clock_in = nn.Linear(CLOCK_FEATURES, dim)
        self.clock_out = nn.Linear(dim, dim)
        self.frame_rate = nn.Linear(FEATURES, dim)
        self.original_size = nn.Linear(2 * FEATURES, dim)
        self.label = self.text = None
        if isinstance(conditioning, ClassConditioning):
            self.label = nn.Embedding(conditioning.num_classes + 1, dim)
        if isinstance(conditioning, TextConditioning):
            self.text = TextEmbedding(conditioning.width, dim=dim, token_dim=dim)

    def forward(
        self, clock: Float[Tensor, " batch"], condition: Condition
    ) -> tuple[Vector, Float[Tensor, "batch text dim"] | None]:
        vector = self.clock_out(
            F.silu(self.clock_in(scalar_features(clock / CLOCK, CLOCK_FEATURES)))
        )
        rate = torch.log2(1 + condition.fps) / 4
        vector = vector + self.frame_rate(scalar_features(rate, FEATURES))
        size = torch.log2(condition.original_size / 256) / 4
        size_features = scalar_features(size.flatten(), FEATURES).view(len(size), -1)
        vector = vector + self.original_size(size_features)
        if self.label is not None:
            vector = vector + self.label(condition.label)
        if self.text is None:
            return vector, None
        pooled, text = self.text(condition.text_tokens, condition.text_mask)
        return vector + pooled, text

    def init_weights(self, generator: torch.Generator) -> None:
        """Size and frame rate start small: they must not drown the clock."""
        for linear in (self.frame_rate, self.original_size):
            nn.init.normal_(linear.weight, std=INIT_STD, generator=generator)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=INIT_STD, generator=generator)


class Stream(nn.Module):
    """The weights that one kind of token has in a double block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.modulation = nn.Linear(dim, 6 * dim)
        self.attention_norm = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.query_norm = HeadNorm(config.head_dim)
        self.key_norm = HeadNorm(config.head_dim)
        self.out = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.mlp = MLP(dim, config.mlp_ratio)
        self.head_dim = config.head_dim

    def look(self, x: Tokens, vector: Vector) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Queries, keys and values, and what modulates the rest."""
        shift, scale, *rest = self.modulation(F.silu(vector))[:, None].chunk(6, dim=2)
        normed = modulate(self.attention_norm(x), shift, scale)
        q, k, v = heads(self.query_key_value(normed), self.head_dim)
        return self.query_norm(q), self.key_norm(k), v, tuple(rest)

    def take(self, x: Tokens, attended: Tokens, rest: tuple[Tensor, ...]) -> Tokens:
        """The tokens after attention and MLP."""
        gate_a, shift_m, scale_m, gate_m = rest
        x = torch.addcmul(x, gate_a, self.out(attended))
        normed = modulate(self.mlp_norm(x), shift_m, scale_m)
        return torch.addcmul(x, gate_m, self.mlp(normed))

    def init_weights(self, generator: torch.Generator) -> None:
        """Closed gates: the block starts as the identity (DiT's adaLN-Zero)."""
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)


class DoubleBlock(nn.Module):
    """Text and clip attend jointly, each with weights of its own."""

    programs = ("mix",)
    attention_dtype: torch.dtype | None = None

    def __init__(self, config: ModelConfig, *, has_text: bool) -> None:
        super().__init__()
        self.clip = Stream(config)
        self.text = Stream(config) if has_text else None

    def forward(
        self,
        texts: list[Tokens],
        clips: list[Tokens],
        vectors: list[Vector],
        turns: list[Turns],
        sights: list[Sight],
    ) -> tuple[list[Tokens], list[Tokens]]:
        rows = zip(texts, clips, vectors, turns, sights, strict=True)
        mixed = [self.mix(*row) for row in rows]
        return [text for text, _ in mixed], [clip for _, clip in mixed]

    def mix(
        self, text: Tokens, clip: Tokens, vector: Vector, turns: Turns, sight: Sight
    ) -> tuple[Tokens, Tokens]:
        q, k, v, clip_rest = self.clip.look(clip, vector)
        q, k = rotate(q, turns), rotate(k, turns)
        if self.text is None:
            return text, self.clip.take(
                clip, attend(q, k, v, sight, self.attention_dtype), clip_rest
            )
        *of_text, text_rest = self.text.look(text, vector)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(of_text, (q, k, v), strict=True))
        attended = attend(q, k, v, sight, self.attention_dtype).split(
            [text.shape[1], clip.shape[1]], dim=1
        )
        text = self.text.take(text, attended[0], text_rest)
        return text, self.clip.take(clip, attended[1], clip_rest)


class SingleBlock(nn.Module):
    """Attention and MLP side by side, with the same weights for text and clip."""

    programs = ("mix",)
    attention_dtype: torch.dtype | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, config.mlp_ratio * config.dim
        self.modulation = nn.Linear(dim, 3 * dim)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.query_key_value_expand = nn.Linear(dim, 3 * dim + hidden)
        self.query_norm = HeadNorm(config.head_dim)
        self.key_norm = HeadNorm(config.head_dim)
        self.out_contract = nn.Linear(dim + hidden, dim)
        self.head_dim, self.sizes = config.head_dim, (3 * dim, hidden)

    def forward(
        self,
        sequences: list[Tokens],
        vectors: list[Vector],
        turns: list[Turns],
        sights: list[Sight],
    ) -> list[Tokens]:
        rows = zip(sequences, vectors, turns, sights, strict=True)
        return [self.mix(*row) for row in rows]

    def mix(self, x: Tokens, vector: Vector, turns: Turns, sight: Sight) -> Tokens:
        shift, scale, gate = self.modulation(F.silu(vector))[:, None].chunk(3, dim=2)
        normed = modulate(self.norm(x), shift, scale)
        looked, hidden = self.query_key_value_expand(normed).split(self.sizes, dim=2)
        q, k, v = heads(looked, self.head_dim)
        q, k = rotate(self.query_norm(q), turns), rotate(self.key_norm(k), turns)
        attended = attend(q, k, v, sight, self.attention_dtype)
        mixed = torch.cat([attended, F.gelu(hidden, approximate="tanh")], dim=2)
        return torch.addcmul(x, gate, self.out_contract(mixed))

    def init_weights(self, generator: torch.Generator) -> None:
        """A closed gate: the block starts as the identity."""
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)


class PyramidFlow(Network):
    """Velocities of the noisy units of a micro-batch."""

    def __init__(self, config: PyramidFlowConfig, conditioning: Conditioning) -> None:
        super().__init__()
        self.config = config
        model, has_text = config.model, isinstance(conditioning, TextConditioning)
        values = config.channels * prod(model.token_size)
        self.tokenizer = nn.Linear(values, model.dim)
        self.conditioning = ClipConditioning(conditioning, model.dim)
        doubles = [DoubleBlock(model, has_text=has_text) for _ in range(model.double_blocks)]
        singles = [SingleBlock(model) for _ in range(model.single_blocks)]
        self.blocks = nn.ModuleList([*doubles, *singles])
        self.head_modulation = nn.Linear(model.dim, 2 * model.dim)
        self.head_norm = nn.LayerNorm(model.dim, eps=NORM_EPS, elementwise_affine=False)
        self.detokenizer = nn.Linear(model.dim, values)

    def init_weights(self, seed: int = 0) -> None:
        """Set every parameter, in a fixed order, from one seed; the first answer is zero."""
        generator = torch.Generator(self.tokenizer.weight.device).manual_seed(seed)
        for module in self.modules():
            init_linear(module, generator)
        for module in self.modules():
            own = getattr(module, "init_weights", None)
            if module is not self and callable(own):
                own(generator)
        for linear in (self.head_modulation, self.detokenizer):
            nn.init.zeros_(linear.weight)

    def forward(self, groups: list[Group]) -> list[Piece]:
        """The velocity of each group's noisy unit, in fp32."""
        texts, clips, vectors = zip(*(self.embed(group) for group in groups), strict=True)
        turns = [self.turns(group) for group in groups]
        sights = [self.sight(group) for group in groups]
        doubles = self.config.model.double_blocks
        for block in self.blocks[:doubles]:
            texts, clips = block(texts, clips, vectors, turns, sights)
        pairs = list(zip(texts, clips, strict=True))
        sequences = [torch.cat(pair, dim=1) for pair in pairs]
        turns = [after_text(turn, text.shape[1]) for text, turn in zip(texts, turns, strict=True)]
        for block in self.blocks[doubles:]:
            sequences = block(sequences, vectors, turns, sights)
        return [self.head(*row) for row in zip(groups, sequences, vectors, strict=True)]

    def embed(self, group: Group) -> tuple[Tokens, Tokens, Vector]:
        """Text tokens, padding first; tokens of the clip; and the vector that modulates both."""
        height, width = self.config.model.token_size
        cells = [
            rearrange(piece, "b c t (y h) (x w) -> b (t y x) (c h w)", h=height, w=width)
            for piece in group.pieces
        ]
        clip = self.tokenizer(torch.cat(cells, dim=1))
        vector, text = self.conditioning(group.clock, group.condition)
        if group.text_lengths is None:
            return clip[:, :0], clip, vector
        # Text has no positions, so its order is free: what nobody sees comes first.
        return text[:, : max(group.text_lengths)].contiguous().flip(1), clip, vector

    def sight(self, group: Group) -> Sight:
        """Text sees the first unit, which ends with it; each unit sees all before and itself."""
        lengths = group.text_lengths or (0,) * len(group.clock)
        text = max(lengths)
        ends = [text + end for end in self.config.token_ends(group.unit, group.stage)]
        return Sight(tuple(text - length for length in lengths), tuple(ends))

    def turns(self, group: Group) -> Turns:
        """Rotary positions of the tokens of a clip."""
        places = [
            token_places(
                self.config.units.frames(stretch),
                self.config.grid(stretch.level),
                2 ** (group.stage - stretch.level),
                group.clock.device,
            )
            for stretch in lay_out(group.unit, group.stage)
        ]
        return rotary_turns(torch.cat(places), self.config.model.head_dim)

    def head(self, group: Group, sequence: Tokens, vector: Vector) -> Piece:
        """The noisy unit's tokens as cells of its level."""
        _, _, frames, *_ = group.pieces[-1].shape
        (height, width), (y, x) = self.config.model.token_size, self.config.grid(group.stage)
        shift, scale = self.head_modulation(F.silu(vector))[:, None].chunk(2, dim=2)
        noisy = sequence[:, -frames * y * x :]
        cells = self.detokenizer(modulate(self.head_norm(noisy), shift, scale)).float()
        return rearrange(
            cells,
            "b (t y x) (c h w) -> b c t (y h) (x w)",
            c=self.config.channels, t=frames, y=y, x=x, h=height, w=width,
        )  # fmt: skip


def heads(x: Tokens, head_dim: int) -> Tensor:
    """Queries, keys and values, stacked, of every head."""
    return rearrange(x, "b n (three h d) -> three b h n d", three=3, d=head_dim)
