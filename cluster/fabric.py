"""How fast the nodes of a job exchange data, all together and in pairs that tell who is slow.

The launcher starts this as it starts training, and ranks join the same groups: what is tried is the
very path that training takes.
"""

import json
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from t2v.engine.world import World, join_world
from t2v.recipe.recipe import load_config

CPU_BYTES, GPU_BYTES, REPEATS = 4 << 20, 256 << 20, 5


def main(folder: str, seconds: str, ranks_per_node: str, config: str, *overrides: str) -> None:
    """One rank: its rates, or what went wrong, into a file of the folder."""
    engine = load_config(config, list(overrides)).engine
    engine = engine.model_copy(update={"collective_timeout_seconds": float(seconds)})
    with join_world(engine) as world:
        deadline = timedelta(seconds=float(seconds))
        rates = measure(world, ranks_per_node=int(ranks_per_node), deadline=deadline)
        world.gather(rates)  # none leaves while another still measures
        on_gpu = float(world.device.type == "cuda")
        told = json.dumps(rates | {"on_gpu": on_gpu})
        (Path(folder) / f"rank-{world.rank:05d}.json").write_text(told, encoding="utf-8")


def pairings(count: int) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs in which every one of three or more has two different partners."""
    if count < 2:
        return []
    if count == 2:
        return [[(0, 1)]]
    ring = [(first, (first + 1) % count) for first in range(count)]
    rounds = [ring[0 : count - 1 : 2], ring[1:count:2]]
    if count % 2:  # the pair that closes an odd ring meets both ends of the others
        rounds = [ring[0 : count - 1 : 2], ring[1 : count - 1 : 2], [ring[-1]]]
    return rounds


def slow_members(rates: dict[tuple[int, int], float], *, least_share: float = 0.5) -> list[int]:
    """Who is slow with every partner: below a share of what its peers reach at their best.

    Of two nodes alone, none can be told from the other.
    """
    best: dict[int, float] = {}
    for pair, rate in rates.items():
        for member in pair:
            best[member] = max(best.get(member, 0.0), rate)
    if len(best) < 3:
        return []
    usual = statistics.median(best.values())
    return sorted(member for member, rate in best.items() if rate < least_share * usual)


def measure(world: World, *, ranks_per_node: int, deadline: timedelta) -> dict[str, float]:
    """Bytes per second that a rank saw: `all` together, and `A-B` for each pair of nodes it was in.

    What is summed is checked: a fabric that returns wrong sums is worse than a slow one.
    """
    if world.world_size == 1:
        return {}
    size = GPU_BYTES if world.device.type == "cuda" else CPU_BYTES
    values = torch.ones(size // 4, device=world.device)
    rates = {"all": _all_reduce(values, world.world_size, None)}
    for pairs in pairings(world.world_size // ranks_per_node):
        groups = {
            pair: dist.new_group(
                [node * ranks_per_node + local for node in pair for local in range(ranks_per_node)],
                timeout=deadline,
            )
            for pair in pairs
        }
        for pair, group in groups.items():
            if world.rank // ranks_per_node in pair:
                rate = _all_reduce(values, 2 * ranks_per_node, group)
                rates["-".join(map(str, pair))] = rate
        dist.barrier()
    return rates


def _all_reduce(values: Tensor, members: int, group: Any) -> float:
    """Bytes per second of the ring's bus: 2 (n - 1) / n times the bytes summed."""
    seconds = []
    for _ in range(1 + REPEATS):
        values.fill_(1.0)
        dist.barrier(group)
        started = time.perf_counter()
        dist.all_reduce(values, group=group)
        wrong = float((values != members).sum())  # also waits for the GPU
        seconds.append(time.perf_counter() - started)
        if wrong:
            raise ArithmeticError(f"{wrong:.0f} sums of {members} ones are wrong")
    best = min(seconds[1:])
    return 2 * (members - 1) / members * values.numel() * 4 / best


if __name__ == "__main__":
    main(*sys.argv[1:])
