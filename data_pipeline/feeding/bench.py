"""How fast a machine loads what a recipe asks for, and where the time goes."""

import os
import time
from itertools import islice

import psutil
from pydantic import Field
from rich.table import Table

from data_pipeline import stages
from data_pipeline.errors import ConfigError
from data_pipeline.feeding.config import CachedLatents, Conditioning, DataConfig
from data_pipeline.feeding.loader import Loader
from data_pipeline.progress import progress
from data_pipeline.pyramid import Pyramid
from data_pipeline.strict import Strict
from data_pipeline.terminal import Terminal


class LoaderSpeed(Strict):
    """What `t2v data bench` prints."""

    samples: int
    workers: int = Field(description="0: the process itself")
    samples_per_second: float
    megabytes_per_second: float = Field(description="of what is stored and read of samples")
    milliseconds_by_stage: dict[str, float] = Field(description="per sample, in one process")
    process_mib: list[float] = Field(description="resident memory of each loading process")
    cores: int
    machine_samples_per_second: float = Field(description="of one process, times the cores")


def bench(
    config: DataConfig,
    pyramid: Pyramid,
    conditioning: Conditioning,
    *,
    seed: int,
    samples: int,
    latents: CachedLatents | None = None,
) -> LoaderSpeed:
    """Load at least `samples` samples in this process, by stage, and again by the workers."""
    if samples < 1:
        raise ConfigError(f"--samples: {samples} is wrong because it is no number; give 1 or more.")

    def loader(workers: int) -> Loader:
        return Loader(
            config.model_copy(update={"num_workers": workers}),
            pyramid,
            conditioning,
            seed=seed,
            global_batch_size=sum(source.weight for source in config.sources),
            micro_batch_size=1,
            rank=0,
            world_size=1,
            latents=latents,
        )

    alone = loader(0)
    steps = -(-samples // alone.accumulation_steps)
    samples = steps * alone.accumulation_steps
    stages.seconds.clear()
    begin = time.perf_counter()
    for _ in progress(alone.steps(0, steps), "one process", steps):
        pass
    alone_seconds = seconds = time.perf_counter() - begin
    spent = {name: 1e3 * stages.seconds[name] / samples for name in stages.STAGES}
    processes = [psutil.Process()]
    memory = [process.memory_info().rss / 2**20 for process in processes]
    if config.num_workers:
        many = loader(config.num_workers)
        warm_up = config.num_workers  # steps, so that every worker is up before time is taken
        batches = many.steps(0, warm_up + steps)
        for _ in islice(batches, warm_up):
            pass
        begin = time.perf_counter()
        for _ in progress(islice(batches, steps), f"{config.num_workers} workers", steps):
            processes = [psutil.Process(pid) for pid in many.worker_pids]
            memory = [process.memory_info().rss / 2**20 for process in processes]
        seconds = time.perf_counter() - begin
        many.close()
    cores = len(os.sched_getaffinity(0))
    places = [alone.order.place(n) for n in range(samples)]
    stored = sum(alone.sources[p.source].stored_bytes(p.shard, p.row) for p in places)
    return LoaderSpeed(
        samples=samples,
        workers=config.num_workers,
        samples_per_second=samples / seconds,
        megabytes_per_second=stored / seconds / 1e6,
        milliseconds_by_stage=spent,
        process_mib=memory,
        cores=cores,
        machine_samples_per_second=samples / alone_seconds * cores,
    )


def print_speed(speed: LoaderSpeed, gpu_samples_per_second: float) -> None:
    """The tables, and how many GPUs of a given appetite the machine feeds."""
    console = Terminal()
    table = Table("stage", "ms per sample", title="one process")
    for name, milliseconds in speed.milliseconds_by_stage.items():
        table.add_row(name, f"{milliseconds:.2f}")
    console.print(table)
    console.print(
        f"{speed.workers or 'no'} workers: {speed.samples_per_second:.1f} samples/s, "
        f"{speed.megabytes_per_second:.1f} MB/s; "
        f"at most {max(speed.process_mib):.0f} MiB in each loading process."
    )
    console.print(
        f"{speed.cores} cores load about {speed.machine_samples_per_second:.1f} samples/s: enough "
        f"for {speed.machine_samples_per_second / gpu_samples_per_second:.1f} GPUs that take "
        f"{gpu_samples_per_second:.2f} samples/s each."
    )
