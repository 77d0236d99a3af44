"""Every engine trains the same numbers; the world agrees on errors."""

import pytest
import torch

from t2v.config import RunConfig
from t2v.engine.engine import Engine, build_engine
from t2v.engine.world import join_world
from t2v.model.hpdm import build_model
from t2v.train.ema import Ema
from t2v.train.objective import level_losses
from t2v.train.optim import learning_rate
from tests.distributed import run_distributed
from tests.tiny import noise_batch, tiny_config


def meta_model(config: RunConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return build_model(config)


def run_steps(engine: Engine, config: RunConfig, steps: int) -> list[list[float]]:
    """Plain steps over this rank's share of each global batch; losses per level and the norm."""
    ema = Ema(engine.parameters(), config.ema_half_life_steps)
    world, size = engine.world, config.micro_batch_size
    share = config.global_batch_size // world.world_size
    history = []
    for step in range(steps):
        first = step * config.global_batch_size + world.rank * share
        losses = torch.zeros(config.pyramid.levels)
        for start in range(first, first + share, size):
            batch = noise_batch(config, list(range(start, start + size)))
            with engine.autocast():
                loss = level_losses(engine.model, batch, config, world.device)
            final = start + size == first + share
            engine.backward(loss.sum() * size / share, final=final)
            losses += loss.detach() * size / share
        norm = float(engine.gradient_norm())
        engine.update(learning_rate(config.optimizer, step, config.total_steps), norm)
        ema.update(engine.updates)
        history.append([*(world.total(losses) / world.world_size).tolist(), norm])
    return history


def train_and_gather(config: RunConfig, steps: int) -> tuple[list[list[float]], dict]:
    """(history, whole parameters) of a run in the present world."""
    with join_world(config.engine) as world:
        engine = build_engine(meta_model(config), config, world)
        history = run_steps(engine, config, steps)
        weights = {}
        for name, part in engine.parameters().items():
            whole = engine.whole(name, part)
            whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
            weights[name] = whole.numpy().copy()
        return history, weights


@pytest.mark.dist
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_two_fsdp_processes_train_what_one_process_trains(optimizer):
    # Adam divides by |g| + eps: a usual eps turns rounding of near-zero gradients into whole steps.
    changes = {"optimizer": {"name": optimizer, "eps": 1.0e-2}}
    history, weights = train_and_gather(tiny_config(**changes), 6)
    fsdp = tiny_config(**changes, engine={"kind": "fsdp"})
    for other_history, other_weights in run_distributed(train_and_gather, 2, fsdp, 6):
        # Sums are taken in another order: fp32 rounding, grown by six steps.
        torch.testing.assert_close(
            torch.tensor(other_history), torch.tensor(history), rtol=2e-5, atol=1e-6
        )
        for name, weight in weights.items():
            torch.testing.assert_close(
                torch.from_numpy(other_weights[name]),
                torch.from_numpy(weight),
                rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}",
            )  # fmt: skip


def start_values(config: RunConfig) -> dict:
    return train_and_gather(config, 0)[1]


@pytest.mark.dist
def test_sharded_initial_values_are_bitwise_those_of_one_process():
    whole = start_values(tiny_config())
    for sharded in run_distributed(start_values, 2, tiny_config(engine={"kind": "fsdp"})):
        for name, values in whole.items():
            assert (sharded[name] == values).all(), name
