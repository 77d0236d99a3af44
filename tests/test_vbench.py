"""Samples under the names of another program: each clip once, under its own prompt, or none."""

import json
from pathlib import Path

import pytest

from t2v.cli import main


def samples(folder: Path, prompts: list[str | int]) -> Path:
    folder.mkdir()
    records = []
    for number, prompt in enumerate(prompts):
        (folder / f"{number:04d}.mp4").write_bytes(bytes([number]))
        records.append({"file": f"{number:04d}.mp4", "prompt": prompt})
    (folder / "samples.json").write_text(json.dumps(records))
    return folder


def export(folder: Path, out: Path) -> int:
    return main(["evaluate", str(folder), "--export=vbench", f"--out={out}"])


def test_clips_of_a_prompt_count_up(tmp_path):
    folder = samples(tmp_path / "s", ["a cat", "a dog, 3 m", "a cat", "a cat"])
    assert export(folder, tmp_path / "out") == 0
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    names = ["a cat-0.mp4", "a dog, 3 m-0.mp4", "a cat-1.mp4", "a cat-2.mp4"]
    assert found == {name: bytes([number]) for number, name in enumerate(names)}


@pytest.mark.parametrize("prompt", ["../up", "a" * 300, 3])
def test_what_cannot_be_a_name_is_refused_before_anything_is_written(tmp_path, capsys, prompt):
    folder = samples(tmp_path / "s", ["a cat", prompt])
    assert export(folder, tmp_path / "out") == 78
    error = capsys.readouterr().err
    assert "is wrong because no file can be named so; sample prompts of VBench's lists." in error
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(tmp_path, capsys):
    folder = samples(tmp_path / "s", ["a cat"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert export(folder, tmp_path / "out") == 78
    assert "is not empty; give --out a new folder." in capsys.readouterr().err
    assert export(tmp_path, tmp_path / "new") == 66


@pytest.mark.parametrize(
    ("file", "code", "words"),
    [
        ("0002.mp4", 66, "0002.mp4: missing although samples.json names it; sample again."),
        ("../0000.mp4", 65, "'../0000.mp4' is wrong because it leaves the folder"),
        (None, 65, "samples.json: is damaged because it is no list of samples"),
    ],
)
def test_records_that_are_wrong_leave_nothing_half_copied(tmp_path, capsys, file, code, words):
    folder = samples(tmp_path / "s", ["a cat", "a dog"])
    (tmp_path / "0000.mp4").write_bytes(b"of somebody else")
    records = json.loads((folder / "samples.json").read_text())
    records[1]["file"] = file
    (folder / "samples.json").write_text(json.dumps(records))
    assert export(folder, tmp_path / "out") == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
