"""The methods there are: ours, and those that other packages bring.

A package registers its own under the entry point group `t2v.methods`: the name is the recipe's
`method.kind`, the object a class that does what `t2v.methods.method.Method` says.
"""

from importlib.metadata import entry_points
from typing import Annotated

from pydantic import GetPydanticSchema
from pydantic_core import core_schema

from t2v.methods.hpdm.method import HPDMMethod
from t2v.methods.method import Method, MethodConfig

METHODS: dict[str, type[Method]] = {
    "hpdm": HPDMMethod,
    **{found.name: found.load() for found in entry_points(group="t2v.methods")},
}

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
