"""What a real SLURM is told of jobs that fail, and what of a user's shell never reaches them."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from t2v.recipe.recipe import dump_config
from tests.slurm_cluster import SlurmCluster, missing, slurm_cluster
from tests.test_loop import config_of, dataset, status_of
from tests.test_slurm_launch import ROOT, launch, site, wait_until_none_queues

__all__ = ["dataset"]  # a fixture

# Reading it takes long enough to ask only once.
REASON = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.dist,
    pytest.mark.timeout(900),  # on a machine that may be busy
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with slurm_cluster() as running:
        yield running


def recipe_of(dataset: Path, home: Path, name: str = "run", **changes) -> str:
    config = config_of(dataset, home / name, engine={"kind": "fsdp"}, **changes)
    (home / f"{name}.yaml").write_text(dump_config(config))
    return str(home / f"{name}.yaml")


def test_a_rank_that_is_killed_is_137_and_its_own_rank_is_named(cluster, dataset, tmp_path):
    environment = {"OMP_NUM_THREADS": "1", "T2V_FAULT": "forward:1:3:kill"}
    profile = site(tmp_path, environment=environment, restart_limit=0)
    where = ["--cluster", profile, "--nodes", "2", "--submit"]
    number = launch(cluster, "launch", recipe_of(dataset, tmp_path), *where)
    logs = wait_until_none_queues(cluster, tmp_path)
    assert cluster.job(number)["ExitCode"] == "137:0", logs
    assert "| rank that failed first | 1 on" in (tmp_path / "run" / "failure.md").read_text()
    assert logs.count("rank 1 on ") >= 2  # both nodes say which rank died of what
    assert status_of(tmp_path / "run")["reason"].startswith("rank 1 on")


def test_starts_that_fail_before_a_rank_owns_the_run_end_the_job(cluster, dataset, tmp_path):
    real = Path(sys.executable).with_name("t2v")
    broken = tmp_path / "programs" / "t2v"
    broken.parent.mkdir()
    broken.write_text(f'#!/bin/sh\n[ "$1" = node ] && exit 1\nexec {real} "$@"\n')
    broken.chmod(0o755)
    setup = [f"export PATH={broken.parent}:$PATH"]
    profile = site(tmp_path, environment={"OMP_NUM_THREADS": "1"}, setup=setup)
    where = ["--cluster", profile, "--nodes", "1", "--submit"]
    number = launch(cluster, "launch", recipe_of(dataset, tmp_path), *where)
    while cluster.wait_for(number, "FAILED", "RUNNING", seconds=400)["JobState"] != "FAILED":
        cluster.wait_for(number, "FAILED", "PENDING", seconds=400)
    assert cluster.job(number)["Restarts"] == "2"
    logs = wait_until_none_queues(cluster, tmp_path)
    assert "not requeued because three starts in a row ended alike: training with 1" in logs


def test_nothing_of_shells_and_login_files_arrives(cluster, dataset, tmp_path):
    (tmp_path / "tell").write_text('env -0 >"told"\n')
    environment = {"OMP_NUM_THREADS": "1", "BASH_ENV": str(tmp_path / "tell")}
    where = ["--cluster", site(tmp_path, environment=environment), "--nodes", "1", "--submit"]
    hostile = {"FROM_SHELL": "1", "BASH_FUNC_srun%%": "() { touch forged; }", "LD_PRELOAD": ""}
    launch(cluster, "launch", recipe_of(dataset, tmp_path), *where, **hostile)
    logs = wait_until_none_queues(cluster, tmp_path)
    assert status_of(tmp_path / "run")["state"] == "done", logs
    told = dict(e.split("=", 1) for e in (tmp_path / "told").read_text().split("\0") if e)
    names = ("FROM_SHELL", "FROM_LOGIN", "T2V_FAULT", "GLOO_SOCKET_IFNAME", "BASH_FUNC_t2v%%")
    assert not set(names) & set(told)
    assert told["PYTHONPATH"] == str(ROOT)  # the profile's
    assert not list(tmp_path.rglob("forged"))


def test_a_chain_ends_right_and_stops_where_one_fails(cluster, dataset, tmp_path):
    first, second, third = (recipe_of(dataset, tmp_path, name) for name in "abc")
    environment = {"OMP_NUM_THREADS": "1"}
    profile = site(tmp_path, environment=environment, restart_limit=0)
    where = ["--cluster", profile, "--nodes", "1", "--submit"]
    chain = [f"{second} name=b", "--then", f"{third} name=c"]
    launch(cluster, "launch", first, *where, "--then", *chain)
    logs = wait_until_none_queues(cluster, tmp_path)
    ends = [json.loads((tmp_path / n / "status.json").read_text()) for n in "abc"]
    assert [end["state"] for end in ends] == ["done"] * 3, logs
    assert ends[0]["updated"] < ends[1]["updated"] < ends[2]["updated"]
    d, e, f = (recipe_of(dataset, tmp_path, name) for name in "def")
    broken = f"{e} name=e 'data.sources=[{{path: {tmp_path}/none}}]'"
    launch(cluster, "launch", d, *where, "--then", broken, "--then", f"{f} name=f")
    wait_until_none_queues(cluster, tmp_path)
    assert status_of(tmp_path / "d")["state"] == "done"
    assert not (tmp_path / "f" / "status.json").exists()
