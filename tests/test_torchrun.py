"""How ranks are started: on which CPUs, by which interface, and for a site that wants to know."""

import json
import os

import pytest

from cluster import torchrun
from cluster.node import NodeJob, is_done, tell_site
from cluster.torchrun import Place, address_of, launcher_environment, matching, own_interface
from data_pipeline.cpus import usable_cpus
from data_pipeline.errors import ConfigError

NAMES = ["lo", "eth0", "eth1", "ib0", "docker0"]


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        *[("", None), ("eth", "eth0"), ("=eth1", "eth1"), ("=eth", None), ("ib,eth", "eth0")],
        *[("^eth", "ib0"), ("^=eth0,ib0", "eth1"), ("nothing", None), ("ib0:1", "ib0")],
    ],
)
def test_gloo_takes_the_interface_that_nccl_would(rule, name):
    assert matching(rule, NAMES) == name


def test_a_node_takes_the_way_to_the_first_one_and_never_its_own_loopback(monkeypatch):
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    found = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.2"], "ib0": ["10.1.0.2"]}
    monkeypatch.setattr(torchrun, "addresses", lambda: found)
    ways = {"n1": [], "n2": ["10.1.0.2"]}  # n1 is this very host, by Debian's hosts file
    monkeypatch.setattr(torchrun, "route_to", lambda host: ways.get(host, []))
    monkeypatch.setenv("T2V_NODE_NAMES", "n1 n2")
    place = Place(nnodes=2, rdzv_endpoint="n1:29400")
    assert own_interface(place) == "ib0"
    monkeypatch.setenv("T2V_NODE_NAMES", "")
    assert own_interface(place) == "eth0"  # the first that leads outward
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib")
    assert own_interface(place) == "ib0"
    with pytest.raises(ConfigError, match="eth7: is no interface of this node"):
        address_of("eth7")


def test_threads_are_those_that_the_job_may_use_by_its_ranks(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})
    try:
        assert launcher_environment(Place())["OMP_NUM_THREADS"] == "1"
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, mine)
    (tmp_path / "membership").write_text("0::/job\n")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "cpu.max").write_text("50000 100000\n")
    allowed = {"cgroups": tmp_path, "membership": tmp_path / "membership"}
    assert usable_cpus(**allowed) == 1
    (tmp_path / "job" / "cpu.max").write_text("max 100000\n")
    assert usable_cpus(**allowed) == len(mine)


def test_a_site_is_told_how_an_attempt_ended_and_cannot_change_it(tmp_path, capfd):
    status = {"state": "failed", "exit_code": 70, "reason": "no finite \x1b[31m gradient"}
    (tmp_path / "status.json").write_text(json.dumps(status))
    said = "$T2V_STATE $T2V_EXIT_CODE $T2V_DECISION $T2V_REASON"
    tell_site(f"sh -c 'echo \"{said}\"'", tmp_path)
    assert capfd.readouterr().out == "failed 70 stop no finite \\x1b[31m gradient\n"
    tell_site("/no/such/program", tmp_path)
    tell_site("false", tmp_path)
    assert capfd.readouterr().out.count("on_end: ") == 2


def test_a_pod_that_is_made_anew_after_the_end_waits_for_nobody(tmp_path):
    job = NodeJob(run_dir=tmp_path, train_arguments=("r.yaml",), rdzv_id="tiny-ab12")
    assert not is_done(job)
    for told, done in (
        ({"state": "done", "job_id": "tiny-ab12"}, True),
        ({"state": "done", "job_id": "tiny-cd34"}, False),  # another recipe's
        ({"state": "running", "job_id": "tiny-ab12"}, False),
    ):
        (tmp_path / "status.json").write_text(json.dumps(told))
        assert is_done(job) == done
