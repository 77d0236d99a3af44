"""The network on batches of tiles of one level: branches, their context, and the processes that
share the work."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from t2v.methods.hpdm.diffusion import DiffusionConfig, c_in, c_noise, denoised, wide
from t2v.methods.hpdm.memory import LevelRoom
from t2v.methods.hpdm.network import HPDM, PIXELS, Latents
from t2v.methods.hpdm.store import Box, Fetched, Kept, Store
from t2v.methods.hpdm.tiling import Tiling
from t2v.methods.method import Team
from t2v.network.conditioning import Condition

TileBatch = Float[Tensor, "rows channels tile_frames tile_height tile_width"]
# (block, coarser level) -> features of the whole level, by (branch and clip, frame, row, column).
FeatureVolumes = dict[tuple[int, int], Kept]
LATENTS = "latents"


@dataclass(frozen=True)
class Batch:
    """Tiles that go through the network together: (clip, tile) of each.

    They go once for each branch; `rows` are their places among all branches' clips.
    """

    number: int
    clips: list[int]
    tiles: list[int]
    rows: list[int]

    def under(self, branches: range) -> "Batch":
        """The same tiles under some of the branches that they go under."""
        count = len(self.tiles)
        return replace(self, rows=self.rows[branches.start * count : branches.stop * count])


@dataclass(frozen=True)
class Pass:
    """Branches of one network with as many latents, which go through it together."""

    branches: range
    model: HPDM
    latents: int


class LevelNetwork:
    """The network on tiles of one level.

    `branches` are conditions, each with a number of latents (None: all): the prompt's alone, or
    also the one that guidance leads away from, whose context was read in that same way, both times
    by the `guide` if there is one.
    """

    def __init__(
        self,
        model: HPDM,
        level: int,
        *,
        branches: list[tuple[Condition, int | None]],
        guide: HPDM | None = None,
        volumes: FeatureVolumes,
        diffusion: DiffusionConfig,
        room: LevelRoom,
        store: Store,
        team: Team,
    ) -> None:
        self.model, self.level, self.room = model, level, room
        self.store, self.team = store, team
        conditions = [condition for condition, _ in branches]
        self.clips, self.branches = len(conditions[0].fps), len(branches)
        self.condition = joined(conditions)
        models = [model, guide or model][: self.branches]
        self.passes = passes_of(models, [n or model.config.num_latents for _, n in branches])
        self.context = model.config.context_features(level)
        self.volumes = {key: volumes[key] for key in self.context}
        self.input_scale = diffusion.level_input_scale(level)
        self.device = conditions[0].fps.device
        self.rows_at_once = max(1, room.tile_batch // self.branches)

    def batches(self, tiles: list[int]) -> list[Batch]:
        """Tiles of every clip, in the order in which they are added up."""
        pairs = [(clip, tile) for clip in range(self.clips) for tile in tiles]
        batches = []
        for first in range(0, len(pairs), self.rows_at_once):
            clips, numbers = zip(*pairs[first : first + self.rows_at_once], strict=True)
            rows = [branch * self.clips + clip for branch in range(self.branches) for clip in clips]
            batches.append(Batch(len(batches), list(clips), list(numbers), rows))
        return batches

    def features(self, batch: Batch, tiling: Tiling) -> Fetched:
        """The boxes of kept features that tiles look at."""
        boxes = {}
        for block, coarser in self.volumes:
            if (block == PIXELS, coarser) in boxes:
                continue
            grid = self.model.pixel_grid if block == PIXELS else self.model.grid
            low, shape = grid.support(self.level, tiling.offsets[batch.tiles], coarser)
            corners = zip(batch.rows, low.tolist() * self.branches, strict=False)
            places = [box(row, corner, shape) for row, corner in corners]
            boxes[block == PIXELS, coarser] = places
        return {
            (block, coarser): kept.read(boxes[block == PIXELS, coarser])[:, 0]
            for (block, coarser), kept in self.volumes.items()
        }

    def __call__(
        self,
        x_noisy: TileBatch,
        batch: Batch,
        tiling: Tiling,
        sigma: float,
        given: Fetched,
        watch: Callable[[int, Tensor], None] = lambda block, features: None,
    ) -> tuple[Float[Tensor, "branches rows channels frames height width"], list[Latents]]:
        """Denoised tiles, and last latents of each pass, given features and perhaps earlier
        latents."""
        answers, last = [], []
        for number, some in enumerate(self.passes):
            if not (rows := batch.under(some.branches)).rows:
                break
            first = some.branches.start * len(batch.tiles)
            own = slice(first, first + len(rows.rows))
            seen = {key: given[key][own] for key in self.context}
            before = given.get((LATENTS, number))
            tiles, latents = one_pass(self, some, x_noisy, rows, tiling, sigma, seen, before, watch)
            answers.append(tiles)
            last.append(latents)
        return torch.cat(answers) if len(answers) > 1 else answers[0], last

    def shared(
        self,
        batches: list[Batch],
        load: Callable[[Batch], Fetched],
        compute: Callable[[Batch, Fetched], dict[int, Tensor]],
        shape: tuple[int, ...],
        parts: Sequence[int] = (0,),
    ) -> Iterator[tuple[Batch, int, Tensor]]:
        """(batch, part, answer), the same on every member of the team, of which each loads, ahead,
        and computes its share of the batches.

        A batch is of the same rows however many share the work, so that its bytes are the same.
        """
        rank, size = self.team.rank, self.team.size
        mine = self.store.fetched(partial(load, batch) for batch in batches[rank::size])
        for first in range(0, len(batches), size):
            round_, answers = batches[first : first + size], {}
            if rank < len(round_):
                answers = compute(round_[rank], next(mine))
            for part in parts:
                answer = answers.pop(part, None)
                if size > 1 or answer is None:
                    answer = padded(answer, (self.rows_at_once, *shape), self.device)
                for batch, rows in zip(round_, self.team.gather(answer), strict=False):
                    yield batch, part, rows[: len(batch.tiles)]


def one_pass(
    network: LevelNetwork,
    some: Pass,
    x_noisy: TileBatch,
    batch: Batch,
    tiling: Tiling,
    sigma: float,
    seen: Fetched,
    latents: Latents | None,
    watch: Callable[[int, Tensor], None],
) -> tuple[Float[Tensor, "branches rows channels frames height width"], Latents]:
    """Denoised tiles and last latents of branches that go together."""
    branches = len(batch.rows) // len(batch.tiles)
    x_noisy = x_noisy.repeat(branches, 1, 1, 1, 1)
    sigmas = torch.full((len(x_noisy),), sigma, device=network.device)
    scales = torch.full_like(sigmas, network.input_scale)
    output, latents = some.model(
        (wide(c_in(sigmas, scales)) * x_noisy)[:, None],
        c_noise(sigmas)[:, None],
        tiling.offsets[batch.tiles].repeat(branches, 1).to(network.device)[:, None],
        network.condition.rows(torch.tensor(batch.rows, device=network.device)),
        latents,
        num_latents=some.latents,
        level=network.level,
        kept=seen,
        watch=watch,
    )
    answers = denoised(x_noisy, output[:, 0], sigmas, scales)
    return answers.unflatten(0, (branches, -1)), latents


def passes_of(models: list[HPDM], latents: list[int]) -> list[Pass]:
    """Branches by network and number of latents: neighbours that are alike go together."""
    alike = [(id(model), count) for model, count in zip(models, latents, strict=True)]
    runs = [list(some) for _, some in groupby(range(len(alike)), key=alike.__getitem__)]
    return [Pass(range(some[0], some[-1] + 1), models[some[0]], latents[some[0]]) for some in runs]


def joined(conditions: list[Condition]) -> Condition:
    """The rows of several conditions, one after the other."""
    names = [name for name, value in vars(conditions[0]).items() if value is not None]
    return replace(
        conditions[0],
        **{name: torch.cat([getattr(c, name) for c in conditions]) for name in names},
    )


def padded(rows: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Rows, or none, with zeros behind them."""
    full = torch.zeros(shape, device=device)
    if rows is not None:
        full[: len(rows)] = rows
    return full


def box(row: int, corner: list[int], shape: tuple[int, int, int]) -> Box:
    """Where features of one clip's window are kept."""
    sides = zip(corner, shape, strict=True)
    return (slice(row, row + 1), *(slice(low, low + side) for low, side in sides))
