"""Jobs handed to stand-ins of a scheduler: what is asked first, refused, and kept in order."""

import json
import os
from pathlib import Path

import pytest
import yaml

from cluster.crds import dropped
from t2v.cli import main
from tests.test_launch import recipe, site
from tests.test_profile import KUBERNETES, SLURM

__all__ = ["recipe", "site"]  # fixtures

CRDS = Path(__file__).parent / "crds"
KUBECTL = """#!/bin/sh
cat >"$CALLS.$1"
[ "$1 $2" = "get crd" ] && { cat "$CALLS-crd-$3" 2>/dev/null && exit; echo NotFound >&2; exit 1; }
[ "$3" = get ] && { cat "$CALLS-job"; exit; }
[ "$1" = "$REFUSED" ] && { echo 'Error: jobsets "tiny" already exists' >&2; exit 1; }
echo created
"""


def test_kubectl_applies_what_may_stay_and_creates_what_must_be_new(
    recipe, site, tmp_path, kubectl, monkeypatch, capsys
):
    profile = site(KUBERNETES, flavour="trainjob")
    assert main(["launch", recipe, "--cluster", profile, "--submit"]) == 0
    applied = list(yaml.safe_load_all((tmp_path / "calls.apply").read_text()))
    created = list(yaml.safe_load_all((tmp_path / "calls.create").read_text()))
    assert [each["kind"] for each in applied] == ["ConfigMap", "TrainingRuntime"]
    assert [each["kind"] for each in created] == ["TrainJob"]
    told = capsys.readouterr().out
    for word in ("watch:", "stop:", "resume:", "kubectl -n team delete trainjob tiny"):
        assert word in told
    monkeypatch.setenv("REFUSED", "create")
    profile = site(KUBERNETES, flavour="trainjob", restart_limit=3)
    assert main(["launch", recipe, "--cluster", profile, "--submit"]) == 78
    assert "already exists" in capsys.readouterr().err
    live = {(each["kind"], each["metadata"]["name"]): each for each in applied}
    for each in yaml.safe_load_all((tmp_path / "calls.apply").read_text()):
        assert live.get((each["kind"], each["metadata"]["name"]), each) == each


@pytest.fixture
def kubectl(tmp_path, monkeypatch) -> Path:
    """Where a stand-in of kubectl finds and keeps things; the cluster is a new one."""
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    for name, file, version in (
        ("jobsets.jobset.x-k8s.io", "jobset", "v1alpha2"),
        ("trainjobs.trainer.kubeflow.org", "trainjob", "v1alpha1"),
    ):
        define(tmp_path, name, version, json.loads((CRDS / f"{file}.json").read_text()))
    define(tmp_path, "trainingruntimes.trainer.kubeflow.org", "v1alpha1", {})
    return tmp_path


def define(home: Path, name: str, version: str, schema: dict) -> None:
    """A custom resource of the cluster."""
    versions = [{"name": version, "schema": {"openAPIV3Schema": schema}}]
    (home / f"calls-crd-{name}").write_text(json.dumps({"spec": {"versions": versions}}))


def test_a_jobset_that_would_drop_what_decides_about_preemption_is_refused(
    recipe, site, kubectl, capsys
):
    command = ["launch", recipe, "--cluster", site(KUBERNETES), "--submit"]
    assert main(command) == 0
    schema = json.loads((CRDS / "jobset.json").read_text())
    policy = schema["properties"]["spec"]["properties"]["failurePolicy"]["properties"]
    del policy["rules"]["items"]["properties"]["onJobFailureMessagePatterns"]
    define(kubectl, "jobsets.jobset.x-k8s.io", "v1alpha2", schema)
    (kubectl / "calls.create").unlink()
    assert main(command) == 78
    said = capsys.readouterr().err
    assert "does not know spec.failurePolicy.rules[0].onJobFailureMessagePatterns" in said
    assert "install JobSet 0.10 or newer" in said
    assert not (kubectl / "calls.create").exists()
    (kubectl / "calls-crd-jobsets.jobset.x-k8s.io").unlink()
    assert main(command) == 78
    assert "this cluster has no such resource" in capsys.readouterr().err


def test_a_queue_needs_kueue(recipe, site, kubectl, capsys):
    command = ["launch", recipe, "--cluster", site(KUBERNETES, queue="team"), "--submit"]
    assert main(command) == 78
    assert "localqueues.kueue.x-k8s.io: this cluster has no such" in capsys.readouterr().err
    define(kubectl, "localqueues.kueue.x-k8s.io", "v1beta1", {})
    assert main(command) == 0


def test_what_a_schema_does_not_say_is_not_called_dropped():
    known = {"type": "object", "properties": {"a": {"type": "string"}}}
    schema = {
        "type": "object",
        "properties": {
            "known": known,
            "any": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
            "names": {"type": "object", "additionalProperties": {"type": "string"}},
            "list": {"type": "array", "items": known},
        },
    }
    node = {"known": {"a": 1, "b": 2}, "any": {"x": {"y": 1}}, "names": {"n": "v"}, "new": 1}
    assert list(dropped(node, schema)) == ["known.b", "new"]
    assert list(dropped({"list": [{"a": 1}, {"c": 1}]}, schema)) == ["list[1].c"]


SQUEUE = """#!/bin/sh
echo "$0 $*" >>"$CALLS"
case "$0" in
*squeue) cat "$CALLS-queue" 2>/dev/null ;;
*sbatch) wc -l <"$CALLS" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """Where stand-ins of SLURM's commands write down what they were called with."""
    for name in ("squeue", "sbatch"):
        (tmp_path / name).write_text(SQUEUE)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path


def submissions(home: Path) -> list[list[str]]:
    lines = (home / "calls").read_text().splitlines()
    return [line.split()[1:] for line in lines if line.split()[0].endswith("sbatch")]


def test_a_second_job_of_a_run_is_refused(recipe, site, slurm, capsys):
    command = ["launch", recipe, "--cluster", site(SLURM, workdir=str(slurm)), "--submit"]
    (slurm / "calls-queue").write_text(f"7 PENDING {slurm}/runs/other/launch/ab/job.sbatch\n")
    assert main(command) == 0
    (slurm / "calls-queue").write_text(f"8 RUNNING {slurm}/runs/tiny/launch/ab/job.sbatch\n")
    assert main(command) == 78
    assert "has job 8 (running) already" in capsys.readouterr().err
    assert len(submissions(slurm)) == 1


def test_jobs_ahead_wait_for_each_other(recipe, site, slurm, capsys):
    profile = site(SLURM, workdir=str(slurm), jobs_ahead=2)
    assert main(["launch", recipe, "--cluster", profile, "--submit"]) == 0
    first, second, third = submissions(slurm)
    assert first[0] == "--parsable"
    assert [second[1], second[-1]] == ["--dependency=afterany:2", "behind"]
    assert [third[1], third[-1]] == ["--dependency=afterany:3", "behind"]
    assert (slurm / "runs/tiny/slurm/ahead").read_text() == "3\n4\n"
    # Whoever ends the run must end those that wait, or the next one goes on.
    assert "stop:    scancel 3 4 && scancel --signal=USR1 --batch 2   " in capsys.readouterr().out


def test_a_refusal_names_the_jobs_that_were_taken_before_it(recipe, site, slurm, capsys):
    """As a queue's limit refuses the third: the others wait and run all the same."""
    refuse = "*sbatch) [ $(wc -l <$CALLS) -gt 3 ] && { echo limit >&2; exit 1; }; wc -l <"
    (slurm / "sbatch").write_text(SQUEUE.replace("*sbatch) wc -l <", refuse))
    profile = site(SLURM, workdir=str(slurm), jobs_ahead=9)
    assert main(["launch", recipe, "--cluster", profile, "--submit"]) == 78
    said = capsys.readouterr().err
    assert "refused because 'limit'" in said
    assert "Taken before: `scancel 2 3` ends them." in said


def test_a_chain_is_kept_by_dependencies_and_told_where_the_one_before_lies(
    recipe, site, slurm, tmp_path, capsys
):
    protocol = Path(__file__).parent.parent / "configs" / "evaluation" / "ucf101_2048.yaml"
    content = yaml.safe_load(Path(recipe).read_text())
    warm = {"checkpoint": "to/be/replaced"}
    (tmp_path / "pyramid.yaml").write_text(yaml.safe_dump({**content, "warm_start": warm}))
    pyramid = f"{tmp_path}/pyramid.yaml name=pyramid run_dir=runs/pyramid"
    command = ["launch", recipe, "--cluster", site(SLURM, workdir=str(slurm)), "--submit"]
    assert main([*command, "--then", pyramid, "--then", f"evaluate:{protocol}"]) == 0
    _, second, third = submissions(slurm)
    assert second[1:3] == ["--dependency=afterok:2", "--kill-on-invalid-dep=yes"]
    assert third[1:3] == ["--dependency=afterok:4", "--kill-on-invalid-dep=yes"]
    resolved = yaml.safe_load(Path(second[-1]).with_name("config.yaml").read_text())
    assert resolved["warm_start"]["checkpoint"] == f"{slurm}/runs/tiny"
    script = Path(third[-1]).read_text()
    assert f"{slurm}/runs/pyramid --protocol {protocol}" in script
    assert "torchrun --standalone" in script
    assert (slurm / "runs/tiny/slurm/dependents").read_text() == "4\n"
    assert main([*command, "--then", f"{recipe} name=again"]) == 78
    assert "has the run_dir of one before" in capsys.readouterr().err


def test_kubernetes_keeps_a_chain_by_waiting(recipe, site, kubectl, capsys):
    ended = {"status": {"conditions": [{"type": "Failed", "status": "True"}]}}
    (kubectl / "calls-job").write_text(json.dumps(ended))
    then = f"{recipe} name=second run_dir=runs/second"
    command = ["launch", recipe, "--cluster", site(KUBERNETES), "--submit", "--then", then]
    assert main(command) == 78
    told = capsys.readouterr()
    assert "what follows is created then" in told.out
    assert "has failed, and what follows it is not created" in told.err
    ended["status"]["conditions"][0]["type"] = "Completed"
    (kubectl / "calls-job").write_text(json.dumps(ended))
    assert main(command) == 0
    (created,) = yaml.safe_load_all((kubectl / "calls.create").read_text())
    assert created["metadata"]["name"] == "second"
