"""`t2v schema`: JSON schemas, by which editors complete and check YAML."""

import argparse
import json

from t2v.commands.parser import add_verb

KINDS = ("recipe", "profile", "protocol")


def add_schema_verb(verbs) -> None:
    """The verb and its argument."""
    verb = add_verb(verbs, "schema", schema, "a JSON schema, for editors that check YAML",
                    "t2v schema recipe > configs/schema/recipe.json")  # fmt: skip
    verb.add_argument("kind", choices=KINDS)


def schema(options: argparse.Namespace) -> None:
    print(json_schema(options.kind))


def json_schema(kind: str) -> str:
    """The schema of a kind of YAML file, as text; it is written from the models that read it."""
    from pydantic import TypeAdapter

    match kind:
        case "recipe":
            from t2v.recipe.recipe import RunConfig as model
        case "profile":
            from cluster.profile import Profile as model
        case _:
            from t2v.evaluation.protocol import Protocol as model
    found = TypeAdapter(model).json_schema()
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema"} | found, indent=1)
