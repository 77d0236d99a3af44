"""Names and values that shells, sbatch and Kubernetes take as they stand."""

from typing import Annotated

from pydantic import Field

ENVIRONMENT_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
# What sbatch reads in a directive without any quoting.
DIRECTIVE_VALUE = r"^[A-Za-z0-9@+=:,./_\[\]*&|-]+$"
LABEL = r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"
LABEL_VALUE = r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$"
DNS_LABEL = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
DNS_NAME = r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"
ABSOLUTE_PATH = r"^/[^\x00-\x1f\x7f:]*$"
# https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/
QUANTITY = r"\d+(\.\d+)?(m|k|[KMGTPE]i|[MGTPE]|e\d+)?"
IMAGE_BY_DIGEST = r"^[a-z0-9][a-zA-Z0-9._:/-]*@sha256:[0-9a-f]{64}$"

Directive = Annotated[str, Field(pattern=DIRECTIVE_VALUE)]
Folder = Annotated[str, Field(pattern=ABSOLUTE_PATH)]
Label = Annotated[str, Field(pattern=LABEL)]
LabelValue = Annotated[str, Field(pattern=LABEL_VALUE)]


def refuse_unprintable(name: str, text: str, *, allowed: str = "") -> None:
    """ValueError for control characters and what is no UTF-8."""
    for character in text:
        surrogate = "\ud800" <= character <= "\udfff"
        if surrogate or (not character.isprintable() and character not in allowed + " "):
            raise ValueError(f"{name} has the character {character!r}, which no job can hold")
