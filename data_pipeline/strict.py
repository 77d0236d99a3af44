"""The base of every configuration model: frozen, no unknown fields, no silent conversion."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """A frozen configuration model that refuses unknown fields and values of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# YAML has lists only, so the outer tuple accepts a list; its members stay strict.
Size = Annotated[
    tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]],
    Field(strict=False, description="(frames, height, width)"),
]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
