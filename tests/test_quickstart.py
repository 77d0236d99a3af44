"""The quickstart keeps the bounds that the README states."""

import json

import pytest

from t2v.cli import main


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1500)
def test_quickstart_samples_keep_their_bounds(tmp_path):
    workdir = tmp_path / "quickstart"
    assert main(["quickstart", "--workdir", str(workdir)]) == 0
    result = json.loads((workdir / "quickstart.json").read_text())
    for name, bound in result["bounds"].items():
        assert result["scores"][name] >= bound, result
    assert (workdir / "samples" / "contact_sheet.png").stat().st_size > 0
    assert len(json.loads((workdir / "samples" / "samples.json").read_text())) == 40


def test_a_folder_that_holds_something_is_refused(tmp_path, capsys):
    (tmp_path / "precious").write_text("mine")
    assert main(["quickstart", "--workdir", str(tmp_path)]) == 78
    assert "is not empty; remove it or give --workdir another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
