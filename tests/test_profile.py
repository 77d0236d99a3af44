"""Profiles of clusters: strict, and never a place for a secret."""

from pathlib import Path

import pytest

from cluster.profile import (
    KubernetesProfile,
    SlurmProfile,
    load_profile,
    parse_profile,
)
from cluster.secrets import holds_secret, is_secret, secrets_in
from cluster.slurm_profile import minutes_of
from data_pipeline.errors import ConfigError, InputMissing

PROFILES = Path(__file__).parent.parent / "configs" / "cluster"

SLURM = {
    "kind": "slurm",
    "nodes": 4,
    "gpus_per_node": 2,
    "gpu_memory_gib": 79.6,
    "cpus_per_node": 16,
    "memory_gib": 64,
    "time_limit_minutes": 600,
    "workdir": "/shared/t2v",
}
KUBERNETES = {
    "kind": "kubernetes",
    "namespace": "team",
    "image": "registry.example/t2v@sha256:" + "ab" * 32,
    "nodes": 4,
    "gpus_per_node": 2,
    "gpu_memory_gib": 79.6,
    "cpus_per_node": 16,
    "memory_gib": 64,
    "workdir": "/shared/t2v",
    "mounts": [{"claim": "shared", "path": "/shared"}],
}
# What real secrets look like; none of these opens anything.
SECRETS = [
    "AKIAIOSFODNN7EXAMPLE",
    "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "hf_abcdefghijklmnopqrstuvwxyz",
    "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "https://user:password@example.org/x",
    "https://bucket.example/x?X-Amz-Signature=0123456789abcdef",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abc",
    "-----BEGIN RSA PRIVATE KEY-----",
]


def refusal(content: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_profile(content, "site.yaml")
    assert caught.value.exit_code == 78
    return str(caught.value)


def test_shipped_profiles_are_valid():
    assert isinstance(load_profile(PROFILES / "slurm.yaml"), SlurmProfile)
    assert isinstance(load_profile(PROFILES / "kubernetes.yaml"), KubernetesProfile)


def test_missing_profile_and_broken_yaml_are_named(tmp_path):
    with pytest.raises(InputMissing, match=r"nowhere\.yaml: no such profile"):
        load_profile(tmp_path / "nowhere.yaml")
    (tmp_path / "twice.yaml").write_text("kind: slurm\nkind: slurm\n")
    with pytest.raises(ConfigError, match="'kind' is there twice"):
        load_profile(tmp_path / "twice.yaml")


@pytest.mark.parametrize(
    ("base", "change", "said"),
    [
        (SLURM, {"kind": "lsf"}, "kind: 'lsf' is wrong because it is none of 'slurm', "),
        (SLURM, {"container": {"kind": "x"}}, "container.kind: value 'x' is wrong"),
        (SLURM, {"kind": ["slurm"]}, "kind: ['slurm'] is wrong because it is none of 'slurm', "),
        (SLURM, {"account": False}, "account: value False is wrong because input should be a"),
        (SLURM, {"account": 16}, "YAML reads some words, as no and 0x10, so; put them in quotes"),
        (SLURM, {"directives": {"reboot": False}}, "directives.reboot: value False is wrong"),
        (SLURM, {"time_limit_minutes": 1.5}, "time_limit_minutes: value 1.5 is wrong"),
        (SLURM, {"directives": {"n": "9"}}, "no long option"),
        (SLURM, {"directives": {"no-requeue": "1"}}, "'no-requeue' keeps the job from"),
        (SLURM, {"directives": {"gres": "gpu:h100:8"}}, "'gres' of 'gpu:h100:8' contradicts"),
        (SLURM, {"directives": {"gpus-per-task": "1"}}, "'gpus-per-task' contradicts the nodes"),
        (SLURM, {"directives": {"hold": True}}, "'hold' keeps the job from"),
        (SLURM, {"directives": {"error": "x.err"}}, "'error' hides what"),
        (SLURM, {"directives": {"arr": "0-9"}}, "'arr' is set by t2v launch"),
        (SLURM, {"directives": {"nice": "9 --hold"}}, "'nice' has a value that sbatch"),
        (SLURM, {"directives": {"contiguous": False}}, "contiguous"),
        (SLURM, {"environment": {"IFS": "x"}}, "environment: 'IFS' is wrong because"),
        (SLURM, {"environment": {"SLURM_NNODES": "9"}}, "environment: 'SLURM_NNODES' is wrong"),
        (SLURM, {"environment": {"step": "9"}}, "environment: 'step' is wrong because"),
        (SLURM, {"secrets": [{"variable": "IFS", "file": "/a"}]}, "secrets: 'IFS' is wrong"),
        (SLURM, {"time_limit_minutes": 10**9}, "time_limit_minutes: 1000000000 is wrong"),
        (SLURM, {"time_limit_minutes": "a day"}, "time_limit_minutes: 'a day' is no time"),
        (SLURM, {"time_limit_minutes": "4:59"}, "time_limit_minutes: '4:59' is wrong"),
        (SLURM, {"cpus_per_node": 10**6}, "cpus_per_node: value 1000000 is wrong"),
        (KUBERNETES, {"memory_gib": 10**9}, "memory_gib: value 1000000000 is wrong"),
        (KUBERNETES, {"gpu_resource": "cpu"}, "gpu_resource: 'cpu' is wrong because"),
        (KUBERNETES, {"mounts": [{"claim": "x", "path": "/"}]}, "mounts: '/' is wrong because it"),
        (
            KUBERNETES,
            {"mounts": [*KUBERNETES["mounts"], {"claim": "x", "path": "/opt"}]},
            "mounts: '/opt' is wrong because it hides what the image has there",
        ),
        (
            KUBERNETES,
            {"mounts": [*KUBERNETES["mounts"], {"claim": "x", "path": "/opt/t2v/lib/"}]},
            "mounts: '/opt/t2v/lib' is wrong because it hides",
        ),
        (
            KUBERNETES,
            {"mounts": [*KUBERNETES["mounts"], {"claim": "x", "path": "/shared/"}]},
            "has a path twice",
        ),
        (
            KUBERNETES,
            {"mounts": [*KUBERNETES["mounts"], {"claim": "x", "path": "/x/..//tmp/"}]},
            "mounts: '/tmp' is wrong because pods have a volume",
        ),
        (
            SLURM,
            {"environment": {"A": "1"}, "secrets": [{"variable": "A", "file": "/a"}]},
            "secrets: A is given twice",
        ),
        (
            KUBERNETES,
            {"mounts": [*KUBERNETES["mounts"], {"claim": "x", "path": "/dev/shm"}]},
            "mounts: '/dev/shm' is wrong because",
        ),
        (
            KUBERNETES,
            {"mounts": [{"claim": "x", "path": "/shared", "read_only": True}]},
            "workdir: '/shared/t2v' is wrong because its mount is read-only",
        ),
        (SLURM, {"patition": "gpu"}, "patition: unknown field; did you mean 'partition'?"),
        (SLURM, {"nodes": "4"}, "nodes: value '4' is wrong because"),
        (SLURM, {"nodes": True}, "nodes: value True is wrong because"),
        (SLURM, {"gpu_memory_gib": 0.0}, "gpu_memory_gib: missing although there are GPUs"),
        (SLURM, {"partition": "gpu --wrap=x"}, "partition:"),
        (SLURM, {"partition": "gpu\n#SBATCH --uid=0"}, "partition:"),
        (SLURM, {"directives": {"nodes": "9"}}, "'nodes' is set by t2v launch"),
        (SLURM, {"directives": {"x y": "9"}}, "no long option"),
        (SLURM, {"setup": ["module load cuda\nrm -rf /"]}, "setup has the character"),
        (KUBERNETES, {"resources": {"cpu": 3}}, "'cpu' is wrong because it is neither"),
        (KUBERNETES, {"resources": {"a.b/c": "3Gi"}}, "a.b/c of '3Gi' is wrong; give a count"),
        (KUBERNETES, {"resources": {"hugepages-2Mi": "x"}}, "give a size such as 5Gi"),
        (KUBERNETES, {"labels": {"app.kubernetes.io/name": "x"}}, "is set by t2v launch"),
        (KUBERNETES, {"annotations": {"t2v/grace": "x"}}, "is set by t2v launch"),
        (KUBERNETES, {"tolerations": [{"key": "a", "seconds": 3}]}, "are of the effect NoExecute"),
        (KUBERNETES, {"on_end": "  "}, "no program is named"),
        (SLURM, {"interface": "eth0; rm"}, "interface: value 'eth0; rm' is wrong"),
        (SLURM, {"directives": {"gpu-bind": "closest"}}, "'gpu-bind' contradicts"),
        (SLURM, {"setup": ["#SBATCH --uid=0"]}, "is a comment"),
        (SLURM, {"workdir": "shared"}, "workdir: value 'shared' is wrong because"),
        (
            SLURM,
            {"container": {"kind": "apptainer", "image": "docker://t2v:latest"}},
            "may be another image tomorrow",
        ),
        (KUBERNETES, {"image": "registry.example/t2v:latest"}, "image:"),
        (KUBERNETES, {"namespace": "Team A"}, "namespace:"),
        (KUBERNETES, {"workdir": "/elsewhere"}, "on none of the mounts"),
        (KUBERNETES, {"topology": "rack"}, "there is no queue"),
        (KUBERNETES, {"environment": {"A B": "1"}}, "no name of a variable"),
        (KUBERNETES, {"environment": {"A": "x\0y"}}, "which no job can hold"),
        (KUBERNETES, {"environment": {"A": "\ud800"}}, "which no job can hold"),
    ],
)
def test_refusals_name_the_field(base, change, said):
    assert said in refusal({**base, **change})


APPTAINER = {"kind": "apptainer", "image": "/images/t2v.sif"}
PYXIS = {"kind": "pyxis", "image": "/images/t2v.sqsh"}


@pytest.mark.parametrize(
    "mounted",
    [
        {**APPTAINER, "binds": ["/data:/data:ro,nosuid,/shared/"]},
        {**APPTAINER, "binds": ["/data", "/mnt/disk:/shared/t2v"]},
        {**PYXIS, "mounts": ["/mnt/disk:/shared:rw+rprivate"]},
        {**PYXIS, "mounts": ["/shared:/shared:ro", "/shared/t2v:/shared/t2v"]},
    ],
)
def test_a_container_may_mount_the_workdir_as_its_program_writes_it(mounted):
    assert isinstance(parse_profile({**SLURM, "container": mounted}, "site.yaml"), SlurmProfile)


@pytest.mark.parametrize(
    ("mounted", "said"),
    [
        ({**APPTAINER}, "on none of the mounts []"),
        ({**APPTAINER, "binds": ["/shared:/mnt"]}, "on none of the mounts ['/mnt']"),
        ({**PYXIS, "mounts": ["/shared/t2v2"]}, "on none of the mounts ['/shared/t2v2']"),
        ({**PYXIS, "mounts": ["/shared:/shared:rprivate+ro"]}, "its mount is read-only"),
    ],
)
def test_a_workdir_that_the_container_does_not_see_is_refused(mounted, said):
    refused = refusal({**SLURM, "container": mounted})
    assert refused.startswith("site.yaml: workdir: '/shared/t2v'")
    assert said in refused


def test_every_mistake_is_told_at_once():
    said = refusal({**SLURM, "nodes": 0, "colour": "red"})
    assert "nodes:" in said
    assert "colour:" in said


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("base", [SLURM, KUBERNETES], ids=["slurm", "kubernetes"])
def test_secret_values_are_refused_and_not_repeated(base, secret):
    said = refusal({**base, "environment": {"HARMLESS": secret}})
    assert "looks like a secret" in said
    assert secret not in said


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "PRIVATE_KEY"]
)
def test_variables_that_would_hold_a_secret_are_refused(name):
    said = refusal({**SLURM, "environment": {name: "1234"}})
    assert "name where it is kept" in said
    assert "1234" not in said


@pytest.mark.parametrize(
    "change",
    [
        {"nodes": SECRETS[0]},
        {"environment": [SECRETS[0]]},
        {"setup": {"export": SECRETS[0]}},
        {"secrets": {"ANY": "kept back"}},
        {"container": {"kind": "pyxis", "image": SECRETS[0], "mounts": [SECRETS[0]]}},
    ],
)
def test_a_secret_in_the_wrong_place_is_not_repeated(change):
    said = refusal({**SLURM, **change})
    assert SECRETS[0] not in said
    assert "kept back" not in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_SOCKET_IFNAME", "eth0"),
        ("NCCL_IB_HCA", "=mlx5_0:1,mlx5_1:1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("AWS_SHARED_CREDENTIALS_FILE", "/home/t2v/.aws/credentials"),
        ("LD_LIBRARY_PATH", "/usr/local/cuda-13.0/lib64:/opt/amazon/efa/lib"),
        ("HTTPS_PROXY", "http://proxy.example:3128"),
    ],
)
def test_usual_settings_are_no_secrets(name, value):
    assert not is_secret(name, value)


def test_secrets_are_found_at_their_path():
    content = {"a": [{"b": "harmless"}, {"c": f"x {SECRETS[0]} y"}], "d": 3}
    assert list(secrets_in(content)) == ["a[1].c"]
    assert not holds_secret("sha256:" + "ab" * 32)
    assert not holds_secret("commit 0123456789abcdef0123456789abcdef01234567")
    assert not holds_secret("/shared/UCF101/Videos/HD/Train/Part1/AbCD")
    assert all(holds_secret(f"before {secret} after") for secret in SECRETS)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        *[("30", 30), ("30:30", 30.5), ("24:00:00", 1440), ("1:30:00", 90), ("2-0", 2880)],
        *[("1-00:00:00", 1440), ("1-12:30", 2190), ("0-00:05:00", 5)],
    ],
)
def test_times_are_read_as_slurm_reads_them(text, minutes):
    profile = parse_profile({**SLURM, "time_limit_minutes": text}, "site")
    assert isinstance(profile, SlurmProfile)
    assert minutes_of(text) == minutes
    assert profile.limit_minutes == int(minutes)


@pytest.mark.parametrize(
    ("number", "base"),
    [("24:00:00", 60), ("1:30", 60), ("-1:30.5", 60), ("0600", 8), ("+010", 8), ("0_7", 8)],
)
def test_a_number_of_another_base_is_refused_where_it_stands(tmp_path, number, base):
    file = tmp_path / "site.yaml"
    file.write_text(f"kind: slurm\ntime_limit_minutes: {number}\n")
    with pytest.raises(ConfigError) as caught:
        load_profile(file)
    said = f"line 2 because {number} would be a number of base {base}; put it in quotes"
    assert said in str(caught.value)
