"""The methods there are: ours, and those that other packages bring.

A package registers its own under the entry point group `t2v.methods`: the name is the recipe's
`method.kind`, the object a class that does what `t2v.methods.method.Method` says.
"""

from importlib.metadata import entry_points
from typing import Annotated

from pydantic import GetPydanticSchema
from pydantic_core import core_schema

from data_pipeline.errors import ConfigError
from t2v.methods.hpdm.method import HPDMMethod
from t2v.methods.method import Method, MethodConfig
from t2v.methods.pyramid_flow.method import PyramidFlowMethod


def installed() -> dict[str, type[Method]]:
    """The methods of other packages, by their kinds."""
    methods = {}
    for found in entry_points(group="t2v.methods"):
        try:
            methods[found.name] = found.load()
        except Exception as error:  # whatever a stranger's module raises
            raise ConfigError(
                f"{found.value}: cannot be loaded as method '{found.name}' because "
                f"{type(error).__name__}: {error}; mend its package, or uninstall it."
            ) from error
    return methods


METHODS: dict[str, type[Method]] = {
    "hpdm": HPDMMethod,
    "pyramid-flow": PyramidFlowMethod,
} | installed()

# The section of whichever method its `kind` names.
AnyMethodConfig = Annotated[
    MethodConfig,
    GetPydanticSchema(
        lambda _, handler: core_schema.tagged_union_schema(
            {kind: handler.generate_schema(method.Config) for kind, method in METHODS.items()},
            discriminator="kind",
        )
    ),
]
