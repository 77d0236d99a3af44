"""What Prometheus is told of a run, and the dashboard that shows it."""

import json
import re
import socket
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from t2v.attempt.record import append_attempt
from t2v.watching.prometheus import FILE, GAUGES, PrometheusView

DASHBOARD = Path(__file__).resolve().parent.parent / "cluster" / "grafana.json"
LINE = {"step": 7, "loss": 0.5, "goodput": 0.9, "data_wait_share": 0.1, "batch_digest": "ab"}


def told(text: str) -> dict[str, float]:
    families = text_string_to_metric_families(text)
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_the_file_and_the_port_tell_the_newest_line(tmp_path):
    for number in (1, 2, 3):
        append_attempt(tmp_path, {"attempt": number, "event": "start"})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    view = PrometheusView(tmp_path, name='a"run\n', port=port, total_steps=100.0)
    view.write({**LINE, "step": 6})
    view.write({**LINE, "loss": None})  # not finite: the last number stands
    view.write({"last_checkpoint": 7, "last_checkpoint_at": 5.0})
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        asked = told(answer.read().decode())
    view.close()
    written = told((tmp_path / FILE).read_text())
    assert asked == written
    expected = {"t2v_step": 7, "t2v_total_steps": 100, "t2v_loss": 0.5, "t2v_restarts": 2}
    expected |= {"t2v_last_checkpoint_step": 7, "t2v_last_checkpoint_timestamp_seconds": 5}
    assert expected.items() <= written.items()
    assert [path.name for path in tmp_path.glob("metrics*")] == [FILE]


def test_the_dashboard_asks_for_what_runs_tell_and_for_all_of_it():
    text = json.dumps(json.loads(DASHBOARD.read_text())["panels"])
    asked = set(re.findall(r"t2v_\w+", text))
    assert asked == {metric for metric, _ in GAUGES.values()} - {"t2v_last_checkpoint_step"}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
