"""Words of others are shown and never obeyed, by every command that prints them."""

import ast
import io
import json
import random
import re
import sys

import pytest

from cluster.node_checks import Check
from cluster.preflight import NodeReport, judge, print_reports
from cluster.status import run_status
from cluster.status_view import print_statuses
from data_pipeline.printable import MOST_CHARACTERS, plain
from data_pipeline.terminal import Terminal
from t2v.attempt.failure import Failure, failure_page, record_failure
from t2v.cli import main
from tests.test_layering import FILES, TREES

PIECES = (
    *(
        "[/",
        "[/]",
        "[bold]",
        "[red]x[/red]",
        "[link=file:///etc/passwd]",
        "[",
        "]",
        "\\[",
        ":bomb:",
    ),
    *("\x1b[31m", "\x1b]0;title\x07", "\x1b[2J", "\x9b31m", "\x00", "\r", "\b", "\x7f", "\u202e"),
    *("\ud800", "\udcff", "\u2028", "\u200b", "`", "```\n# x", "<script>", "%s{0}", "'", '"', "\n"),
)


def hostile_strings(count: int) -> list[str]:
    dice = random.Random(0)
    texts = ["".join(dice.choices(PIECES, k=dice.randint(1, 12))) for _ in range(count - 2)]
    return [*texts, "[/" * 5000, "\x1b[31m" * 2500]


HOSTILE = hostile_strings(200)
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028\u202e\ud800-\udfff]")


def test_plain_text_stays_and_every_other_character_is_seen():
    assert plain("é 漢 [bold]\n\tx") == "é 漢 [bold]\n\tx"
    assert plain("\x1b[31m\x00\udcff\u202e") == r"\x1b[31m\x00\udcff\u202e"
    assert all(not OBEYED.search(plain(text)) for text in HOSTILE)
    assert plain("ab" * MOST_CHARACTERS).endswith("ab ... (20,000 characters)")


@pytest.mark.parametrize("block", range(4))
def test_status_shows_any_reason_and_obeys_none(tmp_path, block):
    for text in HOSTILE[block::4]:
        status = {"state": "failed", "exit_code": 1, "reason": text, "host": text, "step": 1}
        (tmp_path / "status.json").write_text(json.dumps(status))
        console = Terminal(record=True, width=300, file=io.StringIO())
        print_statuses([run_status(tmp_path)], console)
        assert not OBEYED.search(console.export_text())


def test_markup_in_a_table_is_text(tmp_path, capsys):
    reason = "tensor [bold]w[/] [/ \x1b[31m"
    status = {"state": "failed", "exit_code": 1, "reason": reason, "step": 1}
    (tmp_path / "status.json").write_text(json.dumps(status))
    assert main(["status", str(tmp_path)]) == 0
    assert r"tensor [bold]w[/] [/ \x1b[31m" in capsys.readouterr().out


def test_preflight_shows_any_finding_and_obeys_none(capsys):
    for start in range(0, len(HOSTILE), 50):
        texts = HOSTILE[start : start + 50]
        reports = [NodeReport(t[:40], [Check(t, "failed", t, 66)], 0.0) for t in texts]
        print_reports(reports, judge(reports))
    assert not OBEYED.search(capsys.readouterr().out)


def test_errors_show_any_path_and_obey_none(capsys):
    for text in HOSTILE:
        if "\0" not in text and not text.startswith("-"):
            assert main(["status", "--", f"none/{text}"[:200]]) == 66
    assert not OBEYED.search(capsys.readouterr().err)


def test_a_failure_page_and_a_report_hold_any_reason(tmp_path, capsys):
    page = ""
    for text in HOSTILE:
        failure = Failure(
            rank=0, host="n1", exit_code=1, reason=plain(text), section="step", step=1,
            at="2026-01-01T00:00:00+00:00", stack=text.encode(errors="replace").decode(),
            samples=(text.encode(errors="replace").decode(),),
        )  # fmt: skip
        page = failure_page(failure, run_dir=tmp_path, logs=tmp_path, attempt=1)
        assert not OBEYED.search(page)
        assert page.count("```") == 4
        record_failure(tmp_path, failure)
        (tmp_path / "status.json").write_text(json.dumps({"state": "failed", "reason": text}))
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    assert main(["report", str(tmp_path)]) == 0
    html = (tmp_path / "report.html").read_text(encoding="utf-8", errors="replace")
    assert "[31m" in html


def test_nothing_prints_but_through_the_terminal():
    allowed = "data_pipeline/terminal.py"
    users = [file for file, text in FILES.items() if "rich.console" in text and file != allowed]
    assert users == []
    assert sys.modules["rich.console"]


def spoken(call: ast.Call) -> bool:
    """Whether a print says only what is ours, or what went through `plain` or a program's JSON."""
    sound = {"plain", "json_schema", "json.dumps"}
    for argument in call.args:
        told = ast.unparse(argument)
        name = told.partition("(")[0]
        is_ours = isinstance(argument, ast.Constant) or name in sound
        if not (is_ours or "to_json" in told or "found.decision" in told):
            return False
    return True


def test_no_print_says_words_of_others_as_they_are():
    broken = [
        f"{file}:{node.lineno}: prints {ast.unparse(node)[:80]}; use plain, or say"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and not spoken(node)
    ]
    assert broken == []
