"""A run's numbers for Prometheus: a text file in the run folder, and, if asked for, a port of the
host of rank 0. `cluster/grafana.json` shows them.
"""

import time
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, start_http_server, write_to_textfile

from t2v.attempt.record import read_attempts

FILE = "metrics.prom"
WRITE_SECONDS = 5.0
# What a line of metrics.jsonl says under another name here.
GAUGES = {
    "step": ("t2v_step", "Optimizer updates of the run."),
    "total_steps": ("t2v_total_steps", "Updates after which the run is done."),
    "loss": ("t2v_loss", "Mean training loss since the last line."),
    "held_out_loss": ("t2v_held_out_loss", "Loss on held-out samples."),
    "grad_norm": ("t2v_gradient_norm", "Norm of the last gradient, before it is clipped."),
    "learning_rate": ("t2v_learning_rate", "Of the last update."),
    "samples_per_second": ("t2v_samples_per_second", "Of all ranks together."),
    "step_seconds": ("t2v_step_seconds", "Mean of a step since the last line."),
    "data_wait_share": ("t2v_data_wait_share", "Share of a step that ranks wait for samples."),
    "straggler_share": (
        "t2v_straggler_share",
        "Share of a step's time that ranks wait for the slowest; 0 where none is late.",
    ),
    "straggler_rank": ("t2v_straggler_rank", "The rank they wait for; -1: none."),
    "goodput": ("t2v_goodput", "Share of the time since the first start that led to lines."),
    "mfu": ("t2v_model_flops_utilisation", "Model FLOP/s of a device over its peak."),
    "restarts": ("t2v_restarts", "Attempts after the first."),
    "last_checkpoint": ("t2v_last_checkpoint_step", "Step of the newest checkpoint."),
    "last_checkpoint_at": (
        "t2v_last_checkpoint_timestamp_seconds",
        "When it was committed, since 1970; its age is time() less this.",
    ),
    "updated": ("t2v_updated_timestamp_seconds", "When these were last written, since 1970."),
}


class PrometheusView:
    """The newest numbers; labels tell runs apart."""

    def __init__(self, run_dir: Path, *, name: str, port: int | None, **known: float) -> None:
        self.file, self.next_write = run_dir / FILE, 0.0
        self.registry = CollectorRegistry()
        self.gauges = {
            key: Gauge(metric, told, ["run"], registry=self.registry).labels(run=name)
            for key, (metric, told) in GAUGES.items()
        }
        starts = sum(line["event"] == "start" for line in read_attempts(run_dir))
        self.known = {"restarts": float(max(starts - 1, 0)), **known}
        self.server = start_http_server(port, registry=self.registry) if port else None

    def write(self, values: dict[str, Any]) -> None:
        """Take over a line; the file follows every few seconds."""
        for key, value in (self.known | values | {"updated": time.time()}).items():
            if key in self.gauges and isinstance(value, int | float):
                self.gauges[key].set(value)
        if time.monotonic() >= self.next_write:
            self._write_file()

    def close(self) -> None:
        self._write_file()
        if self.server is not None:
            server, thread = self.server
            server.shutdown()
            server.server_close()
            thread.join()

    def _write_file(self) -> None:
        self.next_write = time.monotonic() + WRITE_SECONDS
        write_to_textfile(str(self.file), self.registry)
