"""The account of samples that could not be used, and when there are too many of them."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data_pipeline.errors import DataError

FIRST_SAMPLES = 10_000  # the rate is of at least so many, or one early fault would stop a run


class Quarantine:
    """`quarantine.jsonl` of a run: one line {"n", "id", "reason"} per sample that was replaced.

    It belongs to one process. A resumed run reads it back up to its first sample, so that the
    budget holds over restarts and no line is written twice.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        max_drop_rate: float,
        max_drops_in_a_row: int,
        first_sample: int = 0,
    ):
        self.path = Path(path)
        self.max_drop_rate, self.max_drops_in_a_row = max_drop_rate, max_drops_in_a_row
        self._written = self._read_back()
        self._reasons = {n: why for (n, _), why in self._written.items() if n < first_sample}
        self._in_a_row = 0
        self._last = -2

    @property
    def dropped(self) -> int:
        """Samples replaced so far."""
        return len(self._reasons)

    def record(self, records: Iterable[dict], *, next_sample: int) -> None:
        """Note the samples replaced before `next_sample`, from all ranks; DataError past the
        budget."""
        new = []
        for entry in sorted(records, key=lambda entry: entry["n"]):
            n, name, reason = entry["n"], entry["id"], entry["reason"]
            if (n, name) not in self._written:
                self._written[n, name] = reason
                new.append(json.dumps({"n": n, "id": name, "reason": reason}) + "\n")
            if n not in self._reasons:
                self._in_a_row = self._in_a_row + 1 if n == self._last + 1 else 1
                self._last = n
            self._reasons[n] = reason
        if new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(new)
                file.flush()
                os.fsync(file.fileno())
        self._refuse_too_many(next_sample)

    def _refuse_too_many(self, next_sample: int) -> None:
        allowed = self.max_drop_rate * max(next_sample, FIRST_SAMPLES)
        if self.dropped > allowed:
            limit = f"data.max_drop_rate {self.max_drop_rate:g} allows {allowed:g}"
        elif self._in_a_row > self.max_drops_in_a_row:
            limit = f"data.max_drops_in_a_row is {self.max_drops_in_a_row}"
        else:
            return
        counts = Counter(self._reasons.values()).most_common(3)
        summary = "; ".join(f"{count} x {reason}" for reason, count in counts)
        raise DataError(
            f"{self.path}: {self.dropped} of {next_sample} samples could not be used, but {limit}. "
            f"Reasons: {summary}. Verify the data, or raise the limit."
        )

    def _read_back(self) -> dict[tuple[int, str], str]:
        if not self.path.exists():
            return {}
        written = {}
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                written[entry["n"], entry["id"]] = entry["reason"]
            except (ValueError, KeyError, TypeError):
                if number < len(lines):
                    raise DataError(
                        f"{self.path}: line {number} is damaged; remove it and start again."
                    ) from None
                with self.path.open("r+b") as file:  # a writer was killed in mid-line
                    file.truncate(sum(map(len, lines[:-1])))
        return written
