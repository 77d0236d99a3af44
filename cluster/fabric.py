"""How fast the nodes of a job exchange data, all together and in pairs that tell who is slow."""

import statistics
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CPU_BYTES, GPU_BYTES, REPEATS = 4 << 20, 256 << 20, 5


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


def measure(
    store: dist.Store, rank: int, world_size: int, *, ranks_per_node: int, timeout_seconds: float
) -> dict[str, float]:
    """Bytes per second that a rank saw: `all` together, and `A-B` for each pair of nodes it was in.

    What is summed is checked: a fabric that returns wrong sums is worse than a slow one.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank % ranks_per_node)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    try:
        values = torch.ones(_bytes(device) // 4, device=device)
        rates = {"all": _all_reduce(values, world_size, None)}
        rates |= _pairs(values, rank, world_size // ranks_per_node, ranks_per_node)
    finally:
        dist.destroy_process_group()
    return rates


def _pairs(values: Tensor, rank: int, nodes: int, ranks_per_node: int) -> dict[str, float]:
    rates = {}
    for pairs in pairings(nodes):
        groups = {
            pair: dist.new_group(
                [node * ranks_per_node + local for node in pair for local in range(ranks_per_node)]
            )
            for pair in pairs
        }
        for pair, group in groups.items():
            if rank // ranks_per_node in pair:
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


def _bytes(device: torch.device) -> int:
    return GPU_BYTES if device.type == "cuda" else CPU_BYTES
