"""R30: a run takes no more and more of its machine, and leaves nothing when it ends."""

import gc
import os
import threading
from pathlib import Path

import psutil
import pytest

from t2v import loop
from tests.test_loop import config_of, dataset, leave_no_handlers

__all__ = ["dataset", "leave_no_handlers"]

Holdings = dict[str, int]


def holdings() -> Holdings:
    """Open files, threads and child processes of this process."""
    gc.collect()
    process = psutil.Process()
    return {
        "files": process.num_fds(),
        "threads": threading.active_count(),
        "children": len(process.children(recursive=True)),
    }


def test_a_finished_run_leaves_no_file_thread_or_process(dataset, tmp_path):
    config = config_of(dataset, tmp_path / "first")
    assert loop.train(config) == 0  # what is imported and opened once is there from now on
    before = holdings()
    for name in ("second", "third"):
        assert loop.train(config.model_copy(update={"run_dir": str(tmp_path / name)})) == 0
    assert holdings() == before


@pytest.mark.slow
def test_a_long_run_does_not_grow(dataset, tmp_path, monkeypatch):
    """Memory, files and threads at the end are those after a quarter of the run."""
    steps = 400
    config = config_of(
        dataset, tmp_path / "run", total_steps=steps, checkpoint={"every_steps": 20, "keep_last": 2}
    )
    seen: dict[int, tuple[int, Holdings]] = {}
    real = loop.fault

    def look(site: str, step: int = 0) -> None:
        if site == "step" and step in (steps // 4, steps - 1):
            seen[step] = psutil.Process(os.getpid()).memory_info().rss, holdings()
        real(site, step)

    monkeypatch.setattr(loop, "fault", look)
    assert loop.train(config) == 0
    (early, held), (late, held_late) = seen.values()
    print(f"{late / early - 1:+.2%} of {early / 1e6:.0f} MB")
    assert late < 1.05 * early
    assert held_late["children"] == held["children"]
    assert held_late["files"] <= held["files"] + 2  # a checkpoint may be under way
    assert held_late["threads"] <= held["threads"] + 1


def test_checkpoints_of_a_run_take_bounded_room(dataset, tmp_path):
    config = config_of(
        dataset, tmp_path / "run", checkpoint={"every_steps": 1, "keep_last": 2}, total_steps=6
    )
    assert loop.train(config) == 0
    left = sorted(path.name for path in Path(tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-00000005", "step-00000006"]
