"""Batch scripts: sbatch reads the directives that were meant, and bash every word as it was given.

The scripts run here in a real bash; `srun`, `scontrol`, `sbatch` and `t2v` are stand-ins that write
down what they were called with. A real SLURM runs them in test_slurm.py.
"""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.job import DataJob, Grace, SharedMemory, TrainingJob
from cluster.profile import SlurmProfile, parse_profile
from cluster.render import refuse_bad_shell, render
from cluster.render_slurm import array_script, training_script
from data_pipeline.errors import ConfigError
from tests.test_profile import SLURM

NASTY = [
    "a b",
    "it's",
    '"quoted"',
    "$(touch forged)",
    "`touch forged`",
    "; touch forged;",
    "x\n#SBATCH --uid=0\ntouch forged",
    "'\n#SBATCH --nodes=999\n'",
    "*",
    "~",
    "-n",
    "\\",
    "ünïcödé",
    "a\tb",
    "!$&|<>()[]{}",
    "",
]

STAND_IN = f"""#!{sys.executable} -SE
import json, os, sys, time
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
if name == "srun":
    while words[0].startswith("-"):
        del words[0]
    os.execvp(words[0], words)
with open(os.environ["SLURM_CALLS"], "a") as calls:
    told = {{key: os.environ.get(key) for key in os.environ.get("SLURM_TELL", "").split()}}
    print(json.dumps([name, words, told]), file=calls)
if words[:1] == ["show"]:
    print("n1\\nn2")
if name == "sbatch":
    print("99;cluster")
if words[:1] == ["status"]:
    print(os.environ["SLURM_DECISION"])
if words[:1] == ["preflight"]:
    code = int(os.environ.get("SLURM_PREFLIGHT", "0"))
    if bad := os.environ.get("SLURM_BAD"):
        with open(os.environ["T2V_BAD_NODES"], "a") as file:
            print(bad, file=file)
    sys.exit(code)
if words[:1] == ["node"]:
    time.sleep(float(os.environ.get("SLURM_SECONDS_OF_NODE", "0")))
    sys.exit(int(os.environ.get("SLURM_CODE", "0")))
if words[:1] == ["requeue"]:
    os.kill(os.getppid(), 9)  # as SLURM ends the script
"""


FOR_STAND_INS = ("CALLS", "TELL", "DECISION", "PREFLIGHT", "SECONDS_OF_NODE", "CODE", "BAD")


def directives_of(script: str) -> list[str]:
    """The directives that sbatch takes from a script: it stops at the first line of shell."""
    found = []
    for line in script.splitlines():
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            found.append(line)
    return found


def site(tmp_path: Path, **changes) -> SlurmProfile:
    profile = parse_profile({**SLURM, "workdir": str(tmp_path), **changes}, "site")
    assert isinstance(profile, SlurmProfile)
    return profile


def job(**changes) -> TrainingJob:
    plain = TrainingJob(
        name="tiny",
        run_dir="runs/tiny",
        nodes=2,
        ranks_per_node=2,
        recipe="name: tiny\n",
        record={"t2v": "1"},
        grace=Grace(120, "because"),
        shared_memory=SharedMemory(2, "because"),
        setup_seconds=1800.0,
    )
    return replace(plain, **changes)


def run_script(script: str, tmp_path: Path, **environment: str) -> tuple[int, list]:
    """Exit code of a script in bash, and the calls that it made."""
    process, calls = start_script(script, tmp_path, **environment)
    process.communicate(timeout=60)
    return process.returncode, read_calls(calls)


def start_script(script: str, tmp_path: Path, program: str = STAND_IN, **environment: str) -> tuple:
    programs, calls = tmp_path / "programs", tmp_path / "calls"
    programs.mkdir(exist_ok=True)
    for name in ("srun", "scontrol", "sbatch", "t2v"):
        (programs / name).write_text(program)
        (programs / name).chmod(0o755)
    (tmp_path / "job").write_text(script)
    given = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NODEID": "0"}
    given |= {"SLURMD_NODENAME": "n2", "CALLS": str(calls), "DECISION": "done", **environment}
    # What the job does not keep would not reach the stand-ins.
    given = {f"SLURM_{k}" if k in FOR_STAND_INS else k: v for k, v in given.items()}
    given["PATH"] = f"{programs}:{os.environ['PATH']}"
    process = subprocess.Popen(
        ["bash", str(tmp_path / "job")], env=given, cwd=tmp_path, stderr=subprocess.PIPE
    )
    return process, calls


def read_calls(calls: Path) -> list:
    return [json.loads(line) for line in calls.read_text().splitlines()]


def verbs(calls: list) -> list[str]:
    return [words[0] for _, words, _ in calls]


def test_directives_say_what_profile_and_job_say(tmp_path):
    profile = site(tmp_path, partition="gpu", account="t2v", gpu_type="h100", exclude=["n9"],
                   directives={"switches": "1@10:00", "contiguous": True})  # fmt: skip
    found = directives_of(training_script(job(bad_nodes=("n7",)), profile))
    assert set(found) == {
        "#SBATCH --account=t2v",
        f"#SBATCH --chdir={tmp_path}",
        "#SBATCH --contiguous",
        "#SBATCH --cpus-per-task=16",
        "#SBATCH --exclude=n9,n7",
        "#SBATCH --exclusive",
        "#SBATCH --export=HOME,LANG,PATH,USER",
        "#SBATCH --gpus-per-node=h100:2",
        "#SBATCH --job-name=tiny",
        "#SBATCH --mem=0",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={tmp_path}/runs/tiny/slurm/%x-%j.out",
        "#SBATCH --partition=gpu",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@150",
        "#SBATCH --switches=1@10:00",
        "#SBATCH --time=0-10:00:00",
    }
    assert len(found) == len(set(found))


@pytest.mark.parametrize("container", ["none", "apptainer", "pyxis"])
def test_scripts_are_bash(tmp_path, container):
    digest = "registry.example/t2v@sha256:" + "0" * 64
    mounts = ["/a b:/c", str(tmp_path)]
    kinds = {
        "none": None,
        "apptainer": {"kind": "apptainer", "image": f"docker://{digest}", "binds": mounts},
        "pyxis": {"kind": "pyxis", "image": digest, "mounts": mounts},
    }
    profile = site(tmp_path, container=kinds[container])
    script = training_script(job(), profile)
    refuse_bad_shell(script)
    line = next(line for line in script.splitlines() if line.startswith("container=("))
    begins = {"none": [], "apptainer": ["--pwd"], "pyxis": ["--container-workdir"]}[container]
    words = shlex.split(line.removeprefix("container=(").removesuffix(")"))
    assert [word for word in words if "wd=" in word or "workdir=" in word] == [
        f"{option}={tmp_path}" for option in begins
    ]
    with pytest.raises(ConfigError, match="bash cannot read"):
        refuse_bad_shell(training_script(job(), site(tmp_path, setup=["if true"])))


def test_environment_and_arguments_reach_the_program_as_they_were_given(tmp_path):
    environment = {f"NASTY_{number}": text for number, text in enumerate(NASTY)}
    (tmp_path / "my secret").write_text("s3cret $(touch forged)\n")
    profile = site(tmp_path, environment=environment,
                   secrets=[{"variable": "KEY", "file": f"{tmp_path}/my secret"}])  # fmt: skip
    data = DataJob("words", ("build", *NASTY), 3, 2, 4, 8, 0, {})
    script = array_script(data, profile)
    told = " ".join(["KEY", *environment])
    code, calls = run_script(script, tmp_path, TELL=told, SLURM_ARRAY_TASK_ID="1")
    assert code == 0
    assert calls == [
        [
            "t2v",
            ["data", "build", *NASTY, "--task", "1/3"],
            {**environment, "KEY": "s3cret $(touch forged)"},
        ]
    ]
    assert not (tmp_path / "forged").exists()
    plain = array_script(replace(data, arguments=("build",)), site(tmp_path))
    assert directives_of(script) == directives_of(plain)
    last = script[script.index("data \\\n") :]
    assert shlex.split(last.partition("\n")[2]) == ["build", *NASTY]
    assert "s3cret" not in script


def test_what_a_shell_exports_does_not_reach_the_job(tmp_path):
    hostile = {"PYTHONPATH": "/evil", "LD_LIBRARY_PATH": "/evil", "T2V_FAULT": "step:0:1:kill"}
    functions = {f"BASH_FUNC_{name}%%": "() { touch forged; }" for name in ("t2v", "srun", "mkdir")}
    told = " ".join(["KEPT", *hostile])
    profile = site(tmp_path, environment={"KEPT": "yes"})
    script = training_script(job(), profile)
    code, calls = run_script(script, tmp_path, TELL=told, **hostile, **functions)
    assert code == 0
    assert all(given == {"KEPT": "yes"} | dict.fromkeys(hostile) for _, _, given in calls[1:])
    assert not (tmp_path / "forged").exists()


def test_a_line_of_setup_that_fails_ends_the_job_with_its_name(tmp_path):
    good = ["A=1; export A", "if true; then", "  umask 027", "fi", "B=2 \\", "export B"]
    script = training_script(job(), site(tmp_path, setup=[*good, "touch made"]))
    code, calls = run_script(script, tmp_path, TELL="A B")
    assert (code, calls[1][2]["A"]) == (0, "1")
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o640  # its umask stands
    (tmp_path / "calls").unlink()
    script = training_script(job(), site(tmp_path, setup=["true", "ls '/none $x'", "touch more"]))
    process, calls = start_script(script, tmp_path)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 78
    assert """setup: 'ls '/none $x'' is wrong because it ended with 2; correct it.""" in said
    assert not (tmp_path / "more").exists()
    assert not calls.exists()


@pytest.mark.parametrize("content", [None, ""])
def test_a_secret_that_is_not_on_the_node_ends_the_job_at_once(tmp_path, content):
    file = tmp_path / "my key"
    if content is not None:
        file.write_text(content)
    profile = site(tmp_path, secrets=[{"variable": "KEY", "file": str(file)}])
    process, calls = start_script(training_script(job(), profile), tmp_path)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 78
    assert said.startswith(f"secrets: KEY is wrong because {file} is missing, empty or")
    assert said.count("\n") == 1
    assert not calls.exists()


@pytest.mark.parametrize("text", ["x\0y", "x\x1b[31my", "x\ud800y", "x\ry"])
def test_what_no_job_can_hold_is_refused(tmp_path, text):
    data = DataJob("words", ("build", text), 3, 2, 4, 8, 0, {})
    with pytest.raises(ConfigError, match="no job can hold") as caught:
        array_script(data, site(tmp_path))
    assert caught.value.exit_code == 78


@pytest.mark.parametrize("text", [text for text in NASTY if text] + ["x\0y", "a%jb"])
def test_directives_cannot_be_forged_by_paths(tmp_path, text):
    if all(letter.isalnum() or letter in "-*[]" for letter in text) and text.isascii():
        return  # sbatch reads these as they are
    with pytest.raises(ConfigError) as caught:
        render(job(run_dir=text), site(tmp_path / text.replace("\0", "")))
    assert caught.value.exit_code == 78


def test_a_run_is_told_where_and_what(tmp_path):
    script = training_script(job(), site(tmp_path))
    code, calls = run_script(
        script, tmp_path, SLURM_RESTART_COUNT="3", SLURM_NODEID="1", TELL="T2V_NODE_NAMES"
    )
    assert code == 0
    assert verbs(calls) == ["show", "preflight", "node", "status"]
    assert calls[1][2] == {"T2V_NODE_NAMES": "n1 n2"}
    assert script.count('follow "${step[@]}" --kill-on-bad-exit=0') == 2
    folder = tmp_path / "runs" / "tiny"
    recipe = f"{folder}/launch/{job().snapshot}/config.yaml"
    assert calls[1][1] == [
        *("preflight", "--node-rank", "1", "--nnodes", "2", "--nproc-per-node", "2"),
        *("--rdzv-endpoint", "n1:20035", "--timeout-seconds", "600"),
        *("--gpus", "2", "--gpu-memory-gib", "79.6", "--", recipe),
    ]
    assert calls[2][1] == [
        *("node", "--node-rank", "1", "--nnodes", "2", "--nproc-per-node", "2", "--gpus", "2"),
        *("--rdzv-endpoint", "n1:20034", "--rdzv-id", "17-3"),
        *("--run-dir", str(folder), "--grace-seconds", "120", "--", recipe),
    ]


def test_a_request_to_another_job_on_the_folder_is_left_alone(tmp_path):
    flag = tmp_path / "runs" / "tiny" / "PREEMPT"
    flag.parent.mkdir(parents=True)
    flag.touch()
    run_script(training_script(job(), site(tmp_path)), tmp_path)
    assert flag.exists()
