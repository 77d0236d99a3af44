"""Held-out loss of each level in bins of noise: the same samples and noise at every measurement."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from data_pipeline.feeding.config import Source, TextConditioning
from data_pipeline.feeding.held_out import held_out_reader
from data_pipeline.feeding.loader import Loader, collate
from data_pipeline.feeding.sample import Sample, SampleReader
from data_pipeline.strict import Strict
from t2v.engine.world import World
from t2v.methods.hpdm.diffusion import DiffusionConfig, draw_sigma
from t2v.methods.hpdm.network import CHANNELS
from t2v.methods.hpdm.objective import Patches, mix, weighted_errors

if TYPE_CHECKING:
    from t2v.recipe.recipe import RunConfig
    from t2v.train.state import TrainState

KEY = 0x48454C444F5554  # keeps these draws apart from those of training


class HeldOutConfig(Strict):
    """What is measured on samples that training never sees."""

    every_steps: int = Field(ge=1)
    samples: int = Field(default=64, ge=1, description="over all ranks, the same every time")
    bins: int = Field(default=8, ge=1, le=64, description="equal shares of the training noise")
    weights: Literal["ema", "raw"] = "ema"
    sources: list[Source] | None = Field(
        default=None, min_length=1, description="datasets; none: what data.held_out_share holds out"
    )


class HeldOut:
    """The held-out samples of a run; all ranks measure together and get the same answer.

    Sample s belongs to rank s modulo world size. Ranks with fewer samples repeat theirs, so that
    all take part in the same number of forward passes.
    """

    def __init__(self, config: "RunConfig", loader: Loader, world: World) -> None:
        self.config, self.world = config, world
        self.reader: SampleReader | None = None
        self.read: list[Sample] = []
        self.latest: tuple[int, float] | None = None
        if config.held_out is not None:
            settings = config.held_out
            [self.reader, *_] = world.on_all(lambda: open_reader(config, settings, loader))
            self.mine = list(range(world.rank, settings.samples, world.world_size)) or [0]

    def due(self, step: int) -> bool:
        """Whether a step is one to measure after."""
        settings = self.config.held_out
        if settings is None:
            return False
        return step % settings.every_steps == 0 or step == self.config.total_steps

    def loss_at(self, step: int) -> float | None:
        """What was measured after a step, if it was and is finite."""
        if self.latest is None or self.latest[0] != step or not math.isfinite(self.latest[1]):
            return None
        return self.latest[1]

    def measure(self, state: "TrainState") -> dict[str, Any]:
        """The line of metrics.jsonl on the present weights, which are left bit by bit as they were.

        A level's mean over bins estimates its training loss, conditions never dropped.
        """
        started = time.perf_counter()
        settings = self.config.held_out
        assert settings is not None
        if not self.read:
            self.world.on_all(self._read)
        weights = averaged_weights(state) if settings.weights == "ema" else nullcontext()
        with weights, torch.no_grad():
            table = self._errors(state, settings.samples, settings.bins)
            state.engine.refresh()
        losses = self.world.total(table).mean(0)
        of_levels = losses.mean(1).tolist()
        self.latest = state.step, sum(of_levels)
        return {
            "step": state.step,
            "held_out_loss": sum(of_levels),
            **{f"held_out_level_{level}": loss for level, loss in enumerate(of_levels)},
            **{f"held_out_level_{n}_bins": row for n, row in enumerate(losses.tolist())},
            "held_out_samples": settings.samples,
            "held_out_weights": settings.weights,
            "held_out_seconds": time.perf_counter() - started,
        }

    def _read(self) -> None:
        assert self.reader is not None
        self.read = [self.reader.read(number)[0] for number in self.mine]

    def _errors(
        self, state: "TrainState", samples: int, bins: int
    ) -> Float[Tensor, "samples levels bins"]:
        """This rank's errors at their places, zeros elsewhere."""
        config, device = self.config, self.world.device
        levels = config.pyramid.levels
        table = torch.zeros(samples, levels, bins, dtype=torch.float64)
        has_own = self.world.rank < samples
        for some in passes(
            len(self.mine), samples, self.world.world_size, bins, config.micro_batch_size
        ):
            numbers = [self.mine[row] for row, _ in some]
            turns = [turn for _, turn in some]
            batch = collate([self.read[row] for row, _ in some], [], text_shape(config))
            places = noise_bins(config, numbers, turns, bins)
            noise, sigma, chance = fixed_noise(config, numbers, turns, places, bins)
            with state.engine.autocast():
                errors = weighted_errors(
                    state.engine.model, batch, config,
                    noise.to(device), sigma.to(device), chance.to(device),
                )  # fmt: skip
            if has_own:
                for number, of_levels, values in zip(
                    numbers, places, errors.double().cpu(), strict=True
                ):
                    table[number, range(levels), of_levels] = values
        return table


def open_reader(config: "RunConfig", settings: HeldOutConfig, loader: Loader) -> SampleReader:
    """Reads the held-out samples of a recipe."""
    return held_out_reader(
        config.data,
        settings.sources,
        config.pyramid,
        config.conditioning,
        seed=config.seed,
        samples=settings.samples,
        encoder=loader.text_encoder,
    )


def passes(
    own: int, samples: int, world_size: int, bins: int, micro_batch_size: int
) -> list[list[tuple[int, int]]]:
    """(row of a rank's `own` samples, turn) of each forward pass; as many passes on every rank.

    Short of samples, a rank repeats its first: the same values to the same places.
    """
    most = -(-samples // world_size)
    rows = [row if row < own else 0 for row in range(most)]
    work = [(row, turn) for turn in range(bins) for row in rows]
    return [
        work[first : first + micro_batch_size] for first in range(0, len(work), micro_batch_size)
    ]


def text_shape(config: "RunConfig") -> tuple[int, int] | None:
    """(max_tokens, width) of text embeddings, if the recipe has any."""
    text = config.conditioning
    return (text.max_tokens, text.width) if isinstance(text, TextConditioning) else None


def noise_bins(
    config: "RunConfig", numbers: list[int], turns: list[int], bins: int
) -> list[list[int]]:
    """The bin of each level of each sample at its turn: over all turns a level visits every bin
    once, and which bins meet differs from sample to sample, as independent noise would have it."""
    places = []
    for number, turn in zip(numbers, turns, strict=True):
        generator = torch.Generator().manual_seed(mix(config.seed ^ KEY, number))
        shift = torch.randint(bins, (config.pyramid.levels,), generator=generator).tolist()
        places.append([(first + turn) % bins for first in shift])
    return places


def fixed_noise(
    config: "RunConfig", numbers: list[int], turns: list[int], places: list[list[int]], bins: int
) -> tuple[Patches, Float[Tensor, "batch levels"], Float[Tensor, " batch"]]:
    """(noise, sigma, 1 or 0 for self-conditioning), drawn on the CPU from (seed, sample, turn)."""
    shape = (config.pyramid.levels, CHANNELS, *config.pyramid.patch_size)
    noise, sigma = torch.empty(len(numbers), *shape), torch.empty(len(numbers), shape[0])
    chance = torch.empty(len(numbers))
    for row, (number, turn, of_levels) in enumerate(zip(numbers, turns, places, strict=True)):
        generator = torch.Generator().manual_seed(mix(mix(config.seed ^ KEY, number), turn))
        noise[row].normal_(generator=generator)
        within = torch.rand(shape[0], generator=generator, dtype=torch.float64)
        sigma[row] = sigma_at((torch.tensor(of_levels) + within) / bins, config.diffusion)
        chance[row].uniform_(generator=generator)
    return noise, sigma, (chance < config.model.self_conditioning_rate).float()


def sigma_at(
    quantile: Float[Tensor, " quantiles"], diffusion: DiffusionConfig
) -> Float[Tensor, " quantiles"]:
    """Noise levels at quantiles of the training distribution, short of its endless tails."""
    normal = torch.special.ndtri(quantile.double().clamp(1e-4, 1 - 1e-4))
    return draw_sigma(normal.float(), diffusion)


@contextmanager
def averaged_weights(state: "TrainState") -> Iterator[None]:
    """The averaged weights in place of the trained ones, which come back bit by bit."""
    swap(state)
    try:
        yield
    finally:
        state.engine.refresh()
        swap(state)


@torch.no_grad()
def swap(state: "TrainState") -> None:
    """Trade parameters for their averages, tensor by tensor."""
    averages = state.ema.averages
    for name, part in state.engine.parameters().items():
        kept = part.clone()
        part.copy_(averages[name])
        averages[name].copy_(kept)
    state.engine.refresh()
