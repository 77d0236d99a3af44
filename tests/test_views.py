"""Views of metrics: they show what the lines say, and their failures are theirs alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from t2v.watching.lines import numbers
from t2v.watching.metrics import Metrics, MetricsConfig
from t2v.watching.views import Guarded, progress_text


class Failing:
    """A view that fails at a given moment."""

    def __init__(self, moment: str) -> None:
        self.moment, self.written = moment, 0
        self._at("make")

    def write(self, values: dict[str, Any]) -> None:
        self._at("write")
        self.written += 1

    def close(self) -> None:
        self._at("close")

    def _at(self, moment: str) -> None:
        if moment == self.moment:
            raise ConnectionError(moment)


@pytest.mark.parametrize("moment", ["make", "write", "close"])
def test_a_view_that_fails_is_named_once_and_ends_alone(tmp_path, moment, capsys):
    metrics = Metrics(tmp_path, MetricsConfig(), name="x", step=0)
    metrics.views.append(Guarded("dashboard", lambda: Failing(moment)))
    for step in (1, 2):
        metrics.write({"step": step})
    metrics.close()
    output = capsys.readouterr().out
    assert output == f"dashboard: ends here because ConnectionError({moment!r}); "\
        "metrics.jsonl goes on.\n"  # fmt: skip
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_numbers_of_lists_have_places_and_what_is_no_number_is_left_out():
    line = {"step": 3, "loss": None, "held_out_level_0_bins": [0.5, None, 2], "digest": "ab"}
    line |= {"whole": True}
    assert numbers(line) == {
        "step": 3,
        "held_out_level_0_bins_0": 0.5,
        "held_out_level_0_bins_2": 2,
    }


def test_tensorboard_shows_the_lines_and_forgets_undone_steps(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 5), (4, 6)):
        config = MetricsConfig(tensorboard=True)
        metrics = Metrics(tmp_path, config, name="x", step=first - 1)
        for step in range(first, last + 1):
            metrics.write({"step": step, "loss": step + first / 10, "digest": "ab"})
        metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    shown = [(event.step, round(event.value, 1)) for event in events.Scalars("loss")]
    assert shown == [(1, 1.1), (2, 2.1), (3, 3.1), (4, 4.4), (5, 5.4), (6, 6.4)]


def test_progress_says_what_is_not_finite(tmp_path: Path):
    line = {"step": 1, "loss": None, "grad_norm": None, "samples_per_second": 2.0}
    line |= {"data_wait_share": 0.5, "mfu": None}
    json.dumps(line, allow_nan=False)
    assert progress_text(line).startswith("loss not finite  grad not finite  2.0 samples/s")
    assert "MFU" not in progress_text(line)
    assert progress_text(line | {"mfu": 0.413}).endswith("MFU 41.3%")
    assert progress_text({"held_out_loss": 1.0}) == "held-out loss 1.0000"
