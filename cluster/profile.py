"""The profile of a site, SLURM or Kubernetes, as it is read; errors say all that is wrong."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from cluster.kubernetes_profile import KubernetesProfile
from cluster.secrets import is_secret
from cluster.slurm_profile import SlurmProfile
from data_pipeline.errors import ConfigError, InputMissing
from t2v.recipe.reading import read_mapping

Profile = SlurmProfile | KubernetesProfile
_PROFILE = TypeAdapter(Annotated[Profile, Field(discriminator="kind")])


def load_profile(path: str | Path) -> Profile:
    """The profile of a cluster; errors say all that is wrong."""
    path = Path(path)
    if not path.is_file():
        raise InputMissing(f"{path}: no such profile; `ls configs/cluster` shows those we ship.")
    return parse_profile(read_mapping(path), str(path))


def parse_profile(content: dict, origin: str) -> Profile:
    """A profile from plain data; `origin` begins each line of the error."""
    try:
        return _PROFILE.validate_python(content)
    except ValidationError as error:
        lines = [f"{origin}: {_explain(item)}" for item in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _explain(error) -> str:
    """One line for one pydantic error; a value is shown unless it may be a secret."""
    location = [str(part) for part in error["loc"]]
    if location[:1] in (["slurm"], ["kubernetes"]):
        del location[0]
    path = ".".join(location)
    match error["type"]:
        case "extra_forbidden":
            return f"{path}: unknown field; leave it out, or see docs/cluster.md for those known."
        case "missing":
            return f"{path}: missing; add it."
        case "union_tag_not_found" | "union_tag_invalid":
            known = error["ctx"].get("expected_tags") or "'slurm', 'kubernetes'"
            given = repr(error["ctx"]["tag"]) if "tag" in error["ctx"] else "missing, which"
            kind = f"{path}.kind" if path else "kind"
            return f"{kind}: {given} is wrong because it is none of {known}; correct it."
        case "value_error":
            message = error["msg"].removeprefix("Value error, ")
            return f"{path}: {message}." if path else f"{message}."
    value, reason = error.get("input"), error["msg"][:1].lower() + error["msg"][1:]
    shown = "value" if isinstance(value, str) and is_secret(path, value) else repr(value)
    return f"{path}: {shown} is wrong because {reason}; correct it."
