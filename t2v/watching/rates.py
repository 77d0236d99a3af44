"""How fast a run goes against what its devices can do, and how much of its time it made use of."""

import re
from pathlib import Path

import torch

from t2v.attempt.failure import peak_memory_gib
from t2v.attempt.files import read_records, seconds_of

# Dense matrix products by NVIDIA's data sheets, in TFLOP/s; the first name that fits counts.
PEAK_TFLOPS = (
    ("H200", {"fp32": 67.0, "tf32": 494.7, "bf16": 989.4}),
    ("H100 PCIe", {"fp32": 51.2, "tf32": 378.0, "bf16": 756.0}),
    ("H100 NVL", {"fp32": 60.0, "tf32": 417.5, "bf16": 835.5}),
    ("GH200", {"fp32": 67.0, "tf32": 494.7, "bf16": 989.4}),
    ("H100", {"fp32": 67.0, "tf32": 494.7, "bf16": 989.4}),
    ("A100", {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0}),
    ("L40S", {"fp32": 91.6, "tf32": 183.0, "bf16": 362.0}),
    ("A10", {"fp32": 31.2, "tf32": 62.5, "bf16": 125.0}),
)
GIB = 2**30


class Rates:
    """FLOP/s of the model, without what is computed twice to save memory, from the TFLOP that a
    sample's training takes; one rank asks."""

    def __init__(
        self, tflop_per_sample: float, precision: str, world_size: int, device: torch.device
    ) -> None:
        self.peak = peak_tflops(device_name(device), precision)
        self.tflop = tflop_per_sample / world_size

    def of(self, samples_per_second: float) -> dict[str, float | None]:
        """TFLOP/s of one device and its share of the peak; null where the peak is not known."""
        speed = self.tflop * samples_per_second
        return {
            "model_tflops_per_device": speed,
            "mfu": None if self.peak is None else speed / self.peak,
        }


def device_name(device: torch.device) -> str:
    """A GPU's name by its driver, or `CPU`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_tflops(device_name: str, precision: str) -> float | None:
    """What a device can do at most, if we know it."""
    for name, peaks in PEAK_TFLOPS:
        if set(name.split()) <= set(re.split(r"[\s-]", device_name)):
            return peaks[precision]
    return None


def first_start(run_dir: Path) -> float | None:
    """When the run's first attempt began, in seconds since 1970, if attempts.jsonl tells."""
    records = read_records(run_dir / "attempts.jsonl")
    return seconds_of(records[0].get("at")) if records else None


def peak_memory() -> dict[str, float]:
    """Most memory this rank has held: of its GPU if it has one, and of its process."""
    memory = {"host_memory_gib": peak_memory_gib()}
    if torch.cuda.is_available():
        memory["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / GIB
    return memory
