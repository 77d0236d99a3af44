"""A short training with an engine, and all that it led to, put together from all ranks."""

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from t2v.checkpoint.tensor_files import Slice
from t2v.engine.engine import Engine
from t2v.engine.world import World, join_world
from t2v.loop import open_engine
from t2v.recipe.recipe import RunConfig, method_of
from t2v.train.ema import Ema, half_life
from t2v.train.schedule import learning_rates
from tests import tiny, tiny_flow

noise_batch = {"hpdm": tiny.noise_batch, "pyramid-flow": tiny_flow.noise_batch}


@dataclass
class Outcome:
    """[loss of each part..., gradient norm] of each step, and whole tensors."""

    history: np.ndarray
    start: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    averages: dict[str, np.ndarray]
    unsplit_averages: dict[str, np.ndarray]


def engine_of(config: RunConfig, world: World) -> Engine:
    """A recipe's engine with its initial values."""
    return open_engine(config, method_of(config), world)


def accumulate(engine: Engine, config: RunConfig, step: int) -> Tensor:
    """Gradients of a step, of this rank's share of the global batch; its mean loss of each part."""
    world, size = engine.world, config.micro_batch_size
    share = config.global_batch_size // world.world_size
    first = step * config.global_batch_size + world.rank * share
    method = method_of(config)
    losses = torch.zeros(len(method.parts))
    for number in range(first, first + share, size):
        batch = noise_batch[config.method.kind](config, list(range(number, number + size)))
        with engine.autocast():
            of_parts = method.losses(engine.model, batch, seed=config.seed, device=world.device)
            loss = of_parts * size / share
        engine.backward(loss.sum(), final=number + size == first + share)
        losses += loss.detach()
    return losses


def take_step(engine: Engine, config: RunConfig, step: int) -> list[float]:
    """One update; returns a row of the history."""
    losses = accumulate(engine, config, step)
    norm = float(engine.gradient_norm())
    rates = learning_rates(
        config.optimizer, config.warm_start, step=step,
        total_steps=config.total_steps, updates=engine.updates,
    )  # fmt: skip
    engine.update(rates, norm)
    return [*(engine.world.total(losses) / engine.world.world_size).tolist(), norm]


def train(config: RunConfig, world: World, steps: int) -> Outcome:
    """Plain steps from the recipe's initial values."""
    engine = engine_of(config, world)
    start = whole(engine, engine.parameters())
    ema = Ema(engine.parameters(), half_life(config.ema_half_life_steps))
    followed = {name: torch.from_numpy(values.copy()) for name, values in start.items()}
    unsplit = Ema(followed, half_life(config.ema_half_life_steps))
    history = []
    for step in range(steps):
        history.append(take_step(engine, config, step))
        ema.update(engine.updates)
        for name, values in whole(engine, engine.parameters()).items():
            followed[name].copy_(torch.from_numpy(values))
        unsplit.update(engine.updates)
    return Outcome(
        np.array(history),
        start,
        whole(engine, engine.parameters()),
        whole(engine, ema.averages),
        {name: average.numpy() for name, average in unsplit.averages.items()},
    )


def train_all(configs: list[RunConfig], steps: int) -> list[Outcome]:
    """Several trainings, one after the other, in one world."""
    with join_world(configs[0].engine) as world:
        return [train(config, world, steps) for config in configs]


def whole(engine: Engine, parts: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Every tensor put together from all ranks' parts; a place left out stays nan."""
    places = engine.places()
    return joined({name: Slice(part, places[name]) for name, part in parts.items()}, engine.world)


def joined(slices: dict[str, Slice], world: World) -> dict[str, np.ndarray]:
    """The same of parts that come with their places."""
    mine = {name: (s.place, s.part.flatten().numpy().copy()) for name, s in slices.items()}
    tensors = {
        name: np.full(prod(place.shape), np.nan, np.float32) for name, (place, _) in mine.items()
    }
    for theirs in world.gather(mine):
        for name, (place, part) in theirs.items():
            tensors[name][place.offset :][: len(part)] = part
    return {name: tensor.reshape(slices[name].place.shape) for name, tensor in tensors.items()}
