"""Nodes that check each other before a run: what is found, who is at fault, and who is named."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cluster.bad_nodes import BROKEN_DAYS, note_bad_nodes, read_bad_nodes
from cluster.checks import Check, failed
from cluster.driver import Gpu, Promise, parse_csv, visible
from cluster.fabric import measure, pairings, slow_members
from cluster.gpus import FIELDS, check_gpus
from cluster.judgement import (
    Judgement,
    NodeReport,
    judge,
    of_the_silent,
    own_exit_code,
    with_fabric,
)
from cluster.node_checks import (
    check_data,
    check_disk,
    check_limits,
    check_node,
    check_run_folder,
    loader_bytes,
    missing_bytes,
    skew_verdict,
)
from cluster.preflight import check_alone, check_together
from cluster.rendezvous import Meeting
from data_pipeline.errors import InputMissing
from data_pipeline.feeding.config import NoConditioning
from t2v.cli import main
from t2v.engine.config import EngineConfig
from t2v.engine.world import join_world
from t2v.recipe.recipe import dump_config
from tests.distributed import run_distributed
from tests.test_loop import config_of, dataset
from tests.tiny import tiny_config

__all__ = ["dataset"]  # a fixture

GOOD = Check("GPUs", "ok", "8 x H100")
BUSY = Check("GPUs", "failed", "GPU 3 holds 70000 of 81559 MiB")
NO_DATA = Check("data", "failed", "s3://bucket/videos: no such dataset", 66)
NONE = Promise()
SMI = """\
0, GPU-aa, NVIDIA H100 80GB HBM3, 81559, 1, 0, 570.86.15, 0
1, GPU-bb, NVIDIA H100 80GB HBM3, 81559, {used}, {busy}, 570.86.15, {errors}
"""


def told(**state: object) -> list[Gpu]:
    """The two GPUs by their driver."""
    return parse_csv(SMI.format(**{"used": 1, "busy": 0, "errors": 0} | state), FIELDS)


def report(node: str, *checks: Check, clock: float = 0.0, rates=None) -> NodeReport:
    versions = Check("versions", "ok", "t2v 0.1.0")
    return NodeReport(node, [versions, *checks], clock, rates or {})


@pytest.mark.parametrize("count", range(3, 12))
def test_every_node_has_two_partners_and_one_pair_at_a_time(count):
    rounds = pairings(count)
    partners: dict[int, set[int]] = {node: set() for node in range(count)}
    for pairs in rounds:
        members = [node for pair in pairs for node in pair]
        assert len(members) == len(set(members))
        for first, second in pairs:
            partners[first].add(second)
            partners[second].add(first)
    assert all(len(met) == 2 for met in partners.values())
    assert len(rounds) <= 3


def test_a_slow_node_is_told_from_its_partners():
    for count in range(3, 9):
        for slow in range(count):
            rates = {
                pair: 1.0 if slow in pair else 10.0 for pairs in pairings(count) for pair in pairs
            }
            assert slow_members(rates) == [slow]
    assert slow_members({(0, 1): 1.0}) == []


def measured() -> dict[str, float]:
    with join_world(EngineConfig(kind="fsdp")) as world:
        return measure(world, ranks_per_node=1, deadline=timedelta(seconds=60))


@pytest.mark.slow
@pytest.mark.dist
def test_three_ranks_measure_all_together_and_each_pair():
    first, second, third = run_distributed(measured, 3)
    assert set(first) == {"all", "0-1", "2-0"}
    assert set(second) == {"all", "0-1", "1-2"}
    assert set(third) == {"all", "1-2", "2-0"}
    assert all(rate > 0 for rates in (first, second, third) for rate in rates.values())


def test_what_fails_on_every_node_is_the_jobs_fault():
    judgement = judge([report("n1", NO_DATA), report("n2", NO_DATA)])
    assert (judgement.exit_code, judgement.bad_nodes) == (66, [])
    assert judgement.problems == ["every node: data: s3://bucket/videos: no such dataset"]
    for speaks in (False, True):
        assert own_exit_code(judgement, "n1", speaks=speaks) == 66


def test_what_fails_on_some_nodes_is_theirs():
    judgement = judge([report("n1", GOOD), report("n2", NO_DATA), report("n3", BUSY)])
    assert judgement.exit_code == 69
    assert judgement.bad_nodes == ["n2", "n3"]
    codes = [own_exit_code(judgement, node, speaks=False) for node in ("n1", "n2", "n3")]
    assert codes == [0, 69, 69]
    assert own_exit_code(judgement, "n1", speaks=True) == 69  # the bad ones may be dead
    assert "n3: GPUs: GPU 3 holds 70000 of 81559 MiB" in judgement.problems


def test_busy_gpus_on_every_node_are_every_nodes_fault():
    assert judge([report("n1", BUSY), report("n2", BUSY)]).bad_nodes == ["n1", "n2"]


def test_another_version_or_clock_or_a_slow_link_only_shows_between_nodes():
    def fabric(*names: str, rate: float) -> dict[str, float]:
        return {"on_gpu": 1.0, "all": rate} | dict.fromkeys(names, rate)

    reports = [
        report("n1", rates=fabric("0-1", "2-0", rate=9e9)),
        report("n2", rates=fabric("0-1", "1-2", rate=9e9)),
        report("n3", clock=99.0, rates=fabric("1-2", "2-0", rate=1e9)),
    ]
    other = NodeReport("n2", [Check("versions", "ok", "t2v 0.0.9")], 0.0, reports[1].rates)
    judgement = judge([reports[0], other, reports[2]])
    assert judgement.bad_nodes == ["n2", "n3"]
    text = "\n".join(judgement.problems)
    assert "n2: has t2v 0.0.9, the others t2v 0.1.0" in text
    assert "n3: its clock differs by +99.0 s" in text
    assert "n3: slow: 1.00 GB/s with its best partner" in text


def test_a_gpu_in_use_or_with_memory_errors_is_named():
    idle = told()
    assert [gpu["index"] for gpu in idle] == ["0", "1"]
    assert idle[0]["driver_version"] == "570.86.15"
    for line in ((70000, 0, 0), (1, 95, 0), (1, 0, 2)):
        gpus = told(used=line[0], busy=line[1], errors=line[2])
        assert [check.verdict for check in check_gpus(gpus, ranks=0, promise=NONE)] == ["failed"]
        assert "GPU 1" in check_gpus(gpus, ranks=0, promise=NONE)[0].found
    assert check_gpus(idle, ranks=0, promise=NONE)[0].verdict == "ok"
    uncounted = told(errors="[N/A]")
    assert check_gpus(uncounted, ranks=0, promise=NONE)[0].verdict == "ok"


def test_gpus_that_are_missing_or_silent_fail():
    assert check_gpus([], ranks=8, promise=NONE)[0].verdict == "failed"
    assert check_gpus(None, ranks=8, promise=NONE)[0].verdict == "ok"  # no driver: a CPU node
    # A GPU job never computes on a CPU; on all nodes it is the job's fault, and nobody is branded.
    (check,) = check_gpus(None, ranks=8, promise=Promise(gpus=8))
    assert "no nvidia-smi, 0 by torch, for 8 ranks" in check.found
    assert judge([report("n1", check), report("n2", check)]).bad_nodes == []
    assert judge([report("n1", check), report("n2", check)]).exit_code == 78
    assert judge([report("n1", check), report("n2", GOOD)]).bad_nodes == ["n1"]
    assert judge([report("n1", check)]).bad_nodes == ["n1"]


@pytest.mark.parametrize(
    ("promise", "said"),
    [
        (Promise(model="h100", memory_gib=79.6, driver="570.2"), None),
        (Promise(model="A100"), "GPU 0 is a NVIDIA H100 80GB HBM3, not a A100"),
        (Promise(memory_gib=140), "GPU 1 has 79.6 GiB, not 140"),
        (Promise(driver="575"), "GPU 0 has driver 570.86.15, older than 575"),
    ],
)
def test_gpus_are_those_that_the_site_promised(promise, said):
    gpus = told()
    (check,) = check_gpus(gpus, ranks=0, promise=promise)
    assert check.verdict == ("ok" if said is None else "failed")
    assert (said or "idle") in check.found


def test_on_a_shared_node_only_the_jobs_own_gpus_count():
    gpus = told(used=70000)
    wanted = {None: "01", "0": "0", "1,0": "01", "GPU-b": "1", "": "", "MIG-GPU-bb/3/0": "01"}
    for chosen, indexes in wanted.items():
        assert "".join(gpu["index"] for gpu in visible(gpus, chosen)) == indexes
    assert check_gpus(visible(gpus, "0"), ranks=0, promise=NONE)[0].verdict == "ok"


def test_a_node_that_none_reaches_is_told_from_one_link_that_is_down():
    def seen(*closed: str) -> list[NodeReport]:
        pairs = [dict(link.split() for link in links.split(",") if link) for links in closed]
        return [replace(report(f"n{n + 1}"), closed=found) for n, found in enumerate(pairs)]

    # Of four nodes, each knocks at the next two; nobody reaches n3, which reaches nobody.
    cut_off = judge(seen("2 ip", "2 ip", "3 ip,0 ip", ""))
    assert (cut_off.exit_code, cut_off.bad_nodes) == (69, ["n3"])
    assert "n2: does not reach n3 at ip" in cut_off.problems
    one = judge(seen("1 ip", "", "", ""))
    assert (one.exit_code, one.bad_nodes) == (74, [])
    assert judge(seen("1 ip", "0 ip")).bad_nodes == []  # of two, none can be told from the other


def test_nodes_that_say_nothing_are_bad_but_for_all_of_several():
    names, nobody = {0: "n1", 1: "n2", 2: "n3"}, Judgement(0, [], [])
    assert of_the_silent(names, 3, [2], "did not come", nobody) == Judgement(
        69, ["n3: did not come"], ["n3"]
    )
    assert of_the_silent(names, 3, [1, 2], "did not come", nobody).exit_code == 74
    judged = of_the_silent({0: "n1"}, 3, [2], "did not come", nobody)
    assert judged == Judgement(74, ["node number 2: did not come"], [])


def test_ranks_that_hang_or_are_killed_are_the_cause_and_others_errors_are_not():
    good, lost = {"all": 1e9}, {"failure": "RuntimeError: connection closed by peer"}
    hang = {"failure": "its ranks hang", "is_cause": True}
    reports = [report("n1"), report("n2"), report("n3")]

    def judged(*told) -> Judgement:
        return judge(with_fabric(reports, dict(enumerate(told))))

    assert judged(good, good, good) == Judgement(0, [], [])
    assert judged(lost, lost, hang).bad_nodes == ["n3"]
    assert judged(lost, lost, hang).exit_code == 69
    for alike in (lost, hang):  # who began, nobody can tell
        assert judged(alike, alike, alike).bad_nodes == []
        assert judged(alike, alike, alike).exit_code == 74


def test_bad_nodes_are_avoided_until_their_time_is_over(tmp_path, monkeypatch):
    file = tmp_path / "bad_nodes"
    monkeypatch.setenv("T2V_BAD_NODES", str(file))
    note_bad_nodes(["n2", ""])
    name, end = file.read_text().split()
    assert name == "n2"
    left = datetime.fromisoformat(end) - datetime.now(UTC)
    assert timedelta(days=BROKEN_DAYS, minutes=-1) < left < timedelta(days=BROKEN_DAYS)
    note_bad_nodes(["n3"], days=-1)
    file.write_text(file.read_text() + "n1\n")  # an operator's
    assert read_bad_nodes(file) == ("n1", "n2")
    assert read_bad_nodes(tmp_path / "none") == ()


def test_limits_of_this_process_are_looked_at():
    code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); "
    code += "from cluster.node_checks import check_limits; print(check_limits())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "64 open files are less than 1024" in done.stdout
    assert check_limits().verdict != "failed"


def test_a_clock_may_differ_a_little():
    assert [skew_verdict(s) for s in (0.2, -3.0, 60.0)] == ["ok", "warning", "failed"]


def test_a_run_folder_is_probed_without_a_trace(tmp_path):
    assert check_run_folder(tmp_path / "run").verdict == "ok"
    assert list((tmp_path / "run").iterdir()) == []


def test_a_disk_too_small_for_the_checkpoints_fails(tmp_path):
    assert check_disk(tmp_path, needed_bytes=1).verdict == "ok"
    assert check_disk(tmp_path, needed_bytes=1 << 60).verdict == "failed"


def test_checkpoints_that_are_there_need_no_more_room(tmp_path):
    config = tiny_config(run_dir=str(tmp_path), checkpoint={"keep_last": 2})
    whole = missing_bytes(config)
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000005" / "part").write_bytes(bytes(whole // 3))
    assert missing_bytes(config) == whole - whole // 3
    (tmp_path / "checkpoints" / "step-00000005" / "part").write_bytes(bytes(whole))
    assert missing_bytes(config) == whole // 3  # one more is always being written


def test_a_damaged_sample_is_a_warning(dataset, tmp_path):
    own = Path(shutil.copytree(dataset, tmp_path / "videos"))
    shard = next((own / "shards").glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[512:640] = bytes(128)
    shard.write_bytes(content)
    config = config_of(own, tmp_path / "run")
    config = config.model_copy(update={"conditioning": NoConditioning(kind="none")})
    assert check_data(config).verdict == "warning"


def test_the_loader_may_hold_all_prefetched_patches():
    data = {"num_workers": 3, "prefetch_batches": 2}
    config = tiny_config(data=data, micro_batch_size=2)
    patches = 2 * 2 * 6 * 8 * 3
    assert loader_bytes(config, ranks=4) == 4 * 3 * 2 * 2 * patches


def test_a_recipe_without_its_data_is_missing_input(dataset, tmp_path):
    good = config_of(dataset, tmp_path / "run")
    assert check_data(good).verdict == "ok"
    report, judgement = check_alone(good, ranks=1)
    assert failed(report.checks) == []
    assert judgement == Judgement(0, [], [])
    bad = config_of(tmp_path / "none", tmp_path / "run")
    assert check_alone(bad, ranks=1)[1].exit_code == InputMissing.exit_code
    assert [check.name for check in failed(check_node(bad, ranks=1))] == ["data"]


def test_ranks_that_do_not_divide_the_batch_are_refused(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(tiny_config(run_dir=str(tmp_path / "run"))))
    assert main(["preflight", str(recipe), "--nnodes", "3", "--node-rank", "0"]) == 78
    assert "3 ranks of micro_batch_size" in capsys.readouterr().err


def test_a_node_that_does_not_come_is_named(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("T2V_NODE_NAMES", "n1 n2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = Meeting(nnodes=2, rdzv_endpoint=f"localhost:{port}", rendezvous_timeout_seconds=0.5)
    reports, judgement = check_together(config_of(dataset, tmp_path / "run"), meeting, recipe=())
    assert reports == []
    assert judgement == Judgement(69, ["n2: did not come within 0.5 s"], ["n2"])


@pytest.mark.slow
def test_a_first_node_that_is_not_there_is_one_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(tiny_config(run_dir=str(tmp_path / "run"))))
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        meeting = ["--rdzv-endpoint", f"localhost:{nobody.getsockname()[1]}"]
        command = [sys.executable, "-m", "t2v.cli", "preflight", str(recipe), *meeting]
        command += ["--nnodes", "2", "--node-rank", "1", "--timeout-seconds", "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 74
    (line,) = done.stderr.splitlines()
    assert "the nodes cannot meet because" in line


@pytest.mark.parametrize("verb", ["preflight", "node"])
def test_a_node_that_the_job_does_not_have_is_refused(verb, tmp_path, capsys):
    run_dir = ["--run-dir", str(tmp_path / "run")] if verb == "node" else []
    assert main([verb, *run_dir, "--nnodes", "2", "--node-rank", "2", "--", "any.yaml"]) == 78
    assert "--node-rank: 2 is wrong because --nnodes is 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.dist
def test_the_node_without_the_data_is_named_and_only_it_fails(dataset, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(config_of(dataset, tmp_path / "run")))
    answers: dict[int, subprocess.CompletedProcess] = {}

    def preflight(rank: int) -> None:
        command = [
            *(sys.executable, "-m", "t2v.cli", "preflight", str(recipe)),
            *([f"data.sources=[{{path: {tmp_path}/none}}]"] if rank == 1 else []),
            *("--nnodes", "2", "--node-rank", str(rank), "--json"),
            *("--rdzv-endpoint", f"localhost:{port}"),
        ]
        environment = os.environ | {"SLURMD_NODENAME": f"n{rank + 1}"}
        answers[rank] = subprocess.run(command, env=environment, capture_output=True, text=True)

    threads = [threading.Thread(target=preflight, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[rank].returncode for rank in range(2)] == [69, 69], answers
    found = json.loads(answers[0].stdout)
    assert found["bad_nodes"] == ["n2"]
    assert f"n2: data: {Path(tmp_path)}/none" in answers[1].stderr
    assert found["nodes"][0]["rates"] == {}  # no rank starts where a node is bad
