"""What an engine holds: it moves to every other engine bit by bit, and stays when a step fails."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.feeding.mixture import Mixture
from t2v.checkpoint.checkpoints import Checkpoints
from t2v.checkpoint.config import CheckpointConfig
from t2v.engine.engine import Engine
from t2v.engine.world import ALONE, World, join_world
from t2v.recipe.recipe import RunConfig
from t2v.train.ema import Ema, half_life, power_function
from t2v.train.state import TrainState
from tests.distributed import run_distributed
from tests.tiny import tiny_config
from tests.training import accumulate, engine_of, joined, take_step, whole

ENGINES: dict[str, dict[str, Any]] = {
    "fsdp": {"kind": "fsdp"},
    "zero1": {"kind": "zero", "zero_stage": 1},
    "zero2": {"kind": "zero", "zero_stage": 2},
    "zero3": {"kind": "zero", "zero_stage": 3},
}
MORE = ENGINES | {
    "hsdp": {"kind": "fsdp", "dp_replicate": 2},
    "fsdp shards": {"kind": "fsdp", "accumulate": "shards"},
    "zero2 offload": {"kind": "zero", "zero_stage": 2, "offload_optimizer": True},
    "zero3 offload": {"kind": "zero", "zero_stage": 3, "offload_optimizer": True},
}
UPDATES = 7


def recipe(engine: dict[str, Any], **changes: Any) -> RunConfig:
    return tiny_config(optimizer={"name": "adamw", "eps": 1.0e-2}, engine=engine, **changes)


def state_of(config: RunConfig, world: World) -> TrainState:
    engine = engine_of(config, world)
    averages = Ema(engine.parameters(), half_life(config.ema_half_life_steps))
    lengths = {0.1: Ema(engine.parameters(), power_function(0.1))}
    return TrainState(engine, averages, config.global_batch_size, lengths=lengths)


def everything(state: TrainState) -> dict[str, np.ndarray]:
    """All that a checkpoint holds, whole."""
    return joined(state.slices(), state.engine.world)


def checkpoints(run_dir: Path, world: World) -> Checkpoints:
    made = Checkpoints(run_dir, CheckpointConfig(every_steps=1), world)
    made.clean()
    return made


def save(state: TrainState, config: RunConfig, made: Checkpoints) -> None:
    facts = {
        "step": state.step,
        "updates": state.engine.updates,
        "engine": state.engine.name,
        "config": json.loads(config.model_dump_json()),
        "samples": 0,
        "data_fingerprint": "data",
        "mixture": Mixture(parts=()),
        "text_encoder": None,
    }
    made.save(state.slices(), facts)
    made.finish()


def restored(config: RunConfig, run_dir: Path, world: World) -> TrainState:
    state = state_of(config, world)
    found = checkpoints(run_dir, world).newest()
    assert found is not None
    state.restore(*found)
    return state


def move_all(folder: Path, names: list[str]) -> dict[str, Any]:
    """Under each engine: take on the state saved by one process, save it, and take a step."""
    found = {}
    with join_world(recipe(ENGINES["fsdp"]).engine) as world:
        for name in names:
            config = recipe(MORE[name])
            state = restored(config, folder / "single", world)
            held = everything(state)
            save(state, config, checkpoints(folder / name, world))
            found[name] = (held, state.engine.updates, take_step(state.engine, config, 3))
    return found


def moved_everywhere(folder: Path, world_size: int, names: list[str]) -> None:
    config = recipe({})
    state = state_of(config, ALONE)
    generator = torch.Generator().manual_seed(1)
    for key, piece in state.slices().items():
        piece.part.normal_(generator=generator)
        if "exp_avg_sq" in key:
            piece.part.square_()
    state.step, state.engine.updates = 3, UPDATES
    save(state, config, checkpoints(folder / "single", ALONE))
    wanted = everything(state)
    step = take_step(state.engine, config, 3)
    after = whole(state.engine, state.engine.parameters())
    for outcome in run_distributed(move_all, world_size, folder, names, timeout_seconds=400):
        for name, (held, updates, row) in outcome.items():
            for key, values in wanted.items():
                assert np.array_equal(held[key], values), f"{name}: {key}"
            assert updates == UPDATES
            # The step computes with what was restored, and moves it by its moments.
            np.testing.assert_allclose(row, step, rtol=1e-5, err_msg=name)
    for name in names:
        back = restored(config, folder / name, ALONE)
        for key, values in everything(back).items():
            assert np.array_equal(values, wanted[key]), f"back from {name}: {key}"
        take_step(back.engine, config, 3)
        for key, values in whole(back.engine, back.engine.parameters()).items():
            assert np.array_equal(values, after[key]), f"a step after {name}: {key}"


@pytest.mark.slow
@pytest.mark.dist
def test_state_moves_between_one_process_and_two_under_every_engine(tmp_path):
    moved_everywhere(tmp_path, 2, list(ENGINES))


@pytest.mark.slow
@pytest.mark.dist
def test_state_moves_between_one_process_and_four_under_every_engine(tmp_path):
    moved_everywhere(tmp_path, 4, list(MORE))


def fail_a_step(names: list[str]) -> dict[str, tuple[bool, bool, list[float]]]:
    """Under each engine: two good steps with a step of gradients that are not finite between."""
    found = {}
    with join_world(recipe(ENGINES["fsdp"]).engine) as world:
        for name in names:
            config = recipe(MORE[name])
            state = state_of(config, world)
            take_step(state.engine, config, 0)
            before = everything(state)
            accumulate(state.engine, config, 1)
            backward_once_more(state.engine, config)
            norm = float(state.engine.gradient_norm())
            state.skip()
            after = everything(state)
            same = all(np.array_equal(after[key], values) for key, values in before.items())
            found[name] = (np.isfinite(norm), same, take_step(state.engine, config, 2))
    return found


def backward_once_more(engine: Engine, config: RunConfig) -> None:
    """A step's gradients, and then those of a loss that is not finite on one rank alone."""
    engine.forget_gradients()
    with engine.autocast():
        for parameter in engine.parameters().values():
            assert parameter.isfinite().all()
    bad = torch.nan if engine.world.rank == engine.world.world_size - 1 else 1.0
    hook = engine.model.detokenizer.register_forward_hook(lambda *called: called[-1] * bad)
    accumulate(engine, config, 1)
    hook.remove()


@pytest.mark.slow
@pytest.mark.dist
def test_a_step_without_a_finite_gradient_changes_nothing_under_any_engine():
    config = recipe({})
    state = state_of(config, ALONE)
    take_step(state.engine, config, 0)
    wanted = take_step(state.engine, config, 2)
    names = [name for name in MORE if name != "hsdp"]
    for outcome in run_distributed(fail_a_step, 2, names, timeout_seconds=400):
        for name, (finite, same, row) in outcome.items():
            assert not finite, name
            assert same, name
            np.testing.assert_allclose(row, wanted, rtol=5e-6, err_msg=name)


class CountReductions(TorchDispatchMode):
    """Counts the tensors that ranks add up."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "reduce" in name and ("c10d" in name):
            self.count += 1
        return func(*args, **(kwargs or {}))


def count_reductions(names: list[str]) -> dict[str, list[int]]:
    """How often ranks add up gradients in a step of 1 and of 3 micro-batches each."""
    found: dict[str, list[int]] = {name: [] for name in names}
    with join_world(recipe(ENGINES["fsdp"]).engine) as world:
        for name in names:
            for micro_batches in (1, 3):
                config = recipe(MORE[name], global_batch_size=micro_batches * world.world_size)
                engine = engine_of(config, world)
                with CountReductions() as counted:
                    accumulate(engine, config, 0)
                found[name].append(counted.count)
    return found


@pytest.mark.slow
@pytest.mark.dist
def test_accumulated_gradients_travel_once():
    names = [*ENGINES, "fsdp shards"]
    for outcome in run_distributed(count_reductions, 2, names, timeout_seconds=400):
        for name, (once, of_three) in outcome.items():
            assert 0 < once == of_three / (3 if "shards" in name else 1), name
