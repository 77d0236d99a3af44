"""`t2v launch`: what cannot run is refused before it queues, and nothing secret is written."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cluster.job import LEAST_GRACE_SECONDS, MARGIN_SECONDS, SLACK
from cluster.launch import prepare_run, snapshot_folder, training_job, write_out
from cluster.profile import load_profile
from cluster.reference_manifests import ROOT, reference_manifests
from cluster.render import render
from data_pipeline.errors import ConfigError, InputMissing
from t2v.cli import main
from t2v.plan.plan import Plan, plan
from t2v.recipe.recipe import dump_config, load_config
from tests.test_profile import KUBERNETES, SECRETS, SLURM
from tests.test_render_slurm import NASTY
from tests.tiny import tiny_config


@pytest.fixture
def recipe(tmp_path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(tiny_config(engine={"kind": "fsdp"}, global_batch_size=8)))
    return str(path)


@pytest.fixture
def site(tmp_path):
    """Writes a profile with changes, and tells its path."""

    def write(base: dict, **changes) -> str:
        path = tmp_path / "site.yaml"
        path.write_text(yaml.safe_dump({**base, **changes}))
        return str(path)

    return write


def refusal(*arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare_run(*arguments)
    assert caught.value.exit_code == 78
    return str(caught.value)


def test_what_does_not_fit_is_refused_with_the_arithmetic(recipe, site):
    profile = site(SLURM, gpu_memory_gib=1.0)
    said = refusal(recipe, [], profile)
    assert said.startswith(f"{profile}: gpu_memory_gib: 1 is wrong because each GPU needs 2.")
    assert "2.0 reserve" in said
    assert "4 nodes of 2 ranks" in said


def test_ranks_that_do_not_divide_the_batch_are_refused(recipe, site):
    said = refusal(recipe, ["global_batch_size=9"], site(SLURM))
    assert "global_batch_size: 9 is wrong because 8 ranks" in said


def test_more_nodes_than_the_site_has_are_refused(recipe, site):
    with pytest.raises(ConfigError, match=r"--nodes: 5 is wrong .* 1 to 4"):
        prepare_run(recipe, [], site(SLURM), nodes=5)
    with pytest.raises(ConfigError, match="--nodes: 0 is wrong"):
        prepare_run(recipe, [], site(SLURM), nodes=0)


def test_a_dev_shm_larger_than_the_node_is_refused(recipe, site):
    queues = ["data.prefetch_batches=512", "data.num_workers=512"]
    batches = ["global_batch_size=16000", "micro_batch_size=1000"]
    said = refusal(recipe, queues + batches, site(KUBERNETES))
    assert "memory_gib: 64 is wrong because /dev/shm alone needs" in said
    assert "2 ranks x" in said


def test_a_time_limit_that_leaves_no_time_to_save_is_refused(recipe, site):
    said = refusal(recipe, [], site(SLURM, time_limit_minutes=5, storage_gib_per_second=1.0e-6))
    assert said.startswith("time_limit_minutes: 5 is wrong because stopping takes")


def test_the_snapshot_is_the_resolved_recipe_and_the_code(recipe, site, tmp_path):
    launch = prepare_run(recipe, ["total_steps=77"], site(SLURM), nodes=2)
    told = "\n".join(write_out(launch, tmp_path / "out"))
    assert "nothing is submitted" in told
    resolved = load_config(tmp_path / "out" / "config.yaml")
    assert resolved == load_config(recipe, ["total_steps=77"])
    record = json.loads((tmp_path / "out" / "launch.json").read_text())
    assert record["nodes"] == 2
    assert record["world_size"] == 4
    assert record["t2v"]
    again = prepare_run(recipe, ["total_steps=77"], site(SLURM), nodes=2)
    other = prepare_run(recipe, ["total_steps=78"], site(SLURM), nodes=2)
    assert again.job == launch.job
    assert other.files["job.sbatch"] != launch.files["job.sbatch"]  # a queued job keeps its own


def test_grace_comes_from_what_the_run_has_measured(recipe, site, tmp_path):
    profile = site(SLURM, workdir=str(tmp_path))
    forecast = prepare_run(recipe, [], profile).job
    assert forecast.grace.seconds == LEAST_GRACE_SECONDS
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "step_seconds": 70.0}\n{"step": 2, "st')
    (run / "status.json").write_text('{"save_seconds": 30.0}')
    (run / "bad_nodes").write_text("n3\nn1\nn3\n")
    launch = prepare_run(recipe, [], profile)
    assert launch.job.grace.seconds == SLACK * 100 + MARGIN_SECONDS
    assert "70.0 s for a step, measured" in launch.job.grace.reason
    assert "#SBATCH --exclude=n1,n3" in launch.files["job.sbatch"]
    assert (
        f"#SBATCH --signal=B:USR1@{launch.job.grace.notice_seconds}" in launch.files["job.sbatch"]
    )
    (run / "bad_nodes").write_text("n3 --wrap=$(x)\n")
    assert "is no node's name" in refusal(recipe, [], profile)


@pytest.mark.parametrize("base", [SLURM, KUBERNETES], ids=["slurm", "kubernetes"])
def test_secrets_of_recipe_and_operator_reach_no_file(recipe, site, tmp_path, monkeypatch, base):
    """R26."""
    canaries = {f"CANARY_{number}_TOKEN": secret for number, secret in enumerate(SECRETS)}
    for name, secret in canaries.items():
        monkeypatch.setenv(name, secret)
    launch = prepare_run(recipe, [], site(base))
    for text in launch.files.values():
        assert not any(secret in text for secret in SECRETS)
        assert not any(name in text for name in canaries)
    for secret in SECRETS:
        override = "data.sources=" + json.dumps([{"path": f"s3://bucket/?x={secret} &token=x"}])
        said = refusal(recipe, [override], site(base))
        assert "data.sources[0].path holds a secret" in said
        assert secret not in said


@pytest.fixture(scope="module")
def forecast() -> Plan:
    """Of any run of the tiny recipe on one rank: what it is called does not matter."""
    return plan(tiny_config(), gpus=1, gpu_memory_gib=79.6)


@pytest.mark.parametrize("text", [text for text in NASTY if text])
def test_run_folders_of_any_name_stay_one_word_in_kubernetes(forecast, site, tmp_path, text):
    """R27: refused, or read back as the same."""
    folder = f"runs/{text}"
    profile = load_profile(site(KUBERNETES))
    job = training_job(tiny_config(run_dir=folder), profile, forecast, nodes=1, code="1")
    config_map, jobset = yaml.safe_load_all(render(job, profile)["job.yaml"])
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    arguments = spec["containers"][0]["args"]
    told = arguments[arguments.index("--run-dir") + 1]
    assert told.replace("$$", "$") == str(Path("/shared/t2v", folder))
    path = tmp_path / "inner.yaml"
    path.write_text(config_map["data"]["config.yaml"])
    assert load_config(path).run_dir == folder


@pytest.mark.parametrize("name", ["a b", "a\n#SBATCH --uid=0", "$(x)", "", "a\0b", "x" * 64])
def test_names_that_are_none_are_refused(recipe, site, name):
    assert "name:" in refusal(recipe, [f"name={json.dumps(name)}"], site(SLURM))


def test_the_command_tells_the_plan_and_where_files_are(recipe, site, tmp_path, capsys):
    code = main(["launch", recipe, "--cluster", site(KUBERNETES), "--out", str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert code == 0
    assert "memory per GPU" in told
    assert "kubectl apply" in told
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["job.yaml"]


def test_data_jobs_are_checked_before_they_queue(site, tmp_path, capsys):
    where = ["--cluster", site(SLURM), "--tasks", "4", "--out", str(tmp_path / "out"), "--"]
    assert main(["launch-data", *where, "embed", "data/v", "--encoder", "t5", "--name", "a"]) == 0
    script = (tmp_path / "out" / "job.sbatch").read_text()
    assert "#SBATCH --array=0-3%4" in script
    assert "#SBATCH --gpus-per-node=1" in script
    assert "embed data/v --encoder t5 --name a" in script
    for wrong in (["build", "media"], ["verify", "data/v"], [], ["build", "a", "b", "--task=1/2"]):
        with pytest.raises(SystemExit) as caught:
            main(["launch-data", *where, *wrong])
        assert caught.value.code == 2
    secret = ["build", f"https://x:{SECRETS[2]}@example.org", "out", "--size", "4x8x8"]
    capsys.readouterr()
    assert main(["launch-data", *where, *secret]) == 78
    assert SECRETS[2] not in capsys.readouterr().err
    assert main(["launch-data", "--gpus", "3", *where, "build", "a", "b", "--size", "4x8x8"]) == 78
    assert "--gpus: 3 is wrong because a node" in capsys.readouterr().err


def test_the_steps_that_are_told_copy_these_files_alone(recipe, site, tmp_path):
    workdir, out = tmp_path / "a disk", tmp_path / "a folder"
    out.mkdir()
    (out / "old.yaml").touch()
    prepared = prepare_run(recipe, [], site(SLURM, workdir=str(tmp_path)))
    prepared = replace(prepared, profile=prepared.profile.model_copy(update={"workdir": workdir}))
    copy = write_out(prepared, out)[2]
    subprocess.run(["bash", "-c", copy], check=True)
    home = snapshot_folder(prepared)
    assert sorted(path.name for path in home.iterdir()) == sorted(prepared.files)


def test_a_notice_too_short_to_save_bounds_what_an_eviction_may_cost(recipe, site, tmp_path):
    spot = {"eviction_notice_seconds": 40, "workdir": "/shared/t2v"}
    job = prepare_run(recipe, [], site(KUBERNETES, **spot)).job
    assert job.grace.seconds == 10
    assert "are too few to save" in job.grace.reason
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "step_seconds": 70.0}\n')
    spot["workdir"] = str(tmp_path)
    mounts = [{"claim": "shared", "path": str(tmp_path)}]
    said = refusal(recipe, ["checkpoint.every_steps=100"], site(KUBERNETES, **spot, mounts=mounts))
    assert "checkpoint.every_steps: 100 is wrong" in said
    assert "save at least every 25 steps" in said
    grace = prepare_run(recipe, ["checkpoint.every_steps=100"], site(KUBERNETES, mounts=mounts,
                        workdir=str(tmp_path))).job.grace  # fmt: skip
    assert grace.seconds > 140


@pytest.mark.parametrize("measured", ['"long"', "NaN", "-5", "true"])
def test_grace_does_not_trust_damaged_measurements(recipe, site, tmp_path, measured):
    profile = site(SLURM, workdir=str(tmp_path))
    usual = prepare_run(recipe, [], profile).job.grace
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(f'{{"step_seconds": {measured}}}\n')
    (run / "status.json").write_text(f'{{"save_seconds": {measured}}}')
    assert prepare_run(recipe, [], profile).job.grace == usual


def test_a_damaged_list_of_bad_nodes_is_refused(recipe, site, tmp_path):
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "bad_nodes").write_bytes(b"node1\n\xff\xfe\n")
    assert "is no node's name" in refusal(recipe, [], site(SLURM, workdir=str(tmp_path)))


def test_a_missing_scheduler_is_one_line(recipe, site, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    for base, tool in ((SLURM, "sbatch"), (KUBERNETES, "kubectl")):
        changes = {"workdir": str(tmp_path)} if base is SLURM else {}
        assert main(["launch", recipe, "--cluster", site(base, **changes), "--submit"]) == 66
        assert capsys.readouterr().err.startswith(f"{tool}: not found on this machine; ")
    assert main(["launch", recipe, "--cluster", site(SLURM), "--submit"]) == InputMissing.exit_code
    assert "workdir: /shared/t2v is not on this machine" in capsys.readouterr().err


def test_reference_manifests_are_what_the_renderer_gives():
    """`python -m cluster.reference_manifests` writes them anew."""
    manifests = reference_manifests()
    for path, text in manifests.items():
        assert (ROOT / "cluster" / path).read_text() == text, path
    kept = [
        path for kind in ("slurm", "kubernetes") for path in (ROOT / "cluster" / kind).iterdir()
    ]
    assert len(kept) == len(manifests)
