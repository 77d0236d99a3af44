"""R26: what must stay secret reaches no file of a run, no checkpoint and no message."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from t2v.recipe.recipe import dump_config
from tests.test_loop import config_of, dataset  # noqa: F401 - a fixture

CANARIES = {
    "AWS_ACCESS_KEY_ID": "canary-access-key",
    "AWS_SECRET_ACCESS_KEY": "canary-secret-key",
    "AWS_SESSION_TOKEN": "canary-session-token",
    "HF_TOKEN": "canary-hub-token",
    "WANDB_API_KEY": "canary" * 7,
}


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "t2v.cli", *arguments],
        env=os.environ | CANARIES | environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )


def secrets_under(folder: Path) -> list[str]:
    """Files that hold a canary."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            found += [str(path) for value in CANARIES.values() if value.encode() in content]
    return found


@pytest.mark.slow
@pytest.mark.dist
def test_no_secret_reaches_a_run_or_its_messages(dataset, tmp_path):  # noqa: F811
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(config_of(dataset, tmp_path / "run", total_steps=2)))
    done = run(tmp_path, "train", str(recipe))
    assert done.returncode == 0, done.stderr
    # A store that cannot be reached: the message may name the object, never who asked.
    failed = run(
        tmp_path, "train", str(recipe), f"run_dir={tmp_path / 'failed'}",
        "data.sources=[{path: 's3://bucket/data'}]",
        AWS_ENDPOINT_URL_S3="http://canary-user:canary-secret-key@127.0.0.1:9/",
    )  # fmt: skip
    assert failed.returncode in (66, 74)
    assert "s3://bucket/data" in failed.stderr
    status = run(tmp_path, "status", str(tmp_path / "run"), "--json")
    assert json.loads(status.stdout)["state"] == "done"
    for told in (done, failed, status):
        for value in CANARIES.values():
            assert value not in told.stdout + told.stderr
    assert secrets_under(tmp_path) == []
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
