"""Which settings finish first: every engine setting that fits, ranked by its forecast."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from data_pipeline.errors import ConfigError
from data_pipeline.printable import say
from t2v.plan.communication import communication
from t2v.plan.footprint import Footprint, measure
from t2v.plan.memory import memory
from t2v.plan.plan import (
    TYPICAL,
    assumed_peak,
    compute_per_sample,
    refuse_impossible_site,
)
from t2v.recipe.recipe import RunConfig

MOST_MICRO_BATCH = 64
SHOWN = 8


@dataclass(frozen=True)
class Choice:
    """Settings that differ from the recipe's, as overrides, and what they lead to."""

    changes: dict[str, object]
    step_seconds: float
    communication_seconds: float
    memory_gib: float


def tune(
    config: RunConfig, *, gpus: int, gpu_memory_gib: float, gb_per_second: float
) -> list[Choice]:
    """All that fits, fastest first; of equals, what changes least. A step is its computing at a
    typical utilisation and its communication, one after the other."""
    refuse_impossible_site(config, gpus, gpu_memory_gib, gb_per_second)
    if config.global_batch_size % gpus:
        raise ConfigError(
            f"global_batch_size: {config.global_batch_size} is wrong because {gpus} GPUs do not "
            "divide it; change one of them."
        )
    footprint = measure(config)
    found = []
    for changes, changed in candidates(config, gpus):
        needed = memory(changed, footprint, gpus).total
        if needed <= gpu_memory_gib:
            found.append(Choice(changes, *seconds(changed, footprint, gpus, gb_per_second), needed))
    if not found:
        raise ConfigError(
            f"--tune: nothing fits {gpus} GPUs of {gpu_memory_gib:g} GiB; use more of them."
        )
    return sorted(found, key=lambda c: (round(c.step_seconds, 2), len(c.changes), c.memory_gib))


def seconds(
    config: RunConfig, footprint: Footprint, gpus: int, gb_per_second: float
) -> tuple[float, float]:
    """(seconds of a step, those of them that are communication)."""
    spent = compute_per_sample(config, footprint).spent * config.global_batch_size
    computing = spent / (gpus * assumed_peak(config) * TYPICAL)
    travelling = communication(config, footprint, gpus, gb_per_second).seconds
    return computing + travelling, travelling


def candidates(config: RunConfig, gpus: int) -> Iterator[tuple[dict[str, object], RunConfig]]:
    """(what is changed, the recipe so changed) of every combination that divides evenly."""
    share = config.global_batch_size // gpus
    sizes = [n for n in range(1, min(share, MOST_MICRO_BATCH) + 1) if share % n == 0]
    knobs: dict[str, list] = {
        "micro_batch_size": sizes,
        "activation_checkpointing": ["none", "selective", "blocks"],
    }
    if config.engine.kind == "fsdp":
        replicas = [n for n in range(1, gpus + 1) if gpus % n == 0]
        knobs |= {
            "reshard_after_forward": [False, True],
            "accumulate": ["whole", "shards"],
            "dp_replicate": replicas,
        }
    for values in product(*knobs.values()):
        chosen = dict(zip(knobs, values, strict=True))
        size = chosen.pop("micro_batch_size")
        try:
            engine = type(config.engine).model_validate(config.engine.model_dump() | chosen)
        except ValueError:
            continue  # the engine lacks it
        changed = config.model_copy(update={"engine": engine, "micro_batch_size": size})
        changes = {
            f"engine.{name}": value
            for name, value in chosen.items()
            if value != getattr(config.engine, name)
        }
        if size != config.micro_batch_size:
            changes["micro_batch_size"] = size
        yield changes, changed


def print_choices(choices: list[Choice]) -> None:
    """The fastest few, a line each, whose end is what to give `t2v train` besides the recipe."""
    for choice in choices[:SHOWN]:
        told = " ".join(f"{name}={str(value).lower()}" for name, value in choice.changes.items())
        say(
            f"{choice.step_seconds:9,.2f} s per step ({choice.communication_seconds:,.2f} s of it "
            f"communication)  {choice.memory_gib:6.1f} GiB  {told or 'as it is'}"
        )
