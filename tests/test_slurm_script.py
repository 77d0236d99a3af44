"""What a batch script does as its nodes end: try again, avoid a node, wait, or say why not.

The scripts run in a real bash beside stand-ins, as in test_render_slurm.py.
"""

import re
import signal
import time
from pathlib import Path

import pytest

from cluster.render_slurm import training_script
from cluster.slurm_profile import SHELL_NAMES
from cluster.slurm_shell import SCRIPT
from tests.test_render_slurm import (
    STAND_IN,
    job,
    read_calls,
    run_script,
    site,
    start_script,
    verbs,
)

TELL = 'open("runs/tiny/attempts.jsonl", "a").write("{}\\n")'


@pytest.mark.parametrize(
    ("decision", "restarts", "code", "exit_code", "asked"),
    [
        ("done", "0", "0", 0, False),
        ("stop", "0", "65", 65, False),
        ("stop", "0", "0", 1, False),  # never a success that was none
        ("requeue", "0", "75", -9, True),
        ("requeue", "49", "1", -9, True),
        ("requeue", "50", "75", 75, False),
        ("nonsense", "0", "1", -9, True),
    ],
)
def test_the_run_folder_decides(tmp_path, decision, restarts, code, exit_code, asked):
    script = training_script(job(), site(tmp_path))
    returned, calls = run_script(
        script, tmp_path, DECISION=decision, SLURM_RESTART_COUNT=restarts, CODE=code
    )
    assert returned == exit_code
    assert ("requeue" in verbs(calls)) == asked


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_becomes_the_flag_file_while_the_run_goes_on(tmp_path, number):
    script = training_script(job(), site(tmp_path))
    process, calls = start_script(script, tmp_path, SECONDS_OF_NODE="1.5", CODE="75",
                                  DECISION="stop")  # fmt: skip
    while not calls.exists() or "node" not in verbs(read_calls(calls)):
        time.sleep(0.05)
    process.send_signal(number)
    flag = tmp_path / "runs" / "tiny" / "PREEMPT-17-0"
    while not flag.exists():
        time.sleep(0.05)
    assert process.poll() is None
    process.send_signal(number)  # SLURM sends more than one
    process.communicate(timeout=30)
    assert process.returncode == 75  # of the nodes, not of the interrupted wait
    assert verbs(read_calls(calls))[-1] == "status"


def test_a_bad_node_is_avoided_by_the_job_that_takes_over(tmp_path):
    profile = site(tmp_path, exclude=["n9"])
    script = training_script(job(), profile)
    # A dead node's own code may hide what the first one found; older names are another time's.
    bad_nodes = tmp_path / "runs" / "tiny" / "bad_nodes"
    bad_nodes.parent.mkdir(parents=True)
    bad_nodes.write_text("n3 2020-01-01T00:00:00+00:00\n")
    (bad_nodes.parent / "slurm").mkdir()
    (bad_nodes.parent / "slurm" / "dependents").write_text("23\n")
    bad = "n2 2999-01-01T00:00:00+00:00"
    code, calls = run_script(script, tmp_path, PREFLIGHT="137", BAD=bad)
    assert code == 69
    again = f"{tmp_path}/runs/tiny/launch/{job().snapshot}/{SCRIPT}"
    assert verbs(calls) == ["show", "preflight", "--parsable", "update"]
    assert calls[-2][:2] == ["sbatch", ["--parsable", "--exclude=n9,n2", again]]
    # What waited for this job waits for the new one.
    assert calls[-1][:2] == ["scontrol", ["update", "JobId=23", "Dependency=afterok:99"]]


def test_a_requeued_job_avoids_what_was_found_bad_while_it_trained(tmp_path):
    script = training_script(job(), site(tmp_path, exclude=["n9"])).replace("sleep 120", "exit 75")
    stand_in = STAND_IN.replace("os.kill(os.getppid(), 9)", "pass")
    bad_nodes = tmp_path / "runs" / "tiny" / "bad_nodes"
    bad_nodes.parent.mkdir(parents=True)
    for told, expected in (
        ("n3 2020-01-01T00:00:00+00:00\n", []),  # whose time is over
        ("n2 2999-01-01T00:00:00+00:00\n", [["update", "JobId=17", "ExcNodeList=n9,n2"]]),
        ("n4\nn5\nn6\n", []),  # more than the job has
    ):
        bad_nodes.write_text(told)
        process, calls = start_script(
            script, tmp_path, CODE="71", DECISION="requeue", program=stand_in
        )
        process.communicate(timeout=60)
        asked = [words for name, words, _ in read_calls(calls) if name == "scontrol"]
        assert [words for words in asked if words[0] == "update"] == expected
        calls.unlink()


@pytest.mark.parametrize(("ends", "code"), [({"PREFLIGHT": "69"}, 69), ({"CODE": "71"}, 75)])
def test_jobs_that_wait_already_are_told_whom_to_avoid_and_none_is_added(tmp_path, ends, code):
    script = training_script(job(), site(tmp_path, jobs_ahead=2, exclude=["n9"]))
    (tmp_path / "runs" / "tiny" / "slurm").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "slurm" / "ahead").write_text("18\n19\n")
    bad = "n2 2999-01-01T00:00:00+00:00"
    returned, calls = run_script(script, tmp_path, BAD=bad, DECISION="requeue", **ends)
    assert returned == code
    asked = [words for name, words, _ in calls if name in ("scontrol", "sbatch")]
    told = [["update", f"JobId={number}", "ExcNodeList=n9,n2"] for number in (18, 19)]
    assert asked == [asked[0], *told]


def test_no_variable_of_a_site_is_one_of_the_script():
    """Those that it sets would come to ranks changed."""
    for profile in (site(Path("/shared")), site(Path("/shared"), jobs_ahead=2, interface="eth0")):
        script = training_script(job(), profile)
        assigned = re.findall(r"(?<!-v)(?:^|[\s;(])([a-z_]+)=(?!=)", script)
        assigned += re.findall(r"for ([a-z_]+) in", script)
        for names in re.findall(r"read -r ([a-z_ ]+) <", script):
            assigned += names.split()
        assert set(assigned) - SHELL_NAMES == set()


def test_a_bad_node_without_a_name_is_not_avoided_for_ever(tmp_path):
    script = training_script(job(), site(tmp_path))
    code, calls = run_script(script, tmp_path, PREFLIGHT="69")
    assert code == 69
    assert verbs(calls) == ["show", "preflight"]


@pytest.mark.parametrize("code", ["1", "71", "74", "137"])
@pytest.mark.parametrize(("restarts", "asked"), [("49", True), ("50", False)])
def test_nodes_that_did_not_meet_try_again_within_the_limit(tmp_path, code, restarts, asked):
    script = training_script(job(), site(tmp_path))
    returned, calls = run_script(script, tmp_path, PREFLIGHT=code, SLURM_RESTART_COUNT=restarts)
    assert returned == (-9 if asked else int(code))
    assert verbs(calls) == ["show", "preflight", *(["requeue"] if asked else [])]


def test_three_starts_that_fail_alike_before_the_run_begins_are_the_last(tmp_path):
    script = training_script(job(), site(tmp_path))
    for code, number in (("74", "17"), ("74", "17"), ("1", "17"), ("1", "17"), ("1", "17")):
        returned, calls = run_script(script, tmp_path, PREFLIGHT=code, SLURM_JOB_ID=number)
    assert returned == 1
    asked = [words for name, words, _ in calls if name == "scontrol" and words[0] != "show"]
    again = ["requeue", "17"]
    assert asked == [again, again, again, again]  # a kill of the script comes before its pause


def test_three_runs_of_a_node_that_leave_no_word_are_the_last(tmp_path):
    script = training_script(job(), site(tmp_path))
    ends = [run_script(script, tmp_path, DECISION="requeue", CODE="1")[0] for _ in range(3)]
    assert ends == [-9, -9, 1]
    (tmp_path / "runs/tiny/slurm/failed_starts").unlink()
    stand_in = STAND_IN.replace('words[:1] == ["node"]:', 'words[:1] == ["node"]:\n    ' + TELL)
    for _ in range(4):  # those that do are counted by the run folder
        process, _ = start_script(script, tmp_path, DECISION="requeue", CODE="1", program=stand_in)
        process.communicate(timeout=60)
        assert process.returncode == -9


def test_the_third_start_waits_longer_than_the_second(tmp_path):
    script = training_script(job(), site(tmp_path)).replace("sleep 120", "exit 75")
    stand_in = STAND_IN.replace("os.kill(os.getppid(), 9)", "pass")
    for answer in ("requeue", "requeue 480"):
        process, calls = start_script(script, tmp_path, CODE="1", DECISION=answer, program=stand_in)
        process.communicate(timeout=60)
    asked = [words for name, words, _ in read_calls(calls) if name == "scontrol"]
    assert asked[-1] == ["update", "JobId=17", "StartTime=now+480"]
    assert sum(words[0] == "update" for words in asked) == 1


def test_nodes_meet_at_an_address_of_the_interface_that_the_site_names(tmp_path):
    script = training_script(job(), site(tmp_path, interface="lo"))
    code, calls = run_script(script, tmp_path, TELL="NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME")
    assert code == 0
    assert calls[2][1][calls[2][1].index("--rdzv-endpoint") + 1] == "127.0.0.1:20034"
    assert set(calls[2][2].values()) == {"lo"}
    code, calls = run_script(training_script(job(), site(tmp_path, interface="no0")), tmp_path)
    assert code == 78


@pytest.mark.parametrize(
    ("argument", "decision", "code", "ran"),
    [
        *[("", "requeue", 75, True), ("", "stop", 1, True), ("behind", "requeue", 75, True)],
        *[("behind", "done", 0, False), ("behind", "stop", 1, False)],
    ],
)
def test_jobs_that_are_submitted_ahead_go_on_or_have_nothing_left_to_do(
    tmp_path, argument, decision, code, ran
):
    """Where nodes may neither requeue nor submit."""
    script = training_script(job(), site(tmp_path, jobs_ahead=3))
    process, calls = start_script(f"set -- {argument}\n{script}", tmp_path, DECISION=decision)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert ("node" in verbs(read_calls(calls))) == ran
    assert not {"requeue", "--parsable"} & set(verbs(read_calls(calls)))


@pytest.mark.parametrize("code", ["2", "65", "66", "70", "73", "78", "127"])
def test_a_bad_recipe_is_no_bad_node(tmp_path, code):
    bad_nodes = tmp_path / "runs" / "tiny" / "bad_nodes"
    bad_nodes.parent.mkdir(parents=True)
    bad_nodes.write_text("n7\n")  # of an earlier attempt
    script = training_script(job(), site(tmp_path))
    returned, calls = run_script(script, tmp_path, PREFLIGHT=code)
    assert returned == int(code)
    assert verbs(calls) == ["show", "preflight"]


def test_more_bad_nodes_than_the_job_has_end_it(tmp_path):
    bad_nodes = tmp_path / "runs" / "tiny" / "bad_nodes"
    bad_nodes.parent.mkdir(parents=True)
    bad_nodes.write_text("n5\nn6\nn6\n")
    script = training_script(job(), site(tmp_path))
    code, calls = run_script(script, tmp_path, PREFLIGHT="69", BAD="n7")
    assert code == 69
    assert "sbatch" not in [name for name, _, _ in calls]
