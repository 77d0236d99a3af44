"""Sampling without features kept: each tile, or each step, computes the coarser levels' anew."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from t2v.methods.hpdm.memory import plan_memory
from t2v.methods.hpdm.network import HPDM
from t2v.methods.hpdm.sampling import ALONE, sample_level
from t2v.methods.hpdm.settings import level_tilings
from t2v.methods.hpdm.store import Fetched, Kept, Store
from t2v.methods.hpdm.tiles import Batch, LevelNetwork, read_level
from t2v.methods.hpdm.tiling import Tiling
from t2v.network.conditioning import Condition
from t2v.recipe.recipe import RunConfig

PER_TILE, PER_STEP = "per tile", "per step"


class Anew(LevelNetwork):
    """Features of coarser levels computed for every call, from windows that contain the tile."""

    finished: list[Tensor]

    def _fetched(
        self, batches: list[Batch], tiling: Tiling, latents: Kept | None
    ) -> Iterator[Fetched]:
        for batch in batches:
            yield self._context(batch, tiling, latents)

    def _context(self, batch: Batch, tiling: Tiling, latents: Kept | None) -> Fetched:
        fetched = super()._context(batch, tiling, latents)
        return fetched | self.computed(batch, tiling.offsets[batch.tiles])

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
        clips = torch.tensor(batch.clips)
        rows = torch.cat([clips + branch * self.clips for branch in range(self.branches)])
        known: dict[tuple[int, int], Tensor] = {}

        def boxes(block: int, coarser: int, low: Tensor, shape: tuple[int, int, int]) -> Tensor:
            tokens = known[block, coarser]
            first = (windows[coarser] // token).repeat(self.branches, 1)
            index = [
                (low[:, axis, None] + torch.arange(shape[axis]) - first[:, axis, None]).clamp(
                    0, model.grid.shape[axis] - 1
                )
                for axis in range(3)
            ]
            row = torch.arange(len(tokens))[:, None, None, None]
            t, h, w = (
                index[0][:, :, None, None],
                index[1][:, None, :, None],
                index[2][:, None, None],
            )
            return tokens[row, t, h, w]

        for level in range(self.level):
            scale = self.scales[level]
            tiles = torch.stack([
                self.finished[level][clip][
                    :, t : t + patch[0], h : h + patch[1], w : w + patch[2]
                ]
                for clip, (t, h, w) in zip(batch.clips, windows[level].tolist(), strict=True)
            ]).repeat(self.branches, 1, 1, 1, 1) / scale  # fmt: skip
            factor = (scale**-2 + self.sigma_min**2) ** -0.5
            noise = torch.full((len(tiles), 1), self.sigma_min).log() / 4
            inputs = model.forward_level(
                level, (factor * tiles)[:, None], noise,
                windows[level].repeat(self.branches, 1), self.condition.rows(rows), boxes,
                wanted=model.context_blocks(level),
            )[2]  # fmt: skip
            for block, tokens in inputs.items():
                known[block, level] = tokens[:, 0].unflatten(1, model.grid.shape)
        fetched: Fetched = {}
        for coarser in model.context_levels(self.level):
            low, shape = model.grid.support(self.level, offsets, coarser)
            low = low.repeat(self.branches, 1)
            for block in range(len(model.config.levels_per_block)):
                if self.level in model.fused_levels(block):
                    fetched[block, coarser] = boxes(block, coarser, low, shape)
        return fetched


def condition_of(label: int) -> Condition:
    return Condition(
        fps=torch.tensor([24.0]),
        original_size=torch.tensor([[720.0, 1280.0]]),
        label=torch.tensor([label]),
    )


def sample_anew(model: HPDM, config: RunConfig, way: str, store: Store) -> list[Tensor]:
    """All levels of a clip, with features computed per tile or per step."""
    sampling, pyramid = config.method.sampling, config.method.pyramid
    rooms = plan_memory(model, sampling, clips=1, device_bytes=1 << 62)
    branches = [condition_of(0), condition_of(4)]
    levels: list[Tensor] = []

    def network(kind: type[LevelNetwork], level: int, count: int, volumes: dict) -> LevelNetwork:
        return kind(
            model, level, branches=branches[:count], volumes=volumes,
            diffusion=config.method.diffusion, room=rooms[level], store=store, team=ALONE,
        )  # fmt: skip

    def read(upto: int) -> dict:
        volumes: dict = {}
        for level in range(upto):
            reader = network(LevelNetwork, level, sampling.read_branches(level), volumes)
            tiling = level_tilings(sampling, pyramid, level)[0]
            volumes |= read_level(reader, tiling, levels[level])
        return volumes

    for level in range(pyramid.levels):
        count = len(sampling.branches(level))
        if way == PER_TILE:
            nothing: Any = _Absent()
            maker = network(Anew, level, count, nothing)
            assert isinstance(maker, Anew)
            maker.volumes, maker.finished = {}, levels
            maker.scales = [config.method.diffusion.level_input_scale(n) for n in range(level)]
        else:
            maker = network(LevelNetwork, level, count, read(level))
            denoise = maker.denoise

            def renewed(
                *args: Any, of: int = level, net: LevelNetwork = maker, call: Any = denoise,
                **named: Any,
            ) -> Any:  # fmt: skip
                fresh = read(of)
                net.volumes = {key: fresh[key] for key in net.volumes}
                return call(*args, **named)

            maker.denoise = renewed
        levels.append(
            sample_level(maker, [1], sampling, config.method.diffusion, lambda tiles: None)
        )
    return levels


class _Absent(dict):
    """Volumes that nobody keeps."""

    def __missing__(self, key: tuple[int, int]) -> None:
        return None
