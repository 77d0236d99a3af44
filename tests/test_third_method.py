"""The seam is enough: a method that only these tests register does all that HPDM does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_pipeline.making.build import build
from tests.tiny import RECIPE

ROOT = Path(__file__).parents[1]
METHOD = {
    "kind": "plain",
    "clip_size": [4, 12, 16],
    "token_size": [2, 6, 4],
    "dim": 16,
    "layers": 2,
    "sampling": {"steps": 3},
}
pytestmark = [pytest.mark.slow, pytest.mark.dist]


@pytest.fixture(scope="module")
def labelled(media, tmp_path_factory) -> Path:
    """Shards of toy clips with labels."""
    folder = tmp_path_factory.mktemp("labelled")
    lines = (media / "videos" / "captions.jsonl").read_text().splitlines()
    labelled = [json.loads(line) | {"label": n % 3} for n, line in enumerate(lines)]
    listing = media / "videos" / "labelled.jsonl"
    listing.write_text("".join(json.dumps(line) + "\n" for line in labelled))
    build(listing, folder / "shards", frames=4, height=12, width=16)
    return folder / "shards"


@pytest.fixture(scope="module")
def home(labelled, tmp_path_factory) -> Path:
    """A folder with a recipe of the method, and a package's word that there is such a method."""
    folder = tmp_path_factory.mktemp("third")
    package = folder / "site" / "plain-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: plain\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        "[t2v.methods]\nplain = tests.plain_method:PlainMethod\n"
    )
    recipe = json.loads(json.dumps(RECIPE)) | {
        "method": METHOD,
        "total_steps": 6,
        "data": {"sources": [{"path": str(labelled)}], "num_workers": 0},
        "checkpoint": {"every_steps": 3},
        "held_out": {"every_steps": 3, "samples": 4, "bins": 2,
                     "sources": [{"path": str(labelled)}]},
    }  # fmt: skip
    (folder / "plain.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def t2v(home: Path, *arguments: object, ranks: int = 1, fails: bool = False, **extra: str) -> str:
    """A public command, in processes of its own; what it printed, or its error."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    program = ["-m", "t2v.cli", *map(str, arguments)]
    paths = os.pathsep.join([str(home / "site"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else []), *program],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | extra,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


@pytest.mark.parametrize("engine", ["single", "fsdp", "zero"])
def test_a_third_method_trains_and_resumes_bit_identically(home, engine):
    recipe, ranks = home / "plain.yaml", 1 if engine == "single" else 2
    whole, killed = home / f"{engine}-whole", home / f"{engine}-killed"
    kind = f"engine.kind={engine}"
    t2v(home, "train", recipe, kind, f"run_dir={whole}", ranks=ranks)
    last_rank_dies = f"step:{ranks - 1}:5:kill"
    t2v(home, "train", recipe, kind, f"run_dir={killed}", ranks=ranks, fails=True,
        T2V_FAULT=last_rank_dies)  # fmt: skip
    t2v(home, "train", recipe, kind, f"run_dir={killed}", ranks=ranks)
    t2v(home, "checkpoint", "diff", whole, killed)  # exits 1 where a bit differs
    lines = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    told = {line["step"]: line for line in lines if "held_out_loss" in line}
    assert set(told) == {3, 6}
    assert len(told[6]["held_out_flow_bins"]) == 2
    assert told[6]["held_out_flow"] == pytest.approx(sum(told[6]["held_out_flow_bins"]) / 2)
    assert all(line["loss"] == line["loss_flow"] for line in lines if "loss" in line)


def test_a_third_method_plans_samples_exports_and_reports(home):
    recipe, run = home / "plain.yaml", home / "run"
    plan = json.loads(t2v(home, "plan", recipe, "--json"))
    assert plan["method"] == {"layers": 2}
    assert sum(plan["parameters_by_part"].values()) == plan["parameters"]
    t2v(home, "train", recipe, f"run_dir={run}")
    t2v(home, "checkpoint", "export", run, home / "weights")
    made = []
    for source in (run, home / "weights"):
        out = home / f"samples-{source.name}"
        t2v(home, "sample", source, "--label=0", "--label=2", f"--out={out}", "--seed=5")
        made.append([(out / f"000{n}.mp4").read_bytes() for n in (0, 1)])
    assert made[0] == made[1]
    t2v(home, "report", run)
    assert "Flow by noise" in (run / "report.html").read_text()


def test_what_is_wrong_inside_of_a_third_method_is_told_like_anything_else(home):
    recipe = home / "plain.yaml"
    told = t2v(home, "plan", recipe, "method.dims=16", fails=True)
    assert told == f"{recipe}: method.dims: unknown field; did you mean 'dim'?\n"
    told = t2v(home, "plan", recipe, "method.kind=plane", fails=True)
    known = "'hpdm', 'pyramid-flow', 'plain'"
    assert f"method.kind: value 'plane' is wrong because it is none of {known}" in told


def test_a_method_that_cannot_be_loaded_is_named(tmp_path):
    package = tmp_path / "site" / "broken-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[t2v.methods]\nbroken = nowhere.at_all:Method\n")
    told = t2v(tmp_path, "plan", ROOT / "configs" / "ucf101_s.yaml", fails=True)
    assert told.startswith("nowhere.at_all:Method: cannot be loaded as method 'broken' because ")
    assert told.count("\n") == 1
