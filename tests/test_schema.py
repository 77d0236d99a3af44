"""JSON schemas of YAML files: written from the models, in step with them, and right about ours."""

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from t2v.commands.schema import KINDS, json_schema

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))


def named_schema(path: Path) -> Path:
    """The schema that an editor takes, by the first line of a file."""
    first = path.read_text().splitlines()[0]
    return path.parent / first.removeprefix("# yaml-language-server: $schema=")


@pytest.mark.parametrize("kind", KINDS)
def test_shipped_schemas_are_those_of_the_models(kind):
    path = CONFIGS / "schema" / f"{kind}.json"
    assert path.read_text() == json_schema(kind) + "\n", f"t2v schema {kind} > {path}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_files_fit_the_schema_they_name(path):
    schema = json.loads(named_schema(path).read_text())
    Draft202012Validator.check_schema(schema)
    assert list(Draft202012Validator(schema).iter_errors(yaml.safe_load(path.read_text()))) == []


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"total_step": 3}, []),
        ({"seed": "0"}, ["seed"]),
        ({"method": {"kind": "other"}}, ["method"]),
        ({"engine": {"kind": "fsdp", "zero_stage": 4}}, ["engine", "zero_stage"]),
    ],
)
def test_what_the_models_refuse_the_schema_refuses_there(change, where):
    recipe = yaml.safe_load((CONFIGS / "ucf101_s.yaml").read_text()) | change
    validator = Draft202012Validator(json.loads(json_schema("recipe")))
    assert [list(error.path) for error in validator.iter_errors(recipe)] == [where]
