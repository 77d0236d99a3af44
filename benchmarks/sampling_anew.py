"""Sampling without features kept: each tile, or each step, computes the coarser levels' anew."""

from typing import Any

import torch
from torch import Tensor

from t2v.methods.hpdm.level_network import Batch, LevelNetwork
from t2v.methods.hpdm.memory import plan_memory
from t2v.methods.hpdm.network import HPDM
from t2v.methods.hpdm.sampling import ALONE, sample_level
from t2v.methods.hpdm.settings import level_tilings
from t2v.methods.hpdm.store import Fetched, Store
from t2v.methods.hpdm.tiled_denoiser import read_level
from t2v.methods.hpdm.tiling import Tiling, cut_tile
from t2v.network.conditioning import Condition
from t2v.recipe.recipe import RunConfig

PER_TILE, PER_STEP = "per tile", "per step"


class Anew(LevelNetwork):
    """Features of coarser levels computed for every call, from windows that contain the tile."""

    finished: list[Tensor]
    scales: list[float]
    sigma_min: float

    def __call__(
        self,
        x_noisy: Tensor,
        batch: Batch,
        tiling: Tiling,
        sigma: float,
        given: Fetched,
        *rest: Any,
    ) -> tuple[Tensor, Tensor]:
        given = given | self.computed(batch, tiling.offsets[batch.tiles])
        return super().__call__(x_noisy, batch, tiling, sigma, given, *rest)

    def computed(self, batch: Batch, offsets: Tensor) -> Fetched:
        """The boxes that the tiles look at, each from its own coarse windows."""
        model, pyramid = self.model, self.model.pyramid
        patch, growth = torch.tensor(pyramid.patch_size), torch.tensor(pyramid.growth)
        token = torch.tensor(model.config.token_size)
        windows = {self.level: offsets}
        for level in reversed(range(self.level)):
            last = torch.tensor(pyramid.size(level)) - patch
            low = (windows[level + 1] + patch // 2) // growth - patch // 2
            windows[level] = torch.minimum(low.clamp(min=0), last) // token * token
        known: dict[tuple[int, int], Tensor] = {}

        def seen(level: int) -> Fetched:
            boxes: Fetched = {}
            for block, coarser in model.config.context_features(level):
                low, shape = model.grid.support(level, windows[level], coarser)
                first = low - windows[coarser] // token
                t, h, w = (
                    (first[:, axis, None] + torch.arange(shape[axis]))
                    .clamp(0, model.grid.shape[axis] - 1)
                    .repeat(self.branches, 1)
                    for axis in range(3)
                )
                row = torch.arange(len(t))[:, None, None, None]
                place = row, t[:, :, None, None], h[:, None, :, None], w[:, None, None]
                boxes[block, coarser] = known[block, coarser][place]
            return boxes

        for level in range(self.level):

            def watch(block: int, features: Tensor, level: int = level) -> None:
                known[block, level] = features[:, 0].unflatten(1, model.grid.shape)

            scale = self.scales[level]
            tiles = torch.stack([
                cut_tile(self.finished[level][clip], corner, pyramid.patch_size)
                for clip, corner in zip(batch.clips, windows[level].tolist(), strict=True)
            ]).repeat(self.branches, 1, 1, 1, 1) / scale  # fmt: skip
            factor = (scale**-2 + self.sigma_min**2) ** -0.5
            noise = torch.full((len(tiles), 1), self.sigma_min).log() / 4
            model(
                (factor * tiles)[:, None], noise, windows[level].repeat(self.branches, 1)[:, None],
                self.condition.rows(torch.tensor(batch.rows)), level=level, kept=seen(level),
                watch=watch,
            )  # fmt: skip
        return seen(self.level)


def condition_of(label: int) -> Condition:
    return Condition(
        fps=torch.tensor([24.0]),
        original_size=torch.tensor([[720.0, 1280.0]]),
        label=torch.tensor([label]),
    )


def sample_anew(model: HPDM, config: RunConfig, way: str, store: Store) -> list[Tensor]:
    """All levels of a clip, with features computed per tile or per step."""
    sampling, pyramid = config.method.sampling, config.method.pyramid
    diffusion = config.method.diffusion
    rooms = plan_memory(model, sampling, clips=1, device_bytes=1 << 62)
    branches = [condition_of(0), condition_of(4)]
    levels: list[Tensor] = []

    def network(kind: type[LevelNetwork], level: int, count: int, volumes: dict) -> LevelNetwork:
        return kind(
            model, level, branches=[(told, None) for told in branches[:count]], volumes=volumes,
            diffusion=diffusion, room=rooms[level], store=store, team=ALONE,
        )  # fmt: skip

    def read(upto: int) -> dict:
        volumes: dict = {}
        for level in range(upto):
            reader = network(LevelNetwork, level, len(sampling.readers(level)), volumes)
            tiling = level_tilings(sampling, pyramid, level)[0]
            sigma = sampling.context.level_sigma(diffusion, level)
            volumes |= read_level(reader, tiling, levels[level] / reader.input_scale, sigma)
        return volumes

    for level in range(pyramid.levels):
        count = len(sampling.branches(level))
        if way == PER_TILE:
            maker = network(Anew, level, count, dict.fromkeys(model.config.context_features(level)))
            assert isinstance(maker, Anew)
            maker.volumes, maker.finished = {}, levels
            maker.scales = [diffusion.level_input_scale(n) for n in range(level)]
            maker.sigma_min = diffusion.sigma_min
        else:
            maker = network(LevelNetwork, level, count, read(level))
            shared = maker.shared

            def renewed(
                *args: Any, of: int = level, net: LevelNetwork = maker, call: Any = shared,
                **named: Any,
            ) -> Any:  # fmt: skip
                fresh = read(of)
                net.volumes = {key: fresh[key] for key in net.volumes}
                return call(*args, **named)

            maker.shared = renewed
        levels.append(sample_level(maker, [1], sampling, diffusion, lambda tiles: None))
    return levels
