"""The training loop: one screen; everything else is a named call."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from data_pipeline.errors import NumericError
from data_pipeline.feeding.held_out import held_out_reader
from data_pipeline.feeding.loader import Batch, Loader
from data_pipeline.printable import say
from data_pipeline.store import storage
from t2v.attempt import preemption
from t2v.attempt.attempt import begin_attempt
from t2v.attempt.watchdog import Watchdog
from t2v.checkpoint.checkpoints import Checkpoints
from t2v.checkpoint.compatibility import refuse_other_run
from t2v.engine.compile_cache import sound_compile_cache
from t2v.engine.compute import determinism, keep_freed_memory
from t2v.engine.device import Pace, on_device, to_host
from t2v.engine.engine import Engine, build_engine
from t2v.engine.faults import arm_faults, fault
from t2v.engine.optimizer import BASE, Groups
from t2v.engine.world import World, join_world
from t2v.methods.method import Method
from t2v.plan.footprint import training_tflop
from t2v.recipe.recipe import (
    RunConfig,
    accumulation_steps,
    dump_config,
    longest_section_seconds,
    method_of,
)
from t2v.train.ema import Ema, half_life, power_function
from t2v.train.held_out import HeldOut
from t2v.train.part_weights import PartWeights
from t2v.train.schedule import learning_rates
from t2v.train.state import TrainState
from t2v.train.warm_start import warm_start
from t2v.watching.report import Report, Watched

T = TypeVar("T")


def train(
    config: RunConfig, *, stop_at_step: int | None = None, clear_failures: bool = False
) -> int:
    """Train to `total_steps` and return 0, or to where it is told to stop and return 75."""
    preemption.arm()
    arm_faults()
    run_dir = Path(config.run_dir)
    with contextlib.ExitStack() as exits:
        exits.enter_context(determinism(config.engine))
        longest = longest_section_seconds(config)
        watchdog = exits.enter_context(Watchdog(config.watchdog, longest=longest))
        world = exits.enter_context(join_world(config.engine))
        if world.device.type == "cpu":
            keep_freed_memory()
        attempt = exits.enter_context(
            begin_attempt(
                run_dir, world, watchdog, engine=config.engine.kind,
                total_steps=config.total_steps, recipe=json.loads(config.model_dump_json()),
                clear_failures=clear_failures,
            )
        )  # fmt: skip
        if config.engine.compile:
            exits.enter_context(sound_compile_cache())
        method = method_of(config)
        loader = exits.enter_context(contextlib.closing(open_loader(config, world)))
        held_out = open_held_out(config, method, loader, world)
        checkpoints = Checkpoints(run_dir, config.checkpoint, world, attempt.may_commit)
        exits.callback(checkpoints.settle)
        state = begin(config, method, world, checkpoints, loader)
        recipe = dump_config(config).encode()
        world.on_first(lambda: storage.write_atomic(run_dir / "config.yaml", recipe))
        report = Report(run_dir, watched(config, method), world, attempt.status, state=state)
        exits.enter_context(contextlib.closing(report))
        # Where training ends on an error: say so before anything is closed.
        exits.push(lambda kind, error, trace: attempt.fail(error) if error else None)
        wait = Waiting()
        steps = wait(loader.steps(state.step, config.total_steps, samples=state.samples))
        stop = world.any(preemption.requested(run_dir))
        while state.step < config.total_steps and not stop:
            started = time.perf_counter()
            watchdog.enter("data", state.step)
            micro_batches = world.together(lambda: read(steps, state))
            samples = [name for batch in micro_batches for name in batch.ids]
            watchdog.enter("step", state.step, samples)
            losses = accumulate_gradients(
                state, wait(micro_batches), config, method, report,
                tell=partial(watchdog.enter, "step", state.step, samples),
            )  # fmt: skip
            rates = learning_rates(
                config.optimizer, config.warm_start, step=state.step,
                total_steps=config.total_steps, updates=state.engine.updates,
            )  # fmt: skip
            computed = torch.cat([state.engine.gradient_norm()[None], losses])
            grad_norm, *losses = to_host(computed).tolist()
            watchdog.enter("checkpoint", state.step)
            checkpoints.wait_for_copy()
            watchdog.enter("step", state.step, samples)
            if math.isfinite(grad_norm):
                state.update(rates, grad_norm, losses)
            else:
                state.skip()
            report.step(
                state, losses, grad_norm=grad_norm, learning_rate=rates[BASE],
                data_seconds=wait.take(), step_seconds=time.perf_counter() - started,
            )  # fmt: skip
            refuse_endless_skips(state, config)
            if held_out.due(state.step):
                watchdog.enter("step", state.step)
                tell = partial(watchdog.enter, "step", state.step)
                report.held_out(held_out.measure(state, tell=tell))
            fault("step", state.step)
            preemption.wait_for_save()
            told = preemption.requested(run_dir) or attempt.is_lost
            stop = world.any(told or state.step == stop_at_step)
            if stop or checkpoints.due(state.step) or state.step == config.total_steps:
                watchdog.enter("checkpoint", state.step)
                now = {
                    "attempt": attempt.number,
                    "held_out_loss": held_out.loss_at(state.step),
                }
                checkpoints.save(state.slices(), facts(state, config, loader) | now)
            report.saved(checkpoints.news())
        watchdog.enter("checkpoint", state.step)
        checkpoints.finish()
        report.saved(checkpoints.news())
        return attempt.finish(is_done=state.step >= config.total_steps)


def begin(
    config: RunConfig, method: Method, world: World, checkpoints: Checkpoints, loader: Loader
) -> TrainState:
    """The newest valid checkpoint of the run; else its warm start; else initial values."""
    fault("setup")
    engine = open_engine(config, method, world)
    parameters = engine.parameters()
    state = TrainState(
        engine, Ema(parameters, half_life(config.ema_half_life_steps)), config.global_batch_size,
        lengths={one: Ema(parameters, power_function(one)) for one in config.ema_lengths or ()},
        part_weights=PartWeights(config.loss_weights, len(method.parts)),
    )  # fmt: skip
    checkpoints.clean()
    found = checkpoints.newest()
    if found is not None:
        folder, manifest = found
        sources = loader.follow(manifest.mixture, manifest.samples)
        changes = refuse_other_run(
            folder, manifest, facts(state, config, loader),
            told=config.checkpoint.accept_data_change, sources=sources,
        )  # fmt: skip
        state.restore(folder, manifest)
        if world.is_first:
            past = ", which is past total_steps: nothing is left to do"
            is_past = state.step > config.total_steps
            say(f"resumed from {folder}{past if is_past else ''}")
            for line in [*changes, *sources]:
                say(f"  from sample {state.samples} on: {line}")
    elif config.warm_start is not None:
        warm_start(config.warm_start, method, engine)
        state.restart_averages()
    checkpoints.reserve(state.slices())
    return state


def read(steps: Iterator[list[Batch]], state: TrainState) -> list[Batch]:
    """The micro-batches of the next step."""
    fault("data", state.step + 1)
    return next(steps)


def accumulate_gradients(
    state: TrainState,
    micro_batches: Iterable[Batch],
    config: RunConfig,
    method: Method,
    report: Report,
    *,
    tell: Callable[[], None],
) -> Tensor:
    """Gradients of a step's loss; returns this rank's mean loss of each part. `tell` is called
    after each micro-batch, so that a long step is no hang."""
    engine = state.engine
    count = accumulation_steps(config, engine.world.world_size)
    device = engine.world.device
    losses, pace = torch.zeros(len(method.parts), device=device), Pace(device)
    weights = state.part_weights.on(device)
    for number, batch in enumerate(on_device(micro_batches, device), start=1):
        report.samples(batch)
        with engine.autocast():
            of_parts = method.losses(engine.model, batch, seed=config.seed, device=device) / count
        if fault("forward", state.step + 1):
            of_parts = of_parts * math.nan
        engine.backward((weights * of_parts).sum(), final=number == count)
        losses += of_parts.detach()
        pace.wait()
        tell()
    fault("collective", state.step + 1)
    return losses


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
        "samples": state.samples,
        "updates": state.engine.updates,
        "engine": state.engine.name,
        "config": json.loads(config.model_dump_json()),
        "data_fingerprint": loader.fingerprint,
        "mixture": loader.mixture,
        "text_encoder": loader.text_encoder,
        "latents": loader.autoencoder,
    }


def open_engine(config: RunConfig, method: Method, world: World) -> Engine:
    """A recipe's engine around a network of initial values."""
    with torch.device("meta"):
        network = method.network()
    frozen = config.warm_start.freeze_base_steps if config.warm_start else 0
    groups = Groups(method.new_parameters, freeze_base_steps=frozen)
    return build_engine(
        network, config.engine, config.optimizer, world, groups=groups, seed=config.seed
    )


def open_loader(config: RunConfig, world: World) -> Loader:
    """This rank's share of the global order."""
    accumulation_steps(config, world.world_size)
    return world.together(
        lambda: Loader(
            config.data,
            config.method.view,
            config.conditioning,
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.micro_batch_size,
            rank=world.rank,
            world_size=world.world_size,
            latents=config.method.cached_latents,
        )
    )


def open_held_out(config: RunConfig, method: Method, loader: Loader, world: World) -> HeldOut:
    """The held-out samples of a recipe, if it measures any."""
    settings, reader = config.held_out, None
    if settings is not None:
        open_one = partial(
            held_out_reader,
            config.data,
            settings.sources,
            config.method.view,
            config.conditioning,
            seed=config.seed,
            samples=settings.samples,
            encoder=loader.text_encoder,
            latents=config.method.cached_latents,
            autoencoder=loader.autoencoder,
        )
        reader = world.together(open_one)
    return HeldOut(
        settings,
        method,
        reader,
        world,
        seed=config.seed,
        micro_batch_size=config.micro_batch_size,
        total_steps=config.total_steps,
    )


def watched(config: RunConfig, method: Method) -> Watched:
    """What a report tells of a run."""
    return Watched(
        name=config.name,
        engine=config.engine.kind,
        precision=config.engine.precision,
        parts=method.parts,
        total_steps=config.total_steps,
        global_batch_size=config.global_batch_size,
        tflop_per_sample=lambda: training_tflop(method),
        metrics=config.metrics,
        data=config.data,
        samples=config.samples,
    )


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
