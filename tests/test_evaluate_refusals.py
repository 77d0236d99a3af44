"""What evaluation refuses: each in one line, before anything is shown."""

import json
import re

import pytest

from data_pipeline.errors import ConfigError
from t2v.cli import main
from t2v.evaluation.protocol import load_protocol
from tests.scenes import (
    CLIPS,
    home,
    rules,
    run_evaluate,
    write_rules,
    write_samples,
)

__all__ = ["home"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fps": "25"}, "p.yaml: fps: value '25' is wrong because"),
        ({"frames": 16}, "p.yaml: frames: unknown field"),
        ({"i3d": None}, "i3d: missing, but view 'whole' asks for fvd"),
        ({"views": [{"name": "a", "size": [4, 8, 8], "frames": 3, "stride": 2, "metrics": ["seam"]
                     }]},
         "views.0.frames: 3 with stride 2 is wrong because clips have 4 frames"),
        ({"generated": {"clips": 1}}, "generated.clips: value 1 is wrong"),
        ({"c3d": {"path": "c3d.pt", "splits": 40}}, "c3d.splits: 40 is wrong because 48"),
    ],
)  # fmt: skip
def test_a_wrong_protocol_is_one_line(home, tmp_path, changes, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        load_protocol(write_rules(tmp_path / "p.yaml", rules(home, **changes)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"i3d.path": "text.pt"}, 78, "text.pt is wrong because it is no TorchScript file"),
        ({"i3d.path": "weights.pt"}, 78, "weights.pt is wrong because it is no TorchScript file"),
        ({"i3d.path": "c3d.pt"}, 78, "c3d.pt is wrong because it takes no clips of 4x12x16"),
        ({"i3d.path": "lost.pt"}, 66, "lost.pt: no such file"),
        ({"i3d.path": "."}, 66, "no such file"),
        ({"i3d.sha256": "0" * 64}, 78, "i3d.sha256: is wrong because"),
        ({"c3d.path": "none.pt"}, 78, "none.pt is wrong because its answers are no probabilities"),
        ({"c3d.path": "i3d.pt"}, 78, "i3d.pt is wrong because it takes no clips"),
        ({"clip.path": "media"}, 66, "media is wrong because it holds no model.safetensors"),
        ({"generated.clips": CLIPS + 1}, 78, "48 clips are too few because the protocol has 49"),
        ({"real.clips": CLIPS + 1}, 78, "real.clips: 49 is wrong"),
        ({"real.split": "test01"}, 78, "real.split: 'test01' is wrong because"),
        ({"real.fingerprint": "0" * 64}, 78, "real.fingerprint: is wrong because"),
        ({"real.dataset": "media"}, 66, "media: is no dataset"),
        ({"fps": 25.0}, 78, "8 fps is wrong because the protocol has 25"),
        ({"views.0.size": [4, 16, 16]}, 78, "4x12x16 is wrong because view 'whole' has 4x16x16"),
        ({"views.0.level": 0}, 78, "has no clip of level 0; sample with --levels"),
        ({"views.0.metrics": ["seam"]}, 78, "do not all tell the same tiles"),
    ],
)
def test_input_that_cannot_be_judged_is_one_line(home, tmp_path, capsys, changes, code, words):
    content = rules(home, c3d={"path": str(home / "c3d.pt"), "splits": 2})
    content["clip"] = {"path": str(home / "clip")} if "clip.path" in changes else None
    metrics = ["fvd", "inception_score", *(["text_score"] if content["clip"] else [])]
    content["views"][0]["metrics"] = metrics
    more = []
    for name, value in changes.items():
        if name.endswith((".path", ".dataset")):
            value = str(home / str(value))
        more += ["--set", f"{name}={json.dumps(value)}"]
    protocol = write_rules(tmp_path / "p.yaml", content)
    assert run_evaluate(home / "other", protocol, tmp_path / "out", *more) == code
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error
    assert not (tmp_path / "out" / "result.json").exists()


def test_what_is_not_there_is_one_line(home, tmp_path, capsys):
    protocol = write_rules(tmp_path / "p.yaml", rules(home))
    for target, rule, words in (
        (tmp_path / "none", protocol, f"{tmp_path / 'none'}"),
        (home / "other", tmp_path / "q.yaml", "q.yaml: no such protocol"),
    ):
        assert run_evaluate(target, rule, tmp_path / "out") == 66
        error = capsys.readouterr().err.strip()
        assert words in error
        assert "\n" not in error
    assert main(["scores", str(tmp_path)]) == 66
    assert "result.json: no such result" in capsys.readouterr().err
    (tmp_path / "result.json").write_text("[]")
    assert main(["scores", str(tmp_path)]) == 65
    assert "is no result because" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("summary", "code", "words"),
    [
        ("{", 65, "samples.json: is damaged because"),
        ("[1, 2]", 65, "samples.json: is damaged because it is no list of samples"),
        ('[{"file": "a.mp4", "levels": [3]}]', 65, "no list of samples ('0.levels')"),
        ('[{"file": "a.mp4", "levels": {"0": 5}}]', 65, "no list of samples ('0.levels.0')"),
        ('[{"file": "a.mp4", "outputs": 5}]', 65, "no list of samples ('0.outputs')"),
        ('[{"file": "a.mp4", "outputs": [{"borders": []}]}]', 65, "samples ('0.outputs.0.size')"),
        ('[{"file": "a.mp4", "settings": {"fps": "8"}}]', 65, "samples ('0.settings.fps')"),
        ('[{"file": "../real/dataset.json"}]', 65, "is wrong because it leaves the folder"),
        ("[]", 66, "holds no samples.json and no mp4"),
        (None, 66, "0003.mp4: missing although samples.json names it"),
        ("sha256", 65, "0000.mp4: is not the file that samples.json tells of"),
        ("cut", 65, "0001.mp4: cannot be decoded"),
        ("cut first", 65, "0000.mp4: cannot be decoded"),
    ],
)
def test_damaged_samples_are_one_line(home, tmp_path, capsys, summary, code, words):
    folder = write_samples(tmp_path / "samples", range(4))
    records = [{"file": f"{n:04d}.mp4", "prompt": n} for n in range(4)]
    if summary is None:
        (folder / "0003.mp4").unlink()
    elif summary == "sha256":
        records[0]["sha256"] = "0" * 64
    elif summary == "cut":
        (folder / "0001.mp4").write_bytes((folder / "0001.mp4").read_bytes()[:300])
    elif summary == "cut first":
        (folder / "0000.mp4").write_bytes(b"")
    told = summary if summary and summary[0] in "[{" else json.dumps(records)
    (folder / "samples.json").write_text(told)
    protocol = write_rules(tmp_path / "p.yaml", rules(home, generated={"clips": 4}))
    assert run_evaluate(folder, protocol, tmp_path / "out") == code
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error


def test_a_damaged_result_is_never_shown(home, tmp_path, capsys):
    protocol = write_rules(tmp_path / "p.yaml", rules(home, generated={"clips": 8}))
    assert run_evaluate(home / "other", protocol, tmp_path / "out") == 0
    whole = json.loads((tmp_path / "out" / "result.json").read_text())
    other = json.loads(json.dumps(whole["pinned"])) | {"fps": 9.0}
    bad = tmp_path / "bad.json"
    for changes in (
        {"views": {}},
        {"views": [1]},
        {"views": {"whole": {"fvd": {"value": None, "low": 0.0}}}},
        {"pinned": {}},
        {"pinned": other},
        {"fingerprint": "0" * 64},
        {"real": {}},
        {"caveats": 5},
    ):
        bad.write_text(json.dumps(whole | changes))
        capsys.readouterr()
        assert main(["scores", str(tmp_path / "out"), str(bad)]) == 65, changes
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"{bad}: is ")
        assert "\n" not in error
    bad.write_bytes(b"\xff" * 1000)
    assert main(["scores", str(bad)]) == 65
    assert len(capsys.readouterr().err) < 300 + len(str(bad))


def test_an_out_that_is_no_folder_is_refused_before_measuring(home, tmp_path, capsys):
    protocol, out = write_rules(tmp_path / "p.yaml", rules(home)), tmp_path / "out"
    out.touch()
    assert run_evaluate(home / "other", protocol, out) == 74
    assert "out: cannot be used because" in capsys.readouterr().err


def test_one_clip_has_no_covariance(home, tmp_path, capsys):
    one = write_samples(tmp_path / "one", range(1))
    protocol = write_rules(tmp_path / "p.yaml", rules(home, generated={"clips": 4}))
    assert run_evaluate(one, protocol, tmp_path / "out") == 78
    assert "1 clips are too few because the protocol has 4, and a covariance needs two" in (
        capsys.readouterr().err
    )
