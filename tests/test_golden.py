"""What is not meant to alter results leaves losses, checkpoints and samples as they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden.json"
# One thread and the instructions that every x86-64 CPU with AVX2 has: libraries choose others, and
# so another order of sums, even between two CPUs with AVX-512.
PLAIN = {
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict:
    """What the code of today makes."""
    folder = tmp_path_factory.mktemp("golden")
    subprocess.run(
        [sys.executable, "-m", "tests.golden_story", folder],
        env=os.environ | PLAIN,
        cwd=GOLDEN.parents[1],
        check=True,
    )
    return json.loads((folder / "told.json").read_text())


@pytest.mark.slow
def test_losses_are_those_that_were_recorded(told):
    recorded = json.loads(GOLDEN.read_text())
    for recipe, losses in recorded["losses"].items():
        # Another kind of CPU sums in another order; ten times what that was seen to move.
        assert told["losses"][recipe] == pytest.approx(losses, rel=1e-4), recipe


@pytest.mark.slow
def test_bytes_are_those_that_were_recorded(told):
    recorded = json.loads(GOLDEN.read_text())
    if any(recorded[name] != told[name] for name in ("machine", "torch")):
        pytest.skip("recorded on another kind of CPU, or by another torch")
    assert told == recorded
