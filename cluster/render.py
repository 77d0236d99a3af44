"""A job as the files that a scheduler is given."""

import shutil
import subprocess

from cluster.job import DataJob, TrainingJob, record_text
from cluster.manifest_rules import faults
from cluster.profile import Profile, SlurmProfile
from cluster.render_kubernetes import data_objects, to_yaml, training_objects
from cluster.render_slurm import array_script, training_script
from cluster.secrets import holds_secret, secrets_in
from cluster.slurm_shell import SCRIPT
from data_pipeline.errors import ConfigError

OBJECTS, RECIPE, RECORD = "job.yaml", "config.yaml", "launch.json"


def render(job: TrainingJob | DataJob, profile: Profile) -> dict[str, str]:
    """File names and texts; ConfigError for a job that would not be what was asked for."""
    if isinstance(profile, SlurmProfile):
        files = {RECORD: record_text(job.record)}
        if isinstance(job, TrainingJob):
            files |= {SCRIPT: training_script(job, profile), RECIPE: job.recipe}
        else:
            files |= {SCRIPT: array_script(job, profile)}
        refuse_bad_shell(files[SCRIPT])
    else:
        is_run = isinstance(job, TrainingJob)
        objects = training_objects(job, profile) if is_run else data_objects(job, profile)
        if found := faults(objects, rdma_resource=profile.rdma_resource):
            raise ConfigError("\n".join(f"{fault}; correct profile or recipe." for fault in found))
        files = {OBJECTS: to_yaml(objects)}
    for name, text in files.items():
        refuse_secrets(name, text)
    return files


def refuse_bad_shell(script: str) -> None:
    """ConfigError where bash cannot read the script, as for a broken line of `setup`."""
    bash = shutil.which("bash")
    if bash is None:
        return
    checked = subprocess.run([bash, "-n"], input=script, capture_output=True, text=True)
    if checked.returncode:
        problem = checked.stderr.strip().splitlines()[0]
        raise ConfigError(
            f"setup: is wrong because bash cannot read the job's script ({problem}); correct it."
        )


def refuse_secrets(name: str, text: str) -> None:
    """ConfigError where a text would show a secret; the secret itself is not repeated."""
    for number, line in enumerate(text.splitlines(), start=1):
        if holds_secret(line):
            raise ConfigError(
                f"{name}: line {number} would show a secret because a recipe, an override or a "
                "profile holds it; give it by reference, under `secrets` of the profile."
            )


def refuse_secrets_in(origin: str, content: object) -> None:
    """ConfigError where plain data holds a secret, with its path."""
    for path in secrets_in(content):
        raise ConfigError(
            f"{origin}: {path} holds a secret, which every copy of the job would show; give it by "
            "reference, under `secrets` of the profile."
        )
