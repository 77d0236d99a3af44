"""Runs a function in several processes that form a world, as a launcher would start them."""

import os
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def run_distributed(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    worlds: int = 1,
    timeout_seconds: float = 120,
) -> list[Any]:
    """What `function(*args)` returned in each of `world_size` fresh processes, in rank order.

    They are forks of a server that has done nothing but import. The parent keeps the meeting point,
    so no port is guessed; a failure shows its own traceback. A function that joins more than one
    world calls `next_world` between them.
    """
    stores = [
        dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(worlds)
    ]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["t2v.loop", "torch._dynamo", "tests.training"])
    answers = context.Queue()
    settings = os.environ | {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "WORLD_PORTS": " ".join(str(store.port) for store in stores),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        context.Process(
            target=_run,
            args=(
                rank,
                settings | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                answers,
                function,
                args,
            ),
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, result, failure = answers.get(timeout=timeout_seconds)
            assert failure is None, f"rank {rank}:\n{failure}"
            results[rank] = result
    finally:
        for process in processes:
            process.join(timeout=10 if len(results) == world_size else 0)
            if process.is_alive():
                process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]


def next_world() -> None:
    """Have this process and its peers meet anew."""
    port, *rest = os.environ["WORLD_PORTS"].split()
    os.environ |= {"MASTER_PORT": port, "WORLD_PORTS": " ".join(rest)}


def _run(
    rank: int,
    settings: dict[str, str],
    answers: Any,
    function: Callable[..., Any],
    args: Any,
) -> None:
    os.environ.clear()
    os.environ.update(settings)
    next_world()
    torch.set_num_threads(1)
    try:
        answers.put((rank, function(*args), None))
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
