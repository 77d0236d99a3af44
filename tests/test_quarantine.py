"""The account of bad samples and its budget."""

import json

import pytest

from data_pipeline.errors import DataError
from data_pipeline.feeding.quarantine import Quarantine


def bad(n: int, reason: str = "cannot be decoded") -> dict:
    return {"n": n, "id": f"0/000000/{n % 7}", "reason": reason}


def quarantine(path, *, rate: float = 0.001, row: int = 100, first: int = 0) -> Quarantine:
    return Quarantine(path, max_drop_rate=rate, max_drops_in_a_row=row, first_sample=first)


def test_every_record_is_a_line(tmp_path):
    book = quarantine(tmp_path / "run" / "quarantine.jsonl")
    book.record([bad(5), bad(2)], next_sample=8)
    book.record([bad(9)], next_sample=16)
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [bad(2), bad(5), bad(9)]
    assert book.dropped == 3


def test_a_resumed_run_counts_what_was_before_it_and_writes_no_line_twice(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    quarantine(path).record([bad(2), bad(5), bad(9)], next_sample=12)
    resumed = quarantine(path, first=8)
    assert resumed.dropped == 2
    resumed.record([bad(9), bad(11)], next_sample=16)
    assert resumed.dropped == 4
    assert len(path.read_text().splitlines()) == 4


def test_the_run_stops_past_the_rate(tmp_path):
    book = quarantine(tmp_path / "q")
    book.record([bad(100 * i) for i in range(10)], next_sample=2000)  # 10 of the first 10,000
    with pytest.raises(
        DataError, match=r"11 of 2000 .* data.max_drop_rate 0.001 allows 10. .*1 x no"
    ):
        book.record([bad(1001, "no such curve")], next_sample=2000)


def test_no_drop_is_allowed_at_rate_zero(tmp_path):
    with pytest.raises(DataError, match="allows 0"):
        quarantine(tmp_path / "q", rate=0.0).record([bad(1)], next_sample=10**6)


def test_the_run_stops_past_so_many_in_a_row_over_steps(tmp_path):
    book = quarantine(tmp_path / "q", rate=1.0, row=4)
    book.record([bad(0), bad(1), bad(3)], next_sample=4)
    book.record([bad(4), bad(5), bad(5), bad(6)], next_sample=8)
    with pytest.raises(DataError, match=r"data\.max_drops_in_a_row is 4"):
        book.record([bad(7)], next_sample=8)


def test_a_line_cut_by_a_kill_is_dropped_and_a_damaged_one_is_told(tmp_path):
    path = tmp_path / "q"
    quarantine(path).record([bad(1), bad(2)], next_sample=4)
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert quarantine(path, first=4).dropped == 1
    path.write_text("garbage\n" + whole)
    with pytest.raises(DataError, match="line 1 is damaged"):
        quarantine(path)
