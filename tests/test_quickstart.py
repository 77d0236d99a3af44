"""The quickstart keeps the bounds that the README states."""

import json
from pathlib import Path

import pytest

from t2v.cli import main


def keep_bounds(workdir: Path, method: str) -> None:
    """Run a method's quickstart, and hold its samples to its bounds."""
    assert main(["quickstart", "--workdir", str(workdir), "--method", method]) == 0
    result = json.loads((workdir / "quickstart.json").read_text())
    for name, bound in result["bounds"].items():
        assert result["scores"][name] >= bound, result
    assert (workdir / "samples" / "contact_sheet.png").stat().st_size > 0
    assert len(json.loads((workdir / "samples" / "samples.json").read_text())) == 40


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(2400)
def test_samples_keep_their_bounds(tmp_path):
    keep_bounds(tmp_path / "quickstart", "hpdm")
    # Sampled while it trained; where others use the cores, that may not come to its end.
    samples = tmp_path / "quickstart" / "runs" / "quickstart_base" / "samples"
    assert json.loads((samples / "state.json").read_text())["state"] in ("done", "sampling")


def test_a_folder_that_holds_something_is_refused(tmp_path, capsys):
    (tmp_path / "precious").write_text("mine")
    assert main(["quickstart", "--workdir", str(tmp_path)]) == 78
    assert "is not empty; remove it or give --workdir another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
