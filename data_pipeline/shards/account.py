"""The account of a source: what of it is in no sample of a dataset, by reason, and how much."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from data_pipeline.strict import Strict

Side = Literal["not_wanted", "unusable", "passed_over"]
SIDES: tuple[Side, ...] = ("unusable", "not_wanted", "passed_over")
MOST_EXAMPLES = 3


class Account(Strict):
    """Files, rows of lists, clips and members of shards that are in no sample."""

    unusable: dict[str, int] = Field(default={}, description="damaged; these cost the budget")
    not_wanted: dict[str, int] = Field(default={}, description="left out by filters and settings")
    passed_over: dict[str, int] = Field(default={}, description="no captioned media of the kind")
    examples: dict[str, list[str]] = Field(default={}, description="the first few, by reason")

    def rows(self) -> list[tuple[str, str, int, str]]:
        """(side, reason, count, examples) for a table."""
        return [
            (side.replace("_", " "), reason, count, ", ".join(self.examples.get(reason, [])))
            for side in SIDES
            for reason, count in getattr(self, side).items()
        ]


NOTHING = Account()


@dataclass
class Tally:
    """An account that is being made."""

    counts: dict[Side, Counter[str]] = field(default_factory=lambda: {s: Counter() for s in SIDES})
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, side: Side, why: str, names: Iterable[str], count: int | None = None) -> None:
        """Count things for one reason; of `why` the part before a colon is the reason."""
        reason, names = why.split(":")[0].strip(), list(names)
        self.counts[side][reason] += len(names) if count is None else count
        kept = self.examples.setdefault(reason, [])
        kept += names[: MOST_EXAMPLES - len(kept)]

    def add_account(self, account: Account) -> None:
        """Take over what another account says."""
        for side in SIDES:
            self.counts[side].update(getattr(account, side))
        for reason, names in account.examples.items():
            self.add("unusable", reason, names, 0)

    def count(self, side: Side) -> int:
        """How many on one side."""
        return sum(self.counts[side].values())

    def account(self) -> Account:
        """What was counted so far, in the order of its text."""
        counts = {
            side: {reason: count for reason, count in sorted(counts.items()) if count}
            for side, counts in self.counts.items()
        }
        told = {reason for by_reason in counts.values() for reason in by_reason}
        examples = {
            why: names for why, names in sorted(self.examples.items()) if why in told and names
        }
        return Account(**counts, examples=examples)
