"""Faults happen where and when they are asked for, and never else."""

import pytest

from data_pipeline.errors import ConfigError
from t2v.engine import faults
from t2v.engine.faults import Fault, fault, parse_faults


def test_faults_are_read_as_written():
    text = "forward:1:7:hang;checkpoint.rename:0:2:kill"
    assert parse_faults(text) == (
        Fault("forward", 1, 7, "hang"),
        Fault("checkpoint.rename", 0, 2, "kill"),
    )
    assert parse_faults("") == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("forwards:0:1:hang", "site 'forwards' is wrong because it is none of data, forward"),
        ("forward:0:1:explode", "action 'explode' is wrong because it is none of kill, term"),
        ("forward:0:hang", "not site:rank:nth:action"),
        ("forward:x:1:hang", "not site:rank:nth:action"),
        ("data:0:1:nan", "action 'nan' is wrong at site 'data'"),
    ],
)
def test_unknown_faults_are_refused(text, reason):
    with pytest.raises(ConfigError, match=reason) as failure:
        parse_faults(text)
    assert "\n" not in str(failure.value)


def test_a_fault_strikes_its_rank_at_its_time_only(monkeypatch, tmp_path):
    log = tmp_path / "log"
    monkeypatch.setenv("T2V_FAULT_LOG", str(log))
    monkeypatch.setattr(faults, "_faults", parse_faults("forward:0:3:nan;checkpoint.write:0:2:eio"))
    assert [fault("forward", step) for step in (1, 2, 3, 4)] == [False, False, True, False]
    fault("checkpoint.write")
    with pytest.raises(OSError, match="Input/output error"):
        fault("checkpoint.write")
    fault("checkpoint.write")
    assert [line.split()[1] for line in log.read_text().splitlines()] == [
        "forward:0:3:nan",
        "checkpoint.write:0:2:eio",
    ]
    monkeypatch.setenv("RANK", "1")
    assert not fault("forward", 3)
