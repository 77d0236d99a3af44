"""`t2v plan`'s memory beside what training steps really hold at their fullest.

Every recipe trains two steps in processes of its own, and every tensor's storage is counted from
the operation that makes it to its end, as it grows and shrinks: FSDP frees gathered weights by
resizing them. That is what a GPU's allocator would be asked for; what the plan adds for CUDA itself
is left out on both sides, and so are gloo's own copies. Of several ranks the fullest one counts.
"""

import argparse
import json
import os
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.train_step import hardware, noise_batch
from t2v.engine.world import World, join_world
from t2v.loop import open_engine
from t2v.plan.footprint import measure
from t2v.plan.memory import memory
from t2v.recipe.recipe import RunConfig, load_config, method_of
from t2v.train.ema import Ema, half_life

ROOT = Path(__file__).parent.parent
MIB = 2**20
# Small enough for a CPU, large enough that what a plan leaves out does not count.
SMALL = {
    "method.pyramid.clip_size": "[16, 96, 96]",
    "method.pyramid.patch_size": "[4, 24, 24]",
    "method.model.token_size": "[1, 4, 4]",
    "method.model.token_dim": "256",
    "method.model.num_latents": "64",
    "method.model.latent_dim": "384",
    "method.model.token_head_dim": "32",
    "method.model.latent_head_dim": "64",
    "method.model.conditioning_dim": "256",
    "method.model.levels_per_block": "[1, 1, 2, 3]",
    "engine.precision": "fp32",
    "engine.compile": "false",
}
WIDE = {"method.model.latent_dim": "512", "optimizer.name": "lamb"}
DEEP = {"global_batch_size": "8", "micro_batch_size": "4", "optimizer.name": "adamw"}
ONE = {"global_batch_size": "2", "micro_batch_size": "2", "optimizer.name": "adamw"}
SPLIT = {
    **(ONE | WIDE),
    **{"engine.kind": "zero", "optimizer.name": "adamw", "micro_batch_size": "1"},
}
# With LAMB's update as the fullest moment, the way of adding up would not show.
TWICE = {"global_batch_size": "4", "micro_batch_size": "1", "optimizer.name": "adamw"}


@dataclass(frozen=True)
class Case:
    """A recipe and the ranks it trains on."""

    name: str
    ranks: int
    changes: dict[str, str]


CASES = (
    Case("wide, LAMB", 1, ONE | WIDE | {"engine.kind": "single"}),
    Case("deep, large batch", 1, DEEP | {"engine.kind": "single"}),
    Case(
        "deep, recomputed",
        1,
        DEEP | {"engine.kind": "single", "engine.activation_checkpointing": "blocks"},
    ),
    Case(
        "deep, selective",
        1,
        DEEP | {"engine.kind": "single", "engine.activation_checkpointing": "selective"},
    ),
    Case("deep, FSDP", 2, DEEP | {"engine.kind": "fsdp"}),
    Case("wide, FSDP", 2, ONE | WIDE | {"engine.kind": "fsdp", "micro_batch_size": "1"}),
    Case("wide, FSDP", 4, ONE | WIDE | {"engine.kind": "fsdp", "global_batch_size": "8"}),
    *(
        Case(f"wide, ZeRO stage {stage}", 2, SPLIT | {"engine.zero_stage": str(stage)})
        for stage in (1, 2, 3)
    ),
    *(
        Case(
            f"wide, FSDP, accumulated {how}",
            2,
            ONE | WIDE | TWICE | {"engine.kind": "fsdp", "engine.accumulate": how},
        )
        for how in ("whole", "shards")
    ),
    Case("wide, ZeRO stage 2, accumulated", 2, SPLIT | TWICE | {"engine.zero_stage": "2"}),
)


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations have made and that still live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._known: dict[int, weakref.ref] = {}
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> "LiveBytes":
        live = self

        def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            live._resize(storage, size)
            if storage._cdata in live._known:
                live._count(storage)
            return storage

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *details: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*details)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        # A view of something that no operation has made: a buffer within a collective.
        for tensor in () if func.is_view else tree_iter(made):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return made

    def _note(self, tensor: Tensor) -> None:
        local = getattr(tensor, "_local_tensor", tensor)
        if local.device.type == "meta":
            return
        storage = local.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return

        def forget(_: object) -> None:
            self.now -= self._sizes.pop(key)
            del self._known[key]

        self._known[key] = weakref.ref(storage, forget)
        self._count(storage)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.now += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.now)


def recipe(case: Case) -> RunConfig:
    """ucf101_s made small, with a case's changes."""
    changes = SMALL | case.changes
    return load_config(
        ROOT / "configs" / "ucf101_s.yaml", [f"{key}={value}" for key, value in changes.items()]
    )


def train(rank: int, case: Case, port: int, answers: Any) -> None:
    """Two steps of a rank under watch; its peak goes to `answers`."""
    torch.set_num_threads(1)
    if case.ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(case.ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    config = recipe(case)
    with join_world(config.engine) as world, LiveBytes() as live:
        take_steps(config, world)
        answers.put((rank, live.peak))


def take_steps(config: RunConfig, world: World) -> None:
    """Two training steps as the loop takes them."""
    method = method_of(config)
    engine = open_engine(config, method, world)
    ema = Ema(engine.parameters(), half_life(config.ema_half_life_steps))
    count = config.global_batch_size // (config.micro_batch_size * world.world_size)
    for _ in range(2):
        for number in range(count):
            batch = noise_batch(config, config.micro_batch_size)
            losses = method.losses(engine.model, batch, seed=config.seed, device=world.device)
            engine.backward(losses.sum() / count, final=number == count - 1)
        engine.update({"base": 1e-5, "new": 1e-5}, float(engine.gradient_norm()))
        ema.update(engine.updates)


def measured(case: Case) -> int:
    """The fullest moment of any rank, in bytes."""
    context = multiprocessing.get_context("spawn")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = context.Queue()
    ranks = [
        context.Process(target=train, args=(rank, case, store.port, answers))
        for rank in range(case.ranks)
    ]
    for process in ranks:
        process.start()
    peaks = [answers.get(timeout=600)[1] for _ in ranks]
    for process in ranks:
        process.join()
    return max(peaks)


def compare(case: Case) -> dict[str, Any]:
    """Forecast and measurement of a case, in MiB."""
    config = recipe(case)
    told = memory(config, measure(config), case.ranks)
    forecast = (told.total - told.reserve) * 2**30
    peak = measured(case)
    return {
        "case": case.name,
        "ranks": case.ranks,
        "forecast_mib": forecast / MIB,
        "measured_mib": peak / MIB,
        "forecast_over_measured": forecast / peak,
        "parts_gib": told.model_dump(exclude={"total", "reserve"}),
        "recipe": asdict(case)["changes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=ROOT / "benchmarks" / "results", type=Path)
    options = parser.parse_args()
    rows = [compare(case) for case in track(CASES, "memory", transient=True)]
    table = Table("recipe", "ranks", "forecast MiB", "measured MiB", "forecast / measured")
    for row in rows:
        table.add_row(
            row["case"],
            str(row["ranks"]),
            f"{row['forecast_mib']:.1f}",
            f"{row['measured_mib']:.1f}",
            f"{row['forecast_over_measured']:.3f}",
        )
    Console().print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": "memory",
        "hardware": hardware(torch.device("cpu")),
        "torch": torch.__version__,
        "cases": rows,
    }
    file = options.out / "memory_cpu.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{file}: written.")


if __name__ == "__main__":
    main()
