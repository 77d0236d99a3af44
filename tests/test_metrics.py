"""metrics.jsonl: one true line per step, whatever happened before."""

import json

import pytest

from t2v.engine.world import ALONE
from t2v.watching import metrics as metrics_module
from t2v.watching.metrics import Metrics, MetricsConfig, StepSums, drop_after, read_lines


def write_steps(run_dir, first: int, last: int) -> None:
    metrics = Metrics(run_dir, MetricsConfig(), name="x", step=first - 1)
    for step in range(first, last + 1):
        metrics.write({"step": step, "loss": step / 2})
    metrics.close()


def lines(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_resumed_run_never_holds_a_step_twice(tmp_path):
    write_steps(tmp_path, 1, 7)
    write_steps(tmp_path, 5, 9)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 10))


def test_half_a_line_of_a_killed_process_is_dropped(tmp_path):
    write_steps(tmp_path, 1, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    write_steps(tmp_path, 4, 4)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_another_damaged_line_is_named_and_stays(tmp_path, capsys):
    write_steps(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\x00\x00\n" + second + third)
    write_steps(tmp_path, 3, 4)
    assert "metrics.jsonl: line 2 is damaged" in capsys.readouterr().out
    assert path.read_bytes().splitlines()[1] == b"\x00\x00"
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3, 4]


def test_lines_that_find_no_space_wait_for_it_and_none_is_half_written(
    tmp_path, monkeypatch, capsys
):
    metrics = Metrics(tmp_path, MetricsConfig(), name="x", step=0)
    metrics.write({"step": 1})
    real = metrics.file
    monkeypatch.setattr(metrics, "file", FullDisk(real))
    for step in (2, 3):
        metrics.write({"step": step})
    assert [line["step"] for line in lines(tmp_path)] == [1]
    monkeypatch.setattr(metrics, "file", real)
    metrics.write({"step": 4})
    metrics.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert capsys.readouterr().out.count("lines wait in memory") == 1


class FullDisk:
    """A file on a disk with room for four more bytes of each write."""

    def __init__(self, file) -> None:
        self.file = file
        self.fileno = file.fileno

    def write(self, content: bytes) -> int:
        return self.file.write(content[:4])


def test_what_the_steps_took_is_known_after_a_restart(tmp_path):
    lines = [{"step": 2, "step_seconds": 1.0}, {"step": 2, "held_out_loss": 1.0}]
    lines += [{"step": 6, "step_seconds": 0.5}, {"step": 8, "step_seconds": 9.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    metrics = Metrics(tmp_path, MetricsConfig(), name="x", step=6)
    metrics.close()
    assert metrics.measured == (2 * 1.0 + 4 * 0.5, 6)


@pytest.mark.parametrize("last", [3, 5])
def test_an_attempt_that_was_taken_for_dead_writes_no_line_into_its_heirs(tmp_path, last):
    zombie = Metrics(tmp_path, MetricsConfig(), name="x", step=0)
    for step in range(1, last + 1):
        zombie.write({"step": step})
    heir = Metrics(tmp_path, MetricsConfig(), name="x", step=3)
    for step in (4, 5, 6):
        zombie.write({"step": step, "of": "zombie"})
        heir.write({"step": step, "of": "heir"})
    zombie.close()
    heir.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [line["of"] for line in lines(tmp_path)[3:]] == ["heir"] * 3


def test_dropping_nothing_changes_nothing(tmp_path):
    write_steps(tmp_path, 1, 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    drop_after(tmp_path / "metrics.jsonl", 3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_null(tmp_path, value):
    metrics = Metrics(tmp_path, MetricsConfig(), name="x", step=0)
    metrics.write({"step": 1, "loss": value})
    metrics.close()
    assert lines(tmp_path) == [{"step": 1, "loss": None}]


def digest_of(numbers: list[int], ids: list[str]) -> str:
    sums = StepSums(("flow",), ALONE)
    sums.add_samples(numbers, ids)
    sums.add_step([0.0], data_seconds=0.0, step_seconds=1.0)
    return sums.summary(len(ids))["batch_digest"]


def test_batch_digest_tells_samples_and_their_order_but_not_who_read_them():
    digest = digest_of([4, 5, 6], ["a", "b", "c"])
    assert digest_of([6, 4, 5], ["c", "a", "b"]) == digest
    assert digest_of([4, 5, 6], ["b", "a", "c"]) != digest
    assert digest_of([5, 6, 7], ["a", "b", "c"]) != digest


def test_a_line_holds_means_since_the_last_one():
    sums = StepSums(("first", "second"), ALONE)
    sums.add_step([1.0, 2.0], data_seconds=0.5, step_seconds=1.0)
    sums.add_step([3.0, 6.0], data_seconds=0.5, step_seconds=3.0)
    line = sums.summary(8)
    assert (line["loss"], line["loss_first"], line["loss_second"]) == (6.0, 2.0, 4.0)
    assert (line["samples_per_second"], line["data_wait_share"]) == (4.0, 0.25)
    sums.add_step([1.0, 1.0], data_seconds=0.0, step_seconds=1.0)
    assert sums.summary(8)["loss"] == 2.0


def test_a_long_file_is_neither_held_nor_parsed_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(1, 20_001):
            line = {
                "step": step,
                "step_seconds": 0.5,
                "productive_seconds": step / 2,
                "x": "y" * 99,
            }
            file.write(json.dumps(line) + "\n")
    parsed = []
    real = metrics_module.parse_line

    def counted(line: bytes) -> dict | None:
        parsed.append(len(line))
        return real(line)

    metrics_module.parse_line, before = counted, path.read_bytes()
    try:
        assert drop_after(path, 19_990) == (9995.0, 19_990)
    finally:
        metrics_module.parse_line = real
    assert len(parsed) == 11
    assert before.startswith(path.read_bytes())
    assert [line["step"] for line in read_lines(path)][-1] == 19_990
