"""The profile of a site, SLURM or Kubernetes, as it is read; errors say all that is wrong."""

from pathlib import Path

from cluster.kubernetes_profile import KubernetesProfile
from cluster.secrets import is_secret, names_secret, secrets_in
from cluster.slurm_profile import SlurmProfile
from data_pipeline.errors import ConfigError
from t2v.recipe.reading import parse, read_mapping

Profile = SlurmProfile | KubernetesProfile
KINDS = {"slurm": SlurmProfile, "kubernetes": KubernetesProfile}


def load_profile(path: str | Path) -> Profile:
    """The profile of a cluster; errors say all that is wrong."""
    missing = "no such profile; `ls configs/cluster` shows those we ship."
    return parse_profile(read_mapping(Path(path), missing=missing), str(Path(path)))


def parse_profile(content: dict, origin: str) -> Profile:
    """A profile from plain data; `origin` begins each line of the error."""
    kind = content.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(
            f"{origin}: kind: {'missing' if kind is None else repr(kind)} is wrong because it is "
            f"none of {', '.join(map(repr, KINDS))}; correct it."
        )
    return parse(KINDS[kind], content, origin, hides=_may_be_secret)


def _may_be_secret(path: str, value: object) -> bool:
    if isinstance(value, str):
        return is_secret(path, value)
    return isinstance(value, dict | list) and (names_secret(path) or any(secrets_in(value)))
