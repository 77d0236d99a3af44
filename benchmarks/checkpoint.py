"""Saves and resumes of a 0.18 B-parameter HPDM split over two processes, on one machine.

Three ways take turns: ours beside training (asynchronous), ours waiting (synchronous), and each
rank's plain `torch.save` of the same tensors with an fsync, which proves nothing. The stall is how
long the training loop stands still: in the call that saves, and before the update that must not
come too early. Between the two lie the gradients of a step; how much longer they take beside a save
is told too, for here training and saving share a CPU. A resume reads, proves and restores the
newest step.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from rich.console import Console
from rich.table import Table

from benchmarks.train_step import noise_batch
from data_pipeline.feeding.mixture import Mixture
from t2v.checkpoint.checkpoints import Checkpoints
from t2v.engine.world import World, join_world
from t2v.loop import open_engine
from t2v.recipe.recipe import RunConfig, load_config, method_of
from t2v.train.ema import Ema, half_life
from t2v.train.state import TrainState

ROOT = Path(__file__).parent.parent
RANKS = 2
OVERRIDES = [
    *("engine={kind: fsdp, precision: fp32}", "optimizer.name=adamw"),
    *("global_batch_size=2", "micro_batch_size=1"),
    # All the weights and few activations: a step of seconds on a CPU.
    *("method.pyramid.clip_size=[16,64,64]", "method.pyramid.patch_size=[4,16,16]"),
]


def fresh_state(config: RunConfig, world: World) -> TrainState:
    engine = open_engine(config, method_of(config), world)
    averages = Ema(engine.parameters(), half_life(config.ema_half_life_steps))
    return TrainState(engine, averages, config.global_batch_size)


def timed(world: World, function: Callable[[], Any]) -> float:
    """Seconds of a call that all ranks begin together, of the slowest rank."""
    world.gather(None)
    started = time.perf_counter()
    function()
    return max(world.gather(time.perf_counter() - started))


def gradients(state: TrainState, config: RunConfig) -> None:
    """Those of one step, and forget them."""
    batch = noise_batch(config, config.micro_batch_size)
    losses = method_of(config).losses(
        state.engine.model, batch, seed=config.seed, device=state.engine.world.device
    )
    state.engine.backward(losses.sum(), final=True)
    state.engine.forget_gradients()


def plain_save(state: TrainState, path: Path) -> None:
    """What a loop without a checkpoint protocol does."""
    with path.open("wb") as file:
        torch.save({name: piece.part for name, piece in state.slices().items()}, file)
        file.flush()
        os.fsync(file.fileno())


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds of every way and repeat; the same on all ranks."""
    config = load_config(ROOT / "configs" / "ucf101_s.yaml", OVERRIDES)
    seconds: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seconds.setdefault(name, []).append(value)

    with join_world(config.engine) as world:
        state = fresh_state(config, world)
        slices = state.slices()
        facts = {
            "updates": 1,
            "engine": state.engine.name,
            "config": json.loads(config.model_dump_json()),
            "samples": 0,
            "data_fingerprint": "none",
            "mixture": Mixture(parts=()),
            "text_encoder": None,
        }
        ways = {
            asynchronous: Checkpoints(
                folder / str(asynchronous),
                config.checkpoint.model_copy(update={"asynchronous": asynchronous, "keep_last": 2}),
                world,
            )
            for asynchronous in (True, False)
        }
        beside, waiting = ways[True], ways[False]
        for checkpoints in ways.values():
            checkpoints.clean()
            checkpoints.reserve(slices)
        gradients(state, config)  # the first allocate
        for repeat in range(repeats):
            step = {"step": repeat + 1}
            note("gradients alone", timed(world, lambda: gradients(state, config)))
            beside.save(slices, facts | step)
            note("gradients beside a save", timed(world, lambda: gradients(state, config)))
            beside.wait_for_copy()
            beside.finish()
            (saved,) = beside.news()
            note("asynchronous stall", max(world.gather(saved.stall_seconds)))
            note("asynchronous commit", max(world.gather(saved.seconds)))
            note(
                "synchronous stall", timed(world, lambda at=step: waiting.save(slices, facts | at))
            )
            path = folder / f"plain-{world.rank}.pt"
            note("torch.save stall", timed(world, lambda at=path: plain_save(state, at)))

            def resume(checkpoints: Checkpoints = waiting) -> None:
                found = checkpoints.newest()
                assert found is not None
                state.restore(*found)

            note("resume", timed(world, resume))
            restore = waiting.newest()
            assert restore is not None
            note("resume, bytes unproved", timed(world, lambda at=restore: state.restore(*at)))
        parameters = sum(value.numel() for value in state.engine.model.parameters())
        size = sum(s.part.numel() * s.part.itemsize for s in slices.values())
        return {
            "parameters": parameters,
            "checkpoint_gib": sum(world.gather(size)) / 2**30,
            "seconds": seconds,
        }


def run_rank(rank: int, port: int, folder: str, repeats: int, answers: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    result = measure(Path(folder), repeats)
    if rank == 0:
        answers.put(result)


def run(folder: str, repeats: int) -> dict[str, Any]:
    """The measurement in two fresh processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(run_rank, (port, folder, repeats, answers), nprocs=RANKS)
    return answers.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where to write; a temporary folder by default")
    parser.add_argument("--out", default=ROOT / "benchmarks" / "results", type=Path)
    options = parser.parse_args()
    folder = tempfile.mkdtemp(dir=options.folder)
    try:
        result = run(folder, options.repeats)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = result["seconds"]
    synchronous = statistics.median(seconds["synchronous stall"])
    table = Table("what", "median s", "least", "most", "of synchronous stall")
    for name, values in seconds.items():
        middle = statistics.median(values)
        table.add_row(
            name, f"{middle:.2f}", f"{min(values):.2f}", f"{max(values):.2f}",
            f"{middle / synchronous:.1%}",
        )  # fmt: skip
    console = Console()
    console.print(
        f"{result['parameters'] / 1e6:.0f} M parameters, {result['checkpoint_gib']:.2f} GiB, "
        f"{RANKS} processes"
    )
    console.print(table)
    record = {
        "benchmark": "checkpoint",
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "ranks": RANKS,
        "load_average_of_last_minute": os.getloadavg()[0],
        **result,
        "stall_of_synchronous": statistics.median(seconds["asynchronous stall"]) / synchronous,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    file = (
        options.out / f"checkpoint-{platform.machine().replace('_', '-')}-{os.cpu_count()}cpu.json"
    )
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{file}: written.")


if __name__ == "__main__":
    main()
