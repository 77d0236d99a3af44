"""What drivers tell of their GPUs is read as they write it, and nothing is said where none does."""

import os
import stat
from pathlib import Path

from cluster.driver import parse_csv, visible
from cluster.gpu_events import (
    FIELDS,
    GpuWatch,
    changes,
    open_log,
    parse_xids,
    read_log,
    states_of,
)

KERNEL = """\
4,1201,88123456,-;NVRM: Xid (PCI:0000:3b:00): 79, pid=4711, name=python, GPU has fallen off the bus.
 SUBSYSTEM=pci
4,1202,88123460,-;NVRM: GPU 0000:3b:00.0: GPU has fallen off the bus.
4,1203,88123470,-;NVRM: Xid (PCI:0000:5e:00): 13, pid=12, name=python, Graphics SM Warp Exception
3,1204,88123480,-;NVRM: Xid (PCI:0000:10:1c): 63, Row Remapper: New row marked for remapping
Nov 22 18:29:55 n7 kernel: [ 966.503025] NVRM: Xid (0000:01:00): 31, Ch 0000000b, engmask 00000120
6,1205,88123490,-;usb 1-1: new high-speed USB device number 2
6,1206,88123495,-;NVRM: Xid (PCI:0000:3b:00): none of ours
"""
CSV = """\
0, GPU-aa, 00000000:3B:00.0, {errors}, {reasons}
1, GPU-bb, 00000000:5E:00.0, 0, 0x0000000000000000
"""
IDLE, HOT, CAPPED = "0x0000000000000001", "0x0000000000000048", "0x0000000000000004"


def states(errors: object = 0, reasons: str = IDLE, chosen: str | None = None):
    rows = parse_csv(CSV.format(errors=errors, reasons=reasons), FIELDS)
    return states_of(visible(rows, chosen))


def test_xid_errors_of_the_kernels_log():
    events = parse_xids(KERNEL)
    assert [event.text.split(",")[0] for event in events] == [
        "GPU 0000:3b:00: Xid 79",
        "GPU 0000:5e:00: Xid 13",
        "GPU 0000:10:1c: Xid 63",
        "GPU 0000:01:00: Xid 31",
    ]
    assert "GPU has fallen off the bus" in events[0].text
    assert [event.is_broken for event in events] == [True, False, False, False]
    hostile = parse_xids("NVRM: Xid (PCI:0000:3b:00): 79, \x1b[31mname=[/bold]\n")
    assert "\x1b" not in hostile[0].text


def test_memory_errors_and_lowered_clocks_are_news_only_when_they_come():
    assert changes(states(), states()) == []
    (errors,) = changes(states(errors=2), states(errors=5))
    assert errors.text == "GPU 0: 3 uncorrected memory errors"
    assert errors.is_broken
    (hot,) = changes(states(), states(reasons=HOT))
    assert hot.text.startswith("GPU 0: its clocks were lowered")
    assert not hot.is_broken
    assert changes(states(reasons=HOT), states(reasons=HOT)) == []
    assert changes(states(), states(reasons=CAPPED)) == []  # everyday life
    assert changes(states("[N/A]", "[Not Supported]"), states("[N/A]", "[N/A]")) == []
    assert changes(states(), []) == []
    assert changes([], states(errors=7)) == []  # of an earlier job


def test_a_place_is_one_whoever_writes_it_and_only_the_jobs_own_gpus_count():
    places = {state.place for state in states()}
    events = parse_xids(KERNEL)
    assert {event.place for event in events[:2]} == places
    assert [event.place in places for event in events] == [True, True, False, False]
    assert [state.index for state in states(chosen="1")] == ["1"]
    assert [state.index for state in states(chosen="GPU-a")] == ["0"]


def test_a_broken_gpu_is_told_at_once_and_at_the_end(tmp_path, monkeypatch):
    log = tmp_path / "kmsg"
    log.write_text(KERNEL)  # of before
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{states_line()}'\n")
    smi.chmod(smi.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("cluster.gpu_events.KERNEL_LOG", str(log))
    monkeypatch.setattr("cluster.gpu_events.LOOK_SECONDS", 0.1)
    told: list[tuple[str, ...]] = []
    watch = GpuWatch(told.append)
    with log.open("a") as file:
        file.write(KERNEL * 2)
    texts, is_broken = watch.close()
    assert is_broken
    assert told == [texts]  # each once, and of the one GPU that is this job's
    assert len(texts) == 1
    assert texts[0].startswith("GPU 0000:3b:00: Xid 79")


def states_line() -> str:
    return CSV.format(errors=0, reasons=IDLE).splitlines()[0]


def test_where_there_is_no_driver_nothing_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("cluster.gpu_events.KERNEL_LOG", str(tmp_path / "none"))
    told: list[tuple[str, ...]] = []
    assert GpuWatch(told.append).close() == ((), False)
    assert told == []
    assert open_log(str(tmp_path / "none")) is None
    file = open_log(str(Path("/dev/null")))
    assert file is not None
    assert read_log(file) == ""
    os.close(file)
