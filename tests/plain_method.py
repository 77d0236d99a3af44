"""A third method, known to the tests alone: flow matching of whole clips by a few layers."""

from math import prod
from typing import Literal

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from data_pipeline.feeding.config import Conditioning
from data_pipeline.pyramid import Pyramid
from data_pipeline.strict import Size
from t2v.methods.method import Method, MethodConfig, SamplingConfig
from t2v.methods.seeds import mix
from t2v.network.layers import ModulatedLayer, init_linear, scalar_features
from t2v.network.network import Network


class PlainSamplingConfig(SamplingConfig):
    steps: int = Field(ge=1, description="Euler steps")


class PlainConfig(MethodConfig):
    kind: Literal["plain"]
    clip_size: Size
    token_size: Size
    dim: int = Field(ge=8)
    layers: int = Field(ge=1)
    sampling: PlainSamplingConfig

    @property
    def view(self) -> Pyramid:
        return Pyramid(levels=1, patch_size=self.clip_size, clip_size=self.clip_size)


class PlainNetwork(Network):
    def __init__(self, config: PlainConfig, num_classes: int) -> None:
        super().__init__()
        grid = [c // t for c, t in zip(config.clip_size, config.token_size, strict=True)]
        self.sizes = dict(zip("tyxfhw", [*grid, *config.token_size], strict=True))
        self.tokenizer = nn.Linear(3 * prod(config.token_size), config.dim)
        self.place = nn.Parameter(torch.empty(prod(grid), config.dim))
        self.clock = nn.Linear(64, config.dim)
        self.label = nn.Parameter(torch.empty(num_classes + 1, config.dim))
        sizes = [(config.dim, 8, config.dim)] * config.layers
        self.blocks = nn.ModuleList(ModulatedLayer(*size) for size in sizes)
        self.head = nn.Linear(config.dim, 3 * prod(config.token_size))

    def init_weights(self, seed: int = 0) -> None:
        generator = torch.Generator(self.place.device).manual_seed(seed)
        for module in self.modules():
            init_linear(module, generator)
        for table in (self.place, self.label):
            nn.init.normal_(table, std=0.02, generator=generator)
        for block in self.blocks:
            block.init_weights(generator)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        cut = {axis: self.sizes[axis] for axis in "fhw"}
        tokens = rearrange(x, "b c (t f) (y h) (x w) -> b (t y x) (c f h w)", **cut)
        tokens = self.tokenizer(tokens) + self.place
        vector = self.clock(scalar_features(time, 64)) + self.label[label]
        for block in self.blocks:
            tokens = block(tokens, vector)
        pixels = self.head(tokens)
        return rearrange(pixels, "b (t y x) (c f h w) -> b c (t f) (y h) (x w)", **self.sizes)


class PlainMethod(Method):
    Config, title, bin_axis, parts = PlainConfig, "plain flow", "time", ("flow",)

    def __init__(self, config: PlainConfig, conditioning: Conditioning) -> None:
        super().__init__(config, conditioning)
        self.calls_per_clip = config.sampling.steps

    def network(self) -> PlainNetwork:
        return PlainNetwork(self.config, self.conditioning.num_classes)

    def inputs(self) -> dict:
        x, label = torch.zeros(1, 3, *self.config.clip_size), torch.zeros(1, dtype=torch.long)
        return {"x": x, "time": torch.ones(1), "label": label}

    def losses(self, network, batch, *, seed, device) -> Tensor:
        return self._errors(network, batch, 0, 1, seed, device).mean(0)

    def held_out(self, network, batch, *, turns, bins, seed, device):
        shift, places = torch.tensor(turns, device=device) / bins, [[turn] for turn in turns]
        return self._errors(network, batch, shift, bins, ~seed % 2**63, device), places

    def _errors(self, network, batch, shift, bins, seed, device) -> Tensor:
        x = rearrange(batch.patches[:, 0].to(device), "b t h w c -> b c t h w") / 127.5 - 1
        draws = [torch.Generator().manual_seed(mix(seed, n)) for n in batch.numbers.tolist()]
        noise = torch.stack([torch.randn(x.shape[1:], generator=draw) for draw in draws]).to(device)
        time = torch.cat([torch.rand(1, generator=draw) for draw in draws]).to(device)
        time = shift + time / bins
        x_time = torch.lerp(noise, x, time[:, None, None, None, None])
        error = network(x_time, time, batch.label.to(device)) - (x - noise)
        return error.square().mean((1, 2, 3, 4))[:, None]

    def bin_edges(self, bins: int) -> list[float]:
        return [n / bins for n in range(1, bins)]

    def facts(self) -> dict:
        return {"layers": self.config.layers}

    @torch.no_grad()
    def generate(
        self, network, *, condition, null, seeds, room, team, progress, given=None, guide=None
    ) -> list[Tensor]:
        draws = (torch.Generator().manual_seed(seed) for seed in seeds)
        x = torch.stack([torch.randn(3, *self.config.clip_size, generator=g) for g in draws])
        steps = self.config.sampling.steps
        for step in range(steps):
            x = x + network(x, torch.full((len(x),), step / steps), condition.label) / steps
            progress(len(x))
        return [x.clamp(-1, 1)]
