"""The training loop: one screen; everything else is a named call."""

import contextlib
import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from data_pipeline import storage
from data_pipeline.errors import ConfigError, NumericError
from data_pipeline.loader import Loader
from t2v.config import RunConfig, dump_config
from t2v.engine.compute import make_deterministic
from t2v.engine.engine import Engine, build_engine
from t2v.engine.world import World, join_world
from t2v.model.hpdm import build_model
from t2v.train import preemption
from t2v.train.checkpoint import Checkpoints
from t2v.train.contract import refuse_other_run
from t2v.train.ema import Ema
from t2v.train.held_out import HeldOut
from t2v.train.objective import level_losses
from t2v.train.report import Report
from t2v.train.run_folder import StatusFile, locked
from t2v.train.schedule import BASE, learning_rates
from t2v.train.state import TrainState
from t2v.train.warm_start import warm_start

if TYPE_CHECKING:
    from data_pipeline.loader import Batch

T = TypeVar("T")


def train(config: RunConfig, *, stop_at_step: int | None = None) -> int:
    """Train to `total_steps` and return 0, or to where it is told to stop and return 75."""
    preemption.arm()
    make_deterministic()
    run_dir = Path(config.run_dir)
    with contextlib.ExitStack() as exits:
        world = exits.enter_context(join_world(config.engine))
        status = exits.enter_context(owned(run_dir, config, world))
        loader = exits.enter_context(contextlib.closing(open_loader(config, world)))
        held_out = HeldOut(config, loader, world)
        checkpoints = Checkpoints(run_dir, config.checkpoint, world)
        exits.callback(checkpoints.settle)
        state = begin(config, world, checkpoints, loader)
        recipe = dump_config(config).encode()
        world.on_first(lambda: storage.write_atomic(run_dir / "config.yaml", recipe))
        report = Report(run_dir, config, world, status, step=state.step)
        exits.enter_context(contextlib.closing(report))
        wait = Waiting()
        steps = wait(loader.steps(state.step, config.total_steps))
        stop = world.any(preemption.requested(run_dir))
        while state.step < config.total_steps and not stop:
            started = time.perf_counter()
            losses = accumulate_gradients(state.engine, wait(next(steps)), config, report)
            rates = learning_rates(config, state.step, state.engine.updates)
            grad_norm = float(state.engine.gradient_norm())
            if math.isfinite(grad_norm):
                state.update(rates, grad_norm)
            else:
                state.skip()
            report.step(
                state, losses, grad_norm=grad_norm, learning_rate=rates[BASE],
                data_seconds=wait.take(), step_seconds=time.perf_counter() - started,
            )  # fmt: skip
            refuse_endless_skips(state, config)
            if held_out.due(state.step):
                report.held_out(held_out.measure(state))
            stop = world.any(preemption.requested(run_dir) or state.step == stop_at_step)
            if stop or checkpoints.due(state.step) or state.step == config.total_steps:
                checkpoints.save(state.slices(), facts(state, config, loader))
            report.saved(checkpoints.news())
        checkpoints.finish()
        report.saved(checkpoints.news())
        if state.step >= config.total_steps:
            report.end("done")
            return 0
        if world.is_first:
            preemption.acknowledge(run_dir)
        report.end("preempted")
        return preemption.EXIT_CODE


def begin(config: RunConfig, world: World, checkpoints: Checkpoints, loader: Loader) -> TrainState:
    """The newest valid checkpoint of the run; else its warm start; else initial values."""
    with torch.device("meta"):
        model = build_model(config)
    engine = build_engine(model, config, world)
    state = TrainState(engine, Ema(engine.parameters(), config.ema_half_life_steps))
    checkpoints.clean()
    found = checkpoints.newest()
    if found is not None:
        folder, manifest = found
        told = config.checkpoint.accept_data_change
        refuse_other_run(folder, manifest, facts(state, config, loader), told=told)
        state.restore(folder, manifest)
        if world.is_first:
            print(f"resumed from {folder}", flush=True)
    elif config.warm_start is not None:
        warm_start(config, engine)
        state.ema.restart()
    return state


def accumulate_gradients(
    engine: Engine, micro_batches: Iterable["Batch"], config: RunConfig, report: Report
) -> Tensor:
    """Gradients of a step's loss; returns this rank's mean loss of each level."""
    count = accumulation_steps(config, engine.world.world_size)
    device = engine.world.device
    losses = torch.zeros(config.pyramid.levels, device=device)
    for number, batch in enumerate(micro_batches, start=1):
        report.samples(batch)
        with engine.autocast():
            of_levels = level_losses(engine.model, batch, config, device) / count
        engine.backward(of_levels.sum(), final=number == count)
        losses += of_levels.detach()
    return losses


def accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Micro-batches per step and rank; derived, never set."""
    count, rest = divmod(config.global_batch_size, config.micro_batch_size * world_size)
    if rest:
        raise ConfigError(
            f"global_batch_size: {config.global_batch_size} is wrong because {world_size} ranks of "
            f"micro_batch_size {config.micro_batch_size} do not divide it; change one of them."
        )
    return count


def refuse_endless_skips(state: TrainState, config: RunConfig) -> None:
    """NumericError after too many steps in a row without a finite gradient; nothing is saved."""
    limit = config.optimizer.max_skips_in_a_row
    if state.skips_in_a_row >= limit:
        raise NumericError(
            f"{config.run_dir}: no finite gradient in {limit} steps in a row up to step "
            f"{state.step}; metrics.jsonl names their samples; lower optimizer.learning_rate, or "
            "look at these samples."
        )


def facts(state: TrainState, config: RunConfig, loader: Loader) -> dict[str, Any]:
    """What a manifest tells of a run besides its files."""
    return {
        "step": state.step,
        "updates": state.engine.updates,
        "engine": state.engine.name,
        "config": json.loads(config.model_dump_json()),
        "data_fingerprint": loader.fingerprint,
        "text_encoder": loader.text_encoder,
    }


def open_loader(config: RunConfig, world: World) -> Loader:
    """This rank's share of the global order."""
    accumulation_steps(config, world.world_size)
    loaders = []

    def open_one() -> None:
        loaders.append(
            Loader(
                config.data,
                config.pyramid,
                config.conditioning,
                seed=config.seed,
                global_batch_size=config.global_batch_size,
                micro_batch_size=config.micro_batch_size,
                rank=world.rank,
                world_size=world.world_size,
            )
        )

    world.on_all(open_one)
    return loaders[0]


@contextlib.contextmanager
def owned(run_dir: Path, config: RunConfig, world: World) -> Iterator[StatusFile | None]:
    """The run folder, locked; rank 0 gets its status file, in which a failure leaves its reason."""
    with contextlib.ExitStack() as exits:
        status = None
        if world.is_first:
            status = StatusFile(run_dir, step=0, total_steps=config.total_steps)

        def enter() -> None:
            exits.enter_context(locked(run_dir))
            assert status is not None
            status.write("starting")

        world.on_first(enter)
        try:
            yield status
        except BaseException as failure:
            if status is not None:
                # A full disk may be the very failure.
                with contextlib.suppress(OSError):
                    status.write("failed", reason=str(failure) or repr(failure))
            raise


class Waiting:
    """Passes items on and counts the seconds spent waiting for them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, items: Iterable[T]) -> Iterator[T]:
        iterator = iter(items)
        while True:
            started = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - started
            yield item

    def take(self) -> float:
        """The seconds since the last time."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds
