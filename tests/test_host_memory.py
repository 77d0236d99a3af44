"""A process in a container has the container's memory, not the machine's."""

import psutil
import pytest

from data_pipeline.host_memory import available_memory

MIB = 2**20


def group(folder, limit, use, cache=0, *, version=2):
    folder.mkdir(parents=True, exist_ok=True)
    limit_file, use_file, cached = {
        2: ("memory.max", "memory.current", "inactive_file"),
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }[version]
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / use_file).write_text(f"{use}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{cached} {cache}\n")


def left(tmp_path, line: str) -> int:
    membership = tmp_path / "cgroup"
    membership.write_text(line)
    return available_memory(cgroups=tmp_path / "fs", membership=membership)


def test_the_least_of_all_groups_around_counts(tmp_path):
    group(tmp_path / "fs/job/step", "max", 3 * MIB)
    group(tmp_path / "fs/job", 10 * MIB, 7 * MIB, cache=2 * MIB)
    group(tmp_path / "fs", 100 * MIB, 50 * MIB)
    assert left(tmp_path, "0::/job/step\n") == 5 * MIB
    assert left(tmp_path, "0::/\n") == 50 * MIB


def test_older_groups_count_too(tmp_path):
    group(tmp_path / "fs/memory/job", 8 * MIB, 6 * MIB, version=1)
    assert left(tmp_path, "5:cpu:/other\n4:memory:/job\n") == 2 * MIB


def test_a_group_that_is_over_its_limit_has_nothing_left(tmp_path):
    group(tmp_path / "fs/job", 8 * MIB, 9 * MIB)
    assert left(tmp_path, "0::/job\n") == 0


@pytest.mark.parametrize("line", ["", "0::/nowhere\n", "3:cpu:/job\n"])
def test_without_a_limit_it_is_the_machine_s(tmp_path, line):
    available = psutil.virtual_memory().available
    assert left(tmp_path, line) == pytest.approx(available, rel=0.5)
