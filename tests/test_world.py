"""What one rank knows, all ranks know."""

import pytest

from data_pipeline.errors import ConfigError, DataError, StorageError
from t2v.engine.config import EngineConfig
from t2v.engine.world import join_world
from tests.distributed import run_distributed


def fail_on(world, rank: int, error: Exception):
    def function() -> str:
        if world.rank == rank:
            raise error
        return f"rank {world.rank}"

    return function


def agree() -> list:
    """What a rank sees of values, flags and errors of two ranks."""
    seen = []
    with join_world(EngineConfig(kind="fsdp")) as world:
        seen.append(world.gather(world.rank * 10))
        seen.append((world.any(world.rank == 1), world.any(False)))
        seen.append(world.on_all(lambda: world.rank + 5))
        seen.append(world.on_first(lambda: f"from rank {world.rank}"))
        for rank, error in ((1, DataError("bad clip")), (0, OSError(28, "No space", "/disk"))):
            try:
                world.on_all(fail_on(world, rank, error))
            except (DataError, StorageError) as failure:
                seen.append(f"{type(failure).__name__}: {failure}")
        try:
            world.on_first(fail_on(world, 0, ConfigError("no")))
        except ConfigError as failure:
            seen.append(str(failure))
    return seen


@pytest.mark.dist
def test_ranks_agree_on_values_flags_and_errors():
    for seen in run_distributed(agree, 2):
        assert seen == [
            [0, 10],
            (True, False),
            [5, 6],
            "from rank 0",
            "DataError: bad clip",
            "StorageError: /disk: cannot be used because no space; check disk and rights.",
            "no",
        ]


def test_one_process_agrees_with_itself():
    with join_world(EngineConfig(kind="single")) as world:
        assert world.gather(3) == [3]
        assert world.any(True)
        assert world.on_first(lambda: 4) == 4
        with pytest.raises(StorageError, match="/disk: cannot be used because no space"):
            world.on_all(fail_on(world, 0, OSError(28, "No space", "/disk")))


@pytest.mark.parametrize("environment", [{}, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}])
def test_fsdp_alone_needs_no_launcher(monkeypatch, environment):
    """`accelerate launch` names a meeting point but no rank to a process that is alone."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with join_world(EngineConfig(kind="fsdp")) as world:
        assert (world.rank, world.world_size) == (0, 1)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    message = "LOCAL_RANK: 1 is wrong because 1 GPUs are visible"
    with pytest.raises(ConfigError, match=message), join_world(EngineConfig(kind="single")):
        pass


@pytest.mark.parametrize(
    ("kind", "environment", "message"),
    [
        ("single", {"WORLD_SIZE": "2"}, "'single' is wrong because WORLD_SIZE is 2; use 'fsdp'"),
        ("fsdp", {"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR: missing from the environment"),
        ("fsdp", {"WORLD_SIZE": "2"}, "RANK: missing from the environment"),
        ("fsdp", {"WORLD_SIZE": "2", "RANK": "2"}, "RANK: 2 is wrong because WORLD_SIZE is 2"),
        ("fsdp", {"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' is wrong"),
    ],
)
def test_environment_that_tells_no_world_is_refused(monkeypatch, kind, environment, message):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), join_world(EngineConfig(kind=kind)):
        pass
